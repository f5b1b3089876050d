"""Checksums of the rows of the feature store: CRC-32 of a row's bytes, begun with four bytes of the
content's digest.

So a row that was changed is told from what was written, and so is the row of another image under a
wrong number. The sums of a space stand in a table of their own, `BLOCK` rows a record, 0 where none
is known: earlier versions, which do not know the table, can still use the store, and the rows that
they add have no sum until this version reads them.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune import files

BLOCK = 1024  # rows a record
CHUNK = 1 << 20  # bytes of rows read at once: what fits into a CPU's cache

Sums = NDArray[np.uint32]
Numbers = NDArray[np.int64]

# The trigger serves earlier versions too: they remove spaces, whose numbers are then used again.
SCHEMA = """
create table if not exists checksums (
  space integer not null, block integer not null, sums blob not null,
  primary key (space, block)) without rowid;
create trigger if not exists checksums_go_with_their_space after delete on spaces
  begin delete from checksums where space = old.id; end;
"""


def marks(digests: files.Digests) -> Sums:
    """What the checksum of each content's row begins with: four bytes of its digest. Never 0, which
    means none."""
    return np.maximum(np.ascontiguousarray(digests.rows[:, :4]).view("<u4")[:, 0], 1)


def of_block(rows: NDArray[np.float32], marks: Sums) -> Sums:
    """The checksums of rows in memory, C-contiguous `(n, width)`. Never 0, which means that none is
    known."""
    size = rows.shape[1] * 4
    data = memoryview(rows.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    sums = [
        zlib.crc32(data[i * size : (i + 1) * size], mark) or 1
        for i, mark in enumerate(marks.tolist())
    ]
    return np.array(sums, dtype=np.uint32)


def of_rows(path: Path, width: int, rows: Numbers, marks: Sums) -> Sums:
    """The checksums of rows in a file, by ascending numbers; 0 where they cannot be read.

    They are read, not mapped: a mapped file that is cut short at this moment, or a bad disk, would
    end the process.
    """
    sums = np.zeros(len(rows), dtype=np.uint32)
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return sums
    size = width * 4
    try:
        for part in _runs(rows, max(1, CHUNK // size)):
            try:
                data = os.pread(
                    handle, (part.stop - part.start) * size, int(rows[part.start]) * size
                )
            except OSError:
                continue
            whole = len(data) // size
            table = np.frombuffer(data, dtype=np.float32, count=whole * width).reshape(whole, width)
            sums[part.start : part.start + whole] = of_block(
                table, marks[part.start : part.start + whole]
            )
    finally:
        os.close(handle)
    return sums


def _runs(rows: Numbers, most: int) -> Iterator[slice]:
    """The parts of ascending `rows` whose numbers follow each other, at most `most` in each."""
    edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    for low, high in itertools.pairwise(edges):
        yield from (slice(start, min(start + most, high)) for start in range(low, high, most))


def read(db: sqlite3.Connection, space: int, count: int) -> Sums:
    """The checksums of the first `count` rows of a space, 0 where none is known."""
    result = np.zeros((-(-count // BLOCK), BLOCK), dtype=np.uint32)
    query = "select block, sums from checksums where space = ? and block < ?"
    for block, record in db.execute(query, (space, len(result))):
        result[block] = _sums(record)
    return result.reshape(-1)[:count]


def _sums(record: object) -> Sums:
    if not isinstance(record, bytes) or len(record) != BLOCK * 4:
        return np.zeros(BLOCK, dtype=np.uint32)
    return np.frombuffer(record, dtype="<u4").astype(np.uint32)


def put(db: sqlite3.Connection, space: int, rows: Numbers, sums: Sums, *, over: bool) -> None:
    """Note the checksums of `rows`, `over` those that are there or only where none is; in the
    caller's transaction."""
    if not len(rows):
        return
    order = np.argsort(rows, kind="stable")
    rows, sums = rows[order], sums[order]
    blocks, starts = np.unique(rows // BLOCK, return_index=True)
    ends = [*starts[1:].tolist(), len(rows)]
    for block, start, end in zip(blocks.tolist(), starts.tolist(), ends, strict=True):
        here = slice(start, end)
        found = db.execute(
            "select sums from checksums where space = ? and block = ?", (space, block)
        ).fetchone()
        record = _sums(found[0] if found else None)
        at = rows[here] % BLOCK
        record[at] = np.where(over | (record[at] == 0), sums[here], record[at])
        data = record.astype("<u4").tobytes()
        db.execute(
            "insert or replace into checksums (space, block, sums) values (?, ?, ?)",
            (space, block, data),
        )


def cut(db: sqlite3.Connection, space: int, count: int) -> None:
    """Forget the checksums of all rows from number `count` on; in the caller's transaction."""
    db.execute("delete from checksums where space = ? and block > ?", (space, count // BLOCK))
    rest = np.arange(count, (count // BLOCK + 1) * BLOCK)
    put(db, space, rest, np.zeros(len(rest), dtype=np.uint32), over=True)
