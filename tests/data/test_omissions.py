"""What is left out of a set: the rules, what they empty, and an account of every file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import odd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data import images, omissions
from finetune.data.faults import Rules
from finetune.data.images import ImageSet
from finetune.errors import UserError
from finetune.files import Digests


def make(root: Path, *names: str) -> Path:
    """Files that all differ, with the names given; a name with = has the bytes of what follows
    it."""
    for entry in names:
        name, _, same = entry.partition("=")
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((same or name).encode())
    return root


def applied(root: Path, **rules: Any) -> ImageSet:
    found = images.load(root, rules=Rules(**rules))
    rest, ids = omissions.apply(found, Digests.of(images.digests(found)), Rules(**rules))
    assert images.digests(rest) == list(ids)
    return images.make_splits(rest, ids, seed=0)


CONFLICT = (
    *(f"{c}/{i}.jpg" for c in ("cat", "dog") for i in range(9)),
    "cat/x.jpg=same",
    "dog/y.jpg=same",
    "cat/z.jpg=same",
)


def test_conflicts_stop_with_the_option(tmp_path: Path) -> None:
    """One content under two labels stops the job, and the message names the way on."""
    with pytest.raises(UserError, match="--on-conflict skip"):
        applied(make(tmp_path, *CONFLICT))


@pytest.mark.parametrize(
    ("rule", "left"),
    [("skip", {"cat/x.jpg", "cat/z.jpg", "dog/y.jpg"}), ("first", {"cat/z.jpg", "dog/y.jpg"})],
)
def test_conflicts_are_left_out(tmp_path: Path, rule: str, left: set[str]) -> None:
    """skip leaves out all copies, first all but the first by path; each is remembered with the
    labels, and told."""
    found = applied(make(tmp_path, *CONFLICT), on_conflict=rule)
    assert left == {fault.path for fault in found.left_out}
    assert left.isdisjoint(found.paths)
    assert "dog/y.jpg (dog)" in found.left_out[0].detail
    assert f"{len(left)} images left out (two labels)" in omissions.told(found)[0]


LEAK = (
    *(f"{p}/{c}/{i}.jpg" for p in ("train", "test") for c in "ab" for i in range(3)),
    "train/a/x.jpg=s",
    "test/a/y.jpg=s",
)


def test_leaks_are_left_out_of_the_training(tmp_path: Path) -> None:
    """skip leaves the copy out of the training part and the test part whole; stop names the option;
    tell goes on."""
    make(tmp_path, *LEAK)
    rest = applied(tmp_path, on_leak="skip")
    assert ["train/a/x.jpg"] == [fault.path for fault in rest.left_out]
    assert "test/a/y.jpg" in rest.paths
    assert "the same image is test/a/y.jpg of the test part" == rest.left_out[0].detail
    with pytest.raises(UserError, match="--on-leak skip"):
        applied(tmp_path, on_leak="stop")
    assert () == applied(tmp_path).left_out


def test_what_is_emptied_is_refused_or_goes_too(tmp_path: Path) -> None:
    """A class that a rule empties stops the job with the next option, and is left out where that is
    given."""
    make(tmp_path, *(f"{p}/{c}/{i}.jpg" for p in ("train", "test") for c in "ab" for i in range(3)))
    make(tmp_path, "train/c/1.jpg=s", "test/c/2.jpg=s", "test/lynx/1.jpg")
    with pytest.raises(UserError, match="--on-empty-class skip"):
        applied(tmp_path, on_leak="skip")
    rest = applied(tmp_path, on_leak="skip", on_empty_class="skip")
    assert ("a", "b") == rest.classes
    assert {"train/c/1.jpg", "test/c/2.jpg", "test/lynx/1.jpg"} == {
        fault.path for fault in rest.left_out
    }
    assert any(
        "left out 1 class without training images: c" in line for line in omissions.told(rest)
    )


def test_nothing_is_left(tmp_path: Path) -> None:
    """Rules that leave one class or none end in a refusal in words."""
    with pytest.raises(UserError, match=r"one class alone \(dog\)"):
        applied(
            make(tmp_path / "one", "cat/1.jpg=s", "dog/2.jpg=s", "dog/3.jpg"),
            on_conflict="skip",
            on_empty_class="skip",
        )
    with pytest.raises(UserError, match="no class is left"):
        applied(
            make(tmp_path / "none", "cat/1.jpg=s", "dog/2.jpg=s"),
            on_conflict="skip",
            on_empty_class="skip",
        )


def test_images_of_data_in_the_test_folder_are_for_the_test(tmp_path: Path) -> None:
    """--test may name a folder inside DATA: its images leave the training, and its own folder is no
    class."""
    make(
        tmp_path, *(f"{c}/{i}.jpg" for c in "ab" for i in range(3)), "held/a/9.jpg", "held/b/8.jpg"
    )
    found = images.load(tmp_path, test=tmp_path / "held")
    assert ("a", "b") == found.classes
    assert found.split is not None
    assert ["held/a/9.jpg", "held/b/8.jpg"] == [
        found.paths[i] for i in np.flatnonzero(found.split == "test")
    ]
    assert 8 == len(set(found.paths)) == len(found)
    assert "2 images" in found.notes[-1]


NAMES = st.sampled_from(
    [
        *(
            f"{c}/{i}.{e}"
            for c in ("a", "b")
            for i in range(3)
            for e in ("jpg", "tga", "txt", "psd")
        ),
        *(
            "a/deep/x.png",
            "README.md",
            "a/.DS_Store",
            ".git/config",
            "a/Thumbs.db",
            "b/none",
            "__MACOSX/a/1.jpg",
            "c/notes.txt",
        ),
        *(
            "runs/r/run.json",
            "runs/r/recipe.yaml",
            "runs/r/report.html",
            "a/g/gallery.sqlite",
            "a/g/thumbs/1.jpg",
            "runs/log.txt",
        ),
        *(
            "train/a/1.jpg",
            "train/b/2.jpg",
            "test/a/3.jpg",
            "test/lynx/4.jpg",
            "test/note",
            "train/b/x.ico",
        ),
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.sets(NAMES, min_size=2, max_size=20))
def test_every_file_is_used_or_named_as_left_out(names: set[str]) -> None:
    """Whatever lies in a folder, its files are those of the set and those of the account, hidden
    ones included."""
    with tempfile.TemporaryDirectory() as folder:
        root = make(Path(folder), *names)
        try:
            found = images.load(root, rules=Rules(on_empty_class="skip"))
        except UserError:
            return
        there = {
            os.path.relpath(Path(here) / name, root)
            for here, _, inside in os.walk(root)
            for name in inside
        }
        named = [fault.path for fault in omissions.account(found)]
        below = {
            path for path in there for name in named if name.endswith("/") and path.startswith(name)
        }
        assert there == set(found.paths) | (set(named) & there) | below
        assert set(found.paths).isdisjoint(set(named) | below)


def test_the_account_can_be_written_whatever_names_hold(tmp_path: Path) -> None:
    """A copy of a test image whose name is no UTF-8 is named in text that any table takes."""
    odd.need(tmp_path / "try")
    copy = os.fsdecode(b"caf\xe9.jpg")
    make(tmp_path, *LEAK[:-2], "train/a/x.jpg=s", f"test/a/{copy}=s")
    rest = applied(tmp_path, on_leak="skip")
    assert r"test/a/caf\xe9.jpg" in rest.left_out[0].detail
    "".join(rest.left_out[0].cells()).encode()
