"""Small pictures, made once: kept in the cache folder by the content that they show, the longest
unused dropped first."""

from __future__ import annotations

import contextlib
import os
import threading
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from PIL import Image

from finetune import files, hardware
from finetune.data import decode
from finetune.errors import UserError

FORMAT = 2  # raise it when the pictures, or how they are kept, change
SIDES = {"small": 320, "large": 1600}  # pixels of the longer side
LIMIT = 500_000_000  # bytes kept
QUALITY = 82
SUM = 4  # bytes of checksum, before the picture
TINY = 96  # pixels: up to here JPEG would show, and PNG is as small


class Thumbs:
    """The small pictures in one folder (`cache_dir()/thumbs`). Threads and processes may share it.

    Where there is no cache, nothing is kept: every picture is made when it is asked for.
    """

    def __init__(self, folder: Path | None = None, limit: int = LIMIT) -> None:
        self.folder = folder or _own_folder()
        self.limit = limit
        self._bytes: int | None = None  # kept; None: not counted yet
        self._lock = threading.Lock()
        # decoded side by side: each may take much memory
        self._places = threading.BoundedSemaphore(hardware.cores())

    def get(self, digest: str, size: str, read: Callable[[], bytes]) -> bytes:
        """The picture of the content with this SHA-256, in one of `SIDES`; `read` gives the content
        where it has to be made.

        It is a JPEG, or a PNG where it is tiny. Raises `DecodeError`, and what `read` raises.
        """
        if self.folder is None:
            with self._places:
                return shrink(read(), SIDES[size])
        path = self.folder / f"{SIDES[size]}-{FORMAT}" / digest[:2] / digest
        found = _kept(path)
        if found is not None:
            return found
        with self._places:
            found = _kept(path)  # somebody else may have made it meanwhile
            if found is not None:
                return found
            made = shrink(read(), SIDES[size])
            with contextlib.suppress(OSError, UserError):  # a full disk costs time alone
                files.write_bytes(path, zlib.crc32(made).to_bytes(SUM, "little") + made)
                self._count(SUM + len(made), self.folder)
        return made

    def _count(self, new: int, folder: Path) -> None:
        with self._lock:
            if self._bytes is not None and self._bytes + new <= self.limit:
                self._bytes += new
                return
            known = sorted((info.st_mtime_ns, info.st_size, path) for path, info in _all(folder))
            total = sum(size for _, size, _ in known)
            # some room, so that this is rare
            goal = self.limit if total <= self.limit else self.limit * 4 // 5
            for _, size, path in known:
                if total <= goal:
                    break
                path.unlink(missing_ok=True)
                total -= size
            self._bytes = total


def _own_folder() -> Path | None:
    with contextlib.suppress(UserError):
        return files.cache_dir("thumbs")
    return None


def _kept(path: Path) -> bytes | None:
    """The picture in a file of the cache; None where it is not there, or not what was written."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    picture = data[SUM:]
    if not picture or zlib.crc32(picture).to_bytes(SUM, "little") != data[:SUM]:
        return None
    with contextlib.suppress(OSError):  # a cache that may only be read
        os.utime(path)  # the time of the last use
    return picture


def _all(folder: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    for path in folder.glob("*/*/*"):
        with contextlib.suppress(OSError):  # another process may drop it meanwhile
            found.append((path, path.stat()))
    return found


def shrink(data: bytes, side: int) -> bytes:
    """The picture in at most `side` pixels per side, as JPEG; tiny ones as PNG. Raises
    `DecodeError`."""
    image = decode.decode(data, short_side=side)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = BytesIO()
    if max(image.size) <= TINY:
        image.save(out, "PNG")
    else:
        image.save(out, "JPEG", quality=QUALITY, progressive=True, optimize=True)
    return out.getvalue()
