"""Durable files: atomic writes, content digests, seals, and the cache folder.

Every file of a run, an index or the cache is written to a temporary name in its own folder, flushed
to the disk and renamed, so that a reader, a kill or a full disk never meets half a file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finetune import files
from finetune.errors import UserError, as_bytes

CACHE_README = """This folder belongs to Regraft (the `finetune` and `retrieve` commands).

features/   features of images, keyed by the content of the files
compiled/   networks converted for OpenVINO, and its compiled models
networks/   descriptions of networks
timings/    how fast networks run here by each engine and precision
thumbs/     small pictures that `retrieve serve` shows, keyed by the content of the files

Everything here can be made again. `finetune cache` shows what is here and prunes it;
deleting the folder is safe.
"""


# letters of a name in the name of its temporary file, which must not be too long for the system
TEMPORARY = 40
CACHE_PARTS = (
    "features",
    "compiled",
    "networks",
    "timings",
    "thumbs",
    "activations",
    "torchvision",
    "README.txt",
)
CLEAR_FIX = "run `finetune cache --clear`, then the same command again"
CACHE_FIX = "set $REGRAFT_CACHE to a folder that you may write to"

_log = logging.getLogger("regraft")


def cache_dir(*parts: str) -> Path:
    """The cache folder (or a folder inside it), made on first use.

    `$REGRAFT_CACHE`, else `$XDG_CACHE_HOME/regraft`, else `~/.cache/regraft`. Raises `UserError`
    where it is not there and cannot be made; one that may only be read is given as it is.
    """
    base, origin = _cache_base()
    folder = base.joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        readme = base / "README.txt"
        if not readme.exists():
            # a full disk and a folder that may only be read are met by who needs more
            with contextlib.suppress(UserError):
                write_text(readme, CACHE_README)
    except OSError as error:
        why = f"the cache folder cannot be made ({error.strerror})"
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            why = "a file stands where a folder of the cache is needed"
            if base.is_dir():
                raise UserError(why, where=folder, fix=CLEAR_FIX) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = f"free some space, or {CACHE_FIX}"
            raise UserError("the disk is full", where=f"{origin}: {folder}", fix=fix) from error
        raise UserError(why, where=f"{origin}: {folder}", fix=CACHE_FIX) from error
    return folder


def _cache_base() -> tuple[Path, str]:
    """Where the cache is to be, and what says so."""
    if root := os.environ.get("REGRAFT_CACHE"):
        try:
            return Path(root).expanduser(), "$REGRAFT_CACHE"
        except RuntimeError as error:
            raise UserError(
                "there is no such user's home folder",
                where=f"$REGRAFT_CACHE: {root}",
                fix=CACHE_FIX,
            ) from error
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if Path(xdg).is_absolute():  # its specification: a relative path is to be ignored
        return Path(xdg) / "regraft", "$XDG_CACHE_HOME"
    try:
        return Path.home() / ".cache" / "regraft", "the cache in the home folder"
    except RuntimeError as error:
        raise UserError(
            "this user has no home folder, in which the cache would be",
            where="$HOME",
            fix=CACHE_FIX,
        ) from error


def note(text: str) -> None:
    """Tell the user something that is no error, in a line on stderr: through `logging`, so that a
    program can hide it."""
    _log.warning("note: %s", text)


def seal(path: Path, sealed: Sequence[Path]) -> None:
    """Write the checksums of files beside them to `path`, so that `is_sealed` can tell later
    whether they are whole."""
    write_json(path, {file.name: _checksum(file) for file in sealed})


def is_sealed(path: Path, sealed: Sequence[Path]) -> bool:
    """Whether the files, and no others, are as `seal` met them; False also where they, or the seal,
    cannot be read."""
    try:
        return bool(read_json(path) == {file.name: _checksum(file) for file in sealed})
    except (OSError, UserError):
        return False


def _checksum(path: Path) -> str:
    """CRC-32, four times as fast as SHA-256: it is there for accidents, not against anybody."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            value = zlib.crc32(piece, value)
    return f"{value:08x}"


@contextlib.contextmanager
def disk_errors(where: object) -> Iterator[None]:
    """Turn a full disk, a read-only folder and their kin into a `UserError` that says what to
    do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            what = (
                "the disk is full"
                if error.errno != errno.EFBIG
                else "the file would be larger than this system allows"
            )
            raise UserError(
                what,
                where=where,
                fix="free some space, then run the same command again: it goes on",
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise UserError(
                f"cannot write here ({error.strerror})",
                where=where,
                fix="mend its permissions, or choose another folder: --out or -o for results, "
                "$REGRAFT_CACHE for the cache",
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise UserError(
                f"a file stands where a folder is needed ({error.strerror})",
                where=where,
                fix="choose another name",
            ) from error
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            what = f"cannot be written under this name ({error.strerror})"
            raise UserError(what, where=where, fix="choose another name") from error
        raise


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to the disk and rename it to
    `path`, else remove it."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{path.name[:TEMPORARY]}.", suffix=".tmp", dir=path.parent
        )
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def in_text(path: Path) -> Iterator[Path]:
    """A path of the same file for libraries that take no name but UTF-8: a link in a temporary
    folder, where it must be."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder) / f"link{path.suffix}"
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN is refused, since JSON has none."""
    write_text(path, json_text(value) + "\n")


def json_text(value: Any) -> str:
    """`value` as indented JSON that UTF-8 can hold: bytes of a name that are not UTF-8 become
    JSON's own escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace").decode()


def read_json(path: Path) -> Any:
    """Read JSON that this project wrote; a missing or damaged file is named."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError("no such file", where=path) from error
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(
            f"damaged: not valid JSON ({error})", where=path, fix="make it again"
        ) from error


def digest(*parts: bytes | str) -> str:
    """SHA-256 over length-prefixed parts, as 64 hex digits: no two different lists of parts collide
    by joining."""
    state = hashlib.sha256()
    for part in parts:
        data = as_bytes(part) if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def digest_json(value: Any) -> str:
    """Digest of a JSON value, independent of the order of keys."""
    return digest(json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Digests(Sequence[str]):
    """SHA-256 digests as 64 hex digits each, kept in the 32 bytes that they are: text would take
    four times as much."""

    def __init__(self, rows: NDArray[np.uint8]) -> None:
        self.rows = rows  # (n, 32)

    @classmethod
    def of(cls, digests: Sequence[str]) -> Digests:
        """`digests` as they are here; any sequence of whole digests will do."""
        if isinstance(digests, Digests):
            return digests
        rows = np.empty((len(digests), 32), dtype=np.uint8)
        # in parts: the joined text of very many would be large
        for start in range(0, len(digests), 4096):
            part = digests[start : start + 4096]
            rows[start : start + len(part)] = np.frombuffer(
                bytes.fromhex("".join(part)), dtype=np.uint8
            ).reshape(-1, 32)
        return cls(rows)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> Digests: ...
    def __getitem__(self, i: int | slice) -> str | Digests:
        return Digests(self.rows[i]) if isinstance(i, slice) else self.rows[i].tobytes().hex()

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def take(self, at: ArrayLike) -> Digests:
        """Those at the positions `at`, in their order."""
        return Digests(self.rows[np.asarray(at, dtype=np.int64)])

    def first(self, at: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of the positions `at`, the first of each content, in order."""
        # of one length: a zero at the end makes no two alike
        contents = np.ascontiguousarray(self.rows[at]).view("S32")[:, 0]
        return at[np.sort(np.unique(contents, return_index=True)[1])]


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a UTF-8 table, whole or not at all; a float is written so that `float()` gives back the
    same bits."""
    text = "".join(",".join(map(_csv, row)) + "\n" for row in (header, *rows))
    files.write_bytes(path, text.encode(errors="surrogateescape"))


def _csv(cell: object) -> str:
    text = repr(float(cell)) if isinstance(cell, float | np.floating) else str(cell)
    # Not csv.writer: with lines that end in \n it leaves a \r unquoted, which csv.reader takes for
    # the end of the line.
    return f'"{text.replace(chr(34), chr(34) * 2)}"' if re.search(r'[",\r\n]', text) else text
