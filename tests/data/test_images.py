"""Image sets: where images come from, what they are called, who trains, and what the check
finds."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import odd
import pytest
from faults import SOLO, make_fault_folder
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finetune.data import checks, images
from finetune.data.images import ImageSet
from finetune.errors import UserError


def make(root: Path, *names: str) -> Path:
    """Files that all differ, with the names given; a name with = has the bytes of what follows
    it."""
    for entry in names:
        name, _, same = entry.partition("=")
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(same or name))
    return root


def numbered(label: str, count: int) -> list[str]:
    return [f"{label}/{i:03d}.jpg" for i in range(count)]


def split_of(found: ImageSet) -> dict[str, str]:
    assert found.split is not None
    return dict(zip(found.paths, found.split.tolist(), strict=True))


def refusal(call: object, *args: object, **how: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **how)  # type: ignore[operator]
    return str(caught.value)


# ------------------------------------------------------------------------------------------ the set


def test_folder_per_class(tmp_path: Path) -> None:
    """Classes are numbered by name, paths are relative to the folder, and bytes are those of the
    files."""
    found = images.load(make(tmp_path, "dog/1.jpg", "cat/2.jpg", "cat/1.jpg"))
    assert (("cat", "dog"), ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg"), [0, 0, 1]) == (
        found.classes,
        found.paths,
        found.labels.tolist(),
    )
    assert (np.int64, None, None, False) == (
        found.labels.dtype,
        found.split,
        found.groups,
        found.in_memory,
    )
    assert b"cat/2.jpg" == found.read(1)
    assert (str(tmp_path), 3) == (found.name, len(found))


def test_folders_of_splits_share_one_class_map(tmp_path: Path) -> None:
    """A class that val lacks keeps its number: b is 1 in every split."""
    found = images.load(
        make(
            tmp_path,
            "train/a/1.jpg",
            "train/b/2.jpg",
            "train/c/3.jpg",
            "val/b/4.jpg",
            "val/c/5.jpg",
            "test/a/6.jpg",
        )
    )
    assert ("a", "b", "c") == found.classes
    assert [0, 1, 2, 1, 2, 0] == found.labels.tolist()
    assert ["train"] * 3 + ["val"] * 2 + ["test"] == list(split_of(found).values())


def test_class_that_is_not_in_train_fails_by_name(tmp_path: Path) -> None:
    """A class of val or test without training images is named with its count."""
    message = refusal(
        images.load,
        make(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "val/lynx/3.jpg", "val/lynx/4.jpg"),
    )
    assert "'lynx' (2 images)" in message
    assert "'a', 'b'" in message


def test_table(tmp_path: Path) -> None:
    """A CSV gives paths, labels, splits and groups; the class map comes from its training rows."""
    make(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    table = tmp_path / "t.csv"
    table.write_text(
        "path,label,split,group\nb.jpg,dog,train,g\na.jpg,cat,train,\nc.jpg,dog,test,g\n",
        encoding="utf-8",
    )
    found = images.load(table)
    assert (("cat", "dog"), [1, 0, 1], ("g", "", "g")) == (
        found.classes,
        found.labels.tolist(),
        found.groups,
    )
    assert {"b.jpg": "train", "a.jpg": "train", "c.jpg": "test"} == split_of(found)
    assert b"c.jpg" == found.read(2)
    table.write_text("path,label,split\nb.jpg,dog,train\na.jpg,cat,val\n", encoding="utf-8")
    assert "'cat' (1 image)" in refusal(images.load, table)


def test_named_set() -> None:
    """A named set reads like files, from memory."""
    found = images.load("sklearn:digits")
    assert (1797, 10, True) == (len(found), len(found.classes), found.in_memory)
    assert found.read(0).startswith(b"\x89PNG")
    assert 8 == images.short_side(found, 0)


@pytest.mark.parametrize("text", ["no/such/folder", "", "photo.jpg", "hf:beans"])
def test_what_is_no_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """What is neither folder, CSV nor named set is refused with what can be given."""
    monkeypatch.chdir(make(tmp_path, "photo.jpg"))
    message = refusal(images.load, text) if text else refusal(images.load, tmp_path / "none.csv")
    assert "CSV" in message


def test_subset(tmp_path: Path) -> None:
    """A subset by positions keeps their order, by a mask the set's; labels, groups and splits
    follow."""
    whole = ImageSet(
        "s",
        tmp_path,
        ("a", "b", "c"),
        np.array([0, 1, 0]),
        ("x", "y"),
        ("g", "", "h"),
        np.array(["train", "val", "test"]),
    )
    some = whole.subset([2, 0])
    assert (("c", "a"), [0, 0], ("h", "g"), ["test", "train"]) == (
        some.paths,
        some.labels.tolist(),
        some.groups,
        [] if some.split is None else some.split.tolist(),
    )
    assert ("b",) == whole.subset(whole.labels == 1).paths
    assert () == whole.subset([]).paths
    assert ("x", "y") == some.classes


def test_with_classes(tmp_path: Path) -> None:
    """Labels can be read against the classes of a model, which may be more; others fail by name."""
    found = images.load(make(tmp_path, "b/1.jpg", "c/2.jpg"))
    assert [1, 2] == images.with_classes(found, ("a", "b", "c")).labels.tolist()
    assert "'c' (1 image)" in refusal(images.with_classes, found, ("a", "b"))


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    """Reading a file that has gone names it."""
    found = images.load(make(tmp_path, "a/1.jpg", "b/2.jpg"))
    (tmp_path / "b/2.jpg").unlink()
    assert "b/2.jpg: cannot be read (No such file" in refusal(found.read, 1)


def test_unlabelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loose files and folders have no labels; a folder without images is refused."""
    monkeypatch.chdir(make(tmp_path, "x/2.jpg", "x/1.jpg", "x/notes.txt", "y.png"))
    found = images.load_unlabelled("x")
    assert (("1.jpg", "2.jpg"), [-1, -1], (), ("notes.txt",)) == (
        found.paths,
        found.labels.tolist(),
        found.classes,
        found.ignored,
    )
    assert ("y.png", "x/1.jpg", "x/2.jpg") == images.load_unlabelled(["y.png", Path("x")]).paths
    assert b"y.png" == images.load_unlabelled([tmp_path / "y.png"]).read(0)
    make(tmp_path, "empty/notes.txt")
    assert "holds no images" in refusal(images.load_unlabelled, tmp_path / "empty")
    assert "no.jpg: no such file" in refusal(images.load_unlabelled, ["no.jpg"])


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    """A link from within a class to the folder above does not hang, and adds neither image nor
    class."""
    make(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a/loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    found = images.load(tmp_path)
    assert (("a/1.jpg", "b/2.jpg"), ("a", "b")) == (found.paths, found.classes)


def test_many_files_are_found_quickly(tmp_path: Path) -> None:
    """The walk asks the file system about folders, not about every file: 5,000 files take a
    fraction of a second."""
    for label in range(5):
        folder = tmp_path / f"class {label}"
        folder.mkdir()
        for i in range(1000):
            os.close(os.open(folder / f"{i}.jpg", os.O_CREAT))
    start = time.process_time()
    assert 5000 == len(images.load(tmp_path))
    assert time.process_time() - start < 1.0


# -------------------------------------------------------------------------------- a test of its own


def test_test_folder_becomes_the_test_part(tmp_path: Path) -> None:
    """--test joins a second folder: its images are the test part, its classes those of the training
    part."""
    make(
        tmp_path,
        "photos/a/1.jpg",
        "photos/b/2.jpg",
        "photos/c/3.jpg",
        "held out/b/9.jpg",
        "held out/b/list.txt",
    )
    found = images.load(tmp_path / "photos", test=tmp_path / "held out")
    assert ("a/1.jpg", "b/2.jpg", "c/3.jpg", "../held out/b/9.jpg") == found.paths
    assert [0, 1, 2, 1] == found.labels.tolist()
    assert ["train", "train", "train", "test"] == list(split_of(found).values())
    assert b"held out/b/9.jpg" == found.read(3)
    assert ("../held out/b/list.txt",) == found.ignored


def test_test_folder_is_refused_where_it_cannot_be_right(tmp_path: Path) -> None:
    """A second test part, an unknown class, splits within, and the training folder itself are
    refused."""
    make(
        tmp_path,
        "p/a/1.jpg",
        "p/b/2.jpg",
        "lynx/lynx/1.jpg",
        "s/train/a/1.jpg",
        "s/test/a/2.jpg",
        "q/b/1.jpg",
    )
    assert "'lynx'" in refusal(images.load, tmp_path / "p", test=tmp_path / "lynx")
    assert "test part already" in refusal(images.load, tmp_path / "s", test=tmp_path / "q")
    assert "without a split" in refusal(images.load, tmp_path / "p", test=tmp_path / "s")
    assert "every image is a test image" in refusal(
        images.load, tmp_path / "p", test=tmp_path / "p"
    )
    assert "--test takes a folder" in refusal(images.load, tmp_path / "p", test="sklearn:digits")


# ------------------------------------------------------------------------------- splits and content


def test_digests(tmp_path: Path) -> None:
    """Digests are SHA-256 in the order of the images; remembered ones are not computed again."""
    found = images.load(make(tmp_path, "a/1.jpg", "b/2.jpg"))
    expected = [hashlib.sha256(name.encode()).hexdigest() for name in ("a/1.jpg", "b/2.jpg")]
    assert expected == images.digests(found)
    assert expected[::-1] == list(images.digest_of(found, [1, 0]))
    (tmp_path / "a/1.jpg").unlink()
    assert ["known", expected[1]] == images.digests(found, ["known", None])


def test_digests_name_all_files_that_fail(tmp_path: Path) -> None:
    """Files that cannot be read are counted and named together, not one a try."""
    found = images.load(make(tmp_path, *numbered("a", 5), *numbered("b", 5)))
    for name in numbered("a", 4):
        (tmp_path / name).unlink()
    message = refusal(images.digests, found)
    assert (
        "4 of 10 images fail; a/000.jpg: cannot be read (No such file or directory); a/001.jpg"
        in message
    )
    assert "and 1 more" in message


def test_splits_are_made_by_class_and_seed(tmp_path: Path) -> None:
    """20 % of each class is test; small sets have no validation part; the seed decides."""
    found = images.load(make(tmp_path, *numbered("a", 50), *numbered("b", 25)))
    ids = images.digests(found)
    made = images.make_splits(found, ids, seed=0)
    assert made.split is not None
    assert [10, 5] == np.bincount(made.labels[made.split == "test"]).tolist()
    assert {"train", "test"} == set(made.split.tolist())
    assert split_of(made) == split_of(images.make_splits(found, ids, seed=0))
    assert split_of(made) != split_of(images.make_splits(found, ids, seed=1))
    assert found.split is None


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=30, max_size=30),
    st.lists(st.integers(0, 12), min_size=30, max_size=30),
    st.integers(0, 3),
)
def test_same_bytes_and_groups_are_not_separated(
    contents: list[int], groups: list[int], seed: int
) -> None:
    """Whatever images share bytes or a group, over however many steps, is on one side."""
    labels = np.array([content % 2 for content in contents])
    found = ImageSet(
        "s",
        Path(),
        tuple(map(str, range(30))),
        labels,
        ("x", "y"),
        tuple(f"g{g}" if g < 6 else "" for g in groups),
    )
    ids = [f"d{content}" for content in contents]
    numbers = images.group_ids(found, ids)
    assume(len(np.unique(numbers)) > 6 and len(np.unique(labels)) > 1)
    made = images.make_splits(found, ids, seed=seed)
    assert made.split is not None
    for number in np.unique(numbers):
        assert 1 == len(set(made.split[numbers == number].tolist()))
    for i in range(30):
        for j in range(i):
            if ids[i] == ids[j] or (found.groups and found.groups[i] == found.groups[j] != ""):
                assert numbers[i] == numbers[j]


def test_one_content_under_two_labels_is_refused(tmp_path: Path) -> None:
    """A file in two classes is named with both paths and labels, and with what to do."""
    found = images.load(
        make(tmp_path, *numbered("cat", 9), *numbered("dog", 9), "cat/x.jpg=same", "dog/y.jpg=same")
    )
    message = refusal(images.make_splits, found, images.digests(found), seed=0)
    assert "1 file under two labels: cat/x.jpg (cat) = dog/y.jpg (dog)" in message
    assert "remove the wrong one" in message


def test_given_test_part_is_never_touched(tmp_path: Path) -> None:
    """Splits of folders stay; a validation part is made of training images where it is large
    enough."""
    names = [f"train/{name}" for name in (*numbered("a", 350), *numbered("b", 350))]
    found = images.load(make(tmp_path, *names, "test/a/x.jpg", "test/b/y.jpg"))
    made = split_of(images.make_splits(found, images.digests(found), seed=0))
    assert {"test/a/x.jpg", "test/b/y.jpg"} == {
        path for path, split in made.items() if split == "test"
    }
    assert 105 == sum(split == "val" for split in made.values())


def test_sets_that_cannot_be_split_are_refused(tmp_path: Path) -> None:
    """One class, an empty class, too few images, one group of all and images without labels are
    each said."""

    def why(*names: str) -> str:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        found = images.load(make(root, *names))
        return refusal(images.make_splits, found, images.digests(found), seed=0)

    assert "one class alone (a)" in why(*numbered("a", 9))
    assert "1 class without training images: b" in why(*numbered("a", 9), "b/notes.txt")
    assert "each of the 2 classes has one image alone" in why("a/1.jpg", "b/1.jpg")
    loose = images.load_unlabelled(make(tmp_path / "loose", "1.jpg", "2.jpg"))
    assert "without labels" in refusal(images.make_splits, loose, ["", ""], seed=0)
    whole = ImageSet("s", Path(), tuple("abcd"), np.array([0, 1, 0, 1]), ("x", "y"), ("g",) * 4)
    assert "must stay together" in refusal(images.make_splits, whole, list("abcd"), seed=0)
    with pytest.raises(ValueError, match="3 digests of 4 images"):
        images.make_splits(whole, list("abc"), seed=0)


def test_shots(tmp_path: Path) -> None:
    """K images a class train, the test part stays, validation images are dropped."""
    names = [
        f"{part}/{name}"
        for part in ("train", "val", "test")
        for label in ("a", "b")
        for name in numbered(label, 6)
    ]
    found = images.load(make(tmp_path, *names), shots=2)
    assert {"train": 4, "test": 12} == {
        name: list(split_of(found).values()).count(name) for name in ("train", "test")
    }
    assert len(found) == 16
    assert "0 images a class" in refusal(images.take_shots, found, 0, 0)


def test_shots_of_a_folder_per_class(tmp_path: Path) -> None:
    """Where no test part is given it is made first, of the whole set: one image a class trains, a
    fifth is test."""
    make(tmp_path, *numbered("a", 50), *numbered("b", 25))
    found = images.load(tmp_path, shots=1, seed=3)
    assert {"train": 2, "test": 15} == {
        name: list(split_of(found).values()).count(name) for name in ("train", "test")
    }
    whole = images.load(tmp_path)
    made = images.make_splits(whole, images.digests(whole), seed=3)
    assert split_of(found) == split_of(images.take_shots(made, 1, 3))
    with pytest.raises(ValueError, match="make_splits"):
        images.take_shots(whole, 1, 0)


def test_folder_of_faults_can_be_split(tmp_path: Path) -> None:
    """The class of one image trains, and the given test part stays, in spite of the faults."""
    found = images.load(make_fault_folder(tmp_path))
    made = split_of(images.make_splits(found, images.digests(found), seed=0))
    assert "train" == made[SOLO]
    assert {path.split("/")[0] for path in made if made[path] == "test"} == {"test"}


def test_importing_loads_nothing_heavy() -> None:
    """Neither torch nor scikit-learn is imported before a named set asks for it."""
    heavy = "('torch', 'torchvision', 'sklearn', 'scipy', 'timm')"
    code = f"import sys, finetune.data.images; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "[]" == found.stdout.strip()


# -------------------------------------------------------------------------------------------- names


def test_classes_of_any_name(tmp_path: Path) -> None:
    """Folders whose names cannot be printed are classes under the names that are shown, different
    ones under different names."""
    odd.need(tmp_path / "try")
    folders = [os.fsdecode(b"caf\xe9"), os.fsdecode(b"caf\xe8"), "two\nlines", "a\\b", r"caf\xe9"]
    make(tmp_path / "data", *(f"{folder}/{name}" for folder in folders for name in odd.NAMES))

    found = images.load(tmp_path / "data")

    assert sorted([r"caf\xe9", r"caf\xe8", r"two\x0alines", "a\\b", r"caf\\xe9"]) == list(
        found.classes
    )
    assert len(folders) * len(odd.NAMES) == len({found.read(i) for i in range(len(found))})
    assert [folders[0]] == sorted(
        {
            path.partition("/")[0]
            for path in found.subset(found.labels == found.classes.index(r"caf\xe9")).paths
        }
    )


def test_a_check_prints_no_name_raw(tmp_path: Path) -> None:
    """The text of a check is printable line by line, and its JSON is UTF-8, whatever the files are
    called."""
    odd.need(tmp_path / "try")
    make(
        tmp_path, *(f"{folder}/{name}=same" for folder in ("a", "b\x1b[31m") for name in odd.NAMES)
    )
    (tmp_path / "a" / "link\n.png").symlink_to("nowhere")

    report = checks.check(images.load(tmp_path))

    assert all(line.isprintable() for line in report.to_text().splitlines())
    assert r"a/link\x0a.png: unreadable" in report.to_text()
    assert json.dumps(report.to_json(), ensure_ascii=False).encode().decode().isprintable()


def test_classes_of_an_older_run_are_known_again(tmp_path: Path) -> None:
    """A run of version 0.1.0 may have a class with a tab in its name: its folder is still that
    class."""
    make(tmp_path, "b/1.png", "t\tb/2.png")
    assert [1, 0] == images.with_classes(images.load(tmp_path), ("t\tb", "b")).labels.tolist()


def test_data_may_be_written_as_it_is_shown(tmp_path: Path) -> None:
    """A recipe keeps the folder of the images as it is shown: it is found again."""
    odd.need(tmp_path / "try")
    make(tmp_path / os.fsdecode(b"caf\xe9"), "a/1.png", "b/2.png")
    assert 2 == len(images.load(str(tmp_path / r"caf\xe9")))


def test_a_label_that_cannot_be_printed_is_its_own_class(tmp_path: Path) -> None:
    """A table with a control character in a label is joined with test images of that label."""
    make(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    for name, rows in (("a.csv", ("1.jpg,od\x01d", "2.jpg,plain")), ("b.csv", ("3.jpg,od\x01d",))):
        (tmp_path / name).write_text("path,label\n" + "\n".join(rows), encoding="utf-8")
    found = images.load(tmp_path / "a.csv", test=tmp_path / "b.csv")
    assert ["3.jpg", 0] == [found.paths[2], found.labels[2]]
    known = images.with_classes(found, (r"od\x01d", "plain"))
    assert [0, 1, 0] == known.labels.tolist()


def test_test_images_are_found_though_the_data_are_a_link(tmp_path: Path) -> None:
    """Where DATA is a link, the way to --test begins at what it points to; also for a table that
    names files above its folder."""
    make(tmp_path, "far/away/data/a/1.jpg", "far/away/data/b/2.jpg", "held/a/3.jpg", "held/b/4.jpg")
    make(tmp_path, "more/5.jpg")
    (tmp_path / "data").symlink_to(tmp_path / "far/away/data", target_is_directory=True)
    found = images.load(tmp_path / "data", test=tmp_path / "held")
    assert [b"held/a/3.jpg", b"held/b/4.jpg"] == [found.read(i) for i in (2, 3)]
    (tmp_path / "held/t.csv").write_text("path,label\n../more/5.jpg,a\n", encoding="utf-8")
    table = images.load(tmp_path / "data", test=tmp_path / "held/t.csv")
    assert b"more/5.jpg" == table.read(2)


def test_an_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    """A packed folder is no folder: the message says what to do with it."""
    make(tmp_path, "photos.zip")
    with pytest.raises(UserError, match="unpack it"):
        images.load(tmp_path / "photos.zip")
