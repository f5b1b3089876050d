"""The one error a person can mend: every message says where, what (with the value), and what to do."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right. The CLI prints it and exits 1; the library raises it as it is.

    `where` names the file, option or line; `what` says what is wrong, with the value; `fix` says what to do.
    """

    def __init__(self, what: str, *, where: object = None, fix: str = "") -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.fix = fix
        head = f"{self.where}: {what}" if self.where else what
        super().__init__(f"{head}\n  → {fix}" if fix else head)
