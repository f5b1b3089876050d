"""Which kind of index serves, and how hard it must search: decided on numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from finetune.errors import UserError
from retrieval import spec
from retrieval.spec import choose


def test_choose_takes_the_most_exact_kind_that_fits() -> None:
    """By size first, then by memory, down to codes alone; where nothing fits, the message says how
    much would."""
    assert "Flat" == choose(20_000, 1280)
    assert "SQfp16" == choose(60_000, 1280)
    assert choose(1_000_000, 1280).startswith("IVF4096,PQ256x4fs,Refine(SQfp16)")
    assert "Flat" == choose(20_000, 1280, 103)
    assert "SQfp16" == choose(20_000, 1280, 60)
    sizes = [choose(2_000_000, 128, memory) for memory in (None, 400, 200)]
    assert ["Refine(SQfp16)", "Refine(SQ8)", "PQ64x4fs"] == [name.split(",")[-1] for name in sizes]
    assert "SQ8" == choose(5000, 1280, 7)
    with pytest.raises(UserError, match="do not fit 10 MB") as caught:
        choose(1_000_000, 1280, 10)
    needed = float(str(caught.value).split("allow ")[1].split(" MB")[0])
    assert "PQ256x4fs" == choose(1_000_000, 1280, needed + 0.1).split(",")[-1]


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 10_000_000), d=st.integers(1, 4096), memory=st.none() | st.floats(0.01, 1e5)
)
def test_choose_never_exceeds_the_memory(n: int, d: int, memory: float | None) -> None:
    """Codes of the chosen kind fit; without a limit something is always chosen; PQ parts divide the
    width."""
    try:
        name = choose(n, d, memory)
    except UserError:
        assert memory is not None
        return
    parts = int(name.split("PQ")[1].split("x")[0]) if "PQ" in name else 0
    assert not parts or d % parts == 0
    per = {
        "Flat": 4.0 * d,
        "SQfp16": 2.0 * d,
        "SQ8": d,
        "Refine(SQfp16)": 2.0 * d,
        "Refine(SQ8)": d,
    }.get(name.split(",")[-1], 0)
    assert memory is None or n * per <= memory * 1e6


# ------------------------------------------------------------------------------------------- effort


def stairs(effort: spec.Effort) -> NDArray[np.float64]:
    """Recall that follows `a` up to 64 and does not know `b`."""
    return np.full(100, min(1.0, effort["a"] / 64))


def test_climbing_doubles_what_helps_and_leaves_the_rest() -> None:
    """The parameter without effect stays where it was; the climb ends at the first effort that is
    enough."""
    start, limits = {"a": 2, "b": 2}, {"a": 1024, "b": 1024}

    assert {"a": 32, "b": 2} == spec.climb(stairs, start, limits, 0.5)
    assert {"a": 64, "b": 2} == spec.climb(stairs, start, limits, 1.0)
    assert {"a": 32, "b": 2} == spec.climb(stairs, start, {"a": 32, "b": 2}, 1.0)


def test_climbing_stops_where_more_is_useless() -> None:
    """A recall that does not move ends the climb at once, far below the limits."""
    assert {"a": 2} == spec.climb(lambda effort: np.full(10, 0.5), {"a": 2}, {"a": 1 << 20}, 0.9)


def test_tuning_goes_on_where_the_judges_fall_short() -> None:
    """What was enough for the queries that chose may be too little for others."""
    effort, seen = spec.tune(
        lambda effort: np.full(10, min(1.0, effort["a"] / 8)),
        lambda effort: np.full(10, min(1.0, effort["a"] / 16)),
        {"a": 1},
        {"a": 64},
        0.95,
    )

    assert {"a": 16} == effort
    assert 1 == seen.mean()
    assert {"a": 64} == spec.tune(stairs, lambda effort: np.ones(10), {"a": 1}, {"a": 1024}, 1.0)[0]


def test_a_search_among_few_rows_looks_wider() -> None:
    """Lists and graphs by the share that counts, within their limits; refinement as before."""
    wide = spec.widened(
        {"nprobe": 4, "ef": 16, "k_factor": 8}, {"nprobe": 32, "ef": 1000, "k_factor": 1024}, 10
    )

    assert {"nprobe": 32, "ef": 160, "k_factor": 8} == wide
