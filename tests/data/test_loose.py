"""Pictures handed over: one image an input, called as it is given, whatever the other inputs
are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.data import folders, loose
from finetune.errors import UserError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: two files, a folder with two images, a note, and a folder inside."""
    for name in ("a.png", "b.png", "in/2.png", "in/sub/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "in" / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(given: Any, **how: Any) -> str:
    with pytest.raises(UserError) as caught:
        loose.load(given, **how)
    return str(caught.value)


def test_order_and_repetition_are_those_of_the_inputs(here: Path) -> None:
    """A folder stands at its place, sorted; what is given twice is there twice; other files are
    told, once."""
    found = loose.load(["b.png", "in", "a.png", "in/", "b.png"])

    assert (
        "b.png",
        "in/2.png",
        "in/sub/1.png",
        "a.png",
        "in/2.png",
        "in/sub/1.png",
        "b.png",
    ) == found.paths
    assert ("in/notes.txt",) == found.ignored
    assert b"in/sub/1.png" == found.read(2)


@pytest.mark.parametrize("text", ["a.png", "./a.png", "in/../a.png", "in//2.png"])
def test_the_name_of_a_file_is_the_text_that_was_given(here: Path, text: str) -> None:
    """Alone or beside others, relative or not: the same name, and the same bytes."""
    for given in ([text], [text, "b.png"], [here / "b.png", text]):
        found = loose.load(given)
        assert text == found.paths[-1 if given[-1] == text else 0]
    assert (str(here / "a.png"),) == loose.load(here / "a.png").paths
    assert ("./a.png", "./b.png", "./in/2.png", "./in/sub/1.png") == loose.load(".").paths


def test_folders_of_results_are_no_images_and_are_told(here: Path) -> None:
    """A run in a folder is left out as it is everywhere, and an image with a wrong name is known by
    its first bytes."""
    (here / "in" / "run").mkdir()
    for name in ("run.json", "metrics.json", "p.png"):
        (here / "in" / "run" / name).touch()
    Image.new("RGB", (2, 2)).save(here / "in" / "photo.dat", "PNG")
    found = loose.load([here / "in"])

    assert (f"{here}/in/2.png", f"{here}/in/sub/1.png") == found.paths
    lines = "\n".join(folders.told(found.root, found.ignored))
    assert f"results of Regraft are no data: {here}/in/run/" in lines
    assert f"1 of them is an image by the first bytes: {here}/in/photo.dat (PNG)" in lines


def test_a_later_change_of_folder_changes_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names stay as typed; files are found from where they were typed."""
    found = loose.load(["a.png", b"memory", "b.png"])
    monkeypatch.chdir("/")

    assert [b"a.png", b"memory", b"b.png"] == [found.read(i) for i in range(3)]


def test_a_picture_in_memory_is_called_by_its_position(here: Path) -> None:
    """A file whose name looks like that is called in another way, so that they are never mixed
    up."""
    (here / "[1]").write_bytes(b"file")
    found = loose.load(["[1]", b"memory", memoryview(b"view")])

    assert ("./[1]", "[1]", "[2]") == found.paths
    assert [b"file", b"memory", b"view"] == [found.read(i) for i in range(3)]


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (None, "input 1 is of type NoneType"),
        (7, "input 1 is of type int"),
        ([["a.png"]], "input 1 is of type list"),
        (np.zeros((4, 4, 3), np.float32), "input 1 is an array of float32 of shape (4, 4, 3)"),
        (np.zeros((3, 4, 5), np.uint8), "input 1 is an array of uint8 of shape (3, 4, 5)"),
        (np.zeros((4, 4, 2), np.uint8), "shape (4, 4, 2)"),
        (np.zeros((0, 4, 3), np.uint8), "shape (0, 4, 3)"),
        (np.zeros(4, np.uint8), "shape (4,)"),
    ],
)
def test_what_is_no_picture_is_named_by_position_and_type(
    here: Path, item: Any, words: str
) -> None:
    """The message says what would be one."""
    message = refusal(["a.png", item])

    assert words in message
    assert "PIL images" in message


def test_one_thing_that_is_no_picture_is_refused() -> None:
    """Neither a number nor nothing is a list of pictures."""
    assert "a NoneType is no picture" in refusal(None)


def test_missing_files_are_all_named_or_left_for_reading(here: Path) -> None:
    """stop says how many and which; skip goes on, and reading names each."""
    message = refusal(["a.png", "x.png", "y.png"])

    assert "x.png; y.png: no such file or folder (2 of 3 inputs)" in message
    assert "--on-bad-image skip" in message
    assert "no such file or folder" in refusal("")
    found = loose.load(["a.png", "x.png"], on_bad="skip")
    with pytest.raises(UserError, match=r"x\.png: cannot be read"):
        found.read(1)


def test_a_folder_without_images_is_refused_and_no_inputs_are_none(here: Path) -> None:
    """Somebody who names a folder expects images; an empty list has an empty answer."""
    (here / "empty").mkdir()

    assert "empty: holds no images" in refusal("empty")
    (here / "empty" / "notes.txt").touch()
    assert "holds no images; 1 file is left out" in refusal(here / "empty")
    assert 0 == len(loose.load([]))


def test_arrays_are_pictures(here: Path) -> None:
    """Grey, RGB and RGBA; a stack is as many pictures; a view that is not contiguous counts as what
    it shows."""
    from finetune.data import decode

    values = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    for array in (values[..., 0], values[..., :3], values, values[::2, ::-1]):
        found = loose.load([array])
        saved = decode.encode(Image.fromarray(np.array(array)))
        assert saved == found.read(0)
    assert 3 == len(loose.load(np.zeros((3, 5, 7, 3), np.uint8)))


@pytest.mark.skipif(os.name == "nt", reason="needs pipes and links")
def test_a_pipe_is_refused_at_once(here: Path) -> None:
    """A pipe that is named is never opened: refused by name, or left for reading, which refuses it,
    too."""
    os.mkfifo(here / "pipe.jpg")
    assert "pipe.jpg: not a regular file (a pipe)" in refusal(["pipe.jpg", "a.png"])
    found = loose.load(["a.png", "pipe.jpg"], on_bad="skip")
    with pytest.raises(UserError, match=r"not a regular file \(a pipe\)"):
        found.read(1)


@pytest.mark.skipif(os.name == "nt", reason="needs links")
def test_links_that_are_read_already_are_told(here: Path) -> None:
    """A link inside a folder that leads round in a circle has no images of its own, and is
    named."""
    (here / "round").mkdir()
    (here / "round/1.png").write_bytes(b"x")
    (here / "round/up").symlink_to(here / "round", target_is_directory=True)
    assert ["round/up/"] == [fault.path for fault in loose.load(["round"]).left_out]
