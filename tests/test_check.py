"""A verdict reads alike everywhere, and the gravest one counts."""

from __future__ import annotations

import pytest

from finetune.check import Check, Status, worst


def made(status: Status) -> Check:
    return Check("initial loss", status, "2.31", "as expected", "do nothing")


def test_a_check_is_told_with_its_number_its_meaning_and_what_to_do() -> None:
    text = made("warn").to_text()
    assert text.splitlines() == [
        "WARN  initial loss: 2.31",
        "      as expected",
        "      → do nothing",
    ]


def test_a_check_without_anything_to_do_has_no_arrow() -> None:
    assert "→" not in Check("initial loss", "pass", "2.31", "as expected").to_text()


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (["pass", "skip", "warn"], "warn"),
        (["warn", "fail", "pass"], "fail"),
        (["skip", "pass"], "pass"),
        (["skip"], "skip"),
        ([], "skip"),
    ],
)
def test_the_gravest_status_counts(statuses: list[Status], expected: Status) -> None:
    assert worst(made(status) for status in statuses) == expected
