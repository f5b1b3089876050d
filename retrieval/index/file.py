"""The file of an index: what the index library wrote, and behind it a description that its digest
guards.

    payload | description (JSON) | SHA-256 of the description | its length, 8 bytes | magic, 8 bytes

The payload comes first so that its own library can map it into memory, or open the file by itself:
it ignores the rest. Nothing in it is pickled, and it is checked before any reader interprets it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from finetune import files
from finetune.errors import UserError

MAGIC = b"RGRIDX01"
TAIL = 32 + 8 + len(MAGIC)
LONGEST = 64 << 20  # bytes of a description
CHUNK = 1 << 22
AGAIN = "restore it from a copy, or build the index again"


def write(
    path: Path, description: dict[str, Any], feed: Callable[[Callable[[bytes], None]], None]
) -> None:
    """Write an index file, whole or not at all. `feed` is given a function that takes the payload
    piece by piece."""
    with files.atomic(path) as temporary, temporary.open("wb") as file:
        state = hashlib.sha256()

        def take(piece: bytes) -> None:
            state.update(piece)
            file.write(piece)

        feed(take)
        whole = {**description, "payload bytes": file.tell(), "payload sha256": state.hexdigest()}
        text = json.dumps(whole, sort_keys=True, allow_nan=False).encode()
        file.write(text + hashlib.sha256(text).digest() + len(text).to_bytes(8, "little") + MAGIC)


def read(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """The description of an index file. `verify` reads the payload too and compares its digest.

    Raises `UserError` for a missing file, one of another kind, and any damage: cut short, or a byte
    changed.
    """
    try:
        with path.open("rb") as file:
            return _read(file, path, verify)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError("no such index file", where=path, fix="build it first") from error
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=path) from error


def _read(file: BinaryIO, path: Path, verify: bool) -> dict[str, Any]:
    size = file.seek(0, 2)
    file.seek(max(0, size - TAIL))
    tail = file.read(TAIL)
    if len(tail) < TAIL or not tail.endswith(MAGIC):
        raise UserError(
            f"no index file of this version, or cut short ({size:,} bytes)", where=path, fix=AGAIN
        )
    length = int.from_bytes(tail[32:40], "little")
    if length > min(size - TAIL, LONGEST):
        raise UserError(
            f"damaged: a description of {length:,} bytes in a file of {size:,}",
            where=path,
            fix=AGAIN,
        )
    file.seek(size - TAIL - length)
    text = file.read(length)
    if hashlib.sha256(text).digest() != tail[:32]:
        raise UserError("damaged: its description is not what was written", where=path, fix=AGAIN)
    try:
        description = json.loads(text)
        expected, digest = int(description["payload bytes"]), str(description["payload sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"damaged: its description does not parse ({error})", where=path, fix=AGAIN
        ) from error
    if expected != size - TAIL - length:
        raise UserError(
            f"damaged: {size - TAIL - length:,} bytes where {expected:,} were written",
            where=path,
            fix=AGAIN,
        )
    if verify and _digest(file, expected) != digest:
        raise UserError("damaged: its content is not what was written", where=path, fix=AGAIN)
    return dict(description)


def _digest(file: BinaryIO, count: int) -> str:
    state = hashlib.sha256()
    file.seek(0)
    while count:
        piece = file.read(min(CHUNK, count))
        if not piece:
            break
        state.update(piece)
        count -= len(piece)
    return state.hexdigest()
