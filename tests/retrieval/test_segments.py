"""The ground below a gallery: files that never change, one commit point, one writer, readers that
see one moment."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from finetune.errors import UserError
from retrieval.storage import segments, writer
from retrieval.storage.database import DATABASE
from retrieval.storage.segments import read
from retrieval.storage.writer import Writer, writing
from retrieval.vectors import Rows

WIDTH = 4
META = {
    "manifest": {"width": WIDTH},
    "root": {"absolute": "/nowhere", "relative": ""},
    "search": None,
}


def rows(count: int, start: int = 0) -> Rows:
    return np.arange(start, start + count, dtype=np.float32)[:, None] + np.zeros(WIDTH, np.float32)


def append(at: Writer, table: Rows, **meta: object) -> int:
    """Add a segment whose images have made-up digests and paths, in one commit."""
    number, stored = at.write_vectors([table])
    with at.commit(**META, **meta) as db:
        at.add_segment(number, stored, WIDTH)
        for row in range(len(table)):
            digest = bytes([number, row]) * 16
            image = db.execute(
                "insert into image (digest, segment, row, alive) values (?, ?, ?, 1)",
                (digest, number, row),
            ).lastrowid
            db.execute(
                "insert into path (path, image, size, mtime) values (?, ?, 1, 1)",
                (f"{number}/{row}.png", image),
            )
    return number


def bury(at: Writer, ids: list[int]) -> None:
    with at.commit() as db:
        db.executemany("update image set alive = 0 where id = ?", [(number,) for number in ids])


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """An index of two segments, of 3 and 2 rows."""
    folder = tmp_path / "photos.index"
    with writing(folder, create=True) as at:
        append(at, rows(3))
        append(at, rows(2, start=10))
    return folder


def refusal(call: object, *args: object, **how: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **how)  # type: ignore[operator]
    return str(caught.value)


def enter(folder: Path, **how: bool) -> None:
    with writing(folder, **how):
        pass


# ------------------------------------------------------------------------------------------ reading


def test_positions_run_through_the_segments(index: Path) -> None:
    """A position is a row of the segments one after the other; vectors and ids follow it, in the
    order asked for."""
    with contextlib.closing(read(index)) as now:
        assert (5, [0, 3]) == (len(now), now.starts.tolist())
        at = np.array([4, 0, 3])
        assert [11.0, 0.0, 10.0] == now.vectors(at)[:, 0].tolist()
        assert [5, 1, 4] == now.ids(at)
        assert {4: ("2/0.png",)} == now.paths([4])
        assert {(bytes([2, 1]) * 16).hex(): (5, 4, True)} == now.positions(
            [(bytes([2, 1]) * 16).hex(), "00" * 32]
        )


def test_removed_images_are_dead_rows(index: Path) -> None:
    """A removed image keeps its row until its segment is merged, and does not count."""
    with writing(index) as at:
        bury(at, [2, 5])
    with contextlib.closing(read(index)) as now:
        assert [False, True, False, False, True] == now.dead.tolist()
        positions, ids = now.everything()
        assert (3, [0, 2, 3], [1, 3, 4]) == (len(now), positions.tolist(), ids.tolist())


def test_covered_segments_come_first(index: Path) -> None:
    """Positions begin with the segments that the search index covers, in its order."""
    with writing(index) as at, at.commit(search={"segments": [2], "file": "search/9.faiss"}):
        pass
    with contextlib.closing(read(index)) as now:
        assert ((2, 1), [10.0, 0.0]) == (
            now.segments,
            [float(now.vectors(np.array([p]))[0, 0]) for p in (0, 2)],
        )


def test_vectors_are_not_copied_into_memory(index: Path) -> None:
    """Segments are memory-mapped, read-only."""
    with contextlib.closing(read(index)) as now:
        assert all(
            isinstance(table, np.memmap) and not table.flags.writeable for table in now.tables
        )


def test_nothing_there_is_said(tmp_path: Path) -> None:
    """A missing folder, an empty one and an unfinished build are told apart, each with what to
    do."""
    assert "no such folder" in refusal(read, tmp_path / "x.index")
    assert "no gallery here\n" in refusal(read, tmp_path)
    sqlite3.connect(tmp_path / DATABASE).execute("pragma journal_mode=wal").connection.close()
    assert "its build has not ended" in refusal(read, tmp_path)


def test_a_reader_sees_one_moment(index: Path) -> None:
    """What a writer commits, merges and sweeps while a reader is at work changes nothing for the
    reader."""
    with contextlib.closing(read(index)) as before:
        with writing(index) as at:
            append(at, rows(1, start=20))
            with at.commit() as db:
                at.drop_segments([1, 2])
                db.execute("delete from path where image <> 6")
        assert not (index / "segments" / "1.f32").exists()
        assert [0.0, 1.0, 2.0, 10.0, 11.0] == before.vectors(np.arange(5))[:, 0].tolist()
        assert [1, 2, 3, 4, 5] == before.ids(np.arange(5))
        assert ("1/0.png",) == before.paths([1])[1]
    with contextlib.closing(read(index)) as after:
        assert [6] == after.ids(np.arange(1))


def test_a_reader_sees_nothing_of_an_open_transaction(index: Path) -> None:
    """Between a writer's first statement and its commit, readers come and see what was before."""
    with writing(index) as at, at.commit() as db:
        db.execute("delete from path")
        db.execute("delete from image")
        with contextlib.closing(read(index)) as now:
            assert (5, ("1/0.png",)) == (len(now), now.paths([1])[1])


def test_a_reader_that_comes_between_looks_again(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge between a reader's look at the database and at the files is no damage: the reader
    looks again."""
    load, calls = segments._load, []

    def late(folder: Path, db: sqlite3.Connection) -> segments.Snapshot:
        calls.append(1)
        if len(calls) == 1:
            db.execute("select * from meta").fetchall()  # the snapshot is taken here
            with writing(index) as at:
                append(at, rows(1, start=20))
                with at.commit():
                    at.drop_segments([1, 2])
        return load(folder, db)

    monkeypatch.setattr(segments, "_load", late)
    with contextlib.closing(read(index)) as now:
        assert (2, 1) == (len(calls), len(now))


# ------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("harm", ["cut", "changed", "missing"])
def test_a_damaged_segment_is_refused_by_name(index: Path, harm: str) -> None:
    """A segment that is shorter, different or gone is refused, and the message names it."""
    path = index / "segments" / "2.f32"
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif harm == "changed":
        path.write_bytes(b"\x01" + path.read_bytes()[1:])
    else:
        path.unlink()
    message = refusal(read, index)
    assert all(part in message for part in (str(path), "damaged", "--force"))


def test_large_galleries_are_checked_by_size(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond `VERIFIED_BYTES` a reader checks sizes alone, and `verify` still reads every byte."""
    monkeypatch.setattr(segments, "VERIFIED_BYTES", 10)
    path = index / "segments" / "2.f32"
    path.write_bytes(b"\x01" + path.read_bytes()[1:])
    with contextlib.closing(read(index)) as now:
        now.verify(["segments/1.f32"])
        assert str(path) in refusal(now.verify)
    path.write_bytes(b"short")
    assert str(path) in refusal(read, index)


@pytest.mark.parametrize("content", [b"not a database" * 99, b""])
def test_a_damaged_database_is_refused(index: Path, content: bytes) -> None:
    """A database that is none is refused by readers and writers, and given up only where it is to
    be replaced."""
    for end in ("-wal", "-shm"):
        (index / f"{DATABASE}{end}").unlink(missing_ok=True)
    (index / DATABASE).write_bytes(content)
    assert DATABASE in refusal(read, index) or "not ended" in refusal(read, index)
    refusal(enter, index)
    with writing(index, create=True, replace=True) as at:
        append(at, rows(1))
    with contextlib.closing(read(index)) as now:
        assert 1 == len(now)


def test_a_page_of_the_database_is_damaged(index: Path) -> None:
    """Garbage inside the database ends in a `UserError`, whatever it hits."""
    path = index / DATABASE
    data = bytearray(path.read_bytes())
    for page in range(1, len(data) // 4096):
        data[page * 4096 : page * 4096 + 64] = b"\xff" * 64
    path.write_bytes(bytes(data))
    assert "damaged" in refusal(read, index)


def test_another_format_is_refused(index: Path) -> None:
    """An index of a later format is refused with both numbers."""
    with contextlib.closing(sqlite3.connect(index / DATABASE)) as db:
        db.execute("update meta set value = '99' where key = 'format'")
        db.commit()
    assert "format 99" in refusal(read, index)
    assert "format 99" in refusal(enter, index)


# ------------------------------------------------------------------------------------------ writing


def test_a_commit_is_all_or_nothing(index: Path) -> None:
    """What fails inside a commit leaves what was before, and its files are swept."""
    with pytest.raises(RuntimeError, match="in the middle"):
        fail_in_the_middle(index)
    with contextlib.closing(read(index)) as now:
        assert (5, "/nowhere", ("1/0.png",)) == (
            len(now),
            now.meta["root"]["absolute"],
            now.paths([1])[1],
        )
    enter(index)
    assert {"1.f32", "2.f32"} == {path.name for path in (index / "segments").iterdir()}


def fail_in_the_middle(index: Path) -> None:
    with writing(index) as at:
        number, stored = at.write_vectors([rows(2)])
        with at.commit(root="elsewhere") as db:
            at.add_segment(number, stored, WIDTH)
            db.execute("delete from path")
            raise RuntimeError("in the middle")


def test_leftovers_are_swept(index: Path) -> None:
    """The next writer removes what does not count: segments, search indexes, weights, half-written
    files."""
    left = [
        index / name
        for name in (
            "segments/7.f32",
            "segments/.8.f32.x.tmp",
            "search/3.faiss",
            "network/m.safetensors",
        )
    ]
    for path in [*left, index / ".manifest.json.abc.tmp"]:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"left behind")
    enter(index)
    assert not any(path.exists() for path in left)
    assert [] == list(index.glob(".*"))


def test_a_number_is_never_used_twice(index: Path) -> None:
    """A segment that was dropped does not give its number to the next one, nor an image its id."""
    with writing(index) as at:
        with at.commit() as db:
            at.drop_segments([2])
            db.execute("delete from path where image > 3")
        assert 3 == append(at, rows(1))
    with contextlib.closing(read(index)) as now:
        assert [6] == now.ids(np.array([3]))


def test_the_copy_of_the_manifest_follows(index: Path) -> None:
    """`manifest.json` is a copy for people: the next writer mends it."""
    (index / "manifest.json").write_text("something else")
    enter(index)
    assert {"width": WIDTH} == json.loads((index / "manifest.json").read_text())


def test_two_writers_one_process(index: Path) -> None:
    """While one writer is at work, another is refused with the process id; then it may."""
    with writing(index):
        assert f"(process {os.getpid()})" in refusal(enter, index)
    enter(index)


def test_two_writers_two_processes(index: Path) -> None:
    """A writer in another process is named by its id, and readers are not held up."""
    code = (
        "import pathlib, sys; from retrieval.storage.writer import writing\n"
        "with writing(pathlib.Path(sys.argv[1])): print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(index)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert "1\n" == other.stdout.readline()
        assert f"(process {other.pid})" in refusal(enter, index)
        with contextlib.closing(read(index)) as now:
            assert 5 == len(now)
        other.communicate("\n")
    enter(index)


def test_a_first_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """An index that never came to be leaves no folder behind, and an empty folder that was there
    stays."""
    for folder in (tmp_path / "new.index", tmp_path):
        assert "no images" in refusal(fail_to_build, folder)
    assert [] == list(tmp_path.iterdir())


def fail_to_build(folder: Path) -> None:
    with writing(folder, create=True) as at:
        at.write_vectors([rows(1)])
        raise UserError("no images")


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    """A folder with anything else in it, and a file, are no places for an index."""
    (tmp_path / "thesis.tex").write_text("precious")
    assert "thesis.tex" in refusal(enter, tmp_path, create=True)
    assert "a file of this name" in refusal(enter, tmp_path / "thesis.tex", create=True)
    assert "no gallery here" in refusal(enter, tmp_path)
    assert ["thesis.tex"] == [path.name for path in tmp_path.iterdir()]


# ---------------------------------------------------------------------------------------- full disk


@pytest.mark.parametrize("call", ["fsync", "write"])
def test_the_disk_is_full_for_a_segment(
    index: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """No space for a segment: a `UserError`, and the index is what it was."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if call == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(np, "ascontiguousarray", full)
        with writing(index) as at:
            assert "the disk is full" in refusal(at.write_vectors, [rows(2)])
    with contextlib.closing(read(index)) as now:
        now.verify()
        assert 5 == len(now)
    assert {"1.f32", "2.f32"} == {path.name for path in (index / "segments").iterdir()}


@pytest.fixture
def small_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite may not grow by a page: for it, the disk is full."""
    begin = Writer.commit

    @contextlib.contextmanager
    def commit(self: Writer, **changes: object) -> Iterator[sqlite3.Connection]:
        (pages,) = self.db.execute("pragma page_count").fetchone()
        self.db.execute(f"pragma max_page_count = {pages}")
        with begin(self, **changes) as db:
            yield db

    monkeypatch.setattr(writer.Writer, "commit", commit)


def test_the_disk_is_full_for_the_database(index: Path, small_database: None) -> None:
    """No space for the commit: a `UserError`, and the index is what it was."""
    assert "the disk is full" in refusal(fill_up, index)
    with contextlib.closing(read(index)) as now:
        now.verify()
        assert (5, ("1/0.png",)) == (len(now), now.paths([1])[1])


def fill_up(index: Path) -> None:
    with writing(index) as at, at.commit() as db:
        db.execute("delete from path")
        for i in range(2000):
            db.execute(
                "insert into path (path, image, size, mtime) values (?, 1, 1, 1)", (f"{i}" * 20,)
            )
