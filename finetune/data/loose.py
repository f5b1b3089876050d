"""Pictures that somebody hands over to be looked at: files and folders as they are typed, and
pictures in memory.

One image an input, in the order of the inputs; an input that is given twice is there twice. A
folder stands for all images below it, sorted, at its own place. What an image is called does not
depend on the other inputs.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.data import decode, folders, images
from finetune.data.faults import Fault, some
from finetune.data.images import ImageSet
from finetune.errors import UserError
from finetune.names import shown

Picture = str | os.PathLike[str] | bytes | bytearray | memoryview | NDArray[np.uint8] | Image.Image
ACCEPTED = (
    "give paths, bytes of image files, PIL images, or uint8 arrays: "
    "H × W, H × W × 3 (RGB) or H × W × 4 (RGBA)"
)
SKIP = "leave them out: --on-bad-image skip (in Python on_bad='skip')"


def load(given: Picture | Iterable[Picture], *, on_bad: str = "stop") -> ImageSet:
    """The images of `given`, without labels; nothing is decoded yet.

    A file is called as it is given, an image in a folder by the folder as it is given, a slash, and
    the way from there; a picture in memory by its position among the inputs, as in `[3]` (a file of
    that name is called `./[3]`). Raises `UserError` for what is no picture, by position and type;
    for missing files, unless `on_bad` is skip: reading them will name them; and where folders are
    given and no image is there.
    """
    items, root = _several(given), Path.cwd()
    paths: list[str] = []
    ignored: list[str] = []
    left: list[Fault] = []
    missing: list[str] = []
    special: dict[str, str] = {}
    memory: dict[str, Callable[[], bytes]] = {}
    locks: dict[int, threading.Lock] = {}
    for position, item in enumerate(items):
        if not isinstance(item, str | os.PathLike):
            name = f"[{position}]"
            memory[name] = _in_memory(item, position, locks.setdefault(id(item), threading.Lock()))
            paths.append(name)
            continue
        text = _text(os.fspath(item))
        if text and os.path.isdir(text):
            found = folders.walk(Path(text))
            paths += [_below(text, path) for path in found.images]
            ignored += [_below(text, path) for path in (*found.others, *found.results)]
            left += found.linked(_below(text, ""))
            continue
        if not text or not os.path.exists(text):
            missing.append(text or "an empty text")
        elif kind := folders.special(text):
            special[text] = kind
        paths.append(text)
    if special and on_bad == "stop":
        raise UserError(
            f"not a regular file ({next(iter(special.values()))})",
            where=some(list(map(shown, special))),
            fix=f"give files of images, or {SKIP}",
        )
    if missing and on_bad == "stop":
        what = (
            f"no such file or "
            f"folder{f' ({len(missing)} of {len(items)} inputs)' if len(items) > 1 else ''}"
        )
        raise UserError(
            what,
            where=some([shown(path) for path in missing]),
            fix=f"check the spelling, or {SKIP}",
        )
    name = str(items[0]) if len(items) == 1 and not memory else f"{len(items)} inputs"
    if items and not paths:
        why = "".join(f"; {line}" for line in folders.told(root, ignored))
        raise UserError(
            f"holds no images{why}",
            where=name,
            fix=f"known extensions: {' '.join(sorted(folders.EXTENSIONS))}",
        )
    source = functools.partial(_read, root, memory) if memory else None
    labels = np.full(len(paths), -1, dtype=np.int64)
    return ImageSet(
        name,
        root,
        tuple(paths),
        labels,
        (),
        ignored=tuple(dict.fromkeys(ignored)),
        left_out=tuple(dict.fromkeys(left)),
        source=source,
    )


def _several(given: Any) -> Sequence[Any]:
    """The inputs as a list, where one alone was given, too."""
    if isinstance(given, np.ndarray):
        return list(given) if given.ndim == 4 else [given]
    one = isinstance(given, str | os.PathLike | bytes | bytearray | memoryview | Image.Image)
    if not one and not isinstance(given, Iterable):
        raise UserError(f"a {type(given).__name__} is no picture", where="predict", fix=ACCEPTED)
    return [given] if one else list(given)


def _text(path: Any) -> str:
    """A path as it is called: with ~ written out, and never as a picture in memory is."""
    text = os.path.expanduser(os.fsdecode(path))
    return f"./{text}" if re.fullmatch(r"\[\d+\]", text) else text


def _below(folder: str, path: str) -> str:
    return f"{folder.rstrip('/')}/{path}"


def _in_memory(item: Any, position: int, lock: threading.Lock) -> Callable[[], bytes]:
    """What gives the bytes of a picture in memory."""
    if isinstance(item, bytes | bytearray | memoryview):
        return functools.partial(bytes, item)
    if isinstance(item, Image.Image):
        picture = item
    elif isinstance(item, np.ndarray):
        colours = item.shape[2] if item.ndim == 3 else 3
        if (
            item.dtype != np.uint8
            or item.ndim not in (2, 3)
            or colours not in (3, 4)
            or not item.size
        ):
            what = f"input {position} is an array of {item.dtype} of shape {item.shape}"
            raise UserError(what, where="predict", fix=ACCEPTED)
        picture = Image.fromarray(np.ascontiguousarray(item))
    else:
        raise UserError(
            f"input {position} is of type {type(item).__name__}", where="predict", fix=ACCEPTED
        )

    def encoded() -> bytes:
        with lock:  # one picture may be there twice, and Pillow reads it when it is first looked at
            return decode.encode(picture)

    return encoded


def _read(root: Path, memory: dict[str, Callable[[], bytes]], name: str) -> bytes:
    return memory[name]() if name in memory else images.read_file(os.path.join(root, name))
