"""Keeping a gallery quick: small segments are merged, removed images dropped, and the search index
follows.

Vectors that no search index covers are compared with one by one, so that adding a few images costs
no more than them. When there is too much of anything (removed rows, segments, rows outside of the
index), `compact_if_due` puts it right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from retrieval.index import spec
from retrieval.storage import segments
from retrieval.storage.segments import Snapshot, Stored
from retrieval.storage.writer import Writer
from retrieval.vectors import Ints, Rows

MOST_SEGMENTS = 16
DEAD_SHARE = 0.2  # of all rows
UNCOVERED_SHARE = 0.25  # of the rows that the search index covers
ROWS = 4096  # copied at once
EXACT = "Flat"  # the vectors are here already: an index of this kind would be a second copy of them
MEASURED_AT = 10  # the k of an approximate index's recall


def compact_if_due(writer: Writer, *, everything: bool = False) -> None:
    """Merge what is due to be merged and make the search index where it is due; all of it with
    `everything`."""
    with contextlib.closing(segments.read(writer.folder)) as now:
        stale = _index_is_due(now)
        numbers = _due(now, everything or stale)
        covered = (now.meta.get("search") or {}).get("segments", [])
        if numbers:
            _merge(writer, now, numbers)
    if stale or set(covered) & set(numbers):
        _make_index(writer)


def _due(now: Snapshot, everything: bool) -> list[int]:
    """The segments to merge into one: all of them, the small ones, or none."""
    rows = dict(zip(now.segments, (len(table) for table in now.tables), strict=True))
    gone = len(now.dead) - len(now)
    if everything and (gone or len(rows) > 1):
        return list(rows)
    if gone > DEAD_SHARE * len(now.dead):
        return list(rows)
    covered = (now.meta.get("search") or {}).get("segments", [])
    if len(rows) <= MOST_SEGMENTS:
        return []
    # From small to large, while a segment is not much larger than all before it: each row is copied
    # a few times in its life.
    chosen: list[int] = []
    total = 0
    for number in sorted(
        (number for number in rows if number not in covered), key=rows.__getitem__
    ):
        if len(chosen) >= 2 and rows[number] > 2 * total:
            break
        chosen.append(number)
        total += rows[number]
    return chosen if len(chosen) > 1 else []


def _index_is_due(now: Snapshot) -> bool:
    """Whether a search index is wanted, and missing or behind."""
    if (
        not len(now)
        or _factory(len(now), int(now.meta["manifest"]["width"]), now.meta["search settings"])
        == EXACT
    ):
        return False
    covered = (now.meta.get("search") or {}).get("rows", 0)
    return len(now.dead) - covered > UNCOVERED_SHARE * covered


def _merge(writer: Writer, now: Snapshot, numbers: Sequence[int]) -> None:
    """Write the images that count of these segments into a new one, and forget the others, in one
    commit."""
    now.verify(f"segments/{number}.f32" for number in numbers)
    parts = []
    for number, table, start in zip(now.segments, now.tables, now.starts.tolist(), strict=True):
        if number in numbers:
            parts.append(start + np.flatnonzero(~now.dead[start : start + len(table)]))
    positions = np.concatenate(parts)
    search = now.meta.get("search")
    changes: dict[str, Any] = (
        {"search": None} if search and set(search["segments"]) & set(numbers) else {}
    )
    made = writer.write_vectors(_copied(now, positions)) if len(positions) else None
    with writer.commit(**changes) as db:
        if made is not None:
            writer.add_segment(*made, int(writer.meta["manifest"]["width"]))
            rows = [(made[0], row, number) for row, number in enumerate(now.ids(positions))]
            db.executemany("update image set segment = ?, row = ? where id = ?", rows)
        writer.drop_segments(numbers)
        if search and changes:
            writer.forget_file(search["file"])


def _copied(now: Snapshot, positions: Ints) -> Iterator[Rows]:
    for start in range(0, len(positions), ROWS):
        yield now.vectors(positions[start : start + ROWS])


def _make_index(writer: Writer) -> None:
    with contextlib.closing(segments.read(writer.folder)) as now:
        if not len(now):
            return
        table = now.tables[0] if len(now.tables) == 1 else np.concatenate(now.tables)
        old = now.meta.get("search")
        made = index_file(writer, table, now.segments, now.meta["search settings"])
    if made is None:
        return
    stored, search = made
    with writer.commit(search=search):
        if old:
            writer.forget_file(old["file"])
        writer.keep(stored)


def _factory(n: int, d: int, settings: dict[str, Any]) -> str:
    """The faiss factory string for n vectors of d numbers; `EXACT` where every query is compared
    with every vector."""
    asked: str = settings["factory"]
    return spec.choose(n, d, settings["memory_mb"]) if asked == "auto" else asked


def index_file(
    writer: Writer,
    table: Rows,
    numbers: Sequence[int],
    settings: dict[str, Any],
    progress: Callable[[float, str], None] | None = None,
) -> tuple[Stored, dict[str, Any]] | None:
    """Build and write a search index over `table`, the rows of the segments `numbers`; None where
    exact search serves.

    `settings` holds `factory`, `recall` and `memory_mb`, as `index.build` takes them.
    """
    factory = _factory(table.shape[0], table.shape[1], settings)
    if factory == EXACT:
        return None
    from retrieval.index import build

    made = build.build(
        table, factory=factory, recall=settings["recall"], k=MEASURED_AT, progress=progress
    )
    name = f"search/{writer.meta['generation'] + 1}.faiss"
    stored = writer.write_file(name, made.save)
    about = {
        "file": name,
        "rows": len(table),
        "segments": list(numbers),
        "spec": made.spec.to_json(),
        "words": str(made.spec),
    }
    return stored, about
