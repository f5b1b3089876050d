"""Vectors before and beside any index: at unit length, whitened, compared pair by pair."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from finetune.errors import UserError
from retrieval import vectors
from retrieval.index.build import build
from retrieval.index.nearest import exact
from retrieval.vectors import BadRows, near_duplicates, prepare
from retrieval.whitening import Whitening, whiten


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


# ------------------------------------------------------------------------------------------ vectors


def test_rows_without_direction_are_refused_by_position() -> None:
    """NaN, infinity and zeros are named by their rows, in tables and in queries; many are cut
    short."""
    X = np.ones((20, 4), np.float32)
    X[3, 1], X[5, 0], X[8] = np.nan, np.inf, 0
    own = build(prepare(np.eye(4)), factory="Flat")
    for call in (
        lambda: prepare(X),
        lambda: own.search(X, 1),
        lambda: exact(prepare(np.eye(4)), X, 1),
    ):
        with pytest.raises(BadRows, match=r"3 of 20 vectors .* rows 3, 5, 8") as caught:
            call()
        assert [3, 5, 8] == caught.value.rows
    with pytest.raises(BadRows, match="rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …"):
        prepare(np.zeros((30, 4)))


@pytest.mark.parametrize(
    "X", [np.zeros((3, 0)), np.ones(3), np.ones((2, 2, 2)), np.ones((2, 2), complex), [["a", "b"]]]
)
def test_what_is_no_table_of_numbers_is_refused(X: Any) -> None:
    """By its shape and type."""
    assert "vectors of shape" in refusal(lambda: prepare(X))


@settings(max_examples=60, deadline=None)
@given(scale=st.sampled_from([1e-300, 1e-40, 1e-20, 1.0, 1e20, 1e300]), seed=st.integers(0, 1000))
def test_prepare_gives_unit_length_at_any_scale(scale: float, seed: int) -> None:
    """No overflow, no underflow: the direction is that of the row, its length is 1, the input stays
    as it was."""
    X = np.random.default_rng(seed).normal(size=(5, 3)) * scale
    before = X.copy()
    made = prepare(X)

    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(
        made * np.abs(X).max(1, keepdims=True) / np.abs(made).max(1, keepdims=True), X, rtol=1e-5
    )
    np.testing.assert_array_equal(before, X)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 40), held=st.sets(st.integers(0, 39)))
def test_slots_are_a_permutation(n: int, held: set[int]) -> None:
    """Held rows take the last slots; everything else stays where it was as far as that allows."""
    rows = np.array(sorted(row for row in held if row < n), np.int64)
    order = vectors.slot_order(n, rows)
    moved, to = vectors.swaps(n, rows)

    assert list(range(n)) == sorted(order.tolist())
    assert set(rows.tolist()) == set(order[n - len(rows) :].tolist())
    assert moved.tolist() == np.flatnonzero(order != np.arange(n)).tolist()
    np.testing.assert_array_equal(order[moved], to)


def test_repeated_positions_are_marked() -> None:
    """Each position once more than before, wherever it stands in the line."""
    made = vectors.repeated(np.array([[5, 3, 5, 5], [1, 2, 3, 4], [-1, -1, 0, 0]]))

    assert [[False, False, True, True], [False] * 4, [False, True, False, True]] == made.tolist()


# -------------------------------------------------------------------------------------------- pairs


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 30),
    seed=st.integers(0, 1000),
    threshold=st.sampled_from([-1.0, 0.0, 0.5, 0.9, 1.0]),
    block=st.sampled_from([1, 4, 2048]),
)
def test_pairs_are_those_of_brute_force(n: int, seed: int, threshold: float, block: int) -> None:
    """Every pair once, i before j, the best first, whatever the blocks."""
    random = np.random.default_rng(seed)
    X = prepare(random.choice([-1.0, 1.0, 2.0], (n, 3))) if n else np.zeros((0, 3), np.float32)
    found = near_duplicates(X, threshold, block=block)
    scores = X.astype(np.float64) @ X.T.astype(np.float64)
    expected = {
        (i, j) for i in range(n) for j in range(i + 1, n) if scores[i, j] >= threshold - 1e-6
    }

    assert expected == {(i, j) for i, j, _ in found}
    assert len(expected) == len(found)
    assert all(abs(score - np.clip(scores[i, j], -1, 1)) < 1e-5 for i, j, score in found)
    assert [score for *_, score in found] == sorted((score for *_, score in found), reverse=True)


def clustered(n: int, d: int, fall: float, seed: int = 0) -> np.ndarray:
    """Rows whose variance falls along the axes, as that of real features does, every fifth one a
    copy with some noise."""
    rng = np.random.default_rng(seed)
    X = (rng.standard_normal((n, d)) + 0.3) * np.arange(1.0, d + 1) ** -fall
    X[4::5] = X[3:-1:5] * (
        1 + 0.4 * rng.uniform(0, 1, (len(X[4::5]), 1)) * rng.standard_normal((len(X[4::5]), d))
    )
    turn, _ = np.linalg.qr(rng.standard_normal((d, d)))
    return prepare(X @ turn)


@pytest.mark.parametrize(
    ("fall", "threshold"), [(1.0, 0.95), (1.0, 0.999), (0.5, 0.9), (0.0, 0.8), (1.0, 0.3)]
)
def test_pairs_of_many_rows_are_those_of_brute_force(fall: float, threshold: float) -> None:
    """With rows enough to be shortened first: no pair is lost or made up, where that helps and
    where it does not."""
    X = clustered(2100, 96, fall)
    found = near_duplicates(X, threshold, block=500)
    scores = X.astype(np.float64) @ X.T.astype(np.float64)
    sure = {(int(i), int(j)) for i, j in np.argwhere(np.triu(scores, 1) >= threshold + 2e-6)}
    maybe = {(int(i), int(j)) for i, j in np.argwhere(np.triu(scores, 1) >= threshold - 4e-6)}
    got = {(i, j) for i, j, _ in found}

    assert sure
    assert sure <= got <= maybe
    assert all(abs(score - scores[i, j]) < 1e-5 for i, j, score in found)


def test_shortened_rows_bound_every_cosine() -> None:
    """No inner product of shortened rows is below that of the rows themselves, equal and opposite
    ones included."""
    X = clustered(2100, 256, 0.8)
    X[1000], X[1001] = X[7], -X[7]
    short = vectors._shortened(X, 0.9)

    assert short.shape[1] < X.shape[1] / 2
    assert (short @ short.T - X @ X.T).min() > -1e-6


def test_pairs_take_linear_memory() -> None:
    """12 000 rows would be 576 MB of similarities at once; a few blocks are enough."""
    X = prepare(np.random.default_rng(0).normal(size=(12_000, 16)))
    X[11_999] = X[5]
    tracemalloc.start()
    found = near_duplicates(X, 0.9999, block=512)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert (5, 11_999) in [(i, j) for i, j, _ in found]
    assert peak < 20e6


def test_too_many_pairs_are_refused() -> None:
    """The limit is on pairs; the message says to raise the threshold. A threshold that is no cosine
    is refused, too."""
    X = prepare(np.ones((100, 4)))

    assert 4950 == len(near_duplicates(X, 0.5, limit=4950))
    assert "more than 4,949 pairs" in refusal(lambda: near_duplicates(X, 0.5, limit=4949, block=7))
    for threshold in (1.5, -2, float("nan")):
        assert "threshold" in refusal(lambda threshold=threshold: near_duplicates(X, threshold))  # type: ignore[misc]


# ---------------------------------------------------------------------------------------- whitening


def test_whitened_vectors_are_uncorrelated_with_variance_one() -> None:
    """Without shrinkage, on the vectors that it was fitted on: covariance is the identity, the mean
    is zero."""
    random = np.random.default_rng(0)
    X = (random.normal(size=(2000, 6)) @ random.normal(size=(6, 6)) + 5).astype(np.float32)
    made = whiten(X, 6, shrinkage=0.0)
    Y = made(X).astype(np.float64)

    np.testing.assert_allclose(Y.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(Y.T, bias=True), np.eye(6), atol=1e-3)
    first = whiten(X, 2, shrinkage=0.0)(X)
    # the strongest directions come first
    np.testing.assert_allclose(np.abs(Y[:, :2]), np.abs(first), atol=1e-4)


@pytest.mark.parametrize("n", [30, 300])
def test_shrinkage_is_that_of_ledoit_and_wolf(n: int) -> None:
    """The share and the covariance that scikit-learn's estimator finds, with fewer vectors than
    numbers and with more."""
    from sklearn.covariance import LedoitWolf

    random = np.random.default_rng(1)
    X = random.normal(size=(n, 80)) * np.linspace(0.1, 3, 80)
    reference = LedoitWolf().fit(X)
    made = whiten(X, 10)
    Y = made(X.astype(np.float32)).astype(np.float64)
    values, directions = np.linalg.eigh(reference.covariance_)
    expected = (X - X.mean(0)) @ (directions[:, ::-1][:, :10] / np.sqrt(values[::-1][:10]))

    assert reference.shrinkage_ == pytest.approx(made.shrinkage, rel=1e-6)
    np.testing.assert_allclose(np.abs(expected), np.abs(Y), atol=1e-3)


def test_with_fewer_vectors_than_numbers_both_ways_agree() -> None:
    """The small Gram matrix leads to the directions and scales of the large covariance."""
    X = np.random.default_rng(2).normal(size=(12, 40))
    made = whiten(X, 5, shrinkage=0.3)
    centred = X - X.mean(0)
    S = centred.T @ centred / 12
    values, directions = np.linalg.eigh(0.7 * S + 0.3 * np.trace(S) / 40 * np.eye(40))
    expected = centred @ (directions[:, ::-1][:, :5] / np.sqrt(values[::-1][:5]))

    np.testing.assert_allclose(np.abs(expected), np.abs(made(X.astype(np.float32))), atol=1e-4)


@pytest.mark.parametrize(
    ("X", "dim", "words"),
    [
        (np.random.default_rng(0).normal(size=(5, 20)), 5, "span 4"),
        (np.random.default_rng(0).normal(size=(50, 3)), 4, "span 3"),
        (np.random.default_rng(0).normal(size=(50, 3)), 0, "0 dimensions"),
        (np.ones((50, 3)), 1, "all equal"),
        (np.ones((1, 3)), 1, "two finite vectors"),
        (np.full((5, 3), np.nan), 1, "two finite vectors"),
    ],
)
def test_what_cannot_be_whitened_is_refused(X: NDArray[np.float64], dim: int, words: str) -> None:
    """More dimensions than the vectors span, too few vectors, NaN."""
    assert words in refusal(lambda: whiten(X, dim))


def test_a_wrong_shrinkage_is_refused() -> None:
    """It is a share."""
    assert "shrinkage 2" in refusal(lambda: whiten(np.eye(5), 2, shrinkage=2))


def test_a_whitening_comes_back_from_its_file(tmp_path: Path) -> None:
    """Bit by bit; damaged, cut and foreign files are refused, and vectors of another width."""
    X = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    made = whiten(X, 4)
    path = tmp_path / "w.safetensors"
    made.save(path)
    again = Whitening.load(path)

    np.testing.assert_array_equal(made(X), again(X))
    assert made.shrinkage == pytest.approx(again.shrinkage, rel=1e-6)
    assert "8 numbers" in refusal(lambda: made(X[:, :5]))
    for data in (b"", path.read_bytes()[:-9], b"hello" * 50):
        (tmp_path / "bad").write_bytes(data)
        assert "bad" in refusal(lambda: Whitening.load(tmp_path / "bad"))
    assert "nothing" in refusal(lambda: Whitening.load(tmp_path / "nothing"))
    dataclasses.replace(made, mean=made.mean[:5]).save(path)
    assert "damaged" in refusal(lambda: Whitening.load(path))
