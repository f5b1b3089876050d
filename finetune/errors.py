"""The one error a person can mend: every message says where, what (with the value), and what to
do."""

from __future__ import annotations

import re

# Controls, the separators of lines and paragraphs, marks that turn the direction of text, bytes
# that are not UTF-8.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """Something the user can put right. The CLI prints it and exits 1; the library raises it as it
    is.

    `where` names the file, option or line; `what` says what is wrong, with the value; `fix` says
    what to do.
    """

    def __init__(self, what: str, *, where: object = None, fix: str = "") -> None:
        self.what = what = "\n".join(map(printable, what.split("\n")))  # several lines are meant
        self.where = None if where is None else printable(str(where))
        self.fix = fix = printable(fix)
        head = f"{self.where}: {what}" if self.where else what
        super().__init__(f"{head}\n  → {fix}" if fix else head)


def printable(text: str) -> str:
    r"""`text` for a terminal or a page: what a name of a file may hold, but nobody can read, is
    written as bytes, `\xNN`."""
    return UNPRINTABLE.sub(
        lambda found: "".join(f"\\x{byte:02x}" for byte in as_bytes(found[0])), text
    )


def as_bytes(name: str) -> bytes:
    """The bytes that Python's file functions take a name for."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except (
        UnicodeEncodeError
    ):  # half of a surrogate pair, as JSON may hold: no system's file functions make one
        return name.encode("utf-8", "surrogatepass")
