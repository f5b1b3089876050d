"""One writer at a time: a lock on a file that its holder's end gives back, however it ends."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from finetune import files
from finetune.errors import UserError


def take(file: Path, where: Path) -> sqlite3.Connection:
    """Take the lock on `file`; closing the connection gives it back. Raises `UserError` with the holder's process id.

    It is SQLite's own lock: the system drops it with its process, on every platform, so that none is ever stale. The row
    inside tells the next one who holds it. The holder may remove the file before it closes. No other code may open it:
    on POSIX, closing it anywhere in this process would drop the lock. `where` is named in errors.
    """
    while True:
        with files.disk_errors(where):
            file.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # the folder was removed again: below, that is seen
                file.touch()
        before = _inode(file)
        try:
            held = sqlite3.connect(file, timeout=0, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            if _inode(file) == before is not None:
                raise UserError(f"cannot be opened ({error})", where=file, fix="choose another folder with --out") from error
            continue
        try:
            _sign(held)
            if before is not None and _inode(file) == before:
                return held
        except sqlite3.Error as error:
            held.close()
            if before is not None and _inode(file) == before:
                raise _refusal(error, file, where) from error
        except BaseException:
            held.close()
            raise
        held.close()  # the last holder removed this file while we waited at its door: knock at the new one


def _sign(held: sqlite3.Connection) -> None:
    """Lock, leave our name, and lock again: what a transaction writes can be read only after its end."""
    held.execute("BEGIN IMMEDIATE")
    held.execute("CREATE TABLE IF NOT EXISTS writer (pid INTEGER)")
    held.execute("DELETE FROM writer")
    held.execute("INSERT INTO writer VALUES (?)", (os.getpid(),))
    held.execute("COMMIT")
    held.execute("BEGIN IMMEDIATE")


def _refusal(error: sqlite3.Error, file: Path, where: Path) -> UserError:
    if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
        return UserError(f"cannot be locked ({error})", where=file, fix="choose another folder with --out")
    holder = ""
    with contextlib.suppress(sqlite3.Error, TypeError), contextlib.closing(sqlite3.connect(file, timeout=0)) as reader:
        holder = f" (process {reader.execute('SELECT pid FROM writer').fetchone()[0]})"
    fix = "wait until it ends, or choose another folder with --out"
    return UserError(f"another process is at work here{holder}", where=where, fix=fix)


def _inode(file: Path) -> int | None:
    try:
        return file.stat().st_ino
    except FileNotFoundError:
        return None
