"""How good a ranking is: every definition by hand, beside scikit-learn, and beside the benchmarks'
own evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from finetune import metrics as intervals
from retrieval import metrics
from retrieval.metrics import Truth, revisited, summarise

Floats = NDArray[np.float64]
Hits = NDArray[np.bool_]

# The running example: positives at ranks 1, 3 and 6 of six shown, four in the gallery.
HITS = np.array([[1, 0, 1, 0, 0, 1]], bool)
FOUR = np.array([4])


@st.composite
def rankings(draw: st.DrawFn, whole: bool = False) -> tuple[Hits, NDArray[np.int64]]:
    """Hits of a few queries, and how many positives each has: all of them shown where `whole`."""
    q, k = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    hits = np.array(
        draw(st.lists(st.lists(st.booleans(), min_size=k, max_size=k), min_size=q, max_size=q)),
        bool,
    )
    more = 0 if whole else np.array(draw(st.lists(st.integers(0, 4), min_size=q, max_size=q)))
    return hits, hits.sum(1) + more


# ------------------------------------------------------------------------------------------ by hand


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (metrics.recall_at(HITS, FOUR, 1), 1 / 4),
        (metrics.recall_at(HITS, FOUR, 3), 2 / 4),
        (metrics.recall_at(HITS, FOUR, 100), 3 / 4),
        (metrics.precision_at(HITS, FOUR, 1), 1),
        (metrics.precision_at(HITS, FOUR, 3), 2 / 3),
        (metrics.precision_at(HITS, FOUR, 10), 3 / 10),
        (metrics.success_at(~HITS, FOUR, 1), 0),
        (metrics.success_at(~HITS, FOUR, 2), 1),
        (metrics.average_precision(HITS, FOUR), (1 / 1 + 2 / 3 + 3 / 6) / 4),
        (
            metrics.trapezoid_average_precision(HITS, FOUR),
            ((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2 + (2 / 5 + 3 / 6) / 2) / 4,
        ),
        (metrics.map_at_r(HITS, FOUR), (1 / 1 + 2 / 3) / 4),
        (metrics.reciprocal_rank(HITS, FOUR), 1),
        (metrics.reciprocal_rank(~HITS, FOUR), 1 / 2),
    ],
)
def test_values_by_hand(value: Floats, expected: float) -> None:
    """Each definition on one ranking whose values can be computed on paper."""
    np.testing.assert_allclose(value, [expected])


EACH: dict[str, Callable[[Hits, Any], Floats]] = {
    "recall": lambda hits, positives: metrics.recall_at(hits, positives, 3),
    "success": lambda hits, positives: metrics.success_at(hits, positives, 3),
    "precision": lambda hits, positives: metrics.precision_at(hits, positives, 3),
    "ap": metrics.average_precision,
    "trapezoid": metrics.trapezoid_average_precision,
    "map@r": metrics.map_at_r,
    "rr": metrics.reciprocal_rank,
}
each = pytest.mark.parametrize("name", list(EACH))


@each
def test_a_query_without_positives_has_no_score(name: str) -> None:
    """NaN for it alone; the queries beside it keep theirs. A query whose positives were all missed
    has 0."""
    hits = np.array([[0, 0, 0], [1, 1, 0], [0, 0, 0]], bool)
    made = EACH[name](hits, np.array([0, 2, 2]))

    assert np.isnan(made[0])
    assert made[1] > 0
    assert 0 == made[2]


@each
def test_a_perfect_ranking_has_the_best_value(name: str) -> None:
    """All positives first, and as many as are looked at: 1."""
    np.testing.assert_allclose(EACH[name](np.array([[1, 1, 1, 0, 0]], bool), [3]), [1])


@each
def test_lists_may_be_empty(name: str) -> None:
    """No results at all: 0 where positives exist (MAP@R cannot be known then), NaN where none
    do."""
    if name == "map@r":
        with pytest.raises(ValueError, match="MAP@R needs lists"):
            EACH[name](np.zeros((1, 0), bool), [1])
        return
    made = EACH[name](np.zeros((2, 0), bool), [2, 0])

    assert 0 == made[0]
    assert np.isnan(made[1])
    assert (0,) == EACH[name](np.zeros((0, 4), bool), np.zeros(0, int)).shape


@each
@pytest.mark.parametrize(
    ("hits", "positives", "words"),
    [
        (np.ones((2, 3), bool), [3], r"\(2, 3\)"),
        (np.ones(3, bool), [3], r"\(q, k\)"),
        (np.ones((1, 3), int), [3], "must be bool"),
        (np.ones((1, 3), bool), [2], "query 0 has 3 hits, but 2 positives"),
    ],
)
def test_mistakes_of_a_caller_are_refused(name: str, hits: Any, positives: Any, words: str) -> None:
    """Wrong shapes and types, and more hits than positives: no silent value above 1."""
    with pytest.raises(ValueError, match=words):
        EACH[name](hits, positives)


@pytest.mark.parametrize("function", [metrics.recall_at, metrics.precision_at, metrics.success_at])
def test_k_is_at_least_one(function: Callable[..., Floats]) -> None:
    """0 would divide by nothing."""
    with pytest.raises(ValueError, match="k must be at least 1"):
        function(HITS, FOUR, 0)


# --------------------------------------------------------------------------------------- properties


@settings(max_examples=100, deadline=None)
@given(pair=rankings())
def test_values_lie_between_0_and_1_and_follow_their_order(
    pair: tuple[Hits, NDArray[np.int64]],
) -> None:
    """Recall and success grow with k; the trapezoid is never above the step-wise AP; MAP@R is never
    above AP."""
    hits, positives = pair
    some = positives > 0
    steps, areas = (
        metrics.average_precision(hits, positives),
        metrics.trapezoid_average_precision(hits, positives),
    )

    assert (areas[some] <= steps[some] + 1e-12).all()
    for function in (metrics.recall_at, metrics.success_at):
        values = np.stack([function(hits, positives, k) for k in (1, 2, 5, 12)])[:, some]
        assert (np.diff(values, axis=0) >= 0).all()
    wide = np.pad(hits, ((0, 0), (0, 20)))
    at_r = metrics.map_at_r(wide, positives)
    assert (at_r[some] <= steps[some] + 1e-12).all()
    for value in (
        steps,
        areas,
        at_r,
        metrics.reciprocal_rank(hits, positives),
        metrics.precision_at(hits, positives, 4),
    ):
        assert ((0 <= value[some]) & (value[some] <= 1)).all()
        assert np.isnan(value[~some]).all()


@settings(max_examples=100, deadline=None)
@given(pair=rankings(whole=True))
def test_average_precision_is_scikit_learns_on_whole_rankings(
    pair: tuple[Hits, NDArray[np.int64]],
) -> None:
    """With every positive shown and no ties, both definitions are one."""
    from sklearn.metrics import average_precision_score

    hits, positives = pair
    made = metrics.average_precision(hits, positives)
    for row, total, value in zip(hits, positives, made, strict=True):
        if total:
            assert average_precision_score(row, -np.arange(len(row))) == pytest.approx(value)
        else:
            assert np.isnan(value)


def test_a_list_that_is_cut_gives_a_lower_bound() -> None:
    """What was not shown counts as missed, whichever rank it would have had."""
    whole = np.array([[1, 0, 1, 0, 1]], bool)

    assert (
        metrics.average_precision(whole[:, :3], [3])[0] < metrics.average_precision(whole, [3])[0]
    )
    assert metrics.average_precision(whole[:, :3], [3])[0] == pytest.approx((1 + 2 / 3) / 3)


def test_trapezoid_by_its_own_name() -> None:
    """One positive at rank 2: half of the step-wise value of 1/2, since precision rose from 0."""
    hits = np.array([[0, 1]], bool)

    assert 0.5 == metrics.average_precision(hits, [1])[0]
    assert 0.25 == metrics.trapezoid_average_precision(hits, [1])[0]


def test_map_at_r_looks_at_r_results_alone() -> None:
    """A positive behind rank R adds nothing; lists that end before R are refused, by both
    numbers."""
    assert 0.5 == metrics.map_at_r(np.array([[1, 0, 1]], bool), [2])[0]
    with pytest.raises(ValueError, match="4, not 3"):
        metrics.map_at_r(np.array([[1, 0, 1]], bool), [4])


# ------------------------------------------------------------------------------------------- labels


def test_hits_by_label_leave_the_query_out() -> None:
    """The gallery row that is the query is no positive and no result; what follows moves up."""
    gallery, query = np.array(["a", "a", "b", "a"]), np.array(["a", "b"])
    positions = [[0, 2, 3], [0, 1, 2]]
    hits, positives = metrics.hits_by_label(positions, query, gallery, own=[0, -1])

    assert [[False, True, False], [False, False, True]] == hits.tolist()
    assert [2, 1] == positives.tolist()


def test_hits_by_label_know_empty_places_and_unknown_labels() -> None:
    """−1 is no hit, not even where the last row would match; a label that the gallery lacks has no
    positives."""
    hits, positives = metrics.hits_by_label([[-1, 1], [0, 1]], np.array([7, 9]), np.array([8, 7]))

    assert [[False, True], [False, False]] == hits.tolist()
    assert [1, 0] == positives.tolist()
    hits, positives = metrics.hits_by_label(np.full((2, 3), -1), np.array([1, 2]), np.zeros(0, int))
    assert not hits.any()
    assert [0, 0] == positives.tolist()
    with pytest.raises(ValueError, match="query labels"):
        metrics.hits_by_label([[0, 1]], np.array([1, 2]), np.array([1, 2]))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 12), seed=st.integers(0, 1000))
def test_hits_by_label_of_whole_rankings_find_every_positive(n: int, seed: int) -> None:
    """Each row of a gallery as a query over all rows: recall 1, and the counts of its class less
    itself."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, n)
    positions = np.stack([random.permutation(n) for _ in range(n)])
    hits, positives = metrics.hits_by_label(positions, labels, labels, own=np.arange(n))

    assert (
        hits.sum(1).tolist()
        == positives.tolist()
        == [(labels == label).sum() - 1 for label in labels]
    )
    assert not hits[:, -1].any()  # the place that the query itself has left


# ---------------------------------------------------------------------------------------- summaries


def test_a_summary_leaves_queries_without_score_out_and_counts_them() -> None:
    """The mean is over the others; the interval holds it and shrinks with more queries."""
    few = summarise([0.0, 1.0, np.nan, 0.5] * 5)
    many = summarise([0.0, 1.0, np.nan, 0.5] * 500)

    assert (0.5, 15, 5) == (few.value, few.n, few.left_out)
    assert few.low < many.low < 0.5 < many.high < few.high
    assert 0 <= few.low <= few.high <= 1


def test_shares_of_queries_have_wilsons_interval() -> None:
    """Success of queries is a share: 36 of 36 leave room for failures, as `finetune` says it of 36
    images."""
    made = summarise(np.ones(36))
    some = summarise([0.0] * 30 + [1.0] * 10)

    assert ("wilson", 36, 1.0) == (made.method, made.n, made.value)
    assert (pytest.approx(36 / (36 + intervals.Z**2)), 1.0) == (made.low, made.high)
    assert (*intervals.wilson(0.25, 40), "wilson") == (some.low, some.high, some.method)


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("n", [1, 2, 36])
def test_no_interval_of_few_queries_is_of_width_zero(value: float, n: int) -> None:
    """Where all queries have the same value, resampling says nothing: the interval keeps a width,
    and names its method."""
    made = summarise([value] * n)

    assert made.high - made.low > 1 / (n + 4)
    assert made.low <= value <= made.high
    assert ("wilson", n) == (made.method, made.n)


def test_other_means_have_a_bootstrap_over_queries() -> None:
    """Values between 0 and 1 have the bootstrap of `finetune.metrics`: close to the normal
    interval, the same every time."""
    values = np.array([0.1] * 300 + [0.9] * 100)
    made = summarise(values)
    error = 1.96 * 0.8 * np.sqrt(0.25 * 0.75 / 400)

    assert "bootstrap" == made.method
    assert made.low == pytest.approx(0.3 - error, abs=0.006)
    assert made.high == pytest.approx(0.3 + error, abs=0.006)
    assert made == summarise(values)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Of 100 samples of 20 queries, about 95 % have the mean of the population in their
    interval."""
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        made = summarise(random.beta(2, 3, 20))
        inside += made.low <= 0.4 <= made.high

    assert 90 <= inside <= 99


@pytest.mark.parametrize("values", [[], [np.nan]])
def test_without_a_query_there_is_no_value(values: Sequence[float]) -> None:
    """Neither a value nor an interval is made up."""
    made = summarise(values)

    assert (True, True, 0, "none") == (
        np.isnan(made.value),
        np.isnan(made.low),
        made.n,
        made.method,
    )


# ----------------------------------------------------------------------- revisited Oxford and Paris


def test_the_protocol_on_a_ranking_by_hand() -> None:
    """Ranking e j h x e h with easy e, hard h, junk j and x neither: what a level ignores gives its
    rank away."""
    truth = Truth(easy=[10, 14], hard=[12, 15], junk=[11])
    made = revisited([[10, 11, 12, 13, 14, 15]], [truth], ks=(1, 2, 10))
    easy, medium, hard = (made[level] for level in ("easy", "medium", "hard"))

    # easy: e x e; medium: e h x e h; hard: h x h
    assert easy.ap[0] == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert medium.ap[0] == pytest.approx((1 + 1 + (2 / 3 + 3 / 4) / 2 + (3 / 4 + 4 / 5) / 2) / 4)
    assert hard.ap[0] == pytest.approx(easy.ap[0])
    assert [1, 0.5, 2 / 3] == [pytest.approx(easy.precision[k][0]) for k in (1, 2, 10)]
    assert [1, 1, 4 / 5] == [pytest.approx(medium.precision[k][0]) for k in (1, 2, 10)]


def test_junk_counts_for_nothing() -> None:
    """Junk before, between and behind changes no value; a distractor in its place does."""
    truth = Truth(easy=[1], hard=[2], junk=[7, 8, 9])
    plain, with_junk, with_others = (
        revisited([ranking], [truth])["medium"].ap[0]
        for ranking in ([1, 3, 2], [7, 1, 8, 3, 2, 9], [4, 1, 5, 3, 2, 6])
    )

    assert plain == with_junk
    assert with_others < plain


def test_empty_places_of_a_ranking_have_no_rank() -> None:
    """−1 marks a place without a result, as often as there are such places."""
    truth = [Truth([1], [2], [])]

    assert (
        revisited([[5, 1, 2]], truth)["medium"].ap[0]
        == revisited([[5, -1, 1, -1, 2]], truth)["medium"].ap[0]
    )


def test_a_level_without_positives_is_left_out() -> None:
    """NaN for that level of that query alone; positives that are not shown count as missed."""
    made = revisited([[5, 1], [3, -1]], [Truth([1], [], []), Truth([], [4], [3])])

    assert [0.25, np.nan] == pytest.approx(made["easy"].ap.tolist(), nan_ok=True)
    assert [np.nan, 0.0] == pytest.approx(made["hard"].ap.tolist(), nan_ok=True)
    assert [0.25, 0.0] == made["medium"].ap.tolist()
    assert [np.nan, 0.0] == pytest.approx(made["hard"].precision[5].tolist(), nan_ok=True)


def test_rankings_that_cannot_be_judged_are_refused() -> None:
    """A row twice, or truth for another number of queries."""
    with pytest.raises(ValueError, match="same row twice"):
        revisited([[1, 2, 1]], [Truth([1], [2], [])])
    with pytest.raises(ValueError, match="truth for 2 queries"):
        revisited([[1]], [Truth([1], [], [])] * 2)


def benchmark_own(
    ranking: Sequence[int], ok: Sequence[int], junk: Sequence[int], ks: Sequence[int]
) -> tuple[float, list[float]]:
    """AP and precisions as the benchmark's published evaluation computes them, step by step."""
    places = np.flatnonzero(np.isin(ranking, ok))
    ignored = np.flatnonzero(np.isin(ranking, junk))
    places = np.array([place - int((ignored < place).sum()) for place in places])
    ap = 0.0
    for j, rank in enumerate(places):
        before = 1.0 if rank == 0 else j / rank
        ap += (before + (j + 1) / (rank + 1)) / (2 * len(ok))
    ranks = places + 1
    cuts = [min(int(ranks.max()), k) for k in ks]
    return ap, [float((ranks <= cut).sum()) / cut for cut in cuts]


@settings(max_examples=100, deadline=None)
@given(kinds=st.lists(st.sampled_from("ehjx"), min_size=1, max_size=25))
def test_the_protocol_agrees_with_the_benchmarks_own_evaluation(kinds: list[str]) -> None:
    """On whole rankings of any mix of easy, hard, junk and others, at every level."""
    rows = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in "ehjx"}
    made = revisited([range(len(kinds))], [Truth(rows["e"], rows["h"], rows["j"])], ks=(1, 5, 10))
    levels = {
        "easy": (rows["e"], rows["j"] + rows["h"]),
        "medium": (rows["e"] + rows["h"], rows["j"]),
        "hard": (rows["h"], rows["j"] + rows["e"]),
    }
    for level, (ok, junk) in levels.items():
        if not ok:
            assert np.isnan(made[level].ap[0])
            continue
        ap, precisions = benchmark_own(range(len(kinds)), ok, junk, (1, 5, 10))
        assert ap == pytest.approx(made[level].ap[0])
        assert precisions == pytest.approx([made[level].precision[k][0] for k in (1, 5, 10)])
