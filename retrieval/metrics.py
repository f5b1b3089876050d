"""How good a ranking is: pure functions on arrays, each with its definition.

A ranking is described by two arrays. `hits` is `(q, k)` bool: `hits[i, j]` says whether the j-th
result of query `i` (best first) is a positive. `positives` is `(q,)` int: how many positives query
`i` has in the whole gallery, found or not; below, R. The query itself, and everything else that
must not count, is removed before. A list that ends early has False in its remaining columns, and a
result that is missing is a miss.

Every function returns one float64 value a query. A query without positives (R = 0) has no defined
score: its value is NaN, and `summarise` leaves it out and says how many were left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finetune import metrics as intervals

LEVELS = ("easy", "medium", "hard")


def hits_by_label(
    positions: ArrayLike,
    query_labels: ArrayLike,
    gallery_labels: ArrayLike,
    own: ArrayLike | None = None,
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """`hits` and `positives` where two images match if their labels are equal.

    `positions` is `(q, k)` int, rows of the gallery, best first; −1 marks a place without a result.
    `own` is `(q,)`: the gallery row that is the query itself, −1 for none. That row is no positive,
    and a result that shows it is taken out of the ranking: what follows moves up by one.
    """
    places, query, gallery = (
        np.asarray(positions),
        np.asarray(query_labels),
        np.asarray(gallery_labels),
    )
    if places.ndim != 2 or len(places) != len(query):
        raise ValueError(
            f"positions {places.shape} must be (q, k) with one row "
            f"for each of the {len(query)} query labels"
        )
    codes = np.unique(np.concatenate([gallery, query]), return_inverse=True)[1]
    gallery, query = codes[: len(gallery)], codes[len(gallery) :]
    positives = np.bincount(gallery, minlength=len(codes))[query]
    hits = np.zeros(places.shape, bool)
    if len(gallery):
        hits = (gallery[np.maximum(places, 0)] == query[:, None]) & (places >= 0)
    if own is not None:
        rows = np.asarray(own)
        inside = rows >= 0
        positives[inside] -= gallery[rows[inside]] == query[inside]
        shown = (places == rows[:, None]) & inside[:, None]
        order = np.argsort(shown, axis=1, kind="stable")
        hits = np.take_along_axis(hits & ~shown, order, axis=1)
    return hits, positives


def recall_at(hits: ArrayLike, positives: ArrayLike, k: int) -> NDArray[np.float64]:
    """Recall@k: positives among the first k results, divided by R."""
    found, total = _checked(hits, positives, k)
    return _divide(found[:, :k].sum(1), total)


def success_at(hits: ArrayLike, positives: ArrayLike, k: int) -> NDArray[np.float64]:
    """1 where at least one positive is among the first k, else 0. Metric-learning papers call its
    mean Recall@K."""
    found, total = _checked(hits, positives, k)
    return np.where(total > 0, found[:, :k].any(1).astype(np.float64), np.nan)


def precision_at(hits: ArrayLike, positives: ArrayLike, k: int) -> NDArray[np.float64]:
    """Precision@k: positives among the first k results, divided by k, also where fewer than k
    exist."""
    found, total = _checked(hits, positives, k)
    return np.where(total > 0, found[:, :k].sum(1) / k, np.nan)


def average_precision(hits: ArrayLike, positives: ArrayLike) -> NDArray[np.float64]:
    """Step-wise AP: precision at the rank of every positive that was found, summed, divided by R.

    A positive that is not in the list adds nothing, so on a list cut at k this is a lower bound of
    the AP of the whole ranking. On a whole ranking without ties it is scikit-learn's
    `average_precision_score`.
    """
    found, total = _checked(hits, positives)
    return _divide((found * _precisions(found)).sum(1), total)


def trapezoid_average_precision(hits: ArrayLike, positives: ArrayLike) -> NDArray[np.float64]:
    """AP as the Oxford and Paris benchmarks compute it: the area under precision over recall by
    trapezoids.

    The j-th positive (from 0) at rank r (from 0) adds `(p0 + p1) / 2 / R`, with the precision just
    before it, `p0 = j / r` (1 where r = 0), and at it, `p1 = (j + 1) / (r + 1)`. It is never above
    the step-wise AP. Philbin et al., "Object retrieval with large vocabularies and fast spatial
    matching", CVPR 2007.
    """
    found, total = _checked(hits, positives)
    at = _precisions(found)
    before = np.concatenate([np.ones((len(found), 1)), at[:, :-1]], axis=1)[:, : found.shape[1]]
    return _divide((found * (before + at) / 2).sum(1), total)


def map_at_r(hits: ArrayLike, positives: ArrayLike) -> NDArray[np.float64]:
    """MAP@R: step-wise AP over the first R results only, divided by R.

    Musgrave et al., "A Metric Learning Reality Check", ECCV 2020. The lists must be at least as
    long as the largest R: a shorter one is a `ValueError`, because its value cannot be known.
    """
    found, total = _checked(hits, positives)
    longest = int(total.max(initial=0))
    if found.shape[1] < longest:
        raise ValueError(
            f"MAP@R needs lists as long as the largest number of positives: "
            f"{longest}, not {found.shape[1]}"
        )
    inside = found & (np.arange(found.shape[1]) < total[:, None])
    return _divide((inside * _precisions(inside)).sum(1), total)


def reciprocal_rank(hits: ArrayLike, positives: ArrayLike) -> NDArray[np.float64]:
    """1 / rank of the first positive, ranks from 1; 0 where the list shows none. Its mean is the
    MRR."""
    found, total = _checked(hits, positives)
    if found.shape[1] == 0:
        return np.where(total > 0, 0.0, np.nan)
    return np.where(total > 0, found.any(1) / (found.argmax(1) + 1.0), np.nan)


@dataclass(frozen=True)
class Summary:
    """A mean over `n` queries in [`low`, `high`], by `method`; `left_out` more had no positives."""

    value: float
    low: float
    high: float
    n: int
    method: str
    left_out: int


def summarise(values: ArrayLike) -> Summary:
    """Mean over queries with its 95 % interval: `finetune.metrics.mean`, the definition that
    `finetune` uses.

    The mean of `average_precision` is the mAP. NaN values are left out and counted. The interval
    says how the value would move with other queries of the same kind; it knows nothing of another
    gallery. Without any query there is neither value nor interval (NaN).
    """
    scores = np.asarray(values, np.float64).ravel()
    kept = scores[~np.isnan(scores)]
    without = len(scores) - len(kept)
    if not len(kept):
        return Summary(float("nan"), float("nan"), float("nan"), 0, "none", without)
    made = intervals.mean(kept)
    return Summary(made.value, made.low, made.high, made.n, made.method, without)


@dataclass(frozen=True)
class Truth:
    """What the revisited Oxford and Paris benchmarks know of one query: rows of the gallery, each
    in one list at most."""

    easy: Sequence[int]
    hard: Sequence[int]
    junk: Sequence[int]


@dataclass(frozen=True)
class Revisited:
    """One level of the protocol: trapezoid AP `(q,)` and, for every k, precision `(q,)`; NaN where
    R = 0."""

    ap: NDArray[np.float64]
    precision: Mapping[int, NDArray[np.float64]]


def revisited(
    rankings: Sequence[ArrayLike], truth: Sequence[Truth], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, Revisited]:
    """The protocol of Radenović et al., "Revisiting Oxford and Paris", CVPR 2018: `easy`, `medium`
    and `hard`.

    `rankings[i]` are rows of the gallery for query `i`, best first; −1 marks a place without a
    result. What a level ignores is taken out of the ranking before ranks are counted:

    | level | positive | ignored |
    |---|---|---|
    | easy | easy | junk, hard |
    | medium | easy, hard | junk |
    | hard | hard | junk, easy |

    AP is `trapezoid_average_precision`. Precision at k is taken at `min(k, rank of the last
    positive found)`, as the benchmark's own evaluation does; 0 where no positive was found.
    """
    if len(rankings) != len(truth):
        raise ValueError(f"{len(rankings)} rankings, but truth for {len(truth)} queries")
    parts: dict[str, Callable[[Truth], tuple[list[int], list[int]]]] = {
        "easy": lambda t: ([*t.easy], [*t.junk, *t.hard]),
        "medium": lambda t: ([*t.easy, *t.hard], [*t.junk]),
        "hard": lambda t: ([*t.hard], [*t.junk, *t.easy]),
    }
    result = {}
    for level in LEVELS:
        ap, precision = np.full(len(truth), np.nan), {k: np.full(len(truth), np.nan) for k in ks}
        for i, (ranking, known) in enumerate(zip(rankings, truth, strict=True)):
            positive, ignored = (
                np.unique(np.asarray(rows, np.int64)) for rows in parts[level](known)
            )
            if not len(positive):
                continue
            found = _without(ranking, ignored, positive)
            ap[i] = trapezoid_average_precision(found[None], [len(positive)])[0]
            last = int(np.flatnonzero(found)[-1]) + 1 if found.any() else 0
            for k in ks:
                cut = min(k, last)
                precision[k][i] = found[:cut].mean() if cut else 0.0
        result[level] = Revisited(ap, precision)
    return result


def _without(
    ranking: ArrayLike, ignored: NDArray[np.int64], positive: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which places of a ranking are positive, once empty places and ignored rows are gone; a row
    twice is refused."""
    rows = np.asarray(ranking).ravel()
    rows = rows[rows >= 0]
    if len(np.unique(rows)) != len(rows):
        raise ValueError("a ranking shows the same row twice: each would be counted as found")
    return np.isin(rows[~np.isin(rows, ignored)], positive)


def _precisions(found: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Precision at every rank, `(q, k)`."""
    return np.cumsum(found, axis=1) / np.arange(1, found.shape[1] + 1)


def _divide(sums: NDArray[np.generic], total: NDArray[np.int64]) -> NDArray[np.float64]:
    """`sums / total`, NaN where the total is 0."""
    return np.divide(
        sums, total, out=np.full(len(total), np.nan), where=total > 0, casting="unsafe"
    )


def _checked(
    hits: ArrayLike, positives: ArrayLike, k: int = 1
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """The two arrays with their shapes, k and the counts checked: more hits than positives is a
    caller's mistake."""
    found, total = np.asarray(hits), np.asarray(positives)
    if found.ndim != 2 or total.shape != (len(found),):
        raise ValueError(f"hits {found.shape} must be (q, k), positives {total.shape} must be (q,)")
    if found.dtype != np.bool_:
        raise ValueError(f"hits must be bool, not {found.dtype}")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if np.any(found.sum(1) > total):
        row = int(np.flatnonzero(found.sum(1) > total)[0])
        raise ValueError(f"query {row} has {found[row].sum()} hits, but {total[row]} positives")
    return found, total.astype(np.int64)
