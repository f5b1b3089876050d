"""The one error a person can mend."""

from __future__ import annotations

from pathlib import Path

from finetune.errors import UserError


def test_a_message_can_be_printed_anywhere() -> None:
    """Names in a message cannot break a line, move the cursor or fail to print; lines of the
    message itself stay."""
    error = UserError(
        "no 'caf\udce9'\nsecond line", where=Path("two\nlines\x1b[31m.png"), fix="see \x07b"
    )

    assert r"two\x0alines\x1b[31m.png: no 'caf\xe9'" + "\nsecond line\n  → see \\x07b" == str(error)
    assert (r"two\x0alines\x1b[31m.png", "no 'caf\\xe9'\nsecond line", r"see \x07b") == (
        error.where,
        error.what,
        error.fix,
    )
