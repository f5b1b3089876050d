"""What folders' names mean: classes, parts, and what fits into neither."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune import files
from finetune.data import folders, images, layouts, omissions
from finetune.errors import UserError

RUN = ("run.json", "recipe.yaml", "metrics.json")


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.fsencode(name))
    return root


def refused(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        layouts.scan(root)
    return str(caught.value)


def test_class_is_the_first_folder(tmp_path: Path) -> None:
    """Folders within a class belong to it; equal names deeper down do not merge classes."""
    make(
        tmp_path, "cat/indoor/1.jpg", "dog/indoor/1.jpg", "dog/2.jpg", "README.txt", "cat/list.csv"
    )
    found = layouts.scan(tmp_path)
    assert ("cat", "dog", "dog") == found.classes
    assert found.split is None
    assert ("cat/list.csv",) == found.ignored


def test_class_names_have_one_unicode_form(tmp_path: Path) -> None:
    """A class whose name is written with a combining accent is the class that val writes with one
    letter."""
    make(tmp_path, "train/caf\u0065\u0301/1.jpg", "train/b/1.jpg", "val/caf\u00e9/2.jpg")
    assert {"b", "caf\u00e9"} == set(layouts.scan(tmp_path).classes)


def test_empty_class_folder_is_known(tmp_path: Path) -> None:
    """A class folder without images is a class, so that it can be named later."""
    make(tmp_path, "cat/1.jpg", "dog/", "fox/notes.txt")
    assert ("cat", "dog", "fox") == layouts.scan(tmp_path).known


@pytest.mark.parametrize(
    "names",
    [("train", "val", "test"), ("Train", "Valid", "TEST"), ("training", "validation", "testing")],
)
def test_folders_of_splits(tmp_path: Path, names: tuple[str, str, str]) -> None:
    """train, val and test hold the class folders, under their usual names."""
    make(tmp_path, *(f"{name}/{label}/1.jpg" for name in names for label in "ab"))
    found = layouts.scan(tmp_path)
    assert ("train", "train", "val", "val", "test", "test") == found.split
    assert ("a", "b") * 3 == found.classes
    assert f"{names[0]}/a/1.jpg" == found.paths[0]


def test_training_folder_alone(tmp_path: Path) -> None:
    """A folder with nothing but train/ of class folders is a training part."""
    assert ("train", "train") == layouts.scan(
        make(tmp_path, "train/a/1.jpg", "train/b/1.jpg")
    ).split


def test_train_may_be_a_class(tmp_path: Path) -> None:
    """Beside other vehicles, or with images of its own, a folder called train is a class."""
    assert ("bus", "train") == layouts.scan(
        make(tmp_path / "one", "bus/1.jpg", "train/1.jpg")
    ).classes
    assert ("train",) == layouts.scan(make(tmp_path / "two", "train/1.jpg")).classes


def test_link_between_splits_is_followed(tmp_path: Path) -> None:
    """A val folder that is a link to test holds its images, rather than none."""
    make(tmp_path, "train/a/1.jpg", "test/a/2.jpg")
    (tmp_path / "val").symlink_to(tmp_path / "test", target_is_directory=True)
    assert ("train", "val", "test") == layouts.scan(tmp_path).split


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("a/1.jpg", "b/1.jpg", "stray.png"), "1 image outside of the class folders: stray.png"),
        (("train/a/1.jpg", "val/a/1.jpg", "val/stray.png"), "stray.png"),
        (("train/a/1.jpg", "val/a/1.jpg", "stray.png"), "stray.png"),
        (
            ("1.jpg", "2.jpg", "3.jpg", "4.jpg"),
            "4 images without class folders: 1.jpg, 2.jpg, 3.jpg …",
        ),
        (("train/a/1.jpg", "val/a/1.jpg", "more/a/1.jpg"), "more does not"),
        (
            ("train/a/1.jpg", "val/a/1.jpg", "valid/a/1.jpg"),
            "several folders for one split: val, valid",
        ),
        (("a/notes.txt",), "holds no images"),
        (("a/",), "holds no images"),
    ],
)
def test_layouts_that_are_refused(tmp_path: Path, names: tuple[str, ...], says: str) -> None:
    """Stray images, flat folders and mixed layouts are refused with their names."""
    assert says in refused(make(tmp_path, *names))


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (tuple(f"runs/a/{name}" for name in RUN), "runs/"),
        (tuple(f"out/2026/b/{name}" for name in RUN), "out/"),
        (("runs/c/checkpoints/started.json", "runs/c/recipe.yaml"), "runs/"),
        (("photos.index/gallery.sqlite", "photos.index/segments/1.f32"), "photos.index/"),
    ],
)
def test_results_are_no_data(tmp_path: Path, names: tuple[str, ...], left: str) -> None:
    """A folder with nothing but runs, or a gallery, is neither a class nor files; it is named as
    left out."""
    found = layouts.scan(make(tmp_path, "cat/1.jpg", "dog/2.jpg", *names))
    assert (("cat", "dog"), (left,)) == (found.known, found.ignored)


def test_cache_is_no_data(tmp_path: Path) -> None:
    """The small pictures in a cache folder are no images of the user; a README of somebody else
    marks nothing."""
    make(
        tmp_path,
        "cat/1.jpg",
        "dog/2.jpg",
        "cache/thumbs/3.jpg",
        "mine/thumbs/4.jpg",
        "mine/README.txt",
    )
    (tmp_path / "cache/README.txt").write_text(files.CACHE_README, encoding="utf-8")
    assert ("cat", "dog", "mine") == layouts.scan(tmp_path).known


def test_results_inside_a_class(tmp_path: Path) -> None:
    """A run inside a folder with images is left out alone; runs beside train/ and test/ do not make
    these classes."""
    found = layouts.scan(
        make(tmp_path / "one", "cat/1.jpg", "dog/2.jpg", *(f"cat/runs/a/{name}" for name in RUN))
    )
    assert (("cat", "dog"), ("cat/runs/a/",)) == (found.known, found.ignored)
    parts = layouts.scan(
        make(tmp_path / "two", "train/a/1.jpg", "test/a/2.jpg", *(f"runs/a/{name}" for name in RUN))
    )
    assert (("train", "test"), ("runs/",)) == (parts.split, parts.ignored)


def test_deeper_classes_are_found() -> None:
    """All images below one folder that holds several folders: these seem to be the classes."""
    assert "a/10" == layouts.deeper(["a/10/red/1.jpg", "a/10/blue/x/2.jpg"])
    assert "" == layouts.deeper(["cat/1.jpg", "cat/old/2.jpg"])
    assert "" == layouts.deeper(["cat/1.jpg", "cat/2.jpg"])


def test_same_folders_in_each_class_are_pointed_out() -> None:
    """Parts inside classes and classes inside parts are told; one folder of images a class is
    usual."""
    assert "look like parts" in layouts.alike_inside(
        ["a/train/1.jpg", "a/test/2.jpg", "b/train/3.jpg"], ["a", "a", "b"]
    )
    same = layouts.alike_inside(
        [f"{n}/{c}/1.jpg" for n in ("10", "20") for c in ("red", "blue")], ["10", "10", "20", "20"]
    )
    assert "(blue; red)" in same
    assert "(10)" in same
    assert "" == layouts.alike_inside(["a/images/1.jpg", "b/images/2.jpg"], ["a", "b"])
    assert "" == layouts.alike_inside(["a/x/1.jpg", "a/2.jpg", "b/x/3.jpg"], ["a", "a", "b"])


# ---------------------------------------------------------------------------------- --on-stray skip


@pytest.mark.parametrize(
    ("names", "used", "left"),
    [
        (("a/1.jpg", "b/2.jpg", "x.png"), {"a/1.jpg", "b/2.jpg"}, {"x.png"}),
        (
            ("train/a/1.jpg", "test/a/2.jpg", "x.png", "test/y.png"),
            {"train/a/1.jpg", "test/a/2.jpg"},
            {"x.png", "test/y.png"},
        ),
        (
            ("train/a/1.jpg", "val/a/2.jpg", "more/a/3.jpg", "more/notes.txt"),
            {"train/a/1.jpg", "val/a/2.jpg"},
            {"more/a/3.jpg"},
        ),
        (("a/1.jpg", "b/2.jpg", "train/a/3.jpg"), {"train/a/3.jpg"}, {"a/1.jpg", "b/2.jpg"}),
        (("a/1.jpg", "b/2.jpg", "test/a/3.jpg"), {"a/1.jpg", "b/2.jpg"}, {"test/a/3.jpg"}),
    ],
)
def test_strays_are_left_out(
    tmp_path: Path, names: tuple[str, ...], used: set[str], left: set[str]
) -> None:
    """Images outside of the class folders, and folders beside the parts, stop with the option that
    leaves them out; it names each of them."""
    assert "--on-stray skip" in refused(make(tmp_path, *names))
    found = layouts.scan(tmp_path, on_stray="skip")
    assert used == set(found.paths)
    assert {(path, layouts.STRAY) for path in left} == {(f.path, f.kind) for f in found.left_out}


def test_a_training_part_beside_classes_is_told(tmp_path: Path) -> None:
    """train/ of folders with other names is still a class, with a line that says how to use it
    alone; test/ that --test names is no reason to stop."""
    make(tmp_path / "one", "bus/1.jpg", "train/steam/2.jpg")
    found = layouts.scan(tmp_path / "one")
    assert ("bus", "train") == found.classes
    assert "read as a class; use it alone: --on-stray skip" in found.notes[0]
    two = make(tmp_path / "two", "a/1.jpg", "b/2.jpg", "test/a/3.jpg", "test/b/4.jpg")
    assert f"--test {two}/test" in refused(two)
    pictures = images.load(two, test=two / "test")
    assert ("a", "b") == pictures.classes
    assert pictures.split is not None
    assert ["train", "train", "test", "test"] == pictures.split.tolist()


def test_links_to_folders_that_are_read_already_are_told(tmp_path: Path) -> None:
    """A class folder that is a link to another one, and a link that goes round in a circle, are
    each named as left out."""
    make(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "c").symlink_to(tmp_path / "b", target_is_directory=True)
    (tmp_path / "a/up").symlink_to(tmp_path, target_is_directory=True)
    found = images.load(tmp_path)
    assert [("a/up/", folders.LOOP), ("c/", folders.LINK)] == [
        (fault.path, fault.kind) for fault in found.left_out
    ]
    assert "b/" in found.left_out[1].detail
    lines = omissions.told(found)
    assert any("1 folder left out (read under another name): c/" == line for line in lines)
