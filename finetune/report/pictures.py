"""Pictures that a command writes beside its text."""

from __future__ import annotations

from pathlib import Path

from finetune import files, names
from finetune.errors import UserError
from finetune.training.range_test import RangeTest

ENDINGS = (".svg", ".html")


def check(picture: str | None) -> None:
    """Refuse the name of a picture that cannot be written, before any work."""
    if picture is None:
        return
    path = Path(picture)
    if path.suffix.lower() not in ENDINGS:
        what = f"no picture is written as {path.suffix or 'a file without ending'!r}"
        raise UserError(what, where=path, fix=f"name it {' or '.join(ENDINGS)}")
    if not path.absolute().parent.is_dir():
        raise UserError("its folder does not exist", where=path, fix="make the folder first")


def range_test(test: RangeTest | None, picture: str, data: str) -> str:
    """Write the learning-rate range test to `picture`; returns a line about it."""
    from finetune.training import range_picture

    if test is None or len(test.factors) < 2:
        return "picture    not written: there was no learning-rate range test (see the checks)"
    path = Path(picture)
    title = f"Learning-rate range test: {names.shown(data)}"
    make = range_picture.page if path.suffix.lower() == ".html" else range_picture.svg
    files.write_text(path, make(test, title))
    return f"picture    {names.shown(path)}"
