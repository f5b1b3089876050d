"""The durable ground below a gallery: immutable files of vectors, and one database that says which
of them count.

A folder `photos.gallery/` holds

    gallery.sqlite      what exists: images, paths, segments, the manifest; its commits are the
                        only moments of change
    segments/N.f32      unit vectors, little-endian float32, row by row; never changed after the
                        rename that made them
    search/G.faiss      where the gallery is large: an index over some of the segments
    network/            weights and whitening that a query needs and cannot find elsewhere
    manifest.json       a copy of the manifest, for people
    writer.lock         one writer at a time

A writer makes new files durable first (file, fsync, rename, fsync of the folder), then one
transaction makes them count. What a killed writer leaves behind counts for nothing and is swept by
the next. A reader sees the gallery as of the moment when it came, whatever writers do afterwards.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune import files
from finetune.errors import UserError
from finetune.names import from_database
from retrieval.storage.database import (
    MANIFEST,
    REBUILD,
    check_rows,
    damaged_rows,
    database_errors,
    manifest_text,
    missing_files,
    open_database,
    read_meta,
    select,
)
from retrieval.vectors import Ints, Rows

VERIFIED_BYTES = (
    64_000_000  # up to here every reader checks the content of all files, beyond it their sizes
)
# up to here every reader checks the database's rows against its indexes, 15 ms for 1,000 images
CHECKED_BYTES = 1_000_000


@dataclass(frozen=True)
class Stored:
    """A file of the gallery as it was written: its name relative to the folder, its size and the
    SHA-256 of its bytes."""

    name: str
    bytes: int
    digest: str

    def check(self, folder: Path, *, content: bool) -> None:
        """Refuse a file that is not what was written. A missing one is a `FileNotFoundError`: see
        `read`."""
        path = folder / self.name
        size = path.stat().st_size
        if size != self.bytes:
            raise UserError(
                f"damaged: {size:,} bytes where {self.bytes:,} were written",
                where=path,
                fix=REBUILD,
            )
        if content and files.file_digest(path) != self.digest:
            raise UserError("damaged: its content is not what was written", where=path, fix=REBUILD)


@dataclass(frozen=True)
class Snapshot:
    """A gallery as of one moment; the open transaction of `db` keeps it so until `close`.

    Vectors have *positions*: the rows of `tables`, one segment after the other, from `starts[i]`
    on; the segments that the search index covers come first. `dead` (n,) bool marks the rows of
    removed images.
    """

    folder: Path
    db: sqlite3.Connection
    meta: dict[str, Any]
    segments: tuple[int, ...]
    tables: tuple[Rows, ...]
    starts: Ints
    dead: NDArray[np.bool_]

    def __len__(self) -> int:
        """The number of images that count."""
        return len(self.dead) - int(np.count_nonzero(self.dead))

    @property
    def generation(self) -> int:
        return int(self.meta["generation"])

    def close(self) -> None:
        self.db.close()

    def vectors(self, positions: Ints) -> Rows:
        """The vectors at `positions`, `(m, width)`."""
        out = np.empty((len(positions), int(self.meta["manifest"]["width"])), dtype=np.float32)
        owner = np.searchsorted(self.starts, positions, side="right") - 1
        for i in np.unique(owner):
            at = owner == i
            out[at] = self.tables[i][positions[at] - self.starts[i]]
        return out

    def ids(self, positions: Ints) -> list[int]:
        """Ids of the images at `positions`."""
        with damaged_rows(self.folder):
            return self._ids(positions)

    def _ids(self, positions: Ints) -> list[int]:
        found: dict[int, int] = {}
        owner = np.searchsorted(self.starts, positions, side="right") - 1
        for i in np.unique(owner).tolist():
            start = int(self.starts[i])
            rows = (positions[owner == i] - start).tolist()
            query = "select row, id from image where segment = ? and row in ({marks})"
            found.update(
                {start + row: number for row, number in self.select(query, rows, self.segments[i])}
            )
        return [found[int(p)] for p in positions]

    def positions(self, digests: Sequence[str]) -> dict[str, tuple[int, int, bool]]:
        """(id, position, whether it counts) of the contents that the gallery has a vector of."""
        start = dict(zip(self.segments, self.starts.tolist(), strict=True))
        query = "select digest, id, segment, row, alive from image where digest in ({marks})"
        found = self.select(query, [bytes.fromhex(d) for d in digests])
        with damaged_rows(self.folder):
            return {
                digest.hex(): (number, start[segment] + row, bool(alive))
                for digest, number, segment, row, alive in found
            }

    def paths(self, ids: Sequence[int]) -> dict[int, tuple[str, ...]]:
        """The paths of images, sorted."""
        return {number: tuple(sorted(files)) for number, files in self.files(ids).items()}

    def files(self, ids: Sequence[int]) -> dict[int, dict[str, tuple[int, int]]]:
        """The files of images: path → bytes and time of change, as they were when they were last
        looked at."""
        found: dict[int, dict[str, tuple[int, int]]] = {number: {} for number in ids}
        query = "select image, path, size, mtime from path where image in ({marks})"
        for number, path, size, mtime in self.select(query, list(found)):
            found[number][from_database(path)] = (size, mtime)
        return found

    def everything(self) -> tuple[Ints, Ints]:
        """(positions, ids) of all images that count, by position."""
        start = dict(zip(self.segments, self.starts.tolist(), strict=True))
        with database_errors(self.folder):
            rows = self.db.execute("select segment, row, id from image where alive = 1").fetchall()
        with damaged_rows(self.folder):
            table = np.array(
                [(start[segment] + row, number) for segment, row, number in rows], dtype=np.int64
            ).reshape(-1, 2)
        table = table[np.argsort(table[:, 0])]
        return table[:, 0], table[:, 1]

    def table(self) -> Rows:
        """The vectors of all images that count, by position; not copied where one segment holds
        exactly them."""
        if len(self.tables) == 1 and not self.dead.any():
            return self.tables[0]
        return self.vectors(np.flatnonzero(~self.dead))

    def select(self, query: str, values: Sequence[Any], *first: Any) -> list[tuple[Any, ...]]:
        """Rows of a query with `in ({marks})`, asked in parts."""
        with database_errors(self.folder):
            return select(self.db, query, values, *first)

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Read every byte of these files, or of everything. Raises `UserError` naming what is
        damaged or missing."""
        wanted = None if names is None else set(names)
        if wanted is None:
            check_rows(self.db, self.folder)
        with missing_files():
            for stored in stored_files(self.db, self.folder):
                if wanted is None or stored.name in wanted:
                    stored.check(self.folder, content=True)

    def verify_copy(self) -> None:
        """Refuse a copy of the manifest that is not the manifest: nothing reads it, but people may.

        A change that was killed at its very end leaves an old one.
        """
        copy = self.folder / MANIFEST
        try:
            word = "" if copy.read_bytes() == manifest_text(self.meta) else "another one"
        except OSError as error:
            word = (
                "missing"
                if isinstance(error, FileNotFoundError)
                else f"not readable ({error.strerror})"
            )
        if word:
            fix = "any change writes it again: `retrieve compact GALLERY`"
            raise UserError(
                f"the copy of the manifest is {word}; the gallery itself is whole",
                where=copy,
                fix=fix,
            )


def read(folder: Path) -> Snapshot:
    """The gallery in `folder`, as it is now. Raises `UserError` where there is none, and for
    damaged files."""
    before = None
    while True:
        db = open_database(folder)
        try:
            return _load(folder, db)
        except FileNotFoundError as error:
            # A writer may have swept a segment between our look at the database and at the file:
            # look again.
            (now,) = db.execute("select value from meta where key = 'generation'").fetchone()
            db.close()
            if now == before:
                raise UserError(
                    "damaged: this file is missing", where=error.filename, fix=REBUILD
                ) from error
            before = now
        except BaseException:
            db.close()
            raise


def _load(folder: Path, db: sqlite3.Connection) -> Snapshot:
    with database_errors(folder):
        meta = read_meta(db, folder)
        known = {
            number: (file, rows)
            for number, file, rows in db.execute("select number, file, rows from segment")
        }
        gone = db.execute("select segment, row from image where alive = 0").fetchall()
    check(db, folder)
    with damaged_rows(folder):
        covered = (meta.get("search") or {}).get("segments", [])
        order = (*covered, *sorted(set(known) - set(covered)))
        width = int(meta["manifest"]["width"])
        tables = tuple(
            open_table(folder / known[number][0], width, known[number][1]) for number in order
        )
        starts = np.cumsum([0, *(len(table) for table in tables)], dtype=np.int64)
        dead = np.zeros(starts[-1], dtype=np.bool_)
        begin = dict(zip(order, starts.tolist(), strict=False))
        dead[np.array([begin[segment] + row for segment, row in gone], dtype=np.int64)] = True
    return Snapshot(folder, db, meta, order, tables, starts[:-1], dead)


def is_gallery(folder: Path) -> bool:
    """Whether a finished gallery is in `folder`, damaged or not."""
    try:
        open_database(folder).close()
    except UserError as error:
        return "no gallery here" not in error.what and "no such folder" not in error.what
    return True


def stored_files(db: sqlite3.Connection, folder: Path) -> list[Stored]:
    """The files that count, as they were written."""
    with database_errors(folder):
        return [Stored(*row) for row in db.execute("select name, bytes, digest from file")]


def check(db: sqlite3.Connection, folder: Path) -> None:
    """Refuse a gallery that is not as it was written: by content, or where it is large, by the
    sizes of its files.

    Raises `UserError`, and `FileNotFoundError` for a file that is not there.
    """
    with database_errors(folder):
        (size,) = db.execute(
            "select page_count * page_size from pragma_page_count, pragma_page_size"
        ).fetchone()
    if size <= CHECKED_BYTES:
        check_rows(db, folder)
    stored = stored_files(db, folder)
    with damaged_rows(folder):
        content = sum(file.bytes for file in stored) <= VERIFIED_BYTES
        for file in stored:
            file.check(folder, content=content)


def open_table(path: Path, width: int, rows: int | None = None) -> Rows:
    """A segment's vectors `(rows, width)`, memory-mapped; a file of another size is refused."""
    size = path.stat().st_size
    rows = size // (4 * width) if rows is None else rows
    if size != rows * width * 4:
        raise UserError(
            f"damaged: it does not hold {rows:,} rows of {width} numbers", where=path, fix=REBUILD
        )
    return np.memmap(path, dtype="<f4", mode="r", shape=(rows, width))


def find_root(meta: dict[str, Any], folder: Path) -> Path:
    """The folder of the images: by its way from the gallery, so that both can move together; else
    where it was."""
    beside = (
        Path(os.path.normpath(folder.absolute() / meta["root"]["relative"]))
        if meta["root"]["relative"]
        else None
    )
    return beside if beside is not None and beside.is_dir() else Path(meta["root"]["absolute"])
