"""What the names of folders mean: a folder per class, or train/, val/ and test/ of them.

What fits into neither is refused by name, or left out where that was asked for (`--on-stray skip`).
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.data.csv_table import SPLIT_NAMES
from finetune.data.faults import Fault, some
from finetune.data.folders import (
    EXTENSIONS,
    HIDDEN,
    holds_results,
    is_folder,
    told,
    walk,
)
from finetune.errors import UserError
from finetune.names import shown, typed

NAME_THEM = "name the images in a CSV with path,label[,split]"
STRAY = "outside of the class folders"  # the kind of fault
SKIP_STRAY = "leave them out: --on-stray skip"


@dataclass(frozen=True)
class Scan:
    """A folder of labelled images: class names an image, splits where the folders say them, `known`
    classes (empty ones too).

    `ignored` are files in class folders that no extension announces as images, and folders of
    results (with a slash at the end); `aside` are files that belong to no class: hidden ones, and
    those beside the class folders. `left_out` are images outside of the classes and links to
    folders that are read under another name; `notes` are lines to be told.
    """

    paths: tuple[str, ...]
    classes: tuple[str, ...]
    split: tuple[str, ...] | None
    known: tuple[str, ...]
    ignored: tuple[str, ...]
    aside: tuple[str, ...] = ()
    left_out: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Parts:
    """The folders of the splits, by split (None where the folders are classes); folders and images
    beside them that are left out; notes."""

    folders: dict[str, str] | None
    stray: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def scan(root: Path, *, on_stray: str = "stop", test: Path | None = None) -> Scan:
    """Read a folder per class, or train/, val/ and test/ of them.

    The class of an image is the first folder on its way (NFC), however deep it lies. Images outside
    of all class folders, and folders beside those of the splits, are a `UserError` that names them,
    or left out where `on_stray` is skip. `test` is a folder of test images that was named beside
    this one: it may look like a part.
    """
    parts = _parts(root, on_stray == "skip", test)
    if parts.folders is None:
        return _by_class(root, "", on_stray == "skip", parts)
    found = [
        (name, _by_class(root / folder, f"{folder}/", on_stray == "skip"))
        for name, folder in parts.folders.items()
    ]
    beside = _beside(root, {*parts.folders.values()}, parts.stray)
    return Scan(
        paths=tuple(path for _, part in found for path in part.paths),
        classes=tuple(word for _, part in found for word in part.classes),
        split=tuple(name for name, part in found for _ in part.paths),
        known=next((part.known for name, part in found if name == "train"), ()),
        ignored=(*beside.ignored, *(path for _, part in found for path in part.ignored)),
        aside=(*beside.aside, *(path for _, part in found for path in part.aside)),
        left_out=(*beside.left_out, *(fault for _, part in found for fault in part.left_out)),
        notes=parts.notes,
    )


def _beside(root: Path, parts: Collection[str], stray: Sequence[str]) -> Scan:
    """What stands beside the folders of the splits: folders of results, files, what is hidden, and
    the images that are left out."""
    ignored, aside, left = list[str](), list[str](), list[Fault]()
    with os.scandir(root) as entries:
        here = sorted((entry.name, is_folder(entry)) for entry in entries)
    for name, folder in here:
        if name in parts:
            continue
        if name in stray and folder:
            found = walk(root / name)
            left += [Fault(f"{name}/{path}", STRAY, "beside the parts") for path in found.images]
            left += found.linked(f"{name}/")
            ignored += [f"{name}/{path}" for path in found.results]
            aside += [f"{name}/{path}" for path in (*found.others, *found.hidden)]
        elif name in stray:
            left.append(Fault(name, STRAY, "beside the parts"))
        else:
            unseen = name[0] == "." or name in HIDDEN
            (ignored if folder and not unseen else aside).append(name + "/" * folder)
    return Scan((), (), None, (), tuple(ignored), tuple(aside), tuple(left))


def _only_results(folder: Path) -> bool:
    """Whether a folder holds results of Regraft, itself or further down, and no image beside
    them."""
    found = walk(folder)
    return holds_results(folder, os.listdir(folder)) or bool(found.results and not found.images)  # noqa: PTH208


def _parts(root: Path, skip: bool, test: Path | None) -> _Parts:
    """Which folders hold the splits, and what is left out beside them."""
    with os.scandir(root) as entries:
        seen = sorted(
            (entry.name, is_folder(entry))
            for entry in entries
            if entry.name[0] != "." and entry.name not in HIDDEN
        )
    inside = [name for name, folder in seen if folder]
    named = [name for name in inside if name.lower() in SPLIT_NAMES]
    if not named:
        return _Parts(None)
    inside = [name for name in inside if name in named or not _only_results(root / name)]
    others = [name for name in inside if name not in named]
    found = {SPLIT_NAMES[name.lower()]: name for name in named}
    if "train" not in found or (
        len(named) == 1 and (others or not _inner_folders(root / found["train"]))
    ):
        return _classes_or_parts(root, named, others, skip, test)
    if len(found) < len(named):
        _refuse_twins(root, named)
    if others and not skip:
        raise UserError(
            f"{', '.join(map(shown, named))} look like splits, "
            f"{some(list(map(shown, others)))} {'do' if len(others) > 1 else 'does'} not",
            where=root,
            fix=f"{SKIP_STRAY}; keep only train, val and test here, rename the classes, "
            f"or {NAME_THEM}",
        )
    stray = [name for name, folder in seen if not folder and _is_image(name)]
    if not skip:
        _refuse_stray(stray, root, bool(inside))
    order = {str(name): found[name] for name in ("train", "val", "test") if name in found}
    return _Parts(order, (*others, *stray))


def _classes_or_parts(
    root: Path, named: Sequence[str], others: Sequence[str], skip: bool, test: Path | None
) -> _Parts:
    """Folders with names of splits that do not make a set of parts: they are classes, unless what
    they hold says otherwise."""
    doubtful = {name: inner for name in named if (inner := _inner_folders(root / name))}
    doubtful = {
        name: inner
        for name, inner in doubtful.items()
        if others and not _holds_images(root / name) and not _is_same(root / name, test)
    }
    if skip and list(doubtful) == list(named) and SPLIT_NAMES[named[0].lower()] == "train":
        return _Parts({"train": named[0]}, tuple(others))
    if skip:
        return _Parts(None, tuple(doubtful))
    notes = []
    for name, inner in doubtful.items():
        part = SPLIT_NAMES[name.lower()]
        use = {
            "train": "use it alone: --on-stray skip",
            "test": f"leave it out: --on-stray skip; or judge on it: --test {typed(root / name)}",
            "val": "leave it out: --on-stray skip",
        }[part]
        if same := sorted(set(inner) & set(others)):
            raise UserError(
                f"{shown(name)} looks like a part, with the same folders "
                f"({some(list(map(shown, same)))}) as stand beside it",
                where=root,
                fix=f"{use}; or put the classes into train/ and test/, or {NAME_THEM}",
            )
        notes.append(f"{shown(name)} holds folders, as a part does, but is read as a class; {use}")
    return _Parts(None, (), tuple(notes))


def _refuse_twins(root: Path, named: Sequence[str]) -> None:
    parts = [SPLIT_NAMES[name.lower()] for name in named]
    twice = [name for name, part in zip(named, parts, strict=True) if parts.count(part) > 1]
    raise UserError(
        f"several folders for one split: {', '.join(map(shown, twice))}",
        where=root,
        fix=f"keep one, or {NAME_THEM}",
    )


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _inner_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.name[0] != "." and is_folder(entry)]


def _holds_images(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(_is_image(entry.name) and entry.name[0] != "." for entry in entries)


def _is_same(folder: Path, test: Path | None) -> bool:
    try:
        return test is not None and os.path.samefile(folder, test)
    except OSError:
        return False


def _by_class(root: Path, prefix: str, skip: bool, parts: _Parts = _Parts(None)) -> Scan:
    """The images of a folder per class. `parts` says which of the folders are left out, and the
    notes."""
    found = walk(root)
    outside = {
        path for path in found.images if "/" not in path or path.split("/")[0] in parts.stray
    }
    images = [path for path in found.images if path not in outside]
    if not (skip and images):
        loose = [path for path in found.images if "/" not in path]
        _refuse_stray(loose, root, bool(found.folders))
    if not images:
        why = "".join(f"; {line}" for line in told(root, (*found.others, *found.results)))
        raise UserError(
            f"holds no images{why}",
            where=root,
            fix=f"give each class a folder with its images, or {NAME_THEM}",
        )
    ignored = tuple(prefix + path for path in (*found.others, *found.results) if "/" in path)
    # Files beside the class folders (a README, a licence) belong to no class and are none of our
    # business.
    aside = tuple(
        prefix + path
        for path in (*found.hidden, *(path for path in found.others if "/" not in path))
    )
    stray = tuple(
        Fault(prefix + path, STRAY, "in no class folder")
        for path in found.images
        if path in outside
    )
    names = {
        name: unicodedata.normalize("NFC", name)
        for name in found.folders
        if name not in parts.stray
    }
    return Scan(
        tuple(prefix + path for path in images),
        tuple(names[path[: path.index("/")]] for path in images),
        None,
        tuple(dict.fromkeys(names.values())),
        ignored,
        aside,
        (*stray, *found.linked(prefix)),
        parts.notes,
    )


def _refuse_stray(stray: Sequence[str], root: Path, has_folders: bool) -> None:
    if not stray:
        return
    few = ", ".join(map(shown, stray[:3])) + " …" * (len(stray) > 3)
    count = f"{len(stray)} image{'s' * (len(stray) > 1)}"
    if has_folders:
        raise UserError(
            f"{count} outside of the class folders: {few}",
            where=root,
            fix=f"{SKIP_STRAY}; move them into one, or {NAME_THEM}",
        )
    raise UserError(
        f"{count} without class folders: {few}",
        where=root,
        fix="give each class a folder, or a CSV with path,label; "
        "images without labels are for `finetune predict`",
    )


def deeper(paths: Sequence[str]) -> str:
    """Where the classes seem to lie when all images are below one folder: that folder's path, or
    the empty text.

    `10/red/1.jpg` and `10/blue/2.jpg` lie in 10, which holds the folders red and blue and no image
    itself.
    """
    below = [path.rpartition("/")[0] for path in paths]
    common = os.path.commonpath(below) if below and all(below) else ""
    inside = {path[len(common) + 1 :].partition("/")[0] for path in below}
    return common if common and len(inside) > 1 and "" not in inside else ""


def alike_inside(paths: Sequence[str], classes: Sequence[str]) -> str:
    """A line where every class folder holds folders of the same names, or those of splits, and no
    image: what it looks like."""
    inside: dict[str, set[str]] = {}
    for path, name in zip(paths, classes, strict=True):
        inside.setdefault(name, set()).add(
            path.partition("/")[2].rpartition("/")[0].partition("/")[0]
        )
    names = set().union(*inside.values())
    if len(inside) < 2 or "" in names or len(names) < 2:
        return ""
    few = some([shown(name) for name in sorted(names)])
    if all(name.lower() in SPLIT_NAMES for name in names):
        fix = "put the classes into train/ and test/, or give a CSV with path,label,split"
        what = (
            f"the class folders hold {few}: they look like parts, "
            f"but the images of all are taken together"
        )
        return f"{what}; to keep them apart, {fix}"
    if any(here != names for here in inside.values()):
        return ""
    first = shown(min(inside))
    fix = f"give one of the folders ({first}), or a CSV with path,label"
    return (
        f"each of the {len(inside)} class folders holds the same folders "
        f"({few}); if these are the classes, {fix}"
    )
