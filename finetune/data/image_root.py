"""Where the images of a table lie: the folder that its paths start from, paths without extensions,
and what to do about files that are missing."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from finetune import names
from finetune.data.columns import SUFFIXES
from finetune.errors import UserError
from finetune.names import shown

SAMPLE = 50  # rows that tell where the images lie
FOLDERS = 200  # around a table in which they are looked for
OR_SKIP = "or let the job leave such rows out: --on-bad-image skip"
WEB = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def locate(path: Path, texts: list[str], asked: str | None) -> tuple[Path, list[str], list[str]]:
    """The folder that paths start from, the paths below it, and lines about what was changed.

    Below a root that was `asked` for, paths may begin with folders that are not there, as those of
    another machine do.
    """
    root, notes = path.parent, list[str]()
    if asked is not None:
        root = Path(names.written(asked)).expanduser()
        if not root.is_dir():
            raise UserError(
                "no such folder",
                where=f"--image-root {shown(root)}",
                fix="name the folder that holds the images",
            )
        cut = max(range(_depth(texts) + 1), key=lambda k: (_share(root, texts, k), -k))
        if cut:
            before = texts[0][: len(texts[0]) - len(_without(texts[0], cut))]
            notes.append(f"paths are read without {shown(before)!r}")
            texts = [_without(text, cut) for text in texts]
    completed = [_completed(root, text) for text in texts]
    if added := [new for new, old in zip(completed, texts, strict=True) if new != old]:
        count = f"{len(added)} path{'s' * (len(added) > 1)}"
        notes.append(
            f"{count} without an image's extension got that of the file, as in {shown(added[0])}"
        )
    return root, completed, notes


def relative(folder: Path, text: str) -> str:
    """The path as the table's folder sees it, spelled in one way.

    A path that no file has may be written as `names.shown` shows it, or with the separators of
    Windows. A web address stays as it is.
    """
    if WEB.match(text):
        return text
    if "\\" in text and not os.path.lexists(folder / text):
        plain = names.meant(text)
        text = plain if os.path.lexists(folder / plain) else text.replace("\\", "/")
    return names.way(text, folder)


def is_file(root: Path, name: str) -> bool:
    """Whether the path of a row is that of a file."""
    return os.path.isfile(os.path.join(root, name))


def advice(path: Path, root: Path, missing: Sequence[str], count: int) -> str:
    """What to do about files of a table that are `missing`, as it writes them: the folder near it
    that holds most of them, else what there is to say. The table has `count` rows."""
    skip = f", {OR_SKIP}" if len(missing) < count else ""  # else nothing would be left
    if any(WEB.match(text) for text in missing):
        return f"web addresses are not read: download these images first{skip}"
    for folder in dict.fromkeys((*_near(path.parent), Path())):
        if any(_share(folder, missing, cut) > 0.5 for cut in range(_depth(missing) + 1)):
            return f"they lie below {shown(folder)}: --image-root {names.typed(folder)}"
    if all(os.path.isabs(text) for text in missing):
        return f"mend these paths{skip}"
    return f"paths are relative to {shown(root)}; --image-root DIR names another folder{skip}"


def _completed(root: Path, text: str) -> str:
    """The path with the extension that its file has, where it has none and there is one such
    file."""
    if os.path.splitext(text)[1].lower() in SUFFIXES or os.path.lexists(root / text):
        return text
    found = [text + suffix for suffix in SUFFIXES if is_file(root, text + suffix)]
    return found[0] if len(found) == 1 else text


def _near(folder: Path) -> Iterator[Path]:
    """Folders below and above a table, the nearest first."""
    below = [folder]
    for here in below:
        yield here
        if len(below) < FOLDERS and len(here.parts) - len(folder.parts) < 3:
            try:
                below += sorted(
                    entry for entry in here.iterdir() if entry.is_dir() and entry.name[0] != "."
                )[:FOLDERS]
            except OSError:
                continue
    yield from list(folder.absolute().parents)[:3]


def _share(root: Path, texts: Sequence[str], cut: int) -> float:
    """Of some of the paths, the share that has a file below `root` without their first `cut`
    parts."""
    some = texts[:: max(1, len(texts) // SAMPLE)]
    found = (_without(text, cut) for text in some)
    return sum(is_file(root, _completed(root, name)) for name in found) / len(some)


def _without(text: str, cut: int) -> str:
    return "/".join(_parts(text)[cut:]) if cut else text


def _depth(texts: Sequence[str]) -> int:
    """How many folders all the paths begin with."""
    folders = [_parts(text)[:-1] for text in texts]
    same = (first == last for first, last in zip(min(folders), max(folders), strict=False))
    return sum(itertools.takewhile(bool, same))


def _parts(text: str) -> tuple[str, ...]:
    return PurePosixPath(text.replace("\\", "/")).parts
