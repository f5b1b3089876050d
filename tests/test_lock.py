"""Waiting for another process: how long, what is said meanwhile, and what to do where it does not
end."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune import lock
from finetune.errors import UserError
from finetune.lock import Wait


class Clock:
    """Time that passes only where somebody sleeps; `then` is called after so many seconds."""

    def __init__(self, after: float = 1e9, then: Callable[[], object] = lambda: None) -> None:
        self.now, self.after, self.then = 100.0, 100.0 + after, then

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert 0 < seconds <= lock.AGAIN
        self.now += seconds
        if self.now >= self.after:
            self.then()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "lock.sqlite"


@pytest.fixture
def held(file: Path) -> sqlite3.Connection:
    return lock.take(file, file.parent)


def test_who_waits_gets_the_lock_when_it_is_free(
    file: Path, held: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is taken as soon as its holder ends; that we wait, and for whom, is said once."""
    clock = Clock(after=5, then=held.close)
    monkeypatch.setattr(lock, "time", clock)
    said: list[str] = []
    lock.take(file, file.parent, Wait(60, said.append)).close()
    assert 105 <= clock.now < 106
    (line,) = said
    assert "(process " in line
    assert "60 s at most" in line


@pytest.mark.usefixtures("held")
def test_waiting_ends(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the holder does not end in time, that is said, with both ways on."""
    clock = Clock()
    monkeypatch.setattr(lock, "time", clock)
    with pytest.raises(
        UserError, match=r"(?s)still, after 7 s.*longer: --wait SECONDS; or choose another folder"
    ):
        lock.take(file, file.parent, Wait(7, other="choose another folder with --out"))
    assert clock.now == pytest.approx(107)


@pytest.mark.usefixtures("held")
def test_nobody_waits_unasked(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --wait the refusal comes at once, and names the option; a command without --out does
    not speak of it."""
    monkeypatch.setattr(lock, "time", Clock())
    said: list[str] = []
    with pytest.raises(UserError) as caught:
        lock.take(file, file.parent, Wait(say=said.append))
    assert "wait until it ends: --wait SECONDS" == caught.value.fix
    assert [] == said


def test_who_gives_up_waiting_takes_nothing(
    file: Path, held: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends the waiting at once, and leaves the lock to whom it belongs."""

    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lock, "time", Clock(after=1, then=stop))
    with pytest.raises(KeyboardInterrupt):
        lock.take(file, file.parent, Wait(60))
    monkeypatch.undo()
    with pytest.raises(UserError, match="another process"):
        lock.take(file, file.parent)
    held.close()
    lock.take(file, file.parent).close()


def test_a_full_disk_is_called_that(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the lock cannot be written for want of room, the way on is room, not permissions."""

    def full(held: sqlite3.Connection) -> None:
        held.execute("pragma max_page_count = 1")
        held.execute("create table large (x)")
        held.execute("insert into large values (randomblob(100000))")

    monkeypatch.setattr(lock, "_sign", full)
    with pytest.raises(UserError, match=r"the disk is full\n.*free some space"):
        lock.take(file, file.parent)
