"""What is read off a learning-rate range test."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from finetune.training import range_picture, range_test
from finetune.training.range_test import RangeTest


def made(smooth: Sequence[float], *, first: float = -3, blown: bool = False) -> RangeTest:
    """A test with two steps a decade from `first` on, around a planned rate of 0.01."""
    loss = np.array(smooth, np.float64)
    factors = 10 ** (first + np.arange(len(loss)) / 2)
    slope = np.gradient(loss, np.log10(factors)) if len(loss) > 1 else np.zeros(len(loss))
    groups = {"stage1": 0.001, "head": 0.01}
    return RangeTest(
        rate=0.01,
        groups=groups,
        factors=factors,
        losses=loss,
        smooth=loss,
        slope=slope,
        blown=blown,
    )


FALLS = [2.0, 2.0, 1.9, 1.8, 1.5, 1.2, 1.0, 0.7, 0.5, 0.9, 4.0]  # lowest at a factor of 10


def test_a_rate_where_the_loss_falls_passes() -> None:
    """The lowest loss lies at ten times the plan, the steepest fall before it."""
    test = made(FALLS, blown=True)

    assert test.lowest == pytest.approx(10)
    assert 0.1 <= test.steepest < 10
    assert "pass" == range_test.judged(test).status


@pytest.mark.parametrize(
    ("test", "status", "words"),
    [
        (made(FALLS, first=-5, blown=True), "fail", "diverges"),
        (made([*FALLS, 4.0], first=-5), "warn", "already rises"),
        (made(FALLS, first=0), "warn", "hardly anything"),
        (made([2.0] * 11), "warn", "no rate lowers"),
        (made([2.0, 9.0], blown=True), "fail", "nothing can be learned"),
    ],
)
def test_other_rates_are_told_apart(test: RangeTest, status: str, words: str) -> None:
    """Beyond the edge, behind the lowest loss, far below it, or nothing to find at all."""
    check = range_test.judged(test)

    assert (status, True) == (check.status, words in check.meaning), check
    assert check.action


def test_the_rate_that_is_proposed_is_a_tenth_of_that_of_the_lowest_loss() -> None:
    """The plan's own rate plays no part in it."""
    assert "set the rate to 1.0e-05," in range_test.judged(made(FALLS, first=-6)).action


def test_what_comes_after_the_first_rise_does_not_count() -> None:
    """A loss that was thrown up and falls again is no sign of a good rate."""
    again = [2.0, 1.8, 1.4, 1.0, 1.6, 1.8, 0.9, 0.8, 3.0]

    assert made(again).lowest == pytest.approx(10**-1.5)


@pytest.mark.parametrize("smooth", [FALLS, [2.0, 9.0], [0.0, 0.0, 0.0], [1e-9] * 5])
def test_it_is_drawn_and_written_whatever_it_met(smooth: list[float]) -> None:
    """Strict JSON, and a picture without a number that is none."""
    test = made(smooth)

    json.dumps(test.to_json(), allow_nan=False)
    assert "nan" not in range_picture.svg(test, "test")
