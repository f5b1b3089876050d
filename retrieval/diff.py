"""What a command changes: the files compared with what the gallery remembers, and the one commit
that makes it so.

Files are known by their content. Only files whose size or time differs are read, and only contents
that the gallery has never seen need the network.
"""

from __future__ import annotations

import dataclasses
import os
import stat
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.images import Fault, ImageSet, check_on_bad
from finetune.features import extraction
from finetune.features.store import Store
from finetune.names import from_database, to_database
from finetune.progress import Bar
from retrieval import database
from retrieval.encode import Encoded
from retrieval.segments import Stored
from retrieval.writer import Writer

# ns: a file younger than this could change again within the clock's grain, and is read again
SETTLED = 2_000_000_000
UNSETTLED = -1  # the time of such a file


@dataclass(frozen=True)
class Change:
    """What a command did, in paths; `encoded` counts the contents that were new to the gallery.
    `images` is what it holds now.

    `faults` are files that could not be read and are left out.
    """

    added: int
    changed: int
    moved: int
    removed: int
    unchanged: int
    encoded: int
    images: int
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "faults": tuple(fault.to_json() for fault in self.faults),
        }

    def to_text(self) -> str:
        """One line: what is not zero, and how many images there are now."""
        counts = {
            name: getattr(self, name)
            for name in ("added", "changed", "moved", "removed", "unchanged")
        }
        words = (
            ", ".join(f"{count} {name}" for name, count in counts.items() if count)
            or "nothing to do"
        )
        return (
            f"{words}{f', {len(self.faults)} left out' if self.faults else ''}; "
            f"{self.images} images"
        )


@dataclass(frozen=True)
class Found:
    """A file as a scan found it: POSIX path relative to the root, bytes, time of change in ns."""

    path: str
    size: int
    mtime: int


@dataclass(frozen=True)
class Plan:
    """What differs between the files and the gallery.

    `known` is path → (image, digest) of the paths at hand; `fresh` are the files that had to be
    read, with their `digests`; `have` is digest → image of the contents with a vector; `new` are
    the positions in `fresh` that need one, a position a content. `gone` are paths to forget,
    `old_faults` unreadable files that have not changed since.
    """

    root: Path
    known: dict[str, tuple[int, str]]
    fresh: tuple[Found, ...]
    digests: Sequence[str]
    have: dict[str, int]
    new: tuple[int, ...]
    gone: tuple[str, ...]
    unchanged: int
    old_faults: tuple[tuple[Found, Fault], ...] = ()
    scan_faults: tuple[Fault, ...] = ()


def scan(root: Path, paths: Iterable[str], index: Path) -> tuple[list[Found], list[Fault]]:
    """Size and time of files; those that cannot be read are faults. The index itself is no part of
    its images."""
    found, faults = [], []
    own = way(index.absolute(), root) + "/"
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
        found.append(
            Found(path, info.st_size, info.st_mtime_ns if info.st_mtime_ns < young else UNSETTLED)
        )
    return found, faults


def compare(
    writer: Writer | None,
    root: Path,
    found: Sequence[Found],
    gone: tuple[str, ...],
    store: Store | None,
    on_bad: str,
    bad: Sequence[Fault],
    bar: Bar,
) -> Plan:
    """Read what differs, and ask which of its contents the gallery knows. Without `writer`, it
    knows nothing."""
    check_on_bad(on_bad)
    if bad and on_bad == "stop":
        extraction.refuse(bad, str(root))
    known: dict[str, tuple[int, str]] = {}
    stats: dict[str, tuple[int, int]] = {}
    broken: dict[str, tuple[int, int, str, str]] = {}
    if writer is not None:
        query = (
            "select path, image, digest, size, mtime from path join image on image.id = "
            "path.image where path in ({marks})"
        )
        paths = [to_database(path) for path in (*gone, *(one.path for one in found))]
        for value, image, digest, size, mtime in database.select(writer.db, query, paths):
            path = from_database(value)
            known[path], stats[path] = (image, digest.hex()), (size, mtime)
        if on_bad == "skip":
            old_faults = writer.db.execute("select path, size, mtime, kind, detail from fault")
            broken = {from_database(path): tuple(rest) for path, *rest in old_faults}
    fresh = [
        one
        for one in found
        if one.mtime == UNSETTLED or stats.get(one.path) != (one.size, one.mtime)
    ]
    old = [
        one
        for one in fresh
        if one.mtime != UNSETTLED and broken.get(one.path, (0, 0))[:2] == (one.size, one.mtime)
    ]
    skipped = {one.path for one in old}
    fresh = [one for one in fresh if one.path not in skipped]
    digests: Sequence[str] = ()
    have: dict[str, int] = {}
    if fresh:
        assert store is not None
        with bar("read") as progress:
            progress(0, len(fresh))
            digests = extraction.digests(image_set(root, fresh), store)
    if writer is not None:
        values = [bytes.fromhex(digest) for digest in dict.fromkeys(digests)]
        rows = database.select(
            writer.db, "select digest, id from image where digest in ({marks})", values
        )
        have = {digest.hex(): number for digest, number in rows}
    first: dict[str, int] = {}
    for i, digest in enumerate(digests):
        if digest not in have:
            first.setdefault(digest, i)
    faults = tuple((one, Fault(one.path, broken[one.path][2], broken[one.path][3])) for one in old)
    unchanged = len(found) - len(fresh) - len(old)
    return Plan(
        root,
        known,
        tuple(fresh),
        digests,
        have,
        tuple(first.values()),
        gone,
        unchanged,
        faults,
        tuple(bad),
    )


def bad_files(plan: Plan, made: Encoded | None) -> list[tuple[Found, Fault]]:
    """Every new file whose content cannot be read, not the one alone that stood for the content."""
    if made is None or not made.faults:
        return []
    digest_of = {plan.fresh[i].path: plan.digests[i] for i in plan.new}
    broken = {digest_of[fault.path]: fault for fault in made.faults}
    pairs = zip(plan.fresh, plan.digests, strict=True)
    return [
        (one, dataclasses.replace(broken[digest], path=one.path))
        for one, digest in pairs
        if digest in broken
    ]


def image_set(root: Path, found: Sequence[Found]) -> ImageSet:
    return ImageSet(
        str(root),
        root,
        tuple(one.path for one in found),
        np.full(len(found), -1, dtype=np.int64),
        (),
    )


# ----------------------------------------------------------------------------------- the one commit


def commit(
    writer: Writer,
    plan: Plan,
    made: Encoded | None,
    segment: tuple[int, Stored] | None,
    meta: dict[str, Any],
    *,
    sources: Sequence[str] = (),
    files: Sequence[Stored] = (),
    forget: Sequence[str] = (),
    replace: bool = False,
    whole: bool = False,
) -> Change:
    """Make a plan visible. `replace`: nothing from before stays but the ids; `whole`: the plan has
    seen all files."""
    digest_of = {plan.fresh[i].path: plan.digests[i] for i in plan.new}
    bad = bad_files(plan, made)
    with writer.commit(**meta) as db:
        old = [number for (number,) in db.execute("select number from segment")] if replace else []
        if replace:
            for table in ("path", "source", "fault"):
                db.execute(f"delete from {table}")
            db.execute("delete from file where name not like 'segments/%'")
        if made is not None and segment is not None:
            number, stored = segment
            writer.add_segment(number, stored, made.encoder.width)
            rows = [
                (bytes.fromhex(digest_of[path]), number, row)
                for row, path in enumerate(made.images.paths)
            ]
            db.executemany(
                "insert into image (digest, segment, row, alive) values (?, ?, ?, 1) on conflict "
                "(digest) do update set "
                "segment = excluded.segment, row = excluded.row, alive = 1",
                rows,
            )
        for stored in files:
            writer.keep(stored)
        _write_paths(writer, plan, bad, whole)
        db.executemany(
            "insert or ignore into source (path) values (?)",
            [(to_database(source),) for source in sources],
        )
        for prefix in forget:
            condition, values = database.below(prefix)
            db.execute(f"delete from source where {condition}", values)
        writer.drop_segments(old)
        return _counted(writer, plan, bad, len(made.images) if made else 0)


def _write_paths(
    writer: Writer, plan: Plan, bad: Sequence[tuple[Found, Fault]], whole: bool
) -> None:
    db = writer.db
    broken = {one.path for one, _ in bad}
    good = [
        (one, digest)
        for one, digest in zip(plan.fresh, plan.digests, strict=True)
        if one.path not in broken
    ]
    if whole:
        db.execute("delete from fault")
    db.executemany(
        "delete from fault where path = ?",
        [(to_database(path),) for path in (*(one.path for one, _ in good), *plan.gone)],
    )
    db.executemany(
        "insert or replace into fault (path, size, mtime, kind, detail) values (?, ?, ?, ?, ?)",
        [
            (to_database(one.path), one.size, one.mtime, fault.kind, fault.detail)
            for one, fault in (*plan.old_faults, *bad)
        ],
    )
    dropped = [*plan.gone, *(one.path for one, _ in (*plan.old_faults, *bad))]
    db.executemany("delete from path where path = ?", [(to_database(path),) for path in dropped])
    values = [bytes.fromhex(digest) for digest in dict.fromkeys(digest for _, digest in good)]
    number = {
        d.hex(): i
        for d, i in database.select(
            db, "select digest, id from image where digest in ({marks})", values
        )
    }
    db.executemany(
        "insert or replace into path (path, image, size, mtime) values (?, ?, ?, ?)",
        [(to_database(one.path), number[digest], one.size, one.mtime) for one, digest in good],
    )
    touched = {image for image, _ in plan.known.values()} | set(plan.have.values())
    db.executemany(
        "update image set alive = exists (select 1 from path "
        "where path.image = image.id) where id = ?",
        [(image,) for image in touched],
    )


def _counted(
    writer: Writer, plan: Plan, bad: Sequence[tuple[Found, Fault]], encoded: int
) -> Change:
    """Count paths: a new path is *moved* where its content lost another path in the same step, else
    *added*."""
    lost: dict[str, list[str]] = defaultdict(list)
    for path in plan.gone:
        if path in plan.known:
            lost[plan.known[path][1]].append(path)
    pairs = list(zip(plan.fresh, plan.digests, strict=True))
    for one, digest in pairs:
        if one.path in plan.known and plan.known[one.path][1] != digest:
            # its path lives on with another content: nothing was removed
            lost[plan.known[one.path][1]].append("")
    added = changed = moved = unchanged = removed = 0
    broken = {one.path for one, _ in bad}
    for one, digest in pairs:
        if one.path in broken:
            removed += one.path in plan.known
        elif one.path in plan.known:
            same = plan.known[one.path][1] == digest
            unchanged, changed = unchanged + same, changed + (not same)
        elif lost[digest]:
            lost[digest].sort(reverse=True)  # paths that are gone come first
            lost[digest].pop(0)
            moved += 1
        else:
            added += 1
    removed += sum(path != "" for paths in lost.values() for path in paths)
    faults = (*(fault for _, fault in (*plan.old_faults, *bad)), *plan.scan_faults)
    return Change(
        added, changed, moved, removed, plan.unchanged + unchanged, encoded, alive(writer), faults
    )


def alive(writer: Writer) -> int:
    """How many images count."""
    return int(writer.db.execute("select count(*) from image where alive = 1").fetchone()[0])


def count_paths(writer: Writer) -> int:
    """How many paths the gallery knows."""
    return int(writer.db.execute("select count(*) from path").fetchone()[0])


def way(path: Path, start: Path) -> str:
    """The POSIX way from one folder to a path."""
    return Path(os.path.relpath(path, start.absolute())).as_posix()
