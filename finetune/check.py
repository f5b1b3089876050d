"""What a check found: a verdict, the number behind it, what it means and what to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["pass", "warn", "fail", "skip"]
STATUSES: tuple[Status, ...] = ("pass", "warn", "fail", "skip")


@dataclass(frozen=True)
class Check:
    """One verdict, shown alike in a terminal, as JSON and in a report.

    `value` is what was measured, in words with its numbers; `meaning` says what follows from it,
    `action` what to do (no text: nothing). `status` skip: it could not be checked, and `meaning`
    says why.
    """

    name: str
    status: Status
    value: str
    meaning: str
    action: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """The verdict and its number on one line, what it means and what to do below it."""
        lines = [f"{self.status.upper():<5} {self.name}: {self.value}", f"      {self.meaning}"]
        if self.action:
            lines.append(f"      → {self.action}")
        return "\n".join(lines)


def worst(checks: Iterable[Check]) -> Status:
    """The gravest status among `checks`: fail, then warn, then pass; skip where nothing was
    checked."""
    found = {check.status for check in checks}
    order: tuple[Status, ...] = ("fail", "warn", "pass")
    return next((status for status in order if status in found), "skip")
