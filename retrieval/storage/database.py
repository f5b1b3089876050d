"""The database of a gallery: which files and images count, and the description of it all.

Its commits are the only moments of change. What cannot be read in it is damage, in words.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune import files
from finetune.errors import UserError, as_bytes
from finetune.names import to_database

FORMAT = 1
SEAL = "seal"  # a key of the table `meta`
DATABASE, LOCK, MANIFEST = "gallery.sqlite", "writer.lock", "manifest.json"
FOLDERS = ("segments", "search", "network")
OURS = {
    MANIFEST,
    *FOLDERS,
    *(name + end for name in (DATABASE, LOCK) for end in ("", "-wal", "-shm", "-journal")),
}
LOOKUP = 900  # bound values per query: below SQLite's limit
REBUILD = (
    "restore the gallery from a copy, or build it again: `retrieve build IMAGES -o GALLERY --force`"
)


def open_database(folder: Path) -> sqlite3.Connection:
    path = folder / DATABASE
    if not path.is_file():
        if (folder / MANIFEST).exists():  # written after the first commit
            raise UserError("damaged: this file is missing", where=path, fix=REBUILD)
        what = "no such folder" if not folder.exists() else "no gallery here"
        raise UserError(what, where=folder, fix="make one: retrieve build IMAGES -o GALLERY")
    uri = path.absolute().as_uri()
    with database_errors(folder):
        try:
            return _connect(f"{uri}?mode=ro", folder)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in (
                sqlite3.SQLITE_CANTOPEN,
                sqlite3.SQLITE_READONLY,
            ):
                raise
            # A folder that cannot be written holds no writer, so that no lock is needed.
            return _connect(f"{uri}?mode=ro&immutable=1", folder)


def _connect(uri: str, folder: Path) -> sqlite3.Connection:
    db = sqlite3.connect(uri, uri=True, timeout=30.0, isolation_level=None, check_same_thread=False)
    try:
        db.execute("begin")
        if not has_index(db):
            if (folder / MANIFEST).exists():
                raise UserError("damaged: it is empty", where=folder / DATABASE, fix=REBUILD)
            fix = "the build goes on, or was stopped: run the same `retrieve build` again"
            raise UserError("no gallery here yet: its build has not ended", where=folder, fix=fix)
    except BaseException:
        db.close()
        raise
    return db


def has_index(db: sqlite3.Connection) -> bool:
    return db.execute("select 1 from sqlite_master where name = 'meta'").fetchone() is not None


def read_meta(db: sqlite3.Connection, folder: Path) -> dict[str, Any]:
    """The values of the table `meta`; another format is refused, and what is not as it was
    written."""
    texts = dict(db.execute("select key, value from meta"))
    sealed = texts.pop(SEAL, None)
    meta = {key: json.loads(value) for key, value in texts.items()}
    if meta.get("format") != FORMAT:
        what = f"written in format {meta.get('format')}; this version reads format {FORMAT}"
        raise UserError(what, where=folder, fix="build it again with --force")
    with damaged_rows(folder):
        generation, digest = json.loads(sealed) if sealed is not None else (-1, "")
        # Version 0.1.0 keeps the seal of a generation before its own: it says nothing then.
        if generation > meta["generation"] or (
            generation == meta["generation"] and digest != seal(texts)
        ):
            raise ValueError("its description is not what was written")
    return meta


def seal(texts: dict[str, str]) -> str:
    """The digest of the table `meta`, which no index of the database guards."""
    return files.digest(*(f"{key}\0{texts[key]}".encode() for key in sorted(texts)))


def manifest_text(meta: dict[str, Any]) -> bytes:
    """The manifest as its copy holds it."""
    return (files.json_text(meta["manifest"]) + "\n").encode()


def check_rows(db: sqlite3.Connection, folder: Path) -> None:
    """Refuse a database whose pages are not in order, or whose rows are not those that its indexes
    know."""
    with database_errors(folder):
        (word,) = db.execute("pragma integrity_check(1)").fetchone()
    if word != "ok":
        raise UserError(f"damaged: {word}", where=folder / DATABASE, fix=REBUILD)


def select(
    db: sqlite3.Connection, query: str, values: Sequence[Any], *first: Any
) -> list[tuple[Any, ...]]:
    """Rows of a query that holds `in ({marks})`: asked in parts, since SQLite bounds the number of
    values."""
    found: list[tuple[Any, ...]] = []
    for i in range(0, len(values), LOOKUP):
        part = values[i : i + LOOKUP]
        found += db.execute(
            query.format(marks=",".join("?" * len(part))), (*first, *part)
        ).fetchall()
    return found


def below(path: str) -> tuple[str, list[str | bytes]]:
    """The condition that a column `path` is this path or lies below it, and its values. Names that
    are no UTF-8 are bytes."""
    start, end = f"{path}/", f"{path}0"  # 0 comes right after the slash
    ranges = [to_database(start), to_database(end), as_bytes(start), as_bytes(end)]
    return "(path = ? or (path > ? and path < ?) or (path > ? and path < ?))", [
        to_database(path),
        *ranges,
    ]


@contextlib.contextmanager
def damaged_rows(folder: Path) -> Iterator[None]:
    """Rows that contradict each other, or hold what was never written there, are damage."""
    try:
        yield
    except (LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
        words = (
            str(error)
            if type(error) is ValueError
            else f"its rows contradict each other ({error!r})"
        )
        raise UserError(f"damaged: {words}", where=folder / DATABASE, fix=REBUILD) from error


@contextlib.contextmanager
def missing_files() -> Iterator[None]:
    """A file of the gallery that is not there is damage."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(
            "damaged: this file is missing", where=error.filename, fix=REBUILD
        ) from error


@contextlib.contextmanager
def database_errors(folder: Path) -> Iterator[None]:
    """Turn SQLite's errors into a `UserError`: a full disk, a folder that cannot be written,
    damage."""
    try:
        yield
    except (sqlite3.Error, json.JSONDecodeError) as error:
        words = str(error)
        if "full" in words or "disk I/O" in words:
            what, fix = "the disk is full", "free some space, then run the same command again"
        elif "locked" in words:
            what, fix = "another process is at work here", "wait until it ends"
        elif "readonly" in words or "unable to open" in words:
            what, fix = (
                "cannot be written",
                "mend the permissions, or copy the gallery to a place of your own",
            )
        else:
            what, fix = "damaged", REBUILD
        raise UserError(f"{what} ({words})", where=folder / DATABASE, fix=fix) from error
