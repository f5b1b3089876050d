"""How hard an index must search: its search parameters rise until enough of the true neighbours are
found."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.index.spec import Effort
from retrieval.vectors import ROUNDING, Ints, Rows

USELESS = 2e-4  # a doubled effort that gains less recall than this gains nothing

Shares = Callable[[Effort], NDArray[np.float64]]


def tune(
    choosing: Shares, judging: Shares, effort: Effort, limits: Effort, asked: float
) -> tuple[Effort, NDArray[np.float64]]:
    """The effort that holds the asked recall, and what was then found for other queries than those
    that chose it.

    Both functions give, for an effort, each query's share of its true neighbours. Where the second
    set falls short the effort goes on rising while that helps.
    """
    effort = climb(choosing, effort, limits, asked)
    seen = judging(effort)
    while seen.mean() < asked and effort != limits:
        more = doubled(effort, limits)
        better = judging(more)
        if better.mean() < seen.mean() + USELESS:
            break
        effort, seen = more, better
    return effort, seen


def doubled(effort: Effort, limits: Effort, only: str | None = None) -> Effort:
    return {
        name: min(2 * value, limits[name]) if only in (None, name) else value
        for name, value in effort.items()
    }


def widened(effort: Effort, limits: Effort, factor: float) -> Effort:
    """The effort for a search in which only one row in `factor` counts: as many that count are
    looked at as before."""
    return {
        name: value if name == "k_factor" else min(math.ceil(value * factor), limits[name])
        for name, value in effort.items()
    }


def climb(shares: Shares, effort: Effort, limits: Effort, asked: float) -> Effort:
    """The first effort at which the mean share, less its standard error, is at least `asked`; else
    where more is useless.

    Each step doubles the one parameter that gains most, or all where none gains alone.
    """
    now = shares(effort)
    while (
        now.mean() - now.std() / np.sqrt(len(now)) < asked and now.mean() < 1 and effort != limits
    ):
        alone = [doubled(effort, limits, name) for name in effort if effort[name] < limits[name]]
        tried = [(trial, shares(trial)) for trial in alone]
        best, values = max(tried, key=lambda one: one[1].mean())
        if values.mean() < now.mean() + USELESS:
            best = doubled(effort, limits)
            values = shares(best)
            if values.mean() < now.mean() + USELESS:
                break
        effort, now = best, values
    return effort


def shares_found(X: Rows, Q: Rows, found: Ints, last: NDArray[Any]) -> NDArray[np.float64]:
    """Of every line of `found`, the share that is as near as the last of the true neighbours:
    `(q,)`."""
    near = (cosines(X, Q, found) >= last[:, None] - ROUNDING) & (found >= 0)
    return near.mean(axis=1)


def cosines(X: Rows, Q: Rows, rows: Ints) -> NDArray[np.float64]:
    return np.stack(
        [X[np.maximum(line, 0)].astype(np.float64) @ q for line, q in zip(rows, Q, strict=True)]
    )
