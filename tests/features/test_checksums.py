"""Damage in the feature store: every changed, missing or mixed-up row is noticed, and made again
from its image."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from test_store import ABOUT, WIDTH, found, ids, rows, start

from finetune import files
from finetune.errors import UserError
from finetune.features import checksums
from finetune.features.store import Space, Store

MANY = range(checksums.BLOCK * 2 + 10)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store with the rows of the contents 0 to 9."""
    opened = Store(tmp_path / "features")
    opened.append([opened.space(ABOUT, WIDTH)], ids(*range(10)), [rows(*range(10))])
    yield opened
    opened.close()


def again(store: Store) -> tuple[Store, Space]:
    """The same store and space, as another process opens them."""
    opened = Store(store.folder)
    return opened, opened.space(ABOUT, WIDTH)


def flip(path: Path, row: int, byte: int = 5) -> None:
    """Change one bit of a row."""
    with path.open("r+b") as file:
        file.seek(row * WIDTH * 4 + byte)
        value = file.read(1)[0]
        file.seek(row * WIDTH * 4 + byte)
        file.write(bytes([value ^ 16]))


def file_of(store: Store) -> Path:
    (path,) = store.folder.glob("*.f32")
    return path


def missing(store: Store, space: Space, *numbers: int) -> list[int]:
    return [
        number
        for number, row in zip(numbers, store.find(space, ids(*numbers)), strict=True)
        if row < 0
    ]


def sums(store: Store, space: Space) -> NDArray[np.uint32]:
    return checksums.read(store.db, space.number, 10)


# ------------------------------------------------------------------------------------- rows changed


@pytest.mark.parametrize("row", [0, 4, 9])
@pytest.mark.parametrize("byte", [0, 4 * WIDTH - 1])
def test_one_changed_bit_is_noticed(store: Store, row: int, byte: int) -> None:
    """Wherever it is: this row counts as missing, the others are as they were, and what was met is
    told once."""
    flip(file_of(store), row, byte)
    opened, space = again(store)

    assert [row] == missing(opened, space, *range(10))
    assert (1, 1) == opened.damage()
    assert (0, 0) == opened.damage()
    whole = [number for number in range(10) if number != row]
    assert rows(*whole).tolist() == found(opened, space, *whole).tolist()
    opened.close()


def test_a_damaged_row_is_never_given_away(store: Store) -> None:
    """Who asks for it in spite of all is told the row, the file, and two ways on."""
    flip(file_of(store), 3)
    opened, space = again(store)

    with pytest.raises(UserError, match="row 3 of the feature store is damaged") as caught:
        opened.read(space, ids(2, 3))
    assert str(file_of(store)) == caught.value.where
    assert "run the command again on the images" in caught.value.fix
    assert "finetune cache --clear" in caught.value.fix
    opened.close()


def test_a_row_that_is_made_again_replaces_the_damaged_one(store: Store) -> None:
    """For this process and for all later ones; nothing is counted as damaged any more."""
    flip(file_of(store), 3)
    opened, space = again(store)
    opened.append([space], ids(2, 3), [rows(2, 3)])

    assert rows(*range(10)).tolist() == found(opened, space, *range(10)).tolist()
    opened.close()
    opened, space = again(store)
    assert rows(*range(10)).tolist() == found(opened, space, *range(10)).tolist()
    assert (0, 0) == opened.damage()
    opened.close()


def test_the_row_of_another_image_is_noticed(store: Store) -> None:
    """A damaged index that names the wrong row, or one that does not exist: the right rows of
    others stay."""
    store.db.execute("update rows set row = 7 where row = 2")
    store.db.execute("update rows set row = 1000000 where row = 5")
    opened, space = again(store)
    gone = missing(opened, space, *range(10))

    assert {2, 5} <= set(gone) <= {2, 5, 7}
    opened.append([space], ids(*gone), [rows(*gone)])
    assert rows(*range(10)).tolist() == found(opened, space, *range(10)).tolist()
    opened.close()


def test_rows_that_hold_no_number_are_no_damage(tmp_path: Path) -> None:
    """NaN and infinity come back as they were written."""
    store = Store(tmp_path)
    odd = np.array([[np.nan, np.inf, -np.inf, 0, -0.0, 1]], dtype=np.float32)
    store.append([store.space(ABOUT, WIDTH)], ids(1), [odd])
    opened, space = again(store)

    assert odd.tobytes() == found(opened, space, 1).tobytes()
    opened.close()
    store.close()


def test_rows_in_many_records_are_each_compared(tmp_path: Path) -> None:
    """More rows than a record of checksums holds, in two commits that share a record; damage at the
    borders."""
    store = Store(tmp_path)
    space = store.space(ABOUT, WIDTH)
    for part in (MANY[:1000], MANY[1000:]):
        store.append([space], ids(*part), [rows(*part)])
    bad = [0, 999, 1000, checksums.BLOCK - 1, checksums.BLOCK, MANY[-1]]
    for row in bad:
        flip(store._file(space), row)
    opened, space = again(store)

    assert bad == missing(opened, space, *MANY)
    assert (len(bad), 1) == opened.damage()
    opened.close()
    store.close()


def test_each_row_is_read_once_a_process_and_no_other(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not asked for is not verified, and what was verified is not read again."""
    opened, space = again(store)
    read: list[int] = []
    pread = os.pread

    def counted(handle: int, size: int, at: int) -> bytes:
        read.extend(range(at // (4 * WIDTH), (at + size) // (4 * WIDTH)))
        return pread(handle, size, at)

    monkeypatch.setattr(os, "pread", counted)
    for asked in ((2, 3, 7), (3, 2), (7, 8), (2, 8)):
        opened.find(space, ids(*asked))

    assert [2, 3, 7, 8] == read
    opened.close()


def test_a_disk_that_cannot_be_read_is_damage(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows count as missing; the process goes on."""
    opened, space = again(store)

    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    assert list(range(10)) == missing(opened, space, *range(10))
    opened.close()


# ------------------------------------------------------------------------------------ files changed


@pytest.mark.parametrize(
    ("size", "left"), [(None, 0), (0, 0), (4 * WIDTH * 6 + 3, 6), (4 * WIDTH * 10 + 3, 10)]
)
def test_rows_that_a_file_has_lost_are_missing(store: Store, size: int | None, left: int) -> None:
    """Cut short or removed: the whole rows stay, the others are made again; a file that is too long
    lost nothing."""
    if size is None:
        file_of(store).unlink()
    else:
        os.truncate(file_of(store), size)
    opened, space = again(store)

    assert list(range(left, 10)) == missing(opened, space, *range(10))
    assert (10 - left, int(left < 10)) == opened.damage()
    opened.append([space], ids(*range(10)), [rows(*range(10))])
    assert rows(*range(10)).tolist() == found(opened, space, *range(10)).tolist()
    opened.close()
    opened, space = again(store)
    assert [] == missing(opened, space, *range(10))
    assert 10 == opened.summary()[0]["rows"]
    opened.close()


def test_a_file_that_is_cut_short_under_an_open_store_gives_no_zeros(store: Store) -> None:
    """It is noticed at the next question; writing on is refused, and the same command again mends
    it."""
    space = store.space(ABOUT, WIDTH)
    assert [] == missing(store, space, *range(10))
    os.truncate(file_of(store), 4 * WIDTH * 4)

    assert [4, 5, 6, 7, 8, 9] == missing(store, space, *range(10))
    with pytest.raises(UserError, match="rows are missing") as caught:
        store.append([space], ids(11), [rows(11)])
    assert "run the same command again" in caught.value.fix


def test_rows_of_a_cut_file_get_no_checksum_of_what_takes_their_place(store: Store) -> None:
    """Rows without a checksum that were cut off are forgotten: new ones in their place are not
    mistaken for them."""
    store.db.execute("delete from checksums")
    os.truncate(file_of(store), 4 * WIDTH * 4)
    opened, space = again(store)
    opened.append([space], ids(20, 21), [rows(20, 21)])

    assert [4, 5] == missing(opened, space, 3, 4, 5, 20, 21)
    assert rows(3, 20, 21).tolist() == found(opened, space, 3, 20, 21).tolist()
    opened.close()


# ----------------------------------------------------------------- with what earlier versions wrote


def test_rows_without_a_checksum_are_used_and_get_one(store: Store) -> None:
    """A store of an earlier version: nothing is made again, and damage is noticed from then on."""
    store.db.execute("drop trigger checksums_go_with_their_space")
    store.db.execute("drop table checksums")
    first, space = again(store)
    assert [] == missing(first, space, 1, 2, 3)
    assert [1, 2, 3] == np.flatnonzero(sums(first, space)).tolist()
    first.close()

    for row in (2, 5):
        flip(file_of(store), row)
    second, space = again(store)
    # the damage of row 5 is older than its checksum
    assert [2] == missing(second, space, *range(10))
    second.close()


def test_rows_that_an_earlier_version_adds_are_used(store: Store) -> None:
    """It knows no checksums: its rows stand behind those of this version, and get theirs when they
    are read."""
    space = store.space(ABOUT, WIDTH)
    with file_of(store).open("ab") as file:
        file.write(rows(10, 11).tobytes())
    store.db.executemany(
        "insert into rows (space, digest, row) values (?, ?, ?)",
        [(space.number, bytes.fromhex(digest), 10 + i) for i, digest in enumerate(ids(10, 11))],
    )
    store.db.execute("update spaces set count = 12")
    opened, space = again(store)

    assert rows(*range(12)).tolist() == found(opened, space, *range(12)).tolist()
    assert checksums.read(opened.db, space.number, 12).all()
    opened.close()


def test_a_space_that_an_earlier_version_removes_takes_its_checksums_along(store: Store) -> None:
    """Its number is used again: new rows are not compared with old checksums."""
    number = store.space(ABOUT, WIDTH).number
    old = sqlite3.connect(store.folder / "index.sqlite", isolation_level=None)
    old.execute("delete from rows where space = ?", (number,))
    old.execute("delete from spaces where id = ?", (number,))
    old.close()
    opened = Store(store.folder)
    other = opened.space({**ABOUT, "tap": "stage1"}, WIDTH)

    assert number == other.number
    assert not sums(opened, other).any()
    opened.close()


READER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_store import ABOUT, WIDTH, found, ids, rows
from finetune.features.store import Store
store = Store(Path(sys.argv[1]))
space = store.space(ABOUT, WIDTH)
assert rows(*range(10)).tolist() == found(store, space, *range(10)).tolist()
"""
KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_store import ABOUT, WIDTH, ids
from finetune.features import checksums
from finetune.features.store import Store
put = checksums.put
def kill(*args, **how):
    put(*args, **how)
    os._exit(9)
checksums.put = kill
store = Store(Path(sys.argv[1]))
store.find(store.space(ABOUT, WIDTH), ids(*range(10)))
"""


def test_two_processes_give_checksums_at_once(store: Store) -> None:
    """Both find the store of an earlier version, make the table and fill it."""
    store.db.execute("drop trigger checksums_go_with_their_space")
    store.db.execute("drop table checksums")
    readers: list[subprocess.Popen[bytes]] = [start(READER, store.folder) for _ in range(2)]

    assert [0, 0] == [reader.wait() for reader in readers]
    opened, space = again(store)
    assert sums(opened, space).all()
    assert [] == missing(opened, space, *range(10))
    opened.close()


def test_a_process_that_is_killed_while_it_gives_checksums(store: Store) -> None:
    """None of them is there, and the next process gives them."""
    store.db.execute("delete from checksums")
    assert 9 == start(KILLED, store.folder).wait()
    opened, space = again(store)

    assert not sums(opened, space).any()
    assert [] == missing(opened, space, *range(10))
    assert sums(opened, space).all()
    opened.close()


@pytest.mark.parametrize("record", [b"short", 7, "text"])
def test_a_damaged_record_of_checksums_is_no_bug(store: Store, record: object) -> None:
    """It counts as none: the rows are used as they are."""
    store.db.execute("update checksums set sums = ?", (record,))
    opened, space = again(store)

    assert [] == missing(opened, space, *range(10))
    opened.close()


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_index_gives_right_rows_or_a_message(tmp_path: Path, seed: int) -> None:
    """Bytes of the database changed at random: never a wrong row, never a traceback; the message
    names the command."""
    store = Store(tmp_path / "features")
    store.append([store.space(ABOUT, WIDTH)], ids(*range(200)), [rows(*range(200))])
    store.db.execute("pragma wal_checkpoint(truncate)")
    store.close()
    index = tmp_path / "features" / "index.sqlite"
    data, rng = bytearray(index.read_bytes()), np.random.default_rng(seed)
    for at in rng.integers(100, len(data), 60).tolist():
        data[at] = int(rng.integers(256))
    index.write_bytes(data)

    said = ""
    try:
        opened, space = again(store)
        gone = missing(opened, space, *range(200))
        opened.append([space], ids(*gone), [rows(*gone)])
        assert rows(*range(200)).tolist() == found(opened, space, *range(200)).tolist()
        opened.close()
    except UserError as error:
        said = error.fix
    assert not said or "finetune cache --clear" in said


def test_the_checksum_of_a_row_is_that_of_its_bytes_and_its_content() -> None:
    """The same row for another content, and another row for the same content, have other checksums;
    none is 0."""
    one, other = checksums.marks(files.Digests.of(ids(1, 2))).reshape(2, 1)
    values = {
        int(checksums.of_block(block, mark)[0])
        for block in (rows(1), rows(2))
        for mark in (one, other)
    }

    assert 4 == len(values)
    assert 0 not in values


def test_a_row_that_was_verified_for_one_image_is_not_taken_for_another(store: Store) -> None:
    """A damaged index that gives a second image the row of the first is noticed, though that row
    was found whole before."""
    opened, space = again(store)
    assert [] == missing(opened, space, 1, 2)
    (row,) = opened.find(space, ids(1)).tolist()
    opened.db.execute(
        "update rows set row = ? where space = ? and digest = ?",
        (row, space.number, bytes.fromhex(ids(2)[0])),
    )
    assert [2] == missing(opened, space, 1, 2)
    opened.close()


def test_sums_are_noted_in_any_order(tmp_path: Path) -> None:
    """Rows of several records, not sorted, get each its own checksum."""
    opened = Store(tmp_path)
    space = opened.space(ABOUT, WIDTH)
    order = np.random.default_rng(0).permutation(3 * checksums.BLOCK)
    checksums.put(opened.db, space.number, order, (order + 1).astype(np.uint32), over=True)
    assert np.array_equal(
        np.arange(1, 3 * checksums.BLOCK + 1),
        checksums.read(opened.db, space.number, 3 * checksums.BLOCK),
    )
    opened.close()
