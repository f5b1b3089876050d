"""The feature store: rows by content, whole or not at all, whoever writes at the same time and
whatever is killed."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import odd
import pytest
from numpy.typing import NDArray

from finetune import files
from finetune.errors import UserError
from finetune.features import store as home
from finetune.features.store import Space, Store

WIDTH = 6
ABOUT = {"backbone": "tiny", "tap": "pooled", "precision": "float32"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in a folder of its own."""
    opened = Store(tmp_path / "features")
    yield opened
    opened.close()


def ids(*numbers: int) -> list[str]:
    return [files.digest(str(number)) for number in numbers]


def rows(*numbers: int, width: int = WIDTH) -> NDArray[np.float32]:
    """The row of content `n` is n, n + 1, …: any mix-up shows."""
    return np.array([[n + j for j in range(width)] for n in numbers], dtype=np.float32).reshape(
        len(numbers), width
    )


def found(store: Store, space: Space, *numbers: int) -> NDArray[np.float32]:
    return np.array(store.read(space, ids(*numbers)))


# ------------------------------------------------------------------------------------- what is kept


def test_rows_come_back_by_content_in_the_order_asked_for(store: Store) -> None:
    """Written in one order, read in another, with a repetition."""
    space = store.space(ABOUT, WIDTH)
    store.append([space], ids(3, 1, 2), [rows(3, 1, 2)])

    assert rows(2, 3, 2, 1).tolist() == found(store, space, 2, 3, 2, 1).tolist()


def test_rows_are_kept_for_the_next_process(tmp_path: Path) -> None:
    """Closing and opening again changes nothing."""
    first = Store(tmp_path)
    first.append([first.space(ABOUT, WIDTH)], ids(1, 2), [rows(1, 2)])
    first.close()
    second = Store(tmp_path)

    assert rows(1, 2).tolist() == found(second, second.space(ABOUT, WIDTH), 1, 2).tolist()
    second.close()


def test_what_is_not_here_is_minus_one(store: Store) -> None:
    """Known and unknown contents are told apart, in order."""
    space = store.space(ABOUT, WIDTH)
    store.append([space], ids(1, 2), [rows(1, 2)])

    assert [-1, 1, -1, 0] == store.find(space, ids(7, 2, 8, 1)).tolist()


def test_more_contents_than_a_query_of_sqlite_takes(store: Store) -> None:
    """Thousands are looked up in parts."""
    space = store.space(ABOUT, WIDTH)
    many = range(2 * home.LOOKUP + 5)
    store.append([space], ids(*many), [rows(*many)])

    assert list(many) == store.find(space, ids(*many)).tolist()


def test_spaces_do_not_see_each_other(store: Store) -> None:
    """The same file has another row in another space; the widths differ."""
    one, other = store.space(ABOUT, WIDTH), store.space({**ABOUT, "tap": "stage1"}, 2)
    store.append([one, other], ids(1, 2), [rows(1, 2), rows(8, 9, width=2)])

    assert rows(2).tolist() == found(store, one, 2).tolist()
    assert rows(9, width=2).tolist() == found(store, other, 2).tolist()


def test_the_key_of_a_space_follows_its_description() -> None:
    """Any changed or added word is another key; the order of words is not."""
    keys = {
        files.digest_json([home.FORMAT, about])
        for about in (ABOUT, {**ABOUT, "tap": "x"}, {**ABOUT, "view": "flip"})
    }

    assert 3 == len(keys)


def test_the_same_description_is_the_same_space(store: Store) -> None:
    """Also where its words come in another order."""
    assert store.space(ABOUT, WIDTH) == store.space(dict(reversed(ABOUT.items())), WIDTH)


def test_a_space_with_another_width_is_refused(store: Store) -> None:
    """One description cannot mean rows of two lengths."""
    store.space(ABOUT, WIDTH)

    with pytest.raises(UserError, match="holds rows of 6 features where 7 are expected"):
        store.space(ABOUT, 7)


def test_content_that_is_known_is_not_written_twice(store: Store) -> None:
    """Another writer was faster: its rows stay, the new ones are added behind them."""
    space = store.space(ABOUT, WIDTH)
    store.append([space], ids(1, 2), [rows(1, 2)])
    store.append([space], ids(2, 3, 3), [rows(20, 3, 3)])

    assert rows(1, 2, 3).tolist() == found(store, space, 1, 2, 3).tolist()
    assert 3 == store.summary()[0]["rows"]


def test_rows_that_stand_together_are_mapped_not_copied(store: Store) -> None:
    """A million rows must not be read into memory to be used."""
    space = store.space(ABOUT, WIDTH)
    store.append([space], ids(*range(10)), [rows(*range(10))])
    together = store.read(space, ids(*range(2, 8)))

    assert isinstance(together, np.memmap)
    assert not together.flags.writeable
    assert rows(*range(2, 8)).tolist() == together.tolist()
    assert not isinstance(store.read(space, ids(5, 2)), np.memmap)


def test_no_rows_are_an_empty_table(store: Store) -> None:
    """It has the width of its space."""
    assert (0, WIDTH) == store.read(store.space(ABOUT, WIDTH), []).shape


# --------------------------------------------------------------------------------- faults and kills


def raising(number: int, after: int) -> Any:
    """os.write that takes `after` bytes, then fails."""
    write, left = os.write, [after]

    def call(handle: int, data: Any) -> int:
        if left[0] <= 0:
            raise OSError(number, os.strerror(number))
        done = write(handle, data[: left[0]])
        left[0] -= done
        return done

    return call


def test_a_full_disk_is_an_error_and_the_store_is_right_afterwards(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a row: nothing of it is seen, what was there stays, and the next attempt
    succeeds."""
    space = store.space(ABOUT, WIDTH)
    store.append([space], ids(1), [rows(1)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", raising(errno.ENOSPC, 4 * WIDTH + 5))
        with pytest.raises(UserError, match="the disk is full"):
            store.append([space], ids(2, 3), [rows(2, 3)])

    assert [0, -1, -1] == store.find(space, ids(1, 2, 3)).tolist()
    assert rows(1).tolist() == found(store, space, 1).tolist()
    store.append([space], ids(2, 3), [rows(2, 3)])
    assert rows(1, 2, 3).tolist() == found(store, space, 1, 2, 3).tolist()


def test_a_write_that_takes_only_a_part_is_continued(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may write less than it was given."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:7]))
    space = store.space(ABOUT, WIDTH)
    store.append([space], ids(1, 2), [rows(1, 2)])

    assert rows(1, 2).tolist() == found(store, space, 1, 2).tolist()


def test_several_spaces_are_committed_together_or_not_at_all(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second file fails: the first space has no row either."""
    one, other = store.space(ABOUT, WIDTH), store.space({**ABOUT, "tap": "stage1"}, WIDTH)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", raising(errno.ENOSPC, 4 * WIDTH))
        with pytest.raises(UserError, match="the disk is full"):
            store.append([one, other], ids(1), [rows(1), rows(1)])

    assert [-1, -1] == [store.find(space, ids(1))[0] for space in (one, other)]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_whatever_stops_a_writer_the_next_one_can_write(
    store: Store, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    """The transaction is rolled back, the lock is given back."""
    space = store.space(ABOUT, WIDTH)

    def raise_it(_: int) -> None:
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raise_it)
        with pytest.raises(stop):
            store.append([space], ids(1), [rows(1)])

    assert [-1] == store.find(space, ids(1)).tolist()
    store.append([space], ids(1), [rows(1)])
    assert rows(1).tolist() == found(store, space, 1).tolist()


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_store import ABOUT, WIDTH, ids, rows
from finetune.features.store import Store
store = Store(Path(sys.argv[1]))
space = store.space(ABOUT, WIDTH)
store.append([space], ids(1), [rows(1)])
os.fsync = lambda handle: os._exit(9)   # rows are in the file, the index is not committed
store.append([space], ids(2, 3), [rows(2, 3)])
"""
WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_store import ABOUT, WIDTH, ids, rows
from finetune.features.store import Store
store = Store(Path(sys.argv[1]))
start = int(sys.argv[3])
for i in range(start, start + 40, 2):
    store.append([store.space(ABOUT, WIDTH)], ids(i, i + 1), [rows(i, i + 1)])
"""


def start(code: str, *args: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(args[0]), str(Path(__file__).parent), *map(str, args[1:])]
    )


def test_the_rows_of_a_killed_writer_are_written_over(tmp_path: Path) -> None:
    """They stand in the file but not in the index: no reader sees them, and the next rows take
    their place."""
    assert 9 == start(KILLED, tmp_path).wait()
    store = Store(tmp_path)
    space = store.space(ABOUT, WIDTH)
    size = store._file(space).stat().st_size

    assert [0, -1, -1] == store.find(space, ids(1, 2, 3)).tolist()
    assert 3 * 4 * WIDTH == size
    store.append([space], ids(7), [rows(7)])
    assert rows(1, 7).tolist() == found(store, space, 1, 7).tolist()
    assert 2 * 4 * WIDTH == store._file(space).stat().st_size
    store.close()


def test_two_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    """They wait for each other, also where they write the same contents."""
    writers = [start(WRITER, tmp_path, first) for first in (0, 20)]

    assert [0, 0] == [writer.wait() for writer in writers]
    store = Store(tmp_path)
    space = store.space(ABOUT, WIDTH)
    assert rows(*range(60)).tolist() == found(store, space, *range(60)).tolist()
    assert 60 == store.summary()[0]["rows"]
    store.close()


def test_a_reader_beside_a_writer_sees_whole_rows(tmp_path: Path) -> None:
    """Whatever is in the index can be read, at any moment."""
    done = threading.Event()

    def write() -> None:
        store = Store(tmp_path)
        space = store.space(ABOUT, WIDTH)
        for i in range(60):
            store.append([space], ids(i), [rows(i)])
        store.close()
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reader = Store(tmp_path)
    space = reader.space(ABOUT, WIDTH)
    wrong = 0
    while not done.is_set():
        here = [i for i, row in enumerate(reader.find(space, ids(*range(60)))) if row >= 0]
        wrong += rows(*here).tolist() != found(reader, space, *here).tolist()
    writer.join()
    reader.close()

    assert 0 == wrong


def test_rows_that_another_command_removed_are_not_mistaken(store: Store) -> None:
    """No other row is given in their place: reading fails."""
    space = store.space(ABOUT, WIDTH)
    store.append([space], ids(1, 2), [rows(1, 2)])

    with pytest.raises(UserError, match="rows have gone"):
        store.read(space, ids(1, 3))


@pytest.mark.parametrize("reused", [False, True], ids=["gone", "number used again"])
def test_a_space_that_another_command_removed_is_not_written_to(store: Store, reused: bool) -> None:
    """Its number may belong to another space by then: no row gets there, and the message says what
    to do."""
    space = store.space(ABOUT, WIDTH)
    store.append([space], ids(1), [rows(1)])
    store.prune(-1)
    other = store.space({**ABOUT, "tap": "stage1"}, WIDTH) if reused else None

    for act in (
        lambda: store.append([space], ids(2), [rows(2)]),
        lambda: store.read(space, ids(1)),
    ):
        with pytest.raises(UserError, match="another command cleared the cache"):
            act()
    if other is not None:
        assert other.number == space.number
        assert [-1] == store.find(other, ids(2)).tolist()


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    """The message names the folder and the way out."""
    (tmp_path / "index.sqlite").write_bytes(b"this is no database" * 100)

    with pytest.raises(UserError, match="the index cannot be used") as caught:
        Store(tmp_path)
    assert "finetune cache --clear" in caught.value.fix


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ("database or disk is full", "free some space"),
        ("disk I/O error", "free some space"),
        ("database is locked", "wait for the other command"),
        ("attempt to write a readonly database", "$REGRAFT_CACHE"),
        ("unable to open database file", "$REGRAFT_CACHE"),
        ("database disk image is malformed", "finetune cache --clear"),
    ],
)
def test_what_sqlite_says_becomes_advice(tmp_path: Path, words: str, fix: str) -> None:
    """Each fault has its own remedy."""
    with pytest.raises(UserError, match=words) as caught, home.database_errors(tmp_path):
        raise sqlite3.OperationalError(words)

    assert fix in caught.value.fix


def test_a_writer_that_waits_too_long_says_for_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody holds the lock for longer than we are ready to wait."""
    monkeypatch.setattr(home, "WAIT", 0.05)
    one, other = Store(tmp_path), Store(tmp_path)
    space = one.space(ABOUT, WIDTH)
    one.db.execute("begin immediate")

    with pytest.raises(UserError, match="locked") as caught:
        other.append([space], ids(1), [rows(1)])
    assert "wait for the other command" in caught.value.fix
    one.close()
    other.close()


# -------------------------------------------------------------------------------- files seen before


def test_a_file_is_known_by_path_size_and_time(store: Store) -> None:
    """Any of the three changed, and it is read again."""
    (digest,) = ids(1)
    store.remember([("/a.jpg", 10, 1_000, digest)])

    asked = [
        ("/a.jpg", 10, 1_000),
        ("/b.jpg", 10, 1_000),
        ("/a.jpg", 11, 1_000),
        ("/a.jpg", 10, 1_001),
    ]
    assert [digest, None, None, None] == store.remembered(asked)


def test_a_changed_file_replaces_what_was_remembered(store: Store) -> None:
    """One path has one memory."""
    old, new = ids(1, 2)
    store.remember([("/a.jpg", 10, 1_000, old)])
    store.remember([("/a.jpg", 12, 2_000, new)])

    assert [None, new] == store.remembered([("/a.jpg", 10, 1_000), ("/a.jpg", 12, 2_000)])


# ------------------------------------------------------------------------------------------- upkeep


def test_the_summary_lists_spaces_with_their_size(store: Store) -> None:
    """What it is, how many rows, how many bytes; the last used first."""
    first = store.space({**ABOUT, "tap": "stage1"}, 2)
    second = store.space(ABOUT, WIDTH)
    store.append([second], ids(1, 2), [rows(1, 2)])
    store.append([first], ids(1), [rows(1, width=2)])
    summary = store.summary()

    assert ["stage1", "pooled"] == [row["tap"] for row in summary]
    assert [(1, 8), (2, 48)] == [(row["rows"], row["bytes"]) for row in summary]


def test_pruning_removes_what_was_not_used_and_only_that(store: Store) -> None:
    """Rows and file of the old space go, the bytes are counted; the other space is as it was."""
    old, new = store.space({**ABOUT, "tap": "stage1"}, WIDTH), store.space(ABOUT, WIDTH)
    store.append([old, new], ids(1, 2), [rows(1, 2), rows(1, 2)])
    store.db.execute("update spaces set used = used - 40 * 86400 where key = ?", (old.key,))

    assert 2 * 4 * WIDTH == store.prune(30)
    assert not store._file(old).exists()
    assert ["pooled"] == [row["tap"] for row in store.summary()]
    assert rows(1, 2).tolist() == found(store, new, 1, 2).tolist()
    again = store.space({**ABOUT, "tap": "stage1"}, WIDTH)
    assert [-1] == store.find(again, ids(1)).tolist()


def test_using_a_space_keeps_it(store: Store) -> None:
    """Asking for a space is using it."""
    space = store.space(ABOUT, WIDTH)
    store.db.execute("update spaces set used = used - 40 * 86400")
    store.space(ABOUT, WIDTH)

    assert 0 == store.prune(30)
    assert [space.key[:12]] == [row["key"] for row in store.summary()]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with one row of features and one converted network."""
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "cache"))
    store = Store()
    store.append([store.space(ABOUT, WIDTH)], ids(1), [rows(1)])
    store.close()
    (files.cache_dir("compiled", "blobs") / "x.blob").write_bytes(b"x" * 100)
    return tmp_path / "cache"


def test_the_store_stands_in_the_cache_folder(cache: Path) -> None:
    """`features` inside the cache, with the index and a file a space."""
    assert [".f32", ".sqlite"] == sorted(
        {path.suffix for path in (cache / "features").glob("*.[fs]*") if "-" not in path.name}
    )


def test_clearing_the_cache_leaves_an_empty_folder_that_works(cache: Path) -> None:
    """All can be made again; a part that the user keeps elsewhere, and linked into it, is only
    unlinked."""
    elsewhere = cache.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.txt").write_text("mine")
    (cache / "thumbs").symlink_to(elsewhere, target_is_directory=True)

    assert home.clear() > 100
    assert [] == list(cache.iterdir())
    assert "mine" == (elsewhere / "mine.txt").read_text()
    Store().close()


def test_clearing_the_cache_leaves_what_is_not_its_own(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """$REGRAFT_CACHE may name a folder with other things in it: they are not deleted, and one line
    says so."""
    (cache / "photos").mkdir()
    (cache / "photos" / "one.jpg").write_bytes(b"mine")
    home.clear()

    assert ["photos"] == [path.name for path in cache.iterdir()]
    assert b"mine" == (cache / "photos" / "one.jpg").read_bytes()
    assert "photos did not come from here and stayed" in caplog.text


@pytest.mark.parametrize("act", [Store, home.clear, home.overview, lambda: home.prune(1)])
def test_a_store_without_a_cache_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Any
) -> None:
    """Features need a place: one sentence says which variable gives it."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "file"))

    with pytest.raises(UserError, match=r"\$REGRAFT_CACHE") as caught:
        act()
    assert files.CACHE_FIX == caught.value.fix


def test_pruning_the_cache_takes_converted_networks_too(cache: Path) -> None:
    """Files that were neither written nor read for so long go; younger ones stay."""
    blob = cache / "compiled" / "blobs" / "x.blob"
    assert 0 == home.prune(30)

    os.utime(blob, (0, 0))
    assert 100 == home.prune(30)
    assert not blob.exists()


def test_the_overview_says_where_and_how_much(cache: Path) -> None:
    """The folder, the bytes of its parts, and the features by network."""
    found = home.overview()

    assert str(cache) == found["folder"]
    assert 100 == found["bytes"]["compiled"]
    assert [1] == [space["rows"] for space in found["spaces"]]
    assert "tiny in float32: 1 images, 1 taps" in home.overview_text()


def test_any_path_is_remembered(store: Store) -> None:
    """Files are known again whatever their names hold, and names that differ in a byte are two
    files."""
    paths = [f"/photos/{name}" for name in odd.NAMES]
    store.remember(
        [(path, 1, 2, digest) for path, digest in zip(paths, ids(*range(len(paths))), strict=True)]
    )

    assert ids(*range(len(paths))) == store.remembered([(path, 1, 2) for path in paths])
    store.forget(paths[:1])
    assert [None, ids(1)[0]] == store.remembered([(path, 1, 2) for path in paths[:2]])


def test_pruning_goes_on_where_files_vanish(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A converted network that another process removes meanwhile stops neither the pruning nor the
    overview."""
    folder = files.cache_dir("compiled")
    for name in ("a", "b"):
        (folder / name).write_bytes(b"x" * 10)
    real = Path.rglob

    def vanishing(self: Path, pattern: str) -> list[Path]:
        found = list(real(self, pattern))
        (folder / "a").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "rglob", vanishing)
    assert home.prune(0) >= 10
    assert not (folder / "b").exists()
    (folder / "a").write_bytes(b"x")
    assert home.overview()["folder"] == str(cache)
