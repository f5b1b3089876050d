"""What differs: the files below a folder compared with what the gallery remembers.

Files are known by their content. Only files whose size or time differs are read, and only contents
that the gallery has never seen need the network.
"""

from __future__ import annotations

import dataclasses
import os
import stat
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune.data.images import Fault, ImageSet, check_on_bad
from finetune.features import extraction
from finetune.features.store import Store
from finetune.names import from_database, to_database
from finetune.progress import Bar
from retrieval.encode import Encoded
from retrieval.storage import database
from retrieval.storage.writer import Writer

# ns: a file younger than this could change again within the clock's grain, and is read again
SETTLED = 2_000_000_000
UNSETTLED = -1  # the time of such a file


@dataclass(frozen=True)
class ScannedFile:
    """A file as a scan found it: POSIX path relative to the root, bytes, time of change in ns."""

    path: str
    size: int
    mtime: int


@dataclass(frozen=True)
class Scan:
    """What lies below `root`: files, and the faults of those that cannot be read. `gone` are paths
    that the gallery knows and is to forget."""

    root: Path
    files: tuple[ScannedFile, ...] = ()
    faults: tuple[Fault, ...] = ()
    gone: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileDiff:
    """What differs between the files and the gallery.

    `known` is path → (image, digest) of the paths at hand; `fresh` are the files that had to be
    read, with their `digests`; `have` is digest → image of the contents with a vector; `new` are
    the positions in `fresh` that need one, a position per content. `unchanged` counts the files
    that did not differ; `old_faults` are unreadable files that have not changed since.
    """

    scan: Scan
    known: dict[str, tuple[int, str]]
    fresh: tuple[ScannedFile, ...]
    digests: Sequence[str]
    have: dict[str, int]
    new: tuple[int, ...]
    unchanged: int
    old_faults: tuple[tuple[ScannedFile, Fault], ...] = ()

    def new_contents(self) -> tuple[ImageSet, list[str]]:
        """The files that need the network, one per content, and their digests."""
        files = [self.fresh[i] for i in self.new]
        return image_set(self.scan.root, files), [self.digests[i] for i in self.new]


def scan(root: Path, paths: Iterable[str], gallery: Path) -> Scan:
    """Size and time of files; those that cannot be read are faults. The gallery itself is no part
    of its images."""
    found, faults = [], []
    own = way(gallery.absolute(), root) + "/"
    young = time.time_ns() - SETTLED
    for path in paths:
        if path.startswith(own):
            continue
        full = os.path.join(root, path)
        try:
            info = os.stat(full)
            if not stat.S_ISREG(info.st_mode):  # reading a pipe would wait for ever
                raise OSError(0, "a pipe, a socket or a device")
            if not os.access(full, os.R_OK):
                raise PermissionError(0, "no permission to read it")
        except OSError as error:
            faults.append(Fault(path, "unreadable", error.strerror or str(error)))
            continue
        mtime = info.st_mtime_ns if info.st_mtime_ns < young else UNSETTLED
        found.append(ScannedFile(path, info.st_size, mtime))
    return Scan(root, tuple(found), tuple(faults))


def compare(
    writer: Writer | None, found: Scan, *, store: Store | None, on_bad: str, bar: Bar
) -> FileDiff:
    """Read what differs, and ask which of its contents the gallery knows. Without `writer`, it
    knows nothing; without `store`, nothing may have to be read."""
    check_on_bad(on_bad)
    if found.faults and on_bad == "stop":
        extraction.refuse(found.faults, str(found.root))
    known, stats = _remembered(writer, found) if writer is not None else ({}, {})
    broken = _broken(writer) if writer is not None and on_bad == "skip" else {}
    fresh: list[ScannedFile] = []
    old_faults: list[tuple[ScannedFile, Fault]] = []
    for one in found.files:
        is_settled, same = one.mtime != UNSETTLED, (one.size, one.mtime)
        if is_settled and stats.get(one.path) == same:
            continue
        if is_settled and one.path in broken and broken[one.path][0] == same:
            old_faults.append((one, broken[one.path][1]))
        else:
            fresh.append(one)
    digests: Sequence[str] = ()
    if fresh:
        assert store is not None
        with bar("read") as progress:
            progress(0, len(fresh))
            digests = extraction.digests(image_set(found.root, fresh), store)
    have = known_ids(writer, digests) if writer is not None else {}
    first: dict[str, int] = {}
    for i, digest in enumerate(digests):
        if digest not in have:
            first.setdefault(digest, i)
    unchanged = len(found.files) - len(fresh) - len(old_faults)
    return FileDiff(
        found,
        known,
        tuple(fresh),
        digests,
        have,
        new=tuple(first.values()),
        unchanged=unchanged,
        old_faults=tuple(old_faults),
    )


def _remembered(
    writer: Writer, found: Scan
) -> tuple[dict[str, tuple[int, str]], dict[str, tuple[int, int]]]:
    """What the gallery knows of the paths of a scan: (image, digest), and (bytes, time of
    change)."""
    query = (
        "select path, image, digest, size, mtime from path join image on image.id = "
        "path.image where path in ({marks})"
    )
    known: dict[str, tuple[int, str]] = {}
    stats: dict[str, tuple[int, int]] = {}
    paths = [to_database(path) for path in (*found.gone, *(one.path for one in found.files))]
    for value, image, digest, size, mtime in database.select(writer.db, query, paths):
        path = from_database(value)
        known[path], stats[path] = (image, digest.hex()), (size, mtime)
    return known, stats


def _broken(writer: Writer) -> dict[str, tuple[tuple[int, int], Fault]]:
    """The files that could not be read the last time: path → (bytes, time of change), and why."""
    found = {}
    for value, size, mtime, kind, detail in writer.db.execute(
        "select path, size, mtime, kind, detail from fault"
    ):
        path = from_database(value)
        found[path] = (size, mtime), Fault(path, kind, detail)
    return found


def known_ids(writer: Writer, digests: Iterable[str]) -> dict[str, int]:
    """Digest → id of the contents that the gallery has a vector of."""
    values = [bytes.fromhex(digest) for digest in dict.fromkeys(digests)]
    query = "select digest, id from image where digest in ({marks})"
    return {digest.hex(): number for digest, number in database.select(writer.db, query, values)}


def bad_files(changes: FileDiff, encoded: Encoded | None) -> list[tuple[ScannedFile, Fault]]:
    """Every new file whose content cannot be read, not the one alone that stood for the content."""
    if encoded is None or not encoded.faults:
        return []
    digest_of = {changes.fresh[i].path: changes.digests[i] for i in changes.new}
    broken = {digest_of[fault.path]: fault for fault in encoded.faults}
    pairs = zip(changes.fresh, changes.digests, strict=True)
    return [
        (one, dataclasses.replace(broken[digest], path=one.path))
        for one, digest in pairs
        if digest in broken
    ]


def image_set(root: Path, found: Sequence[ScannedFile]) -> ImageSet:
    return ImageSet(
        str(root),
        root,
        tuple(one.path for one in found),
        np.full(len(found), -1, dtype=np.int64),
        (),
    )


def way(path: Path, start: Path) -> str:
    """The POSIX way from one folder to a path."""
    return Path(os.path.relpath(path, start.absolute())).as_posix()


def listed(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Paths as a list, where one alone was given, too."""
    return [Path(paths)] if isinstance(paths, str | os.PathLike) else [Path(one) for one in paths]


def is_below(path: str, source: str) -> bool:
    """Whether a path of the gallery lies in one of its folders; both start from the root."""
    return not path.startswith("../") if source == "." else path.startswith(f"{source}/")
