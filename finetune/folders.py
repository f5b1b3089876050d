"""Images in folders: a fast walk that follows links without going round in circles, and what the folders' names mean."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UserError
from finetune.table import SPLIT_NAMES

EXTENSIONS = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".j2k", ".avif", ".heic", ".heif"),
        *(".png", ".apng", ".gif", ".webp", ".tif", ".tiff", ".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm"),
    )
)
HIDDEN = frozenset(("__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir"))  # what operating systems leave behind


@dataclass(frozen=True)
class Walk:
    """What lies below a folder, sorted POSIX paths relative to it: images by their extension, other files, and its folders."""

    images: tuple[str, ...]
    others: tuple[str, ...]
    folders: tuple[str, ...]


@dataclass(frozen=True)
class Scan:
    """A folder of labelled images: class names an image, splits where the folders say them, `known` classes (empty ones too)."""

    paths: tuple[str, ...]
    classes: tuple[str, ...]
    split: tuple[str, ...] | None
    known: tuple[str, ...]
    ignored: tuple[str, ...]


def walk(root: Path) -> Walk:
    """Everything below `root`. Each real folder is visited once, under its own name before any link's; hidden files are not seen.

    `folders` are the visited ones directly below `root`. Names are bytes: any of them will do (`names`). A pipe, a socket or
    a device is no image, whatever it is called. Raises `UserError` where a folder cannot be read.
    """
    images: list[str] = []
    others: list[str] = []
    top: list[str] = []
    visited: set[tuple[int, int]] = set()
    waiting, links = [""], list[str]()
    while waiting or links:
        if not waiting:
            links.sort(reverse=True)
        here = waiting.pop() if waiting else links.pop()
        try:
            folder = f"{root}/{here}"
            info = os.stat(folder)  # noqa: PTH116
            if (info.st_dev, info.st_ino) in visited:
                continue
            visited.add((info.st_dev, info.st_ino))
            if here and "/" not in here[:-1]:
                top.append(here[:-1])
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == "." or name in HIDDEN:
                        continue
                    if entry.is_dir():
                        (links if entry.is_symlink() else waiting).append(f"{here}{name}/")
                    elif os.path.splitext(name)[1].lower() in EXTENSIONS and (entry.is_file() or _dangles(entry)):  # noqa: PTH122
                        images.append(here + name)
                    else:
                        others.append(here + name)
        except OSError as error:
            raise UserError(
                f"the folder cannot be read ({error.strerror})", where=root / here, fix="mend its permissions"
            ) from error
    return Walk(tuple(sorted(images)), tuple(sorted(others)), tuple(sorted(top)))


def _dangles(entry: os.DirEntry[str]) -> bool:
    """Whether this is a link to nothing: it counts as an image, so that reading it names it."""
    return entry.is_symlink() and not os.path.exists(entry.path)  # noqa: PTH110


def gather(given: Sequence[str | Path]) -> tuple[Path, tuple[str, ...], tuple[str, ...]]:
    """Files as they are given, and all that is below folders, each file once: (root, image paths relative to it, others).

    One folder alone is the root, else the folder that all the files have in common.
    """
    full: list[str] = []
    others: list[str] = []
    for item in given:
        # Not resolved: links keep the names that the user knows.
        path = Path(os.path.abspath(Path(item).expanduser()))  # noqa: PTH100
        if path.is_dir():
            found = walk(path)
            full += [str(path / image) for image in found.images]
            others += [str(path / other) for other in found.others]
        elif path.exists():
            full.append(str(path))
        else:
            raise UserError("no such file or folder", where=item, fix="check the spelling")
    full = list(dict.fromkeys(full))
    if len(given) == 1 and path.is_dir():
        root = path
    else:
        root = Path(os.path.commonpath([os.path.dirname(file) for file in full])) if full else Path()  # noqa: PTH120
    cut = len(str(root).rstrip("/")) + 1
    outside = (Path(os.path.relpath(other, root)).as_posix() for other in others)
    return root, tuple(file[cut:].replace(os.sep, "/") for file in full), tuple(outside)


def scan(root: Path) -> Scan:
    """Read a folder per class, or train/, val/ and test/ of them.

    The class of an image is the first folder on its way (NFC), however deep it lies. An image outside of all class
    folders is a `UserError` that names it.
    """
    parts = _parts(root)
    if parts is None:
        found = _by_class(root, "")
        return Scan(found.paths, found.classes, None, found.known, found.ignored)
    paths: list[str] = []
    classes: list[str] = []
    split: list[str] = []
    known: tuple[str, ...] = ()
    ignored: list[str] = []
    for name, folder in parts.items():
        found = _by_class(root / folder, f"{folder}/")
        paths += found.paths
        classes += found.classes
        split += [name] * len(found.paths)
        ignored += found.ignored
        if name == "train":
            known = found.known
    return Scan(tuple(paths), tuple(classes), tuple(split), known, tuple(ignored))


def _parts(root: Path) -> dict[str, str] | None:
    """The folders that hold the splits, by split; None where the folders are classes."""
    with os.scandir(root) as entries:
        seen = sorted((entry.name, entry.is_dir()) for entry in entries if entry.name[0] != "." and entry.name not in HIDDEN)
    inside = [name for name, is_folder in seen if is_folder]
    named = [name for name in inside if name.lower() in SPLIT_NAMES]
    found = {SPLIT_NAMES[name.lower()]: name for name in named}
    if "train" not in found or (len(named) == 1 and (len(inside) > 1 or not _holds_folders(root / found["train"]))):
        return None
    if len(found) < len(named):
        twice = [name for name in named if sum(SPLIT_NAMES[name.lower()] == SPLIT_NAMES[other.lower()] for other in named) > 1]
        raise UserError(f"several folders for one split: {', '.join(twice)}", where=root, fix="keep one")
    others = [name for name in inside if name not in named]
    if others:
        raise UserError(
            f"{', '.join(named)} look like splits, {', '.join(others[:3])} does not",
            where=root,
            fix="keep only train, val and test here, or rename the classes",
        )
    stray = [name for name, is_folder in seen if not is_folder and os.path.splitext(name)[1].lower() in EXTENSIONS]  # noqa: PTH122
    _refuse_stray(stray, root, bool(inside))
    return {name: found[name] for name in ("train", "val", "test") if name in found}


def _holds_folders(folder: Path) -> bool:
    return any(entry.is_dir() for entry in folder.iterdir() if entry.name[0] != ".")


def _by_class(root: Path, prefix: str) -> Scan:
    found = walk(root)
    _refuse_stray([path for path in found.images if "/" not in path], root, bool(found.folders))
    if not found.images:
        raise UserError("holds no images", where=root, fix="give each class a folder with its images")
    # Files beside the class folders (a README, a licence) belong to no class and are none of our business.
    ignored = tuple(prefix + path for path in found.others if "/" in path)
    names = {name: unicodedata.normalize("NFC", name) for name in found.folders}
    classes = tuple(names[path[: path.index("/")]] for path in found.images)
    return Scan(tuple(prefix + path for path in found.images), classes, None, tuple(dict.fromkeys(names.values())), ignored)


def _refuse_stray(stray: list[str], root: Path, has_folders: bool) -> None:
    if not stray:
        return
    few = ", ".join(stray[:3]) + " …" * (len(stray) > 3)
    count = f"{len(stray)} image{'s' * (len(stray) > 1)}"
    if has_folders:
        raise UserError(f"{count} outside of the class folders: {few}", where=root, fix="move them into one, or away")
    raise UserError(
        f"{count} without class folders: {few}",
        where=root,
        fix="give each class a folder, or a CSV with path,label; images without labels are for `finetune predict`",
    )
