"""The durable ground below a gallery: immutable files of vectors, and one database that says which of them count.

A folder `photos.index/` holds

    gallery.sqlite      what exists: images, paths, segments, the manifest; its commits are the only moments of change
    segments/N.f32      unit vectors, little-endian float32, row by row; never changed after the rename that made them
    search/G.faiss      where the gallery is large: an index over some of the segments
    network/            weights and whitening that a query needs and cannot find elsewhere
    manifest.json       a copy of the manifest, for people
    writer.lock         one writer at a time

A writer makes new files durable first (file, fsync, rename, fsync of the folder), then one transaction makes them count.
What a killed writer leaves behind counts for nothing and is swept by the next. A reader sees the gallery as of the moment
when it came, whatever writers do afterwards.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune import files, lock
from finetune.errors import UserError

FORMAT = 1
DATABASE, LOCK, MANIFEST = "gallery.sqlite", "writer.lock", "manifest.json"
FOLDERS = ("segments", "search", "network")
OURS = {MANIFEST, *FOLDERS, *(name + end for name in (DATABASE, LOCK) for end in ("", "-wal", "-shm", "-journal"))}
VERIFIED_BYTES = 64_000_000  # up to here every reader checks the content of all files, beyond it their sizes
LOOKUP = 900  # bound values a query: below SQLite's limit
REBUILD = "restore it from a copy, or build it again with --force"

Rows = NDArray[np.float32]
Ints = NDArray[np.int64]

SCHEMA = (
    "create table meta (key text primary key, value text not null) without rowid",
    "create table file (name text primary key, bytes integer not null, digest text not null) without rowid",
    "create table segment (number integer primary key, file text not null unique, rows integer not null)",
    # An id is never given twice, also not after its image was forgotten.
    "create table image (id integer primary key autoincrement, digest blob not null unique, segment integer not null, "
    "row integer not null, alive integer not null, unique (segment, row))",
    "create index image_dead on image (segment, row) where alive = 0",
    "create table path (path text primary key, image integer not null, size integer not null, mtime integer not null) without rowid",
    "create index path_image on path (image)",
    "create table fault (path text primary key, size integer not null, mtime integer not null, kind text not null, "
    "detail text not null) without rowid",
    "create table source (path text primary key) without rowid",
)


@dataclass(frozen=True)
class Stored:
    """A file of the gallery as it was written: its name relative to the folder, its size and the SHA-256 of its bytes."""

    name: str
    bytes: int
    digest: str

    def check(self, folder: Path, *, content: bool) -> None:
        """Refuse a file that is not what was written. A missing one is a `FileNotFoundError`: see `read`."""
        path = folder / self.name
        size = path.stat().st_size
        if size != self.bytes:
            raise UserError(f"damaged: {size:,} bytes where {self.bytes:,} were written", where=path, fix=REBUILD)
        if content and files.file_digest(path) != self.digest:
            raise UserError("damaged: its content is not what was written", where=path, fix=REBUILD)


# ------------------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Snapshot:
    """A gallery as of one moment; the open transaction of `db` keeps it so until `close`.

    Vectors have *positions*: the rows of `tables`, one segment after the other, from `starts[i]` on; the segments that
    the search index covers come first. `dead` (n,) bool marks the rows of removed images.
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
        found: dict[int, int] = {}
        owner = np.searchsorted(self.starts, positions, side="right") - 1
        for i in np.unique(owner).tolist():
            start = int(self.starts[i])
            rows = (positions[owner == i] - start).tolist()
            query = "select row, id from image where segment = ? and row in ({marks})"
            found.update({start + row: number for row, number in self.select(query, rows, self.segments[i])})
        return [found[int(p)] for p in positions]

    def positions(self, digests: Sequence[str]) -> dict[str, tuple[int, int, bool]]:
        """(id, position, whether it counts) of the contents that the gallery has a vector of."""
        start = dict(zip(self.segments, self.starts.tolist(), strict=True))
        query = "select digest, id, segment, row, alive from image where digest in ({marks})"
        found = self.select(query, [bytes.fromhex(d) for d in digests])
        return {digest.hex(): (number, start[segment] + row, bool(alive)) for digest, number, segment, row, alive in found}

    def paths(self, ids: Sequence[int]) -> dict[int, tuple[str, ...]]:
        """The paths of images, sorted."""
        found: dict[int, list[str]] = {number: [] for number in ids}
        for number, path in self.select("select image, path from path where image in ({marks}) order by path", list(found)):
            found[number].append(path)
        return {number: tuple(sorted(paths)) for number, paths in found.items()}

    def everything(self) -> tuple[Ints, Ints]:
        """(positions, ids) of all images that count, by position."""
        start = dict(zip(self.segments, self.starts.tolist(), strict=True))
        with database_errors(self.folder):
            rows = self.db.execute("select segment, row, id from image where alive = 1").fetchall()
        table = np.array([(start[segment] + row, number) for segment, row, number in rows], dtype=np.int64).reshape(-1, 2)
        table = table[np.argsort(table[:, 0])]
        return table[:, 0], table[:, 1]

    def select(self, query: str, values: Sequence[Any], *first: Any) -> list[tuple[Any, ...]]:
        """Rows of a query with `in ({marks})`, asked in parts."""
        with database_errors(self.folder):
            return select(self.db, query, values, *first)

    def verify(self) -> None:
        """Read every byte: database and files. Raises `UserError` naming what is damaged."""
        with database_errors(self.folder):
            (word,) = self.db.execute("pragma quick_check(1)").fetchone()
            known = [Stored(*row) for row in self.db.execute("select name, bytes, digest from file")]
        if word != "ok":
            raise UserError(f"damaged: {word}", where=self.folder / DATABASE, fix=REBUILD)
        for stored in known:
            stored.check(self.folder, content=True)


def read(folder: Path) -> Snapshot:
    """The gallery in `folder`, as it is now. Raises `UserError` where there is none, and for damaged files."""
    before = None
    while True:
        db = _open_reader(folder)
        try:
            return _load(folder, db)
        except FileNotFoundError as error:
            # A writer may have swept a segment between our look at the database and at the file: look again.
            (now,) = db.execute("select value from meta where key = 'generation'").fetchone()
            db.close()
            if now == before:
                raise UserError("damaged: this file is missing", where=error.filename, fix=REBUILD) from error
            before = now
        except BaseException:
            db.close()
            raise


def _open_reader(folder: Path) -> sqlite3.Connection:
    path = folder / DATABASE
    if not path.is_file():
        what = "no such folder" if not folder.exists() else "no index here"
        raise UserError(what, where=folder, fix="make one: retrieve build IMAGES -o INDEX")
    uri = path.absolute().as_uri()
    with database_errors(folder):
        try:
            return _connect(f"{uri}?mode=ro", folder)
        except sqlite3.OperationalError:  # a folder that cannot be written holds no writer: it needs no lock
            return _connect(f"{uri}?mode=ro&immutable=1", folder)


def _connect(uri: str, folder: Path) -> sqlite3.Connection:
    db = sqlite3.connect(uri, uri=True, timeout=30.0, isolation_level=None, check_same_thread=False)
    try:
        db.execute("begin")
        if not _has_index(db):
            fix = "the build goes on, or was stopped: run the same `retrieve build` again"
            raise UserError("no index here yet: its build has not ended", where=folder, fix=fix)
    except BaseException:
        db.close()
        raise
    return db


def _has_index(db: sqlite3.Connection) -> bool:
    return db.execute("select 1 from sqlite_master where name = 'meta'").fetchone() is not None


def _load(folder: Path, db: sqlite3.Connection) -> Snapshot:
    with database_errors(folder):
        meta = read_meta(db, folder)
        stored = [Stored(*row) for row in db.execute("select name, bytes, digest from file")]
        known = {number: (file, rows) for number, file, rows in db.execute("select number, file, rows from segment")}
        gone = db.execute("select segment, row from image where alive = 0").fetchall()
    content = sum(file.bytes for file in stored) <= VERIFIED_BYTES
    for file in stored:
        file.check(folder, content=content)
    covered = (meta.get("search") or {}).get("segments", [])
    order = (*covered, *sorted(set(known) - set(covered)))
    width = int(meta["manifest"]["width"])
    tables = tuple(_map(folder / known[number][0], known[number][1], width) for number in order)
    starts = np.cumsum([0, *(len(table) for table in tables)], dtype=np.int64)
    dead = np.zeros(starts[-1], dtype=np.bool_)
    begin = dict(zip(order, starts.tolist(), strict=False))
    dead[np.array([begin[segment] + row for segment, row in gone], dtype=np.int64)] = True
    return Snapshot(folder, db, meta, order, tables, starts[:-1], dead)


def _map(path: Path, rows: int, width: int) -> Rows:
    if path.stat().st_size != rows * width * 4:
        raise UserError(f"damaged: it does not hold {rows:,} rows of {width} numbers", where=path, fix=REBUILD)
    return np.memmap(path, dtype="<f4", mode="r", shape=(rows, width))


def select(db: sqlite3.Connection, query: str, values: Sequence[Any], *first: Any) -> list[tuple[Any, ...]]:
    """Rows of a query that holds `in ({marks})`: asked in parts, since SQLite bounds the number of values."""
    found: list[tuple[Any, ...]] = []
    for i in range(0, len(values), LOOKUP):
        part = values[i : i + LOOKUP]
        found += db.execute(query.format(marks=",".join("?" * len(part))), (*first, *part)).fetchall()
    return found


def read_meta(db: sqlite3.Connection, folder: Path) -> dict[str, Any]:
    """The values of the table `meta`; another format is refused."""
    meta = {key: json.loads(value) for key, value in db.execute("select key, value from meta")}
    if meta.get("format") != FORMAT:
        what = f"written in format {meta.get('format')}; this version reads format {FORMAT}"
        raise UserError(what, where=folder, fix="build it again with --force")
    return meta


@contextlib.contextmanager
def database_errors(folder: Path) -> Iterator[None]:
    """Turn SQLite's errors into a `UserError`: a full disk, a folder that cannot be written, damage."""
    try:
        yield
    except (sqlite3.Error, json.JSONDecodeError) as error:
        words = str(error)
        if "full" in words or "disk I/O" in words:
            what, fix = "the disk is full", "free some space, then run the same command again"
        elif "locked" in words:
            what, fix = "another process is at work here", "wait until it ends"
        elif "readonly" in words or "unable to open" in words:
            what, fix = "cannot be written", "mend the permissions, or copy the index to a place of your own"
        else:
            what, fix = "damaged", REBUILD
        raise UserError(f"{what} ({words})", where=folder / DATABASE, fix=fix) from error


# ------------------------------------------------------------------------------------------------------------ writing


class Writer:
    """The one writer of a gallery, made by `writing`. Files first, then `commit`."""

    def __init__(self, folder: Path, db: sqlite3.Connection) -> None:
        self.folder, self.db = folder, db
        self.is_new = not _has_index(db)
        self.meta: dict[str, Any] = {"format": FORMAT, "generation": 0, "next": 1} if self.is_new else read_meta(db, folder)

    def write_file(self, name: str, fill: Callable[[Path], None]) -> Stored:
        """Make a file durable: `fill` writes to the path that it gets. It counts once `commit` has `keep` of it."""
        path = self.folder / name
        with files.atomic(path) as temporary:
            fill(temporary)
        _sync_folder(path.parent)
        return Stored(name, path.stat().st_size, files.file_digest(path))

    def write_vectors(self, blocks: Iterable[Rows]) -> tuple[int, Stored]:
        """Write a segment of rows given in blocks `(m, width)`; returns its number and file."""
        number = int(self.meta["next"])
        self.meta["next"] = number + 1  # a number is never used twice: a late reader must not meet another segment's rows

        def fill(temporary: Path) -> None:
            with temporary.open("wb") as file:
                for block in blocks:
                    file.write(np.ascontiguousarray(block, dtype="<f4").tobytes())

        return number, self.write_file(f"segments/{number}.f32", fill)

    @contextlib.contextmanager
    def commit(self, **changes: Any) -> Iterator[sqlite3.Connection]:
        """One transaction: what is done to the database in it, and `changes` of `meta`, become visible at once or not at all."""
        with database_errors(self.folder):
            self.db.execute("begin immediate")
            try:
                if self.is_new:
                    for statement in SCHEMA:
                        self.db.execute(statement)
                yield self.db
                meta = self.meta | changes | {"generation": self.meta["generation"] + 1}
                self.db.executemany(
                    "insert into meta (key, value) values (?, ?) on conflict (key) do update set value = excluded.value",
                    [(key, json.dumps(value, ensure_ascii=False, allow_nan=False)) for key, value in meta.items()],
                )
                self.db.execute("commit")
            except BaseException:
                if self.db.in_transaction:
                    self.db.execute("rollback")
                raise
            self.meta, self.is_new = meta, False

    def keep(self, stored: Stored) -> None:
        """Inside `commit`: this file counts."""
        row = (stored.name, stored.bytes, stored.digest)
        self.db.execute("insert or replace into file (name, bytes, digest) values (?, ?, ?)", row)

    def add_segment(self, number: int, stored: Stored, width: int) -> None:
        """Inside `commit`: this segment counts."""
        self.keep(stored)
        row = (number, stored.name, stored.bytes // (4 * width))
        self.db.execute("insert into segment (number, file, rows) values (?, ?, ?)", row)

    def drop_segments(self, numbers: Iterable[int]) -> None:
        """Inside `commit`: these segments, and the images that are still in them, are forgotten."""
        for number in numbers:
            self.db.execute("delete from file where name = (select file from segment where number = ?)", (number,))
            self.db.execute("delete from segment where number = ?", (number,))
            self.db.execute("delete from image where segment = ?", (number,))

    def sweep(self) -> None:
        """Remove files that do not count, and bring the copy of the manifest up to date."""
        kept = set() if self.is_new else {name for (name,) in self.db.execute("select name from file")}
        for name in FOLDERS:
            folder = self.folder / name
            for path in folder.iterdir() if folder.is_dir() else ():
                if f"{name}/{path.name}" not in kept:
                    with contextlib.suppress(OSError):  # on Windows, a reader may still have it open: the next one sweeps it
                        path.unlink()
        for path in self.folder.glob(f".{MANIFEST}.*.tmp"):
            path.unlink()
        if not self.is_new:
            copy = self.folder / MANIFEST
            text = json.dumps(self.meta["manifest"], indent=2, ensure_ascii=False) + "\n"
            if not copy.exists() or copy.read_text(encoding="utf-8") != text:
                files.write_text(copy, text)


@contextlib.contextmanager
def writing(folder: Path, *, create: bool = False, replace: bool = False) -> Iterator[Writer]:
    """Become the one writer of the gallery in `folder`; with `create`, also where there is none yet.

    Raises `UserError` where another process is writing (with its id), and where there is no gallery. A first build that
    fails leaves nothing behind. With `replace`, a database that cannot be read is given up.
    """
    if create:
        _refuse_foreign(folder)
    else:
        _open_reader(folder).close()
    existed = folder.exists()
    held = lock.take(folder / LOCK, folder)
    writer = None
    try:
        if replace and _is_damaged(folder):
            for name in OURS - {LOCK}:
                _remove(folder / name)
        writer = _open_writer(folder)
        yield writer
        writer.sweep()
    finally:
        if writer is not None:
            writer.db.close()
            if writer.is_new:
                _remove_unborn(folder, existed)
        held.close()


def _open_writer(folder: Path) -> Writer:
    with database_errors(folder):
        db = sqlite3.connect(folder / DATABASE, timeout=30.0, isolation_level=None)
        try:
            db.execute("pragma journal_mode=wal")
            db.execute("pragma synchronous=full")
            writer = Writer(folder, db)
            writer.sweep()
        except BaseException:
            db.close()
            raise
    return writer


def _is_damaged(folder: Path) -> bool:
    """Whether the database, if there is one, cannot be read by this version."""
    db = sqlite3.connect(folder / DATABASE, timeout=30.0, isolation_level=None)
    try:
        if db.execute("pragma quick_check(1)").fetchone() != ("ok",):
            return True
        if _has_index(db):
            read_meta(db, folder)
    except sqlite3.OperationalError:  # a full disk, a lock: no damage
        return False
    except (sqlite3.DatabaseError, ValueError, UserError):
        return True
    finally:
        db.close()
    return False


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove_unborn(folder: Path, existed: bool) -> None:
    for name in OURS:
        _remove(folder / name)
    if not existed:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _refuse_foreign(folder: Path) -> None:
    """A folder that holds anything but an index is not ours to write into."""
    if folder.exists() and not folder.is_dir():
        raise UserError("a file of this name is here", where=folder, fix="choose another name with -o")
    foreign = sorted(p.name for p in folder.iterdir() if p.name not in OURS) if folder.is_dir() else []
    if foreign and not (folder / DATABASE).exists():
        raise UserError(f"not an index: the folder holds {foreign[0]!r}", where=folder, fix="choose a new folder with -o")


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
