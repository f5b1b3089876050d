"""Vectors before and beside any index, in NumPy alone: made ready for cosine search, compared pair
by pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finetune.errors import UserError

Rows = NDArray[np.float32]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Progress = Callable[[float, str], None]

BLOCK = 65_536  # rows read at once
NAMED = 10  # bad rows that a message names
ROUNDING = 1e-6  # float32 inner products of unit vectors are this sure
# rows: of `near_duplicates` where shorter rows pay; to choose their length on
SHORTEN_FROM, SAMPLE = (2000, 1024)
AXES = (32, 64, 128, 256)
REST = 4e-6  # added to the squared length of what the axes leave: more than float32 rounds away
PAIR_COST, WORTH = 100.0, 0.7  # one pair looked up, and the least gain, in full products a pair
PAIRS = 8192  # pairs looked up at once
CROWD = 0.01  # share of a block's pairs from which the whole block is compared


class BadRows(UserError):  # noqa: N818 — it says what is wrong with the rows, not that something went wrong
    """Rows that cannot be searched for: NaN, infinite, or all zeros. `rows` are their numbers, for
    the caller to name."""

    def __init__(self, rows: list[int], total: int) -> None:
        self.rows = rows
        shown = ", ".join(map(str, rows[:NAMED])) + (", …" if len(rows) > NAMED else "")
        super().__init__(
            f"{len(rows)} of {total} vectors hold NaN, infinity or only zeros: rows {shown}",
            fix="leave these out, or compute them again",
        )


def prepare(X: ArrayLike) -> Rows:
    """A copy of `X` `(n, d)` made ready for search: float32, C-contiguous, every row at unit
    length.

    Inner products of such rows are cosines. Raises `BadRows` for rows that have no direction,
    `UserError` for anything that is not a table of real numbers.
    """
    given = np.asarray(X)
    if (
        given.ndim != 2
        or given.shape[1] == 0
        or not (np.issubdtype(given.dtype, np.floating) or np.issubdtype(given.dtype, np.integer))
    ):
        raise UserError(
            f"vectors of shape {given.shape} and type {given.dtype}",
            fix="give a table (rows, numbers) of floats",
        )
    wide = given if given.dtype == np.float64 else given.astype(np.float32)
    largest = np.abs(wide).max(axis=1, initial=0)
    bad = ~(np.isfinite(largest) & (largest > 0))
    if bad.any():
        raise BadRows(np.flatnonzero(bad).tolist(), len(given))
    # first by the largest entry: squares of very large or small ones leave float32's range
    scaled = wide / largest[:, None]
    scaled /= np.linalg.norm(scaled, axis=1, keepdims=True)
    return np.ascontiguousarray(scaled, dtype=np.float32)


def unit(x: Rows) -> Rows:
    """Rows at unit length; a row of zeros stays zero."""
    norm = np.sqrt(np.einsum("ij,ij->i", x, x, dtype=np.float64)).astype(np.float32)[:, None]
    return x / np.maximum(norm, np.float32(1e-12))


def blocks(n: int, size: int = BLOCK) -> Iterator[slice]:
    """Slices that cover `n` rows, `size` at a time."""
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def check_prepared(X: Rows) -> None:
    """Refuse a table that `prepare` did not make. Reads it block by block, so that it may be
    memory-mapped."""
    if X.ndim != 2 or X.dtype != np.float32 or 0 in X.shape:
        raise UserError(
            f"vectors of shape {X.shape} and type {X.dtype}",
            fix="give float32 rows at unit length, as `prepare` makes them",
        )
    for part in blocks(len(X)):
        norms = np.einsum("ij,ij->i", X[part], X[part])
        wrong = ~(np.abs(norms - 1) < 1e-3)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise UserError(
                f"row {part.start + row} has length {math.sqrt(abs(norms[row])):.6g}, not 1",
                fix="use `prepare` first",
            )


# --- what every search does ---------------------------------------------------------------------


def unit_queries(Q: ArrayLike, k: int, d: int) -> Rows:
    if k < 1:
        raise UserError(f"k = {k}", where="k", fix="ask for at least 1 neighbour")
    given = np.asarray(Q)
    if given.ndim != 2 or given.shape[1] != d:
        raise UserError(
            f"queries of shape {given.shape}",
            where="query",
            fix=f"the index holds vectors of {d} numbers: give (q, {d})",
        )
    return prepare(given)


def row_mask(exclude: ArrayLike | None, n: int) -> Mask | None:
    """Rows to leave out as bool `(n,)`; None where there are none."""
    if exclude is None:
        return None
    given = np.asarray(exclude)
    if given.dtype == np.bool_:
        if given.shape != (n,):
            raise UserError(
                f"a mask of shape {given.shape}",
                where="exclude",
                fix=f"the index holds {n} vectors",
            )
        return given if given.any() else None
    if not given.size:
        return None
    if not np.issubdtype(given.dtype, np.integer) or given.min() < 0 or given.max() >= n:
        raise UserError(
            f"positions from {given.min()} to {given.max()}",
            where="exclude",
            fix=f"the index holds 0 to {n - 1}",
        )
    mask = np.zeros(n, np.bool_)
    mask[given] = True
    return mask


def ordered(scores: Rows, positions: Ints) -> tuple[Rows, Ints]:
    """Best first, equal scores by position, scores inside [−1, 1]; NaN goes last."""
    clipped = np.clip(scores, -1, 1)
    order = np.lexsort((positions, -clipped))
    return np.take_along_axis(clipped, order, 1), np.take_along_axis(positions, order, 1)


def repeated(positions: Ints) -> Mask:
    """Where a line shows a position that it has shown before: some graphs do."""
    order = np.argsort(positions, axis=1, kind="stable")
    again = np.zeros(positions.shape, np.bool_)
    line = np.take_along_axis(positions, order, 1)
    np.put_along_axis(again, order[:, 1:], line[:, 1:] == line[:, :-1], 1)
    return again


def swaps(n: int, held: Ints) -> tuple[Ints, Ints]:
    """Which slots hold another row than their own, sorted, and which row: held rows trade places
    with the last ones."""
    tail = np.arange(n - len(held), n)
    out, back = np.setdiff1d(held, tail), np.setdiff1d(tail, held)
    moved, to = np.concatenate([out, back]), np.concatenate([back, out])
    sort = np.argsort(moved)
    return moved[sort], to[sort]


def slot_order(n: int, held: Ints) -> Ints:
    """The row in every slot: `(n,)`, the held rows last."""
    order = np.arange(n)
    moved, to = swaps(n, held)
    order[moved] = to
    return order


# --- pairs --------------------------------------------------------------------------------------


def near_duplicates(
    X: Rows, threshold: float, *, block: int = 2048, limit: int = 5_000_000
) -> list[tuple[int, int, float]]:
    """All pairs of rows of `X` (from `prepare`) whose cosine is at least `threshold`: `(i, j,
    score)` with i < j, best first.

    Exact: every pair is compared, or shown to be below the threshold by a bound (`_shortened`).
    Memory is linear in n and in the number of pairs; more than `limit` pairs are a `UserError`. A
    score within float32's rounding (1e-6) of the threshold counts as reaching it.
    """
    if not -1 <= threshold <= 1:
        raise UserError(
            f"a cosine of {threshold}",
            where="threshold",
            fix="give a number from −1 to 1, such as 0.95",
        )
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], Rows]] = []
    total, lowest = 0, np.float32(threshold - ROUNDING)
    short = _shortened(X, threshold)
    for left in blocks(len(X), block):
        for right in blocks(len(X) - left.start, block):
            right = slice(left.start + right.start, left.start + right.stop)
            i, j, score = _reaching(short[left] @ short[right].T, lowest, left.start, right.start)
            if short is not X and len(i) > CROWD * (left.stop - left.start) * (
                right.stop - right.start
            ):
                i, j, score = _reaching(X[left] @ X[right].T, lowest, left.start, right.start)
            elif short is not X:
                score = _cosines(X, i, j)
                keep = score >= lowest
                i, j, score = i[keep], j[keep], score[keep]
            total += len(i)
            if total > limit:
                fix = "raise the threshold: so many pairs are groups, not near-duplicates"
                raise UserError(
                    f"more than {limit:,} pairs reach {threshold}", where="threshold", fix=fix
                )
            if len(i):
                found.append((i, j, score))
    if not found:
        return []
    i, j, score = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((j, i, -score))
    return list(
        zip(
            i[order].tolist(), j[order].tolist(), np.clip(score[order], -1, 1).tolist(), strict=True
        )
    )


def _reaching(scores: Rows, lowest: np.float32, top: int, left: int) -> tuple[Ints, Ints, Rows]:
    """Rows and columns, counted from `top` and `left`, where a block of scores reaches `lowest`
    above the diagonal; with the scores."""
    flat = np.flatnonzero(scores >= lowest)
    i, j = flat // scores.shape[1] + top, flat % scores.shape[1] + left
    keep = j > i
    return i[keep], j[keep], scores.ravel()[flat[keep]]


def _cosines(X: Rows, i: Ints, j: Ints) -> Rows:
    """The inner products of rows `i` with rows `j`, pair by pair."""
    parts = [np.einsum("ij,ij->i", X[i[s]], X[j[s]]) for s in blocks(len(i), PAIRS)]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _shortened(X: Rows, threshold: float) -> Rows:
    """Shorter rows `(n, m + 1)` whose inner products are never below those of `X`, or `X` itself
    where they would not help.

    The first m numbers are the coordinates along the main axes of a sample, the last is the length
    of what they leave: by Cauchy and Schwarz no inner product of two rests is above the product of
    their lengths. m is the number of axes with which a pair costs least, on the sample.
    """
    n, d = X.shape
    if n < SHORTEN_FROM or d < 2 * AXES[0]:
        return X
    sample = X[np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64)]
    axes = _main_axes(sample, min(AXES[-1], d // 2))
    costs = {}
    for m in (m for m in AXES if m <= axes.shape[1]):
        short = _with_rest(sample, axes[:, :m])
        share = float((short @ short.T >= threshold).mean() - 1 / len(sample))
        costs[m] = m / d + max(share, 0) * PAIR_COST
    best = min(costs, key=lambda m: costs[m])
    return _with_rest(X, axes[:, :best]) if costs[best] < WORTH else X


def _with_rest(X: Rows, axes: Rows) -> Rows:
    """Coordinates of unit rows along orthonormal `axes` `(d, m)`, and the length of the rest,
    rounded up: `(n, m + 1)`."""
    short = np.empty((len(X), axes.shape[1] + 1), np.float32)
    np.matmul(X, axes, out=short[:, :-1])
    inside = np.einsum("ij,ij->i", short[:, :-1], short[:, :-1])
    short[:, -1] = np.sqrt(np.maximum(1 - inside, 0) + REST)
    return short


def _main_axes(sample: Rows, count: int) -> Rows:
    """Orthonormal axes `(d, count)` that hold most of the sample's length, the first most: subspace
    iteration (Halko, Martinsson and Tropp 2011)."""
    axes = sample.T @ np.random.default_rng(0).standard_normal(
        (len(sample), count), dtype=np.float32
    )
    for _ in range(2):
        axes = sample.T @ (sample @ np.linalg.qr(axes)[0])
    basis = np.linalg.qr(axes.astype(np.float64))[0]
    inside = sample @ basis.astype(np.float32)
    _, turn = np.linalg.eigh((inside.T @ inside).astype(np.float64))
    return (basis @ turn[:, ::-1]).astype(np.float32)
