r"""Names of files as text: one reversible way to show them, in JSON, CSV, HTML and at the terminal.

A name is bytes, and may hold a line feed, an escape sequence or no valid UTF-8. `shown` keeps what is printable and writes
every other byte as `\xNN`, a backslash as `\\`; `meant` is its inverse. Inside the program a name is what Python's file
functions give (`surrogateescape`).
"""

from __future__ import annotations

import os
import re

# Controls, the separators of lines and paragraphs, marks that turn the direction of text, bytes that are not UTF-8.
HIDDEN = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
WRITTEN = re.compile(rb"\\(\\|x[0-9a-fA-F]{2})")


def shown(name: str | os.PathLike[str]) -> str:
    r"""A name of a file as printable text: `caf\xe9.jpg`, `two\x0alines.png`, `a\\b`; most names are as they were."""
    return HIDDEN.sub(lambda found: _written(found[0]), os.fspath(name))


def meant(text: str) -> str:
    r"""The name that `shown` was given: `meant(shown(name)) == name`. A backslash before anything else stands for itself."""
    if "\\" not in text:
        return text
    data = WRITTEN.sub(lambda found: b"\\" if found[1] == b"\\" else bytes([int(found[1][1:], 16)]), _bytes(text))
    return data.decode("utf-8", "surrogateescape")


def _written(letter: str) -> str:
    return "\\\\" if letter == "\\" else "".join(f"\\x{byte:02x}" for byte in _bytes(letter))


def _bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON may hold: no system's file functions make one
        return text.encode("utf-8", "surrogatepass")
