"""How hard an index must search: decided on recalls alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval.index import tuning
from retrieval.index.spec import SearchParameters


def stairs(parameters: SearchParameters) -> NDArray[np.float64]:
    """Recall that follows `a` up to 64 and does not know `b`."""
    return np.full(100, min(1.0, parameters["a"] / 64))


def test_climbing_doubles_what_helps_and_leaves_the_rest() -> None:
    """The parameter without effect stays where it was; the climb ends at the first values that are
    enough."""
    start, limits = {"a": 2, "b": 2}, {"a": 1024, "b": 1024}

    assert {"a": 32, "b": 2} == tuning.climb(stairs, start, limits, 0.5)
    assert {"a": 64, "b": 2} == tuning.climb(stairs, start, limits, 1.0)
    assert {"a": 32, "b": 2} == tuning.climb(stairs, start, {"a": 32, "b": 2}, 1.0)


def test_climbing_stops_where_more_is_useless() -> None:
    """A recall that does not move ends the climb at once, far below the limits."""
    assert {"a": 2} == tuning.climb(
        lambda parameters: np.full(10, 0.5), {"a": 2}, {"a": 1 << 20}, 0.9
    )


def test_tuning_goes_on_where_the_judges_fall_short() -> None:
    """What was enough for the queries that chose may be too little for others."""
    parameters, seen = tuning.tune(
        lambda parameters: np.full(10, min(1.0, parameters["a"] / 8)),
        lambda parameters: np.full(10, min(1.0, parameters["a"] / 16)),
        {"a": 1},
        {"a": 64},
        0.95,
    )

    assert {"a": 16} == parameters
    assert 1 == seen.mean()
    assert {"a": 64} == tuning.tune(
        stairs, lambda parameters: np.ones(10), {"a": 1}, {"a": 1024}, 1.0
    )[0]


def test_a_search_among_few_rows_looks_wider() -> None:
    """Lists and graphs by the share that counts, within their limits; refinement as before."""
    wide = tuning.widened(
        {"nprobe": 4, "ef": 16, "k_factor": 8}, {"nprobe": 32, "ef": 1000, "k_factor": 1024}, 10
    )

    assert {"nprobe": 32, "ef": 160, "k_factor": 8} == wide
