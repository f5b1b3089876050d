"""The one writer of a gallery: durable files first, then one transaction that makes them count.

What a killed writer leaves behind counts for nothing, and the next one sweeps it away.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from finetune import files, lock
from finetune.errors import UserError
from finetune.lock import NO_WAIT, Wait
from finetune.names import shown
from retrieval.storage.database import (
    DATABASE,
    FOLDERS,
    FORMAT,
    LOCK,
    MANIFEST,
    OURS,
    SEAL,
    database_errors,
    has_index,
    manifest_text,
    missing_files,
    open_database,
    read_meta,
    seal,
)
from retrieval.storage.segments import Stored, check
from retrieval.vectors import Rows

SCHEMA = (
    "create table meta (key text primary key, value text not null) without rowid",
    "create table file (name text primary key, bytes integer not null, digest text not "
    "null) without rowid",
    "create table segment (number integer primary key, file text not null unique, rows "
    "integer not null)",
    # An id is never given twice, also not after its image was forgotten.
    "create table image (id integer primary key autoincrement, digest blob not null "
    "unique, segment integer not null, "
    "row integer not null, alive integer not null, unique (segment, row))",
    "create index image_dead on image (segment, row) where alive = 0",
    "create table path (path text primary key, image integer not null, size integer not "
    "null, mtime integer not null) "
    "without rowid",
    "create index path_image on path (image)",
    "create table fault (path text primary key, size integer not null, mtime integer not "
    "null, kind text not null, "
    "detail text not null) without rowid",
    "create table source (path text primary key) without rowid",
)


class Writer:
    """The one writer of a gallery, made by `writing`. Files first, then `commit`."""

    def __init__(self, folder: Path, db: sqlite3.Connection) -> None:
        self.folder, self.db = folder, db
        self.is_new = not has_index(db)
        self.meta: dict[str, Any] = (
            {"format": FORMAT, "generation": 0, "next": 1} if self.is_new else read_meta(db, folder)
        )

    def write_file(self, name: str, fill: Callable[[Path], None]) -> Stored:
        """Make a file durable: `fill` writes to the path that it gets. It counts once `commit` has
        `keep` of it."""
        path = self.folder / name
        with files.atomic(path) as temporary:
            fill(temporary)
        with files.disk_errors(path.parent):
            _sync_folder(path.parent)
        return Stored(name, path.stat().st_size, files.file_digest(path))

    def write_vectors(self, blocks: Iterable[Rows]) -> tuple[int, Stored]:
        """Write a segment of rows given in blocks `(m, width)`; returns its number and file."""
        number = int(self.meta["next"])
        # a number is never used twice: a late reader must not meet another segment's rows
        self.meta["next"] = number + 1

        def fill(temporary: Path) -> None:
            with temporary.open("wb") as file:
                for block in blocks:
                    file.write(np.ascontiguousarray(block, dtype="<f4").tobytes())

        return number, self.write_file(f"segments/{number}.f32", fill)

    @contextlib.contextmanager
    def commit(self, **changes: Any) -> Iterator[sqlite3.Connection]:
        """One transaction: what is done to the database in it, and `changes` of `meta`, become
        visible at once or not at all."""
        with database_errors(self.folder):
            self.db.execute("begin immediate")
            try:
                if self.is_new:
                    for statement in SCHEMA:
                        self.db.execute(statement)
                yield self.db
                meta = self.meta | changes | {"generation": self.meta["generation"] + 1}
                texts = {key: json.dumps(value, allow_nan=False) for key, value in meta.items()}
                texts[SEAL] = json.dumps([meta["generation"], seal(texts)])
                self.db.executemany(
                    "insert into meta (key, value) values (?, ?) on conflict "
                    "(key) do update set value = excluded.value",
                    list(texts.items()),
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

    def forget_file(self, name: str) -> None:
        """Inside `commit`: this file does not count any more."""
        self.db.execute("delete from file where name = ?", (name,))

    def add_segment(self, number: int, stored: Stored, width: int) -> None:
        """Inside `commit`: this segment counts."""
        self.keep(stored)
        row = (number, stored.name, stored.bytes // (4 * width))
        self.db.execute("insert into segment (number, file, rows) values (?, ?, ?)", row)

    def drop_segments(self, numbers: Iterable[int]) -> None:
        """Inside `commit`: these segments, and the images that are still in them, are forgotten."""
        for number in numbers:
            self.db.execute(
                "delete from file where name = (select file from segment where number = ?)",
                (number,),
            )
            self.db.execute("delete from segment where number = ?", (number,))
            self.db.execute("delete from image where segment = ?", (number,))

    def sweep(self) -> None:
        """Remove files that do not count, and bring the copy of the manifest up to date."""
        kept = (
            set() if self.is_new else {name for (name,) in self.db.execute("select name from file")}
        )
        for name in FOLDERS:
            folder = self.folder / name
            for path in folder.iterdir() if folder.is_dir() else ():
                if f"{name}/{path.name}" not in kept:
                    # on Windows, a reader may still have it open: the next one sweeps it
                    with contextlib.suppress(OSError):
                        path.unlink()
        for path in self.folder.glob(f".{MANIFEST}.*.tmp"):
            path.unlink()
        if not self.is_new:
            copy = self.folder / MANIFEST
            text = manifest_text(self.meta)
            if not copy.exists() or copy.read_bytes() != text:
                files.write_bytes(copy, text)


@contextlib.contextmanager
def writing(
    folder: Path, *, create: bool = False, replace: bool = False, wait: Wait = NO_WAIT
) -> Iterator[Writer]:
    """Become the one writer of the gallery in `folder`; with `create`, also where there is none
    yet.

    Raises `UserError` where another process is writing for longer than `wait` (with its id), and
    where there is no gallery. A first build that fails leaves nothing behind. With `replace`, a
    database that cannot be read is given up.
    """
    if create:
        _refuse_foreign(folder)
    else:
        open_database(folder).close()
    existed = folder.exists()
    held = lock.take(folder / LOCK, folder, wait)
    writer = None
    try:
        if replace and _is_damaged(folder):
            for name in OURS - {LOCK}:
                _remove(folder / name)
        writer = _open_writer(folder)
        if not create:  # a gallery that nobody could read would only seem to take images
            with missing_files():
                check(writer.db, folder)
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
        if db.execute("pragma integrity_check(1)").fetchone() != ("ok",):
            return True
        if has_index(db):
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
    """A folder that holds anything but a gallery is not ours to write into."""
    if folder.exists() and not folder.is_dir():
        raise UserError(
            "a file of this name is here", where=folder, fix="choose another name with -o"
        )
    foreign = (
        sorted(p.name for p in folder.iterdir() if p.name not in OURS) if folder.is_dir() else []
    )
    if foreign and not (folder / DATABASE).exists():
        raise UserError(
            f"not a gallery: the folder holds {shown(foreign[0])!r}",
            where=folder,
            fix="choose a new folder with -o",
        )


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
