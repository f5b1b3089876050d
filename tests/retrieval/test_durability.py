"""Killed at any moment, a gallery is what it was before or what it became, never anything else.

A small process (the *nursery*) imports everything once and forks a child for each attempt. The
child does one operation and dies on the way: by SIGKILL at a chosen moment (before the n-th call of
a function of the standard library or of ours that touches files or the database), or by a timer
that no handler catches (then also in the middle of a write). Query, info and verification are asked
of what is left, and the operation is done again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import galleries
import numpy as np
import pytest
from galleries import ENCODER, vector_of, words, write

from finetune.errors import UserError
from retrieval import maintenance
from retrieval.gallery import Gallery
from retrieval.storage.segments import is_gallery

OPERATIONS = ("build", "rebuild", "index", "add", "sync", "compact")

pytestmark = pytest.mark.skipif(os.name == "nt", reason="kills by POSIX signals")

NURSERY = """
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import galleries, test_durability as home

galleries.install(setattr)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        os.environ["REGRAFT_CACHE"] = order["cache"]
        counter = home.Counter(order["kill at"]) if order["kill after"] is None else None
        signal.setitimer(signal.ITIMER_REAL, order["kill after"] or 0)
        begin = time.monotonic()
        home.operate(order["operation"], Path(order["base"]))
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.setprofile(None)
        told = [counter.count if counter else 0, time.monotonic() - begin]
        Path(order["base"], "measured").write_text(json.dumps(told))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)
"""


class Counter:
    """Counts the moments of this process, and kills it before the chosen one (0: never)."""

    def __init__(self, kill_at: int) -> None:
        self.count, self.kill_at = 0, kill_at
        sys.setprofile(self.see)

    def see(self, frame: object, event: str, argument: object) -> None:
        if event == "c_call" and getattr(argument, "__module__", None) in (
            None,
            "posix",
            "_io",
            "sqlite3",
        ):
            name = getattr(argument, "__qualname__", "")
        elif event == "call":
            name = frame.f_globals.get("__name__", "")  # type: ignore[attr-defined]
        else:
            return
        if name.startswith(OURS) or name in TOUCHES:
            self.count += 1
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)


OURS = (
    "retrieval",
    "finetune.files",
    "finetune.features.store",
    "finetune.lock",
    "sqlite3",
    "Connection",
    "Cursor",
)
TOUCHES = {
    "fsync",
    "rename",
    "replace",
    "unlink",
    "open",
    "mkdir",
    "write",
    "close",
    "remove",
    "rmdir",
    "chmod",
    "tofile",
}


def operate(operation: str, base: Path) -> None:
    """One operation, in this process."""
    photos, index = base / "photos", base / "photos.index"
    if operation == "build":
        maintenance.build([photos], index, ENCODER)
    elif operation == "rebuild":
        maintenance.build([photos], index, ENCODER, force=True)
    elif operation == "index":
        maintenance.build([photos], index, ENCODER, factory="HNSW8", force=True)
    elif operation == "add":
        maintenance.add(index, [base / "more"])
    elif operation == "sync":
        maintenance.sync(index)
    else:
        maintenance.compact(index)


def age(folder: Path, hours: float) -> None:
    """Let the images in the folder be that old, where they are younger."""
    then = time.time() - 3600 * hours
    for path in folder.rglob("*.png"):
        os.utime(path, (then, min(then, path.stat().st_mtime)))


def prepare(operation: str, base: Path) -> tuple[set[str] | None, set[str]]:
    """What stands before an operation; the paths of the gallery before it (None: no gallery) and
    after it.

    All files are old enough for their times to be trusted, or an operation would have more moments
    before its commit as they age, and the last one counted would no longer lie behind it.
    """
    photos, index = write(base / "photos", words(12)), base / "photos.index"
    write(base / "more", words(4, start=100))
    age(base, hours=2)
    first, more = set(words(12)), {f"../more/{name}" for name in words(4, start=100)}
    if operation == "build":
        return None, first
    maintenance.build([photos], index, ENCODER)
    if operation == "add":
        return first, first | more
    if operation == "compact":
        maintenance.add(index, [base / "more"])
        maintenance.remove(index, ["0000.png", "0001.png"])
        after = (first | more) - {"0000.png", "0001.png"}
        return after, after
    write(photos, words(3, start=50) | {"0000.png": "changed", "moved.png": "word 5"})
    (photos / "0005.png").unlink()
    (photos / "0006.png").unlink()
    age(photos, hours=1)
    return first, (first | set(words(3, start=50)) | {"moved.png"}) - {"0005.png", "0006.png"}


def found(index: Path) -> set[str] | None:
    """The paths of the gallery, after query and info have been found right; None where there is no
    gallery."""
    if not is_gallery(index):
        return None
    with Gallery(index) as gallery:
        gallery.now.verify()
        paths = dict(gallery.now.db.execute("select path, image from path").fetchall())
        assert (len(paths), len(set(paths.values()))) == tuple(
            gallery.info()[key] for key in ("paths", "images")
        )
        positions, ids = gallery.now.everything()
        assert sorted(set(paths.values())) == sorted(ids.tolist())
        contents = {number: path for path, number in paths.items()}
        for hit in gallery.search(vector_of("word 3")[None], 100)[0]:
            assert contents[hit.id] in (hit.path, *hit.also)
        (best,) = gallery.search(vector_of("word 3")[None], 1)[0]
        assert ("0003.png", pytest.approx(1.0)) == (best.path, best.score)
        for position, number in zip(positions.tolist(), ids.tolist(), strict=True):
            name = Path(contents[number]).name
            expected = [f"word {int(name[:4])}", "changed"] if name[:4].isdigit() else ["word 5"]
            vector = gallery.now.vectors(np.array([position]))[0]
            assert any(np.allclose(vector, vector_of(word), atol=1e-5) for word in expected), name
        return set(paths)


@pytest.fixture(autouse=True)
def _without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    galleries.install(monkeypatch.setattr)


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", NURSERY, str(Path(__file__).parent)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def attempt(
    nursery: subprocess.Popen[str],
    operation: str,
    base: Path,
    *,
    kill_at: int = 0,
    kill_after: float | None = None,
) -> int:
    """Let a child do it; 0, or the signal that ended it."""
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    order = {
        "operation": operation,
        "base": str(base),
        "cache": str(base / "cache"),
        "kill at": kill_at,
        "kill after": kill_after,
    }
    nursery.stdin.write(json.dumps(order) + "\n")
    nursery.stdin.flush()
    return int(nursery.stdout.readline())


class Ground:
    """A prepared state that every attempt gets a copy of; `moments` and `seconds` are those of an
    undisturbed operation."""

    def __init__(self, nursery: subprocess.Popen[str], operation: str, base: Path) -> None:
        self.nursery, self.operation, self.base = nursery, operation, base
        self.before, self.after = prepare(operation, base / "template")
        self.moments = self.measure()[0]
        self.seconds = self.measure(timed=True)[1]
        assert self.moments > 50

    def measure(self, timed: bool = False) -> tuple[int, float]:
        with self.copy() as work:
            assert 0 == attempt(
                self.nursery, self.operation, work, kill_after=1000.0 if timed else None
            )
            assert self.after == found(work / "photos.index")
            moments, seconds = json.loads((work / "measured").read_text())
            return moments, seconds

    @contextlib.contextmanager
    def copy(self) -> Iterator[Path]:
        work = self.base / "work"
        shutil.copytree(self.base / "template", work)
        yield work
        shutil.rmtree(work)

    def kill(self, **when: float) -> str:
        """One attempt with its aftermath: whether the operation has happened."""
        with self.copy() as work:
            ended = attempt(self.nursery, self.operation, work, **when)  # type: ignore[arg-type]
            assert ended in (signal.SIGKILL, signal.SIGALRM, 0)
            left = found(work / "photos.index")
            assert left in (self.before, self.after), when
            # the next one goes on; a build may have nothing to do
            with contextlib.suppress(UserError):
                operate(self.operation, work)
            assert self.after == found(work / "photos.index")
            if self.operation != "build":
                assert [] == [
                    path
                    for path in (work / "photos.index").rglob("*")
                    if path.name.endswith(".tmp")
                ]
            return "before" if left == self.before != self.after else "after"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kill_at_a_few_moments(
    nursery: subprocess.Popen[str], tmp_path: Path, operation: str
) -> None:
    """Killed at four random moments, an operation has happened or not, and the next one mends what
    is left."""
    ground = Ground(nursery, operation, tmp_path)
    for at in random.sample(range(1, ground.moments), 4):
        ground.kill(kill_at=at)


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kill_at_many_moments(
    nursery: subprocess.Popen[str], tmp_path: Path, operation: str
) -> None:
    """The same at a hundred moments, the last among them, and at a hundred times; the kills fall on
    both sides of the commit."""
    ground, chance = Ground(nursery, operation, tmp_path), random.Random(0)
    # little comes after the commit of a rebuild
    moments = [*chance.sample(range(1, ground.moments), 99), ground.moments]
    seen = {ground.kill(kill_at=at) for at in moments}
    assert {"before", "after"} - ({"before"} if operation == "compact" else set()) == seen
    for _ in range(100):
        ground.kill(kill_after=chance.uniform(0.0005, ground.seconds))


# ---------------------------------------------------------------------------------------- full disk


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_disk_fills_up_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """No space at the n-th flush, whichever: the operation has happened or not, and goes through
    when there is space."""
    before, after = prepare(operation, tmp_path / "template")
    flush = os.fsync
    for fail_at in range(1, 100):
        work = tmp_path / "work"
        shutil.copytree(tmp_path / "template", work)
        calls = []

        def full(handle: int, calls: list[int] = calls, fail_at: int = fail_at) -> None:
            calls.append(handle)
            if len(calls) == fail_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            flush(handle)

        message = ""
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                operate(operation, work)
            except UserError as error:
                message = str(error)
        assert found(work / "photos.index") in (before, after)
        assert (
            "the disk is full" in message
            or len(calls) < fail_at
            or found(work / "photos.index") == after
        )
        with contextlib.suppress(UserError):
            operate(operation, work)
        assert after == found(work / "photos.index")
        shutil.rmtree(work)
        if len(calls) < fail_at:
            break
    assert fail_at > 2
