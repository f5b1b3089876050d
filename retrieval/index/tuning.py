"""How hard an index must search: its search parameters rise until enough of the true neighbours are
found."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.index.spec import SearchParameters
from retrieval.vectors import ROUNDING, Ints, Rows

USELESS = 2e-4  # doubled parameters that gain less recall than this gain nothing

Shares = Callable[[SearchParameters], NDArray[np.float64]]


def tune(
    choosing: Shares,
    judging: Shares,
    parameters: SearchParameters,
    limits: SearchParameters,
    target_recall: float,
) -> tuple[SearchParameters, NDArray[np.float64]]:
    """The search parameters that hold the target recall, and what was then found for other queries
    than those that chose them.

    Both functions give, for search parameters, each query's share of its true neighbours. Where the
    second set falls short the parameters go on rising while that helps.
    """
    parameters = climb(choosing, parameters, limits, target_recall)
    seen = judging(parameters)
    while seen.mean() < target_recall and parameters != limits:
        more = doubled(parameters, limits)
        better = judging(more)
        if better.mean() < seen.mean() + USELESS:
            break
        parameters, seen = more, better
    return parameters, seen


def doubled(
    parameters: SearchParameters, limits: SearchParameters, only: str | None = None
) -> SearchParameters:
    return {
        name: min(2 * value, limits[name]) if only in (None, name) else value
        for name, value in parameters.items()
    }


def widened(
    parameters: SearchParameters, limits: SearchParameters, factor: float
) -> SearchParameters:
    """The parameters for a search in which only one row in `factor` counts: as many that count are
    looked at as before."""
    return {
        name: value if name == "k_factor" else min(math.ceil(value * factor), limits[name])
        for name, value in parameters.items()
    }


def climb(
    shares: Shares, parameters: SearchParameters, limits: SearchParameters, target_recall: float
) -> SearchParameters:
    """The first parameters at which the mean share, less its standard error, is at least
    `target_recall`; else where more is useless.

    Each step doubles the one parameter that gains most, or all where none gains alone.
    """
    now = shares(parameters)
    while (
        now.mean() - now.std() / np.sqrt(len(now)) < target_recall
        and now.mean() < 1
        and parameters != limits
    ):
        alone = [
            doubled(parameters, limits, name)
            for name in parameters
            if parameters[name] < limits[name]
        ]
        tried = [(trial, shares(trial)) for trial in alone]
        best, values = max(tried, key=lambda one: one[1].mean())
        if values.mean() < now.mean() + USELESS:
            best = doubled(parameters, limits)
            values = shares(best)
            if values.mean() < now.mean() + USELESS:
                break
        parameters, now = best, values
    return parameters


def recall_per_query(X: Rows, Q: Rows, found: Ints, last: NDArray[Any]) -> NDArray[np.float64]:
    """Of every line of `found`, the share that is as near as the last of the true neighbours:
    `(q,)`."""
    near = (cosines(X, Q, found) >= last[:, None] - ROUNDING) & (found >= 0)
    return near.mean(axis=1)


def cosines(X: Rows, Q: Rows, rows: Ints) -> NDArray[np.float64]:
    return np.stack(
        [X[np.maximum(line, 0)].astype(np.float64) @ q for line, q in zip(rows, Q, strict=True)]
    )
