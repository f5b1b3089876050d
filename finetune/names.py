r"""Names of files as text: one reversible way to show them, in JSON, CSV, HTML and at the terminal.

A name is bytes, and may hold a line feed, an escape sequence or no valid UTF-8. `shown` keeps what
is printable and writes every other byte as `\xNN`, a backslash as `\\`, and a blank at either end,
which readers of tables cut off, as `\x20`; `meant` is its inverse. Inside the program a name is
what Python's file functions give (`surrogateescape`).
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from finetune.errors import UNPRINTABLE, as_bytes, printable

WRITTEN = re.compile(rb"\\(\\|x[0-9a-fA-F]{2})")
BLANK = re.compile(r"\A\s|\s\Z")


def shown(name: str | os.PathLike[str]) -> str:
    r"""A name of a file as printable text: `caf\xe9.jpg`, `two\x0alines.png`, `a\\b`; most names
    are as they were."""
    return BLANK.sub(_bytewise, printable(os.fspath(name).replace("\\", "\\\\")))


def meant(text: str) -> str:
    r"""The name that `shown` was given: `meant(shown(name)) == name`. A backslash before anything
    else stands for itself."""
    if "\\" not in text:
        return text
    data = WRITTEN.sub(
        lambda found: b"\\" if found[1] == b"\\" else bytes([int(found[1][1:], 16)]), as_bytes(text)
    )
    return data.decode("utf-8", "surrogateescape")


def written(text: str, folder: str | os.PathLike[str] = "") -> str:
    """The name that somebody wrote: `text` as it is where a file or folder of `folder` is called
    so, else what it means."""
    return text if "\\" not in text or os.path.lexists(os.path.join(folder, text)) else meant(text)


def way(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> str:
    """The way from `folder` to `path` (which may be relative to it), spelled in one way, POSIX.

    Where the system leaves a link by `..`, it is above what the link points to: a way with `..`
    that would lead elsewhere, or nowhere, goes between the real places.
    """
    text, start = os.fspath(path), os.fspath(folder)
    there = os.path.join(start, text)
    plain = os.path.normpath(os.path.relpath(text, start) if os.path.isabs(text) else text)
    if os.pardir in Path(text).parts + Path(plain).parts and os.path.lexists(there):
        try:
            right = os.path.samefile(os.path.join(start, plain), there)
        except OSError:
            right = False
        if not right:
            holder, name = os.path.split(there)
            plain = os.path.relpath(
                os.path.join(os.path.realpath(holder), name), os.path.realpath(start)
            )
    return plain.replace(os.sep, "/")


def spelled(name: str) -> str:
    """A name for what keeps plain text, as classes and recipes do: as it is where it can be
    printed, else as it is shown.

    Different names stay different, and `meant` gives the name back.
    """
    return shown(name) if UNPRINTABLE.search(name) or meant(name) != name else name


def to_database(name: str) -> str | bytes:
    """A name as a database holds it: text, or bytes where it is not UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return as_bytes(name)
    return name


def from_database(value: str | bytes) -> str:
    """The name that a database holds: the inverse of `to_database`."""
    return value if isinstance(value, str) else value.decode("utf-8", "surrogateescape")


def typed(path: str | os.PathLike[str]) -> str:
    r"""A path as a shell reads it: quoted where it must be, `$'caf\xe9'` where it cannot be
    printed."""
    text = os.fspath(path)
    if UNPRINTABLE.search(text):
        return "$'" + shown(text).replace("'", r"\'") + "'"
    return shlex.quote(text)


def _bytewise(found: re.Match[str]) -> str:
    return "".join(f"\\x{byte:02x}" for byte in as_bytes(found[0]))
