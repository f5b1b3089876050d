"""Exact nearest neighbours by cosine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from finetune.features.store import Rows


def neighbours(
    X: Rows, k: int, *, queries: Rows | None = None, block: int = 1024
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Exact cosine k-nearest neighbours, block by block: `(scores, positions)`, both `(q, k)`, the
    best first.

    Without `queries`, every row is a query and is left out of its own answer. Ties go to the lower
    position. A row of zeros has score 0 with everything.
    """
    base = _unit(X)
    leave_one_out = queries is None
    asked = base if queries is None else _unit(queries)
    k = min(k, len(base) - leave_one_out)
    scores, positions = np.empty((len(asked), k), np.float32), np.empty((len(asked), k), np.int64)
    for start in range(0, len(asked), block):
        similarity = asked[start : start + block] @ base.T
        rows = np.arange(len(similarity))
        if leave_one_out:
            similarity[rows, start + rows] = -np.inf
        best = _largest(similarity, k)
        positions[start : start + block] = best
        scores[start : start + block] = np.take_along_axis(similarity, best, 1)
    return np.clip(scores, -1, 1), positions


def _largest(similarity: Rows, k: int) -> NDArray[np.int64]:
    """Positions of the k largest of every row, the largest first, the lower position first among
    equals: `(q, k)`."""
    if k < 1:
        return np.empty((len(similarity), 0), dtype=np.int64)
    last = similarity.shape[1] - k
    best = np.argpartition(similarity, last, axis=1)[:, last:]
    bound = np.take_along_axis(similarity, best, 1).min(axis=1)
    # The partition takes any of those that equal the k-th; where there are more of them than
    # places, choose again.
    for row in np.flatnonzero((similarity >= bound[:, None]).sum(axis=1) > k):
        at = np.flatnonzero(similarity[row] >= bound[row])
        best[row] = at[np.argsort(-similarity[row, at], kind="stable")[:k]]
    order = np.lexsort((best, -np.take_along_axis(similarity, best, 1)), axis=1)
    return np.take_along_axis(best, order, 1)


def _unit(X: Rows) -> Rows:
    x = np.asarray(X, dtype=np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
