"""The content-addressed feature store: a row a file's digest, a folder a space, one SQLite index.

A *space* is everything that decides a feature besides the file: network, preprocessing, tap,
engine, precision, view. Rows are appended to one flat float32 file a space, and the index is
committed after the rows are on the disk: a killed writer loses nothing that was committed, a reader
never sees half a row, and two writers wait for each other. Every row has a checksum (`checksums`)
and is compared with it once a process, before it is given away: what is damaged counts as missing,
so that it is made again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune import files, names, timings
from finetune.data.faults import some
from finetune.errors import UserError
from finetune.features import checksums
from finetune.names import shown

FORMAT = 1
WAIT = 600.0  # seconds that a writer waits for another one
LOOKUP = 900  # digests a query: below SQLite's limit of bound values

Rows = NDArray[np.float32]

SCHEMA = """
create table if not exists spaces (
  id integer primary key, key text unique not null, width integer not null, about text not null,
  count integer not null default 0, used real not null);
create table if not exists rows (
  space integer not null, digest blob not null, row integer not null,
  primary key (space, digest)) without rowid;
create table if not exists seen (
  path text primary key, size integer not null, mtime integer not null, digest blob not null)
  without rowid;
"""


@dataclass(frozen=True)
class Space:
    """One space of the store: its key, the number of features in a row, and its number in the
    index."""

    key: str
    width: int
    number: int


def _until_free(work: Callable[[], object]) -> None:
    """Do it as soon as no other connection is in the way: where two make a new index at once,
    SQLite itself does not wait."""
    end = time.monotonic() + WAIT
    while True:
        try:
            work()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.01)


class Store:
    """The store in one folder (`cache_dir()/features`). Open it once a command; it is not shared
    between threads."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or files.cache_dir("features")
        with files.disk_errors(self.folder), database_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.db = sqlite3.connect(
                self.folder / "index.sqlite", timeout=WAIT, isolation_level=None
            )
            _until_free(lambda: self.db.execute("pragma journal_mode=wal"))
            self.db.execute("pragma synchronous=full")
            _until_free(lambda: self.db.executescript(SCHEMA + checksums.SCHEMA))
        self._verified: dict[
            str, checksums.Sums
        ] = {}  # by space and row: the mark of the content that it was verified for
        self._damage: dict[
            str, int
        ] = {}  # by file: damaged and missing rows that `damage` has not told yet

    def close(self) -> None:
        self.db.close()

    def space(self, about: dict[str, Any], width: int) -> Space:
        """The space that `about` describes (a JSON value that decides its features), made where it
        is new."""
        key = files.digest_json([FORMAT, about])
        with self._writing():
            self.db.execute(
                "insert into spaces (key, width, about, used) values (?, ?, ?, ?) "
                "on conflict (key) do update set used = excluded.used",
                (key, width, json.dumps(about, sort_keys=True), time.time()),
            )
            number, known, count = self.db.execute(
                "select id, width, count from spaces where key = ?", (key,)
            ).fetchone()
            if known == width:
                self._drop_missing(Space(key, width, number), count)
        if known != width:
            raise UserError(
                f"holds rows of {known} features where {width} are expected",
                where=self.folder,
                fix=files.CLEAR_FIX,
            )
        return Space(key, width, number)

    def known(self, about: dict[str, Any], width: int) -> Space | None:
        """The space that `about` describes where it is here and holds rows of `width`."""
        key = files.digest_json([FORMAT, about])
        with database_errors(self.folder):
            found = self.db.execute(
                "select id from spaces where key = ? and width = ? and count > 0", (key, width)
            ).fetchone()
        return Space(key, width, found[0]) if found else None

    def _drop_missing(self, space: Space, count: int) -> None:
        """Forget the rows that stood behind the end of a file which was cut short or removed: they
        are made again."""
        here = self._rows_in_file(space)
        if here >= count:
            return
        self.db.execute("delete from rows where space = ? and row >= ?", (space.number, here))
        self.db.execute("update spaces set count = ? where id = ?", (here, space.number))
        checksums.cut(self.db, space.number, here)
        self._damage[self._file(space).name] = count - here

    def find(self, space: Space, digests: Sequence[str]) -> NDArray[np.int64]:
        """Row numbers of `digests`, -1 where the store does not have them whole: absent, missing
        and damaged rows alike."""
        rows, damaged = self._find(space, digests)
        if len(damaged):
            name = self._file(space).name
            self._damage[name] = max(self._damage.get(name, 0), len(damaged))
        return rows

    def _find(
        self, space: Space, digests: Sequence[str]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row numbers of `digests`, -1 where there is no whole row; and the numbers of the damaged
        ones."""
        rows = np.full(len(digests), -1, dtype=np.int64)
        for i in range(0, len(digests), LOOKUP):
            part = [bytes.fromhex(d) for d in digests[i : i + LOOKUP]]
            marks = ",".join("?" * len(part))
            query = f"select digest, row from rows where space = ? and digest in ({marks})"
            with database_errors(self.folder):
                found = dict(self.db.execute(query, (space.number, *part)))
            rows[i : i + LOOKUP] = [found.get(d, -1) for d in part]
        here = np.flatnonzero(rows >= 0)
        if not len(here):
            return rows, here
        bad = here[
            ~self._sound(space, rows[here], checksums.marks(files.Digests.of(digests).take(here)))
        ]
        damaged = np.unique(rows[bad])
        rows[bad] = -1
        return rows, damaged

    def _sound(
        self, space: Space, rows: NDArray[np.int64], marks: checksums.Sums
    ) -> NDArray[np.bool_]:
        """Which of `rows` hold what was written for the contents of `marks`; each row is read for
        that once a process.

        Rows that an earlier version wrote have no checksum: they get it now, as they are.
        """
        count = min(self._count(space), self._rows_in_file(space))
        known = self._verified.get(space.key, np.zeros(0, dtype=np.uint32))
        if len(known) < count:
            known = np.concatenate([known, np.zeros(count - len(known), dtype=np.uint32)])
            self._verified[space.key] = known
        inside = rows < count
        sound = np.zeros(len(rows), dtype=bool)
        sound[inside] = known[rows[inside]] == marks[inside]
        doubtful = np.flatnonzero(inside & ~sound)
        if len(doubtful):
            at, first = np.unique(rows[doubtful], return_index=True)
            wanted = marks[doubtful][first]
            found = checksums.of_rows(self._file(space), space.width, at, wanted)
            with database_errors(self.folder):
                kept = checksums.read(self.db, space.number, count)[at]
            new = (kept == 0) & (found != 0)
            if new.any():
                self._adopt(space, at[new], found[new])
            right = new | ((found == kept) & (found != 0))
            known[at[right]] = wanted[right]
            sound[doubtful] = known[rows[doubtful]] == marks[doubtful]
        return sound

    def _adopt(self, space: Space, rows: NDArray[np.int64], sums: checksums.Sums) -> None:
        with contextlib.nullcontext() if self.db.in_transaction else self._writing():
            self._count(space)  # it may have been removed meanwhile
            checksums.put(self.db, space.number, rows, sums, over=False)

    def damage(self) -> tuple[int, int]:
        """How many damaged and missing rows were met since the last call, and in how many files."""
        found = sum(self._damage.values()), len(self._damage)
        self._damage.clear()
        return found

    def append(
        self, spaces: Sequence[Space], digests: Sequence[str], blocks: Sequence[Rows]
    ) -> None:
        """Add rows to several spaces in one commit. A digest that another writer has added
        meanwhile is left as it is."""
        with self._writing():
            for space, block in zip(spaces, blocks, strict=True):
                known, _ = self._find(space, digests)
                fresh = [
                    i
                    for i in dict.fromkeys(
                        dict(zip(digests, range(len(digests)), strict=True)).values()
                    )
                    if known[i] < 0
                ]
                start = self._count(space)
                rows = block if len(fresh) == len(block) else block[fresh]  # no copy of them all
                written = np.ascontiguousarray(rows, dtype=np.float32)
                self._write_rows(space, start, written)
                # a damaged row stays where it is, and the content gets a new one
                self.db.executemany(
                    "insert into rows (space, digest, row) values (?, ?, ?) "
                    "on conflict (space, digest) do update set row = excluded.row",
                    [
                        (space.number, bytes.fromhex(digests[i]), start + j)
                        for j, i in enumerate(fresh)
                    ],
                )
                sums = checksums.of_block(
                    written, checksums.marks(files.Digests.of([digests[i] for i in fresh]))
                )
                checksums.put(
                    self.db, space.number, np.arange(start, start + len(fresh)), sums, over=True
                )
                self.db.execute(
                    "update spaces set count = ?, used = ? where id = ?",
                    (start + len(fresh), time.time(), space.number),
                )

    def _write_rows(self, space: Space, start: int, block: Rows) -> None:
        # What stands behind the committed rows was left by a killed writer: it is written over.
        handle = os.open(self._file(space), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if os.fstat(handle).st_size < start * space.width * 4:
                raise _damaged(self._file(space))
            os.ftruncate(handle, start * space.width * 4)
            os.lseek(handle, 0, os.SEEK_END)
            data = memoryview(block.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
            while data:
                data = data[os.write(handle, data) :]
            os.fsync(handle)
        finally:
            os.close(handle)

    def read(self, space: Space, digests: Sequence[str]) -> Rows:
        """The rows of `digests`, memory-mapped where they stand one after the other, else gathered.

        Raises `UserError` where one of them is not here, or damaged: `find` first, and `append`
        what it misses.
        """
        if not len(digests):
            return np.zeros((0, space.width), dtype=np.float32)
        rows, path = self.find(space, digests), self._file(space)
        if rows.min() < 0:
            raise self._missing(space, digests[int(np.argmin(rows))])
        table = np.memmap(
            path, dtype=np.float32, mode="r", shape=(int(rows.max()) + 1, space.width)
        )
        start = int(rows[0])
        if np.array_equal(rows, np.arange(start, start + len(rows))):
            return table[start : start + len(rows)]
        return np.asarray(table[rows])

    def _missing(self, space: Space, digest: str) -> UserError:
        with database_errors(self.folder):
            query = "select row from rows where space = ? and digest = ?"
            found = self.db.execute(query, (space.number, bytes.fromhex(digest))).fetchone()
        if found is None:
            return _gone(self._file(space))
        fix = (
            "run the command again on the images: it makes the row again; "
            "or start afresh with `finetune cache --clear`"
        )
        return UserError(
            f"row {found[0]} of the feature store is damaged or missing",
            where=self._file(space),
            fix=fix,
        )

    def _count(self, space: Space) -> int:
        # Numbers are used again: the key tells whether the space is still the one that was opened.
        with database_errors(self.folder):
            found = self.db.execute(
                "select count from spaces where id = ? and key = ?", (space.number, space.key)
            ).fetchone()
        if found is None:
            raise _gone(self._file(space))
        return int(found[0])

    def _file(self, space: Space) -> Path:
        return self.folder / f"{space.key[:32]}.f32"

    def _rows_in_file(self, space: Space) -> int:
        with files.disk_errors(self._file(space)), contextlib.suppress(FileNotFoundError):
            return self._file(space).stat().st_size // (space.width * 4)
        return 0

    # ---------------------------------------------------------------------------- files seen before

    def remembered(self, stats: Sequence[tuple[str, int, int]]) -> list[str | None]:
        """Digests of files by (absolute path, size, mtime in ns), None where the file is new or has
        changed."""
        result: list[str | None] = []
        for i in range(0, len(stats), LOOKUP):
            part = [
                (names.to_database(path), size, changed)
                for path, size, changed in stats[i : i + LOOKUP]
            ]
            marks = ",".join("?" * len(part))
            query = f"select path, size, mtime, digest from seen where path in ({marks})"
            with database_errors(self.folder):
                rows = self.db.execute(query, [path for path, _, _ in part]).fetchall()
            found = {(path, size, mtime): digest.hex() for path, size, mtime, digest in rows}
            result += [found.get(entry) for entry in part]
        return result

    def remember(self, entries: Sequence[tuple[str, int, int, str]]) -> None:
        """Remember (absolute path, size, mtime in ns, digest) of files that were read."""
        with self._writing():
            self.db.executemany(
                "insert into seen (path, size, mtime, digest) values (?, ?, ?, ?) "
                "on conflict (path) do update set size = excluded.size, mtime = excluded.mtime, "
                "digest = excluded.digest",
                [
                    (names.to_database(path), size, mtime, bytes.fromhex(digest))
                    for path, size, mtime, digest in entries
                ],
            )

    def forget(self, paths: Sequence[str]) -> None:
        """Forget the digests of files by absolute path: they are read again at the next look."""
        with self._writing():
            self.db.executemany(
                "delete from seen where path = ?", [(names.to_database(path),) for path in paths]
            )

    # --------------------------------------------------------------------------------------- upkeep

    def summary(self) -> list[dict[str, Any]]:
        """What is here: a row a space, the last used first."""
        query = "select key, width, about, count, used from spaces order by used desc"
        with database_errors(self.folder):
            found = self.db.execute(query).fetchall()
        return [
            {
                **json.loads(about),
                "key": key[:12],
                "rows": count,
                "bytes": count * width * 4,
                "used": used,
            }
            for key, width, about, count, used in found
        ]

    def prune(self, unused_days: float) -> int:
        """Delete spaces that were not used for `unused_days`; returns the bytes freed."""
        limit = time.time() - unused_days * 86400
        freed = 0
        with self._writing():
            for number, key, width, count in self.db.execute(
                "select id, key, width, count from spaces where used <= ?", (limit,)
            ).fetchall():
                self.db.execute("delete from rows where space = ?", (number,))
                self.db.execute("delete from spaces where id = ?", (number,))
                self._file(Space(key, width, number)).unlink(missing_ok=True)
                freed += count * width * 4
        return freed

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with files.disk_errors(self.folder), database_errors(self.folder):
            self.db.execute("begin immediate")
            try:
                yield
            except BaseException:
                if self.db.in_transaction:  # SQLite itself rolls back where the disk is full
                    self.db.execute("rollback")
                raise
            self.db.execute("commit")


def _gone(path: Path) -> UserError:
    fix = "run the same command again, or start afresh with `finetune cache --clear`"
    return UserError("rows have gone: another command cleared the cache", where=path, fix=fix)


def _damaged(path: Path) -> UserError:
    fix = (
        "run the same command again: it makes them again; "
        "or start afresh with `finetune cache --clear`"
    )
    return UserError("the feature store is damaged: rows are missing", where=path, fix=fix)


@contextlib.contextmanager
def database_errors(where: Path) -> Iterator[None]:
    """Turn SQLite's errors into a `UserError`: full, read-only, locked or damaged."""
    try:
        yield
    except (
        sqlite3.Error,
        UnicodeDecodeError,
    ) as error:  # the second: SQLite quotes a damaged name in its message
        words = str(error)
        if "full" in words or "disk I/O" in words:
            fix = "free some space, then run the same command again: it goes on"
        elif "locked" in words:
            fix = "wait for the other command that writes here, then try again"
        elif "readonly" in words or "unable to open" in words:
            fix = files.CACHE_FIX
        else:
            fix = files.CLEAR_FIX
        raise UserError(f"the index cannot be used ({words})", where=where, fix=fix) from error


# ---------------------------------------------------------------------------------- the whole cache


def clear() -> int:
    """Delete the whole cache (features, converted networks: all of it can be made again); returns
    the bytes freed.

    What is not the cache's own stays: `$REGRAFT_CACHE` may name a folder that holds other things
    too.
    """
    root = files.cache_dir()
    before = _size(root)
    with files.disk_errors(root):
        entries = list(root.iterdir())
        foreign = [entry for entry in entries if entry.name not in files.CACHE_PARTS]
        for entry in entries:
            if entry in foreign:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
    if foreign:
        files.note(
            f"{shown(root)}: {some([shown(entry.name) for entry in foreign])} "
            f"did not come from here and stayed"
        )
    return before - _size(root)


def prune(unused_days: float) -> int:
    """Delete features and converted networks that were not used for `unused_days`; returns the
    bytes freed."""
    store = Store()
    try:
        freed = store.prune(unused_days)
    finally:
        store.close()
    limit = time.time() - unused_days * 86400
    with files.disk_errors(files.cache_dir("compiled")):
        for path in files.cache_dir("compiled").rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # another process makes them, too
                info = path.stat()
                if stat.S_ISREG(info.st_mode) and max(info.st_atime, info.st_mtime) <= limit:
                    path.unlink(missing_ok=True)
                    freed += info.st_size
    return freed


def overview() -> dict[str, Any]:
    """What the cache holds: its folder, the bytes of each part, and a row a space of features."""
    store = Store()
    try:
        spaces = store.summary()
    finally:
        store.close()
    root = files.cache_dir()
    return {
        "folder": str(root),
        "bytes": {entry.name: _size(entry) for entry in sorted(root.iterdir()) if entry.is_dir()},
        "spaces": spaces,
        "timings": timings.overview(),
    }


def overview_text() -> str:
    """The overview for a person: features by network, the last used first."""
    found = overview()
    lines = [
        names.shown(found["folder"]),
        *(f"  {name:<12}{size / 1e6:>9.1f} MB" for name, size in found["bytes"].items()),
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for space in found["spaces"]:
        groups.setdefault((space["backbone"], space["precision"]), []).append(space)
    for (backbone, precision), spaces in groups.items():
        rows, size = max(space["rows"] for space in spaces), sum(space["bytes"] for space in spaces)
        days = (time.time() - max(space["used"] for space in spaces)) / 86400
        words = (
            f"{rows} images, {len(spaces)} taps and views, "
            f"{size / 1e6:.1f} MB, last used {days:.1f} days ago"
        )
        lines.append(f"  {backbone} in {precision}: {words}")
    return "\n".join([*lines, *timings.table()])


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            info = path.stat()
            total += info.st_size if stat.S_ISREG(info.st_mode) else 0
    return total
