"""Folders: the walk sees each image once and hangs on nothing; layouts are recognised, or refused
by name."""

from __future__ import annotations

import os
from pathlib import Path

import odd
import pytest

from finetune import files
from finetune.data import folders
from finetune.errors import UserError


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
        folders.scan(root)
    return str(caught.value)


def test_walk_is_sorted_and_tells_images_from_others(tmp_path: Path) -> None:
    """Images are known by their extension in any case; other files are listed apart."""
    make(tmp_path, "b/2.JPG", "b/1.jpeg", "a/x/3.webp", "a/notes.txt", "b/model.bin")
    found = folders.walk(tmp_path)
    assert ("a/x/3.webp", "b/1.jpeg", "b/2.JPG") == found.images
    assert ("a/notes.txt", "b/model.bin") == found.others
    assert ("a", "b") == found.folders


def test_hidden_files_are_not_seen(tmp_path: Path) -> None:
    """Dotfiles, and what macOS and Windows leave behind, are neither images nor others."""
    make(
        tmp_path,
        "a/1.jpg",
        "a/._1.jpg",
        "a/.cache/2.jpg",
        "__MACOSX/a/1.jpg",
        "a/Thumbs.db",
        ".git/x.png",
        "a/.DS_Store",
    )
    found = folders.walk(tmp_path)
    assert (("a/1.jpg",), (), ("a",)) == (found.images, found.others, found.folders)


def test_links_in_a_circle_do_not_hang(tmp_path: Path) -> None:
    """Each real folder is visited once, under its own name, however links point to it."""
    make(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a/up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "a/self").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "0").symlink_to(tmp_path / "b", target_is_directory=True)
    found = folders.walk(tmp_path)
    assert ("a/1.jpg", "b/2.jpg") == found.images
    assert ("a", "b") == found.folders


def test_links_to_elsewhere_are_followed(tmp_path: Path) -> None:
    """A class folder, and a file, may be links to data kept elsewhere."""
    make(tmp_path, "store/cats/1.jpg", "store/2.jpg", "photos/dog/3.jpg")
    (tmp_path / "photos/cat").symlink_to(tmp_path / "store/cats", target_is_directory=True)
    (tmp_path / "photos/dog/2.jpg").symlink_to(tmp_path / "store/2.jpg")
    assert ("cat/1.jpg", "dog/2.jpg", "dog/3.jpg") == folders.walk(tmp_path / "photos").images


def test_dangling_link_is_not_lost(tmp_path: Path) -> None:
    """A link to an image that is gone is listed, so that reading it names it; a pipe is never
    opened."""
    make(tmp_path, "a/1.jpg")
    (tmp_path / "a/2.jpg").symlink_to(tmp_path / "gone.jpg")
    os.mkfifo(tmp_path / "a/3.jpg")
    found = folders.walk(tmp_path)
    assert (("a/1.jpg", "a/2.jpg"), ("a/3.jpg",)) == (found.images, found.others)


def test_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder without permission is an error, not an empty folder."""
    make(tmp_path, "a/1.jpg", "locked/2.jpg")
    real = os.scandir

    def scandir(path: str) -> object:
        if "locked" in str(path):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"locked.*Permission denied"):
        folders.walk(tmp_path)


def test_names_are_bytes(tmp_path: Path) -> None:
    """A name may hold anything that the file system takes; names that look alike are different
    files."""
    odd.need(tmp_path / "try")
    make(tmp_path, *(f"a.jpg/{name}" for name in odd.NAMES))
    found = folders.walk(tmp_path)
    assert sorted(f"a.jpg/{name}" for name in odd.NAMES) == list(found.images)
    assert ("a.jpg",) == found.folders


@pytest.mark.skipif(os.name == "nt", reason="needs pipes and links")
def test_what_would_not_end_is_no_image(tmp_path: Path) -> None:
    """A pipe or a device is never read, whatever its name and also behind a link; a link to nothing
    is an image to be named."""
    make(tmp_path, "1.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "to-pipe.jpg").symlink_to("pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    found = folders.walk(tmp_path)
    assert ("1.jpg", "dangling.jpg") == found.images
    assert ("device.jpg", "pipe.jpg", "to-pipe.jpg") == found.others


def test_class_is_the_first_folder(tmp_path: Path) -> None:
    """Folders within a class belong to it; equal names deeper down do not merge classes."""
    make(
        tmp_path, "cat/indoor/1.jpg", "dog/indoor/1.jpg", "dog/2.jpg", "README.txt", "cat/list.csv"
    )
    found = folders.scan(tmp_path)
    assert ("cat", "dog", "dog") == found.classes
    assert found.split is None
    assert ("cat/list.csv",) == found.ignored


def test_class_names_have_one_unicode_form(tmp_path: Path) -> None:
    """A class whose name is written with a combining accent is the class that val writes with one
    letter."""
    make(tmp_path, "train/caf\u0065\u0301/1.jpg", "train/b/1.jpg", "val/caf\u00e9/2.jpg")
    assert {"b", "caf\u00e9"} == set(folders.scan(tmp_path).classes)


def test_empty_class_folder_is_known(tmp_path: Path) -> None:
    """A class folder without images is a class, so that it can be named later."""
    make(tmp_path, "cat/1.jpg", "dog/", "fox/notes.txt")
    assert ("cat", "dog", "fox") == folders.scan(tmp_path).known


@pytest.mark.parametrize(
    "names",
    [("train", "val", "test"), ("Train", "Valid", "TEST"), ("training", "validation", "testing")],
)
def test_folders_of_splits(tmp_path: Path, names: tuple[str, str, str]) -> None:
    """train, val and test hold the class folders, under their usual names."""
    make(tmp_path, *(f"{name}/{label}/1.jpg" for name in names for label in "ab"))
    found = folders.scan(tmp_path)
    assert ("train", "train", "val", "val", "test", "test") == found.split
    assert ("a", "b") * 3 == found.classes
    assert f"{names[0]}/a/1.jpg" == found.paths[0]


def test_training_folder_alone(tmp_path: Path) -> None:
    """A folder with nothing but train/ of class folders is a training part."""
    assert ("train", "train") == folders.scan(
        make(tmp_path, "train/a/1.jpg", "train/b/1.jpg")
    ).split


def test_train_may_be_a_class(tmp_path: Path) -> None:
    """Beside other vehicles, or with images of its own, a folder called train is a class."""
    assert ("bus", "train") == folders.scan(
        make(tmp_path / "one", "bus/1.jpg", "train/1.jpg")
    ).classes
    assert ("train",) == folders.scan(make(tmp_path / "two", "train/1.jpg")).classes


def test_link_between_splits_is_followed(tmp_path: Path) -> None:
    """A val folder that is a link to test holds its images, rather than none."""
    make(tmp_path, "train/a/1.jpg", "test/a/2.jpg")
    (tmp_path / "val").symlink_to(tmp_path / "test", target_is_directory=True)
    assert ("train", "val", "test") == folders.scan(tmp_path).split


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


def test_gather_files_and_folders(tmp_path: Path) -> None:
    """Files keep their order, folders are sorted, each file comes once; the root is what they have
    in common."""
    make(tmp_path, "x/2.jpg", "x/1.jpg", "x/notes.txt", "y/z/3.png")
    root, images, others = folders.gather(
        [tmp_path / "y/z/3.png", tmp_path / "x", tmp_path / "x/1.jpg"]
    )
    assert tmp_path == root
    assert ("y/z/3.png", "x/1.jpg", "x/2.jpg") == images
    assert ("x/notes.txt",) == others


def test_gather_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One folder is the root, also when it is named relative to where the user stands."""
    make(tmp_path, "x/sub/1.jpg", "x/2.jpg")
    monkeypatch.chdir(tmp_path)
    root, images, _ = folders.gather(["x"])
    assert (tmp_path / "x", ("2.jpg", "sub/1.jpg")) == (root, images)


def test_gather_names_what_is_not_there(tmp_path: Path) -> None:
    """A path that does not exist is named."""
    with pytest.raises(UserError, match=r"nowhere\.jpg: no such file"):
        folders.gather([tmp_path / "nowhere.jpg"])


RUN = ("run.json", "recipe.yaml", "metrics.json")


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
    found = folders.scan(make(tmp_path, "cat/1.jpg", "dog/2.jpg", *names))
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
    assert ("cat", "dog", "mine") == folders.scan(tmp_path).known


def test_results_inside_a_class(tmp_path: Path) -> None:
    """A run inside a folder with images is left out alone; runs beside train/ and test/ do not make
    these classes."""
    found = folders.scan(
        make(tmp_path / "one", "cat/1.jpg", "dog/2.jpg", *(f"cat/runs/a/{name}" for name in RUN))
    )
    assert (("cat", "dog"), ("cat/runs/a/",)) == (found.known, found.ignored)
    parts = folders.scan(
        make(tmp_path / "two", "train/a/1.jpg", "test/a/2.jpg", *(f"runs/a/{name}" for name in RUN))
    )
    assert (("train", "test"), ("runs/",)) == (parts.split, parts.ignored)


def test_what_is_no_image_is_told_by_kind(tmp_path: Path) -> None:
    """Files are counted by their extensions, images with wrong ones are named, and so are folders
    of results."""
    make(tmp_path, "a/1.psd", "a/2.PSD", "a/3.txt", "a/4")
    (tmp_path / "a/4").write_bytes(b"\x89PNG\r\n\x1a\n")
    lines = folders.told(tmp_path, ["a/1.psd", "a/2.PSD", "a/3.txt", "a/4", "runs/"])
    assert (
        "4 files are left out, as no image extension announces them: 2 .psd, 1 .txt, 1 "
        "without an extension" == lines[0]
    )
    assert "1 of them is an image by the first bytes: a/4 (PNG)" in lines[1]
    assert lines[2].endswith("runs/")
    assert () == folders.told(tmp_path, [])


def test_deeper_classes_are_found() -> None:
    """All images below one folder that holds several folders: these seem to be the classes."""
    assert "a/10" == folders.deeper(["a/10/red/1.jpg", "a/10/blue/x/2.jpg"])
    assert "" == folders.deeper(["cat/1.jpg", "cat/old/2.jpg"])
    assert "" == folders.deeper(["cat/1.jpg", "cat/2.jpg"])


def test_same_folders_in_each_class_are_pointed_out() -> None:
    """Parts inside classes and classes inside parts are told; one folder of images a class is
    usual."""
    assert "look like parts" in folders.alike_inside(
        ["a/train/1.jpg", "a/test/2.jpg", "b/train/3.jpg"], ["a", "a", "b"]
    )
    same = folders.alike_inside(
        [f"{n}/{c}/1.jpg" for n in ("10", "20") for c in ("red", "blue")], ["10", "10", "20", "20"]
    )
    assert "(blue; red)" in same
    assert "(10)" in same
    assert "" == folders.alike_inside(["a/images/1.jpg", "b/images/2.jpg"], ["a", "b"])
    assert "" == folders.alike_inside(["a/x/1.jpg", "a/2.jpg", "b/x/3.jpg"], ["a", "a", "b"])
