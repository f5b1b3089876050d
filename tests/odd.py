"""Names of files that are hard to show: what a file system takes, and a table, a page or a terminal
does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

NAMES = (
    os.fsdecode(b"caf\xe9.png"),
    os.fsdecode(b"caf\xe8.png"),
    "two\nlines.png",
    "\x1b[31mred.png",
    "back\\slash.png",
    r"lit\xe9.png",
    " led.png",
    "<script>alert(1)<b>.png",
    "quo\"te,'d;.png",
    "-o.png",
    "é.png",
    "e\u0301.png",
    "a.png",
    "A.png",
    f"{'l' * 251}.png",
)


def need(folder: Path) -> None:
    """Skip a test where the file system itself refuses such names, or takes two of them for one."""
    folder.mkdir()
    try:
        for name in NAMES:
            (folder / name).touch()
    except OSError:
        pytest.skip("this file system refuses such names itself")
    if len(list(folder.iterdir())) < len(NAMES):
        pytest.skip("this file system takes some of these names for one")
    for name in NAMES:
        (folder / name).unlink()
    folder.rmdir()
