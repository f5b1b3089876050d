"""The one commit of a change: a diff of the files made visible, and what came of it in numbers."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.images import Fault
from finetune.names import to_database
from retrieval.encode import Encoded
from retrieval.storage import database
from retrieval.storage.diff import FileDiff, ScannedFile, bad_files, known_ids
from retrieval.storage.segments import Stored
from retrieval.storage.writer import Writer


@dataclass(frozen=True)
class ChangeSummary:
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
class Commit:
    """What becomes visible beside the files of a diff: values of `meta`, folders that are
    `sources` from now on, `files` that count; sources at and below `forget` do not.

    `replace`: nothing from before stays but the ids; `whole`: the diff has seen all files.
    """

    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    sources: Sequence[str] = ()
    files: Sequence[Stored] = ()
    forget: Sequence[str] = ()
    replace: bool = False
    whole: bool = False


def commit(
    writer: Writer,
    changes: FileDiff,
    encoded: Encoded | None,
    segment: tuple[int, Stored] | None,
    beside: Commit,
) -> ChangeSummary:
    """Make a diff visible, with the vectors of its new contents, which are in `segment`."""
    bad = bad_files(changes, encoded)
    with writer.commit(**beside.meta) as db:
        old: list[int] = []
        if beside.replace:
            old = [number for (number,) in db.execute("select number from segment")]
            for table in ("path", "source", "fault"):
                db.execute(f"delete from {table}")
            db.execute("delete from file where name not like 'segments/%'")
        if encoded is not None and segment is not None:
            _write_images(writer, changes, encoded, segment)
        for stored in beside.files:
            writer.keep(stored)
        _write_paths(writer, changes, bad, beside.whole)
        db.executemany(
            "insert or ignore into source (path) values (?)",
            [(to_database(source),) for source in beside.sources],
        )
        for prefix in beside.forget:
            condition, values = database.below(prefix)
            db.execute(f"delete from source where {condition}", values)
        writer.drop_segments(old)
        return _counted(writer, changes, bad, len(encoded.images) if encoded else 0)


def _write_images(
    writer: Writer, changes: FileDiff, encoded: Encoded, segment: tuple[int, Stored]
) -> None:
    digest_of = {changes.fresh[i].path: changes.digests[i] for i in changes.new}
    number, stored = segment
    writer.add_segment(number, stored, encoded.encoder.width)
    rows = [
        (bytes.fromhex(digest_of[path]), number, row)
        for row, path in enumerate(encoded.images.paths)
    ]
    writer.db.executemany(
        "insert into image (digest, segment, row, alive) values (?, ?, ?, 1) on conflict "
        "(digest) do update set "
        "segment = excluded.segment, row = excluded.row, alive = 1",
        rows,
    )


def _write_paths(
    writer: Writer, changes: FileDiff, bad: Sequence[tuple[ScannedFile, Fault]], whole: bool
) -> None:
    db = writer.db
    broken = {one.path for one, _ in bad}
    good = [
        (one, digest)
        for one, digest in zip(changes.fresh, changes.digests, strict=True)
        if one.path not in broken
    ]
    if whole:
        db.execute("delete from fault")
    db.executemany(
        "delete from fault where path = ?",
        [(to_database(path),) for path in (*(one.path for one, _ in good), *changes.scan.gone)],
    )
    db.executemany(
        "insert or replace into fault (path, size, mtime, kind, detail) values (?, ?, ?, ?, ?)",
        [
            (to_database(one.path), one.size, one.mtime, fault.kind, fault.detail)
            for one, fault in (*changes.old_faults, *bad)
        ],
    )
    dropped = [*changes.scan.gone, *(one.path for one, _ in (*changes.old_faults, *bad))]
    db.executemany("delete from path where path = ?", [(to_database(path),) for path in dropped])
    number = known_ids(writer, (digest for _, digest in good))
    db.executemany(
        "insert or replace into path (path, image, size, mtime) values (?, ?, ?, ?)",
        [(to_database(one.path), number[digest], one.size, one.mtime) for one, digest in good],
    )
    touched = {image for image, _ in changes.known.values()} | set(changes.have.values())
    db.executemany(
        "update image set alive = exists (select 1 from path "
        "where path.image = image.id) where id = ?",
        [(image,) for image in touched],
    )


def _counted(
    writer: Writer, changes: FileDiff, bad: Sequence[tuple[ScannedFile, Fault]], encoded: int
) -> ChangeSummary:
    """Count paths: a new path is *moved* where its content lost another path in the same step, else
    *added*."""
    lost: dict[str, list[str]] = defaultdict(list)
    for path in changes.scan.gone:
        if path in changes.known:
            lost[changes.known[path][1]].append(path)
    pairs = list(zip(changes.fresh, changes.digests, strict=True))
    for one, digest in pairs:
        if one.path in changes.known and changes.known[one.path][1] != digest:
            # its path lives on with another content: nothing was removed
            lost[changes.known[one.path][1]].append("")
    added = changed = moved = unchanged = removed = 0
    broken = {one.path for one, _ in bad}
    for one, digest in pairs:
        if one.path in broken:
            removed += one.path in changes.known
        elif one.path in changes.known:
            same = changes.known[one.path][1] == digest
            unchanged, changed = unchanged + same, changed + (not same)
        elif lost[digest]:
            lost[digest].sort(reverse=True)  # paths that are gone come first
            lost[digest].pop(0)
            moved += 1
        else:
            added += 1
    removed += sum(path != "" for paths in lost.values() for path in paths)
    faults = (*(fault for _, fault in (*changes.old_faults, *bad)), *changes.scan.faults)
    return ChangeSummary(
        added,
        changed,
        moved,
        removed,
        changes.unchanged + unchanged,
        encoded,
        alive(writer),
        faults,
    )


def alive(writer: Writer) -> int:
    """How many images count."""
    return int(writer.db.execute("select count(*) from image where alive = 1").fetchone()[0])


def count_paths(writer: Writer) -> int:
    """How many paths the gallery knows."""
    return int(writer.db.execute("select count(*) from path").fetchone()[0])
