"""The solvers: the optimum of each loss, primal and dual, folds, weights, and where they stop."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC, LinearSVC

from finetune.heads import solvers
from finetune.heads.head import rbf

FOLDS, CLASSES = 3, 4


@pytest.fixture(scope="module")
def table() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, CLASSES, 200)
    X = rng.standard_normal((200, 12)) + 0.8 * rng.standard_normal((CLASSES, 12))[y]
    return np.concatenate(
        [X / np.linalg.norm(X, axis=1, keepdims=True), np.ones((200, 1))], axis=1
    ), y


def squared_hinge(A: np.ndarray, y: np.ndarray, coef: np.ndarray, C: float) -> float:
    sign = np.where(y[:, None] == np.arange(coef.shape[1]), 1, -1)
    return float((coef**2).sum() / 2 + C * (np.maximum(1 - sign * (A @ coef), 0) ** 2).sum())


@pytest.mark.parametrize("C", [0.1, 1.0, 100.0])
def test_the_linear_machine_is_liblinears(table: tuple[np.ndarray, np.ndarray], C: float) -> None:
    """The objective of `LinearSVC` (squared hinge, the bias penalised as it does) is reached within
    the tolerance."""
    A, y = table
    (fit,) = solvers.path(A, y, CLASSES, [C], loss="hinge", gram=False, tol=1e-6)
    other = (
        LinearSVC(C=C, fit_intercept=False, dual=False, tol=1e-8, max_iter=10_000).fit(A, y).coef_.T
    )

    assert squared_hinge(A, y, fit.coef[0], C) == pytest.approx(
        squared_hinge(A, y, other, C), rel=1e-4
    )
    assert fit.converged
    assert np.abs(fit.coef[0] - other).max() < 1e-2 * np.abs(other).max()


def test_logistic_regression_is_scikit_learns(table: tuple[np.ndarray, np.ndarray]) -> None:
    """Multinomial, with the bias among the penalised weights."""
    A, y = table
    (fit,) = solvers.path(A, y, CLASSES, [3.0], loss="logistic", gram=False, tol=1e-8)
    other = LogisticRegression(C=3.0, fit_intercept=False, tol=1e-8, max_iter=10_000).fit(A, y)

    np.testing.assert_allclose(fit.coef[0], other.coef_.T, atol=2e-3)


@pytest.mark.parametrize("loss", ["hinge", "logistic"])
def test_rows_and_their_kernel_matrix_give_the_same_machine(
    table: tuple[np.ndarray, np.ndarray], loss: solvers.Loss
) -> None:
    """Primal and dual are one problem: their scores agree."""
    A, y = table
    (primal,) = solvers.path(A, y, CLASSES, [2.0], loss=loss, gram=False, tol=1e-8)
    (dual,) = solvers.path(A @ A.T, y, CLASSES, [2.0], loss=loss, gram=True, tol=1e-8)

    np.testing.assert_allclose(primal.scores, dual.scores, atol=2e-3)


def test_the_rbf_machine_ranks_as_libsvms(table: tuple[np.ndarray, np.ndarray]) -> None:
    """On the same kernel, one against the rest, it says what libsvm says for nearly every row (its
    hinge is not squared)."""
    A, y = table
    X = A[:, :-1].astype(np.float32)
    K = rbf(X, X, 1.0)
    (fit,) = solvers.path(K + 1, y, CLASSES, [10.0], loss="hinge", gram=True)
    other = np.stack(
        [
            SVC(kernel="rbf", gamma=1.0, C=10.0).fit(X, y == c).decision_function(X)
            for c in range(CLASSES)
        ],
        axis=1,
    )

    assert np.mean(fit.scores[0].argmax(1) == other.argmax(1)) > 0.95


def test_a_row_that_is_held_out_does_not_matter(table: tuple[np.ndarray, np.ndarray]) -> None:
    """With mask 0 a row may have any label: the machine stays the same, and the row is scored all
    the same."""
    A, y = table
    masks = np.arange(FOLDS)[:, None] != np.arange(len(y)) % FOLDS
    wrong = np.where(masks[0], y, (y + 1) % CLASSES)
    (right,) = solvers.path(
        A, y, CLASSES, [1.0], loss="hinge", gram=False, masks=masks[:1], tol=1e-8
    )
    (other,) = solvers.path(
        A, wrong, CLASSES, [1.0], loss="hinge", gram=False, masks=masks[:1], tol=1e-8
    )

    np.testing.assert_allclose(right.coef, other.coef, atol=1e-5)
    assert right.scores.shape == (1, len(y), CLASSES)


def test_folds_side_by_side_are_the_folds_one_by_one(table: tuple[np.ndarray, np.ndarray]) -> None:
    """All folds in one product give each fold's own solution."""
    A, y = table
    masks = np.arange(FOLDS)[:, None] != np.arange(len(y)) % FOLDS
    (together,) = solvers.path(
        A, y, CLASSES, [1.0], loss="hinge", gram=False, masks=masks, tol=1e-8
    )

    for k in range(FOLDS):
        (alone,) = solvers.path(
            A[masks[k]], y[masks[k]], CLASSES, [1.0], loss="hinge", gram=False, tol=1e-8
        )
        np.testing.assert_allclose(together.coef[k], alone.coef[0], atol=1e-4)


def test_a_weight_of_two_is_the_row_twice(table: tuple[np.ndarray, np.ndarray]) -> None:
    """Weights multiply C row by row."""
    A, y = table
    weights = np.where(y == 0, 2.0, 1.0)
    twice = np.concatenate([np.arange(len(y)), np.flatnonzero(y == 0)])
    (weighted,) = solvers.path(
        A, y, CLASSES, [1.0], loss="logistic", gram=False, weights=weights, tol=1e-8
    )
    (repeated,) = solvers.path(
        A[twice], y[twice], CLASSES, [1.0], loss="logistic", gram=False, tol=1e-8
    )

    np.testing.assert_allclose(weighted.coef, repeated.coef, atol=1e-4)


def test_the_path_is_lazy_and_the_start_does_not_matter(
    table: tuple[np.ndarray, np.ndarray],
) -> None:
    """Values of C that nobody asks for cost nothing, and a warm start ends where a cold one
    does."""
    A, y = table
    path = solvers.path(A, y, CLASSES, [0.1, 1.0, 10.0], loss="hinge", gram=False, tol=1e-8)
    first, second = next(path), next(path)
    (cold,) = solvers.path(A, y, CLASSES, [1.0], loss="hinge", gram=False, tol=1e-8)

    assert (0.1, 1.0) == (first.C, second.C)
    np.testing.assert_allclose(second.coef, cold.coef, atol=1e-4)


def test_chunks_do_not_change_the_result(
    table: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many classes are solved a few at a time within the memory allowed."""
    A, y = table
    whole, *_ = solvers.solve(
        A, y, CLASSES, np.ones((len(y), 1)), loss="hinge", gram=False, tol=1e-8
    )
    monkeypatch.setattr(solvers, "ELEMENTS", 2 * len(y))
    parts, *_ = solvers.solve(
        A, y, CLASSES, np.ones((len(y), 1)), loss="hinge", gram=False, tol=1e-8
    )

    np.testing.assert_allclose(whole, parts, atol=1e-5)


def test_single_precision_is_enough(table: tuple[np.ndarray, np.ndarray]) -> None:
    """float32 products reach the tolerance that the choice and the head use, at a large C too."""
    A, y = table
    for C in (1.0, 1000.0):
        (fit,) = solvers.path(
            (A @ A.T).astype(np.float32), y, CLASSES, [C], loss="hinge", gram=True
        )
        assert fit.gap <= solvers.TOLERANCE


def few(
    A: np.ndarray, y: np.ndarray, C: float, direct: int, monkeypatch: pytest.MonkeyPatch
) -> solvers.Fit:
    monkeypatch.setattr(solvers, "DIRECT", direct)
    masks = np.arange(FOLDS)[:, None] != np.arange(len(y)) % FOLDS
    (fit,) = solvers.path(
        (A @ A.T).astype(np.float32), y, CLASSES, [C], loss="hinge", gram=True, masks=masks
    )
    return fit


@pytest.mark.parametrize("C", [0.1, 10.0, 3000.0])
def test_exact_steps_end_where_conjugate_gradients_do(
    table: tuple[np.ndarray, np.ndarray], C: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Solved in the support vectors alone, always or never: the same machine, held-out rows and
    all, and converged."""
    always, never = (few(*table, C, direct, monkeypatch) for direct in (10**9, 0))

    assert always.converged
    assert never.converged
    np.testing.assert_allclose(always.scores, never.scores, atol=0.05 * np.abs(never.scores).max())
    assert always.steps <= never.steps + solvers.EXACT_STEPS + 1


def test_exact_steps_converge_on_parted_classes_at_any_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a large C leaves hardly a margin error, float32 scores still agree with their
    coefficients."""
    rng = np.random.default_rng(1)
    y = rng.integers(0, CLASSES, 600)
    X = np.abs(rng.standard_normal((600, 300)) + 4 * rng.standard_normal((CLASSES, 300))[y])
    A = np.concatenate(
        [X / np.linalg.norm(X, axis=1, keepdims=True), np.ones((600, 1))], axis=1
    ).astype(np.float32)
    for fit in solvers.path(A @ A.T, y, CLASSES, [10.0, 1000.0, 10_000.0], loss="hinge", gram=True):
        assert fit.converged
        assert fit.steps < 20


def test_squared_errors_are_kernel_ridge_in_both_forms(
    table: tuple[np.ndarray, np.ndarray],
) -> None:
    """From rows as from their kernel matrix, with a weight a row: the closed form of scikit-learn's
    `Ridge`."""
    from sklearn.linear_model import Ridge

    A, y = table
    C = np.linspace(0.5, 4, len(y))
    ridge = Ridge(alpha=0.5, fit_intercept=False).fit(
        A, np.where(y[:, None] == np.arange(CLASSES), 1, -1), sample_weight=C
    )
    dual = solvers.least_squares(A @ A.T, y, CLASSES, C)
    primal = solvers.least_squares(A, y, CLASSES, C, gram=False)

    np.testing.assert_allclose(A.T @ dual, ridge.coef_.T, atol=1e-6)
    np.testing.assert_allclose(primal, ridge.coef_.T, atol=1e-6)


def uneven(n: int = 1200, d: int = 30, classes: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose variance falls along the axes, with one class among many: few support vectors, a
    badly scaled Hessian."""
    rng = np.random.default_rng(2)
    y = rng.integers(0, classes, n)
    X = (rng.standard_normal((n, d)) + 3 * rng.standard_normal((classes, d))[y]) * np.arange(
        1.0, d + 1
    ) ** -0.7 + 1
    X = X @ np.linalg.qr(rng.standard_normal((d, d)))[0]
    return np.concatenate(
        [X / np.linalg.norm(X, axis=1, keepdims=True), np.ones((n, 1))], axis=1
    ), y


@pytest.mark.parametrize("C", [1.0, 100.0])
def test_many_rows_are_turned_and_reach_the_same_optimum(
    C: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along the main axes and on support vectors alone, from nothing or from a start: the objective
    is liblinear's."""
    A, y = uneven()
    alone: list[int] = []
    on_own_rows = solvers._on_own_rows
    monkeypatch.setattr(
        solvers,
        "_on_own_rows",
        lambda rows, *more: (alone.append(len(rows)), on_own_rows(rows, *more))[1],
    )
    other = (
        LinearSVC(C=C, fit_intercept=False, dual=False, tol=1e-8, max_iter=100_000)
        .fit(A, y)
        .coef_.T
    )
    best = squared_hinge(A, y, other, C)
    for Cs in ([C], [C / 10, C]):
        *_, fit = solvers.path(A, y, 12, Cs, loss="hinge", gram=False, tol=1e-5)
        assert fit.converged
        assert squared_hinge(A, y, fit.coef[0], C) == pytest.approx(best, rel=1e-4)
        np.testing.assert_allclose(fit.scores[0], A @ fit.coef[0], atol=1e-6)

    assert alone
    assert max(alone) <= len(A) / solvers.FEW


def test_rows_too_wide_to_be_turned_are_solved_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same scores without the turn."""
    A, y = uneven()
    found = []
    for width in (10**6, 0):
        monkeypatch.setattr(solvers, "TURNED", width)
        found.append(
            solvers.solve(A, y, 12, np.ones((len(y), 1)), loss="hinge", gram=False, tol=1e-7)[1]
        )

    np.testing.assert_allclose(*found, atol=1e-3)
