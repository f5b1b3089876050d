"""One writer at a time: a lock on a file that its holder's end gives back, however it ends."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune import files
from finetune.errors import UserError

AGAIN = 0.2  # seconds between two looks at a lock that another process holds


@dataclass(frozen=True)
class Wait:
    """What to do where another process is at work: wait for `seconds` at most, and tell `say` in
    one line that we do.

    `other` is another way on than to wait, as in "choose another folder with --out"; none where a
    command has none.
    """

    seconds: float = 0.0
    say: Callable[[str], None] = lambda text: None
    other: str = ""


NO_WAIT = Wait()


def take(file: Path, where: Path, wait: Wait = NO_WAIT) -> sqlite3.Connection:
    """Take the lock on `file`; closing the connection gives it back. Raises `UserError` with the
    holder's process id.

    It is SQLite's own lock: the system drops it with its process, on every platform, so that none
    is ever stale. The row inside tells the next one who holds it. The holder may remove the file
    before it closes. No other code may open it: on POSIX, closing it anywhere in this process would
    drop the lock. `where` is named in errors.
    """
    end, told = time.monotonic() + wait.seconds, False
    while True:
        try:
            if (held := _try(file, where, wait)) is not None:
                return held
        except _Held as held_by:
            if not time.monotonic() < end:  # nor where it is no number
                raise _refusal(held_by, where, wait) from held_by
            if not told:
                wait.say(
                    f"waiting    another process is at work on {where}{held_by}; "
                    f"for {wait.seconds:g} s at most"
                )
                told = True
            # Not SQLite's own waiting: it would not hear Ctrl-C.
            time.sleep(max(0.0, min(AGAIN, end - time.monotonic())))


class _Held(Exception):  # noqa: N818
    """Another process holds the lock; its text is that process, as far as it is known."""


def _try(file: Path, where: Path, wait: Wait) -> sqlite3.Connection | None:
    """The lock, or None where its file vanished meanwhile: to be tried again. Raises `_Held` where
    another has it."""
    with files.disk_errors(where):
        file.parent.mkdir(parents=True, exist_ok=True)
        # the folder was removed again: below, that is seen
        with contextlib.suppress(FileNotFoundError):
            file.touch()
    before = _inode(file)
    try:
        held = sqlite3.connect(file, timeout=0, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        if _inode(file) == before is not None:
            raise _broken("opened", error, file, wait) from error
        return None
    try:
        _sign(held)
        if before is not None and _inode(file) == before:
            return held
    except sqlite3.Error as error:
        held.close()
        if before is not None and _inode(file) == before:
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
                raise _Held(_holder(file)) from error
            raise _broken("locked", error, file, wait) from error
    except BaseException:
        held.close()
        raise
    # the last holder removed this file while we waited at its door: knock at the new one
    held.close()
    return None


def _sign(held: sqlite3.Connection) -> None:
    """Lock, leave our name, and lock again: what a transaction writes can be read only after its
    end."""
    held.execute("BEGIN IMMEDIATE")
    held.execute("CREATE TABLE IF NOT EXISTS writer (pid INTEGER)")
    held.execute("DELETE FROM writer")
    held.execute("INSERT INTO writer VALUES (?)", (os.getpid(),))
    held.execute("COMMIT")
    held.execute("BEGIN IMMEDIATE")


def _holder(file: Path) -> str:
    """Who holds the lock, as in ` (process 12)`; nothing where that cannot be read."""
    with (
        contextlib.suppress(sqlite3.Error, TypeError),
        contextlib.closing(sqlite3.connect(file, timeout=0)) as reader,
    ):
        return f" (process {reader.execute('SELECT pid FROM writer').fetchone()[0]})"
    return ""


def _refusal(held_by: _Held, where: Path, wait: Wait) -> UserError:
    still = f" still, after {wait.seconds:g} s" if wait.seconds else ""
    fix = (
        f"wait until it ends{', longer' if wait.seconds else ''}: --wait "
        f"SECONDS{wait.other and f'; or {wait.other}'}"
    )
    return UserError(f"another process is at work here{held_by}{still}", where=where, fix=fix)


def _broken(done: str, error: sqlite3.Error, file: Path, wait: Wait) -> UserError:
    """The lock's file is no lock, or cannot be written."""
    if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL:
        return UserError(
            "the disk is full",
            where=file,
            fix=f"free some space, then run the same command again"
            f"{wait.other and f'; or {wait.other}'}",
        )
    fix = (
        f"remove it while no other process is at work there, or mend its "
        f"permissions{wait.other and f'; or {wait.other}'}"
    )
    return UserError(f"this lock cannot be {done} ({error})", where=file, fix=fix)


def _inode(file: Path) -> int | None:
    try:
        return file.stat().st_ino
    except FileNotFoundError:
        return None
