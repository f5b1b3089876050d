"""Folders: the walk sees each image once and hangs on nothing; layouts are recognised, or refused
by name."""

from __future__ import annotations

import os
from pathlib import Path

import odd
import pytest

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


@pytest.mark.skipif(os.name == "nt", reason="needs links")
def test_a_link_to_itself_stops_nothing(tmp_path: Path) -> None:
    """It leads nowhere: under an image's name it is an image to be named, else it is no image."""
    make(tmp_path, "a/1.jpg")
    for name in ("a/2.jpg", "a/loop", "a/.hidden"):
        (tmp_path / name).symlink_to(Path(name).name)
    found = folders.walk(tmp_path)
    assert (("a/1.jpg", "a/2.jpg"), ("a/loop",), ("a/.hidden",)) == (
        found.images,
        found.others,
        found.hidden,
    )


@pytest.mark.skipif(os.name == "nt", reason="needs pipes")
def test_a_pipe_is_told_as_a_pipe(tmp_path: Path) -> None:
    """A pipe with an image's name is not said to lack an extension."""
    os.mkfifo(tmp_path / "pipe.jpg")
    assert ("left out, as no regular file: pipe.jpg (a pipe)",) == folders.told(
        tmp_path, ["pipe.jpg"]
    )
