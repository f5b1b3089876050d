"""Linear and kernel classifiers by Newton steps: many folds and classes at once, on BLAS.

Two losses over the scores `f = A @ coef`:

- *hinge*: one machine a class against the rest, `½‖w‖² + Σᵢ cᵢ max(0, 1 − yᵢ fᵢ)²`, what
  liblinear's L2-loss SVM solves;
- *logistic*: `½‖W‖² + Σᵢ cᵢ (log Σₖ exp fᵢₖ − fᵢ,ᵧᵢ)`, multinomial.

`A` is either the rows themselves (primal; `‖w‖²` is Euclidean) or their kernel matrix (Gram; `coef`
are the dual coefficients and `‖w‖² = coefᵀ A coef`). The bias is the weight of a constant feature 1
and is penalised with the rest, as in scikit-learn's `LinearSVC` with `intercept_scaling=1`: callers
append a column of ones, or add 1 to the kernel.

Every fold is the same matrix with `cᵢ = 0` on the rows held out, so that one product serves all
folds and all classes, and the scores of the held-out rows come out of it for nothing. Newton's
equations are solved by conjugate gradients in the geometry of `w` (Keerthi and DeCoste 2005;
Chapelle 2007). Once few rows are support vectors, these are all that the hinge's equations hold:
then problem by problem on these rows alone, in the Gram form by Cholesky's factors, in the primal
by conjugate gradients along the main axes of the rows, scaled by the Hessian's diagonal. The step
is an exact line search, and the stopping rule is the relative duality gap, which needs no further
product: `(P − D) / P ≤ tol` bounds the distance of the objective to its optimum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

Array = NDArray[Any]
Bools = NDArray[np.bool_]
Loss = Literal["hinge", "logistic"]

TOLERANCE = 1e-3  # relative duality gap at which a problem counts as solved
NEWTON_STEPS = 70
CG_STEPS = 250
# rows for every support vector, from which primal steps are taken on these; to what fraction
FEW, OWN_FORCING = (8, 0.03)
# in float32, where rows depend on one another, they may stall at a large C: conjugate gradients go
# on then
EXACT_STEPS = 8
# of a system's float32 rounding over its smallest eigenvalue: more, and it is solved in float64
ROUNDING = 0.2
# a system in m support vectors of n rows is solved exactly where m³ ≤ DIRECT n²: some 40 products
# cost that
DIRECT = 100
FORCING = 0.2  # a Newton system is solved to this fraction of its first residual
LINE_STEPS = 12
# rows of a block: bounds the memory beyond the matrix, and float32 sums are carried in float64
# between blocks
ROWS = 8192
# up to so many rows, and times their width, the Gram form is the faster one
GRAM_ROWS, GRAM_FACTOR = (6000, 4)
# rows up to so wide are turned to their main axes: the eigenvectors of wider ones cost more than
# they save
TURNED = 2048
ELEMENTS = 24_000_000  # scores held at once by `solve`: problems beyond it wait for the next chunk


@dataclass(frozen=True)
class Fit:
    """Solutions for one value of C. `scores` `(folds, n, classes)` cover every row, held out or
    not; `coef` `(folds, width of A, classes)`; `gap` is the largest relative duality gap, `steps`
    the Newton steps taken."""

    C: float
    scores: Array
    coef: Array
    gap: float
    steps: int

    @property
    def converged(self) -> bool:
        return self.gap <= TOLERANCE


def gram_is_faster(n: int, d: int) -> bool:
    """Whether `n` rows of width `d` are better given as their `(n, n)` kernel matrix."""
    return n <= max(d, min(GRAM_ROWS, GRAM_FACTOR * d))


def path(
    A: Array,
    y: NDArray[np.int64],
    classes: int,
    Cs: Sequence[float],
    *,
    loss: Loss,
    gram: bool,
    masks: Array | None = None,
    weights: Array | None = None,
    tol: float = TOLERANCE,
) -> Iterator[Fit]:
    """Solve for every C in turn, each started from the one before; give `Cs` in rising order.

    `A` is `(n, d)` rows with a constant column, or with `gram` a symmetric positive semi-definite
    `(n, n)` kernel; its dtype (float32 or float64) is the precision of the products. `masks`
    `(folds, n)` marks the training rows of every fold (all rows of one fold by default), `weights`
    `(n,)` multiply C row by row. Nothing is computed before a value is asked for, so a caller may
    stop early.
    """
    masks = np.ones((1, len(y)), bool) if masks is None else np.asarray(masks, bool)
    scale = masks.T * (np.ones(len(y)) if weights is None else np.asarray(weights, float))[:, None]
    coef: Array | None = None
    for C in Cs:
        coef, scores, gap, steps = solve(
            A, y, classes, scale * C, loss=loss, gram=gram, start=coef, tol=tol
        )
        shape = (-1, len(masks), classes)
        yield Fit(
            C, scores.reshape(shape).swapaxes(0, 1), coef.reshape(shape).swapaxes(0, 1), gap, steps
        )


def solve(
    A: Array,
    y: NDArray[np.int64],
    classes: int,
    C: Array,
    *,
    loss: Loss,
    gram: bool,
    start: Array | None = None,
    tol: float = TOLERANCE,
) -> tuple[Array, Array, float, int]:
    """All folds and classes for one `C` `(n, folds)`, in chunks that fit in memory.

    Coefficients `(width of A, folds * classes)`, scores `(n, folds * classes)`, the largest gap,
    the most steps taken.
    """
    turn = _main_axes(A) if not gram and loss == "hinge" and A.shape[1] <= TURNED else None
    if turn is not None:
        A, start = A @ turn, None if start is None else turn.T @ start
    total, width = C.shape[1] * classes, 1 if loss == "hinge" else classes
    chunk = max(1, ELEMENTS // (len(y) * width)) * width
    coef, scores = np.zeros((A.shape[1], total), A.dtype), np.zeros((len(y), total), A.dtype)
    gap, steps = 0.0, 0
    for low in range(0, total, chunk):
        columns = np.arange(low, min(low + chunk, total))
        problem = _Problem(A, y, C, classes, loss, gram, turn is not None)
        if start is not None:
            coef[:, columns] = start[:, columns]
        coef[:, columns], scores[:, columns], worst, taken = _newton(
            problem, columns, coef[:, columns], tol
        )
        gap, steps = max(gap, worst), max(steps, taken)
    return coef if turn is None else turn @ coef, scores, gap, steps


def _main_axes(A: Array) -> Array:
    """The orthonormal axes along which the rows vary independently: along these, a Hessian is near
    to its diagonal."""
    total = np.zeros((A.shape[1],) * 2)
    for i in range(0, len(A), ROWS):
        total += A[i : i + ROWS].T @ A[i : i + ROWS]
    return np.linalg.eigh(total)[1].astype(A.dtype)


def least_squares(
    A: Array, y: NDArray[np.int64], classes: int, C: Array, *, gram: bool = True
) -> Array:
    """The same with squared errors `Σᵢ cᵢ (yᵢ − fᵢ)²` in place of the hinge, in closed form: the
    least-squares SVM (Suykens and Vandewalle 1999), one class against the rest.

    Coefficients `(width of A, classes)`; `C` is `(n,)`. All classes share one factorisation, and
    every row gets a coefficient. A kernel matrix `A` is overwritten.
    """
    target = np.where(y[:, None] == np.arange(classes), 1, -1).astype(A.dtype)
    if gram:
        return _positive_solve(A, (1 / (2 * C)).astype(A.dtype), target).astype(A.dtype)
    normal, right = np.zeros((A.shape[1],) * 2), np.zeros((A.shape[1], classes))
    for i in range(0, len(A), ROWS):
        part = A[i : i + ROWS]
        weighted = part * C[i : i + ROWS, None].astype(A.dtype)
        normal += weighted.T @ part
        right += weighted.T @ target[i : i + ROWS]
    return _positive_solve(normal, np.full(A.shape[1], 0.5), right).astype(A.dtype)


class _Problem:
    """One matrix and one loss; the methods take the columns (fold × class) that are still being
    solved. `scaled`: the rows lie along their main axes.

    In the Gram form of the hinge a part `shift` of the loss's own `1 / 2c` on the diagonal of the
    dual is moved into the kernel, `K + shift I` with `1 / 2c' = 1 / 2c − shift`: the same solution,
    but a kernel without zero eigenvalues, which float32 needs.
    """

    def __init__(
        self,
        A: Array,
        y: NDArray[np.int64],
        C: Array,
        classes: int,
        loss: Loss,
        gram: bool,
        scaled: bool,
    ) -> None:
        self.A, self.y, self.classes, self.loss, self.gram, self.scaled = (
            A,
            y,
            classes,
            loss,
            gram,
            scaled,
        )
        self.width = 1 if loss == "hinge" else classes
        self.shift = 0.0
        if gram and loss == "hinge":
            self.shift = float(min(0.25 / max(C.max(), 1e-12), 1e-3 * A.diagonal().mean()))
            C = C / (1 - 2 * self.shift * C)
        self.C = C.astype(A.dtype)

    def forward(self, v: Array) -> Array:
        """Scores of the coefficients `v`."""
        if self.gram:
            product = self.A @ v
            return product + self.A.dtype.type(self.shift) * v if self.shift else product
        if len(self.A) <= ROWS:
            return self.A @ v
        return np.concatenate([self.A[i : i + ROWS] @ v for i in range(0, len(self.A), ROWS)])

    def back(self, u: Array) -> Array:
        """The gradient of the coefficients from the gradient of the scores, in the geometry of
        `w`."""
        if self.gram:
            return u
        if len(self.A) <= ROWS:
            return self.A.T @ u
        total = np.zeros((self.A.shape[1], u.shape[1]))
        for i in range(0, len(self.A), ROWS):
            total += self.A[i : i + ROWS].T @ u[i : i + ROWS]
        return total.astype(self.A.dtype)

    def scale(self, diagonal: Array | None) -> Array | None:
        """The Hessian's own diagonal, a column a problem, where conjugate gradients are scaled by
        it (Jacobi)."""
        if diagonal is None or not self.scaled:
            return None
        total = np.ones((self.A.shape[1], diagonal.shape[1]))
        for i in range(0, len(self.A), ROWS):
            total += np.square(self.A[i : i + ROWS]).T @ diagonal[i : i + ROWS]
        return total.astype(self.A.dtype)

    def inner(self, v: Array, w: Array, scores_of_w: Array) -> Array:
        """`⟨v, w⟩` in the geometry of `w`, one value a problem."""
        return self.sums(v, scores_of_w if self.gram else w)

    def sums(self, a: Array, b: Array) -> Array:
        """`Σ a b` over rows (and over the classes of one multinomial problem), float64."""
        total = np.zeros(a.shape[1])
        for i in range(0, len(a), ROWS):
            total += np.einsum("ij,ij->j", a[i : i + ROWS], b[i : i + ROWS])
        return total if self.width == 1 else total.reshape(-1, self.width).sum(axis=1)

    def spread(self, values: Array) -> Array:
        """One value a problem → one a column."""
        values = values.astype(self.A.dtype)
        return values if self.width == 1 else np.repeat(values, self.width)

    def evaluate(self, columns: NDArray[np.int64]) -> Callable[[Array], _Loss]:
        """The loss of scores in these columns."""
        fold, label = columns // self.classes, columns % self.classes
        target = self.y[:, None] == label
        if self.loss == "hinge":
            sign = np.where(target, 1, -1).astype(self.A.dtype)
            return lambda f: self._hinge(f, sign, self.C[:, fold])
        C = self.C[:, fold[:: self.width]]
        return lambda f: self._logistic(
            f, target.astype(self.A.dtype), np.repeat(C, self.width, axis=1)
        )

    def _hinge(self, f: Array, sign: Array, C: Array) -> _Loss:
        h = np.maximum(1 - sign * f, 0)
        Ch = C * h
        curvature = 2 * C * (h > 0)
        value = self.sums(Ch, h)
        conjugate = 2 * self.sums(Ch, np.ones_like(h)) - value
        return _Loss(value, -2 * sign * Ch, conjugate, lambda u: curvature * u, curvature)

    def _logistic(self, f: Array, target: Array, C: Array) -> _Loss:
        shape = (len(f), -1, self.width)
        z = f.reshape(shape)
        z = z - z.max(axis=2, keepdims=True)
        p = np.exp(z)
        total = p.sum(axis=2, keepdims=True)
        logp = (z - np.log(total)).reshape(f.shape)
        p = (p / total).reshape(f.shape)
        Cp = C * p

        def curvature(u: Array) -> Array:
            mean = (p * u).reshape(shape).sum(axis=2, keepdims=True)
            return Cp * (u.reshape(shape) - mean).reshape(f.shape)

        return _Loss(-self.sums(C * target, logp), Cp - C * target, -self.sums(Cp, logp), curvature)


@dataclass(frozen=True)
class _Loss:
    """The loss at given scores: value, gradient, conjugate at the dual point of the gradient,
    Hessian times a vector, and the Hessian's diagonal where it has nothing else."""

    value: Array
    gradient: Array
    conjugate: Array
    curvature: Callable[[Array], Array]
    diagonal: Array | None = None


def _newton(
    problem: _Problem, columns: NDArray[np.int64], coef: Array, tol: float
) -> tuple[Array, Array, float, int]:
    """Newton steps until every problem's relative duality gap is at most `tol`; solved problems
    leave the batch."""
    q = problem.width
    scores = problem.forward(coef)
    gap = np.full(len(columns) // q, np.inf)
    live, steps, exact, start = (
        np.arange(len(gap)),
        0,
        np.zeros(len(gap), np.int64),
        (coef.copy(), scores.copy()),
    )
    while True:
        own = (live[:, None] * q + np.arange(q)).ravel()
        b, f = coef[:, own], scores[:, own]
        evaluate = problem.evaluate(columns[own])
        loss = evaluate(f)
        g = b + problem.back(loss.gradient)
        u = problem.forward(g)
        bb, bg, gg = problem.inner(b, b, f), problem.inner(b, g, u), problem.inner(g, g, u)
        primal = bb / 2 + loss.value
        gap[live] = (primal + (bb - 2 * bg + gg) / 2 - loss.conjugate) / np.maximum(primal, 1e-30)
        keep = ~(gap[live] <= tol)
        if steps == NEWTON_STEPS or not keep.any():
            break
        if not keep.all():
            live, wide = live[keep], np.repeat(keep, q)
            own, b, f, g, u, gg = (
                own[wide],
                b[:, wide],
                f[:, wide],
                g[:, wide],
                u[:, wide],
                gg[keep],
            )
            evaluate = problem.evaluate(columns[own])
            loss = evaluate(f)
        few = _few_support_vectors(problem, loss) & (
            (exact[live] < EXACT_STEPS) | (not problem.gram)
        )
        d, image = _direction(problem, loss, b, g, u, gg, few)
        t = problem.spread(_step_length(problem, evaluate, b, f, g, u, d, image))
        coef[:, own], scores[:, own] = b + t * d, f + t * image
        exact[live] += few
        if problem.gram and (stalled := live[few & (exact[live] == EXACT_STEPS)]).size:
            coef[:, stalled], scores[:, stalled] = start[0][:, stalled], start[1][:, stalled]
        steps += 1
    return (
        coef,
        scores - problem.A.dtype.type(problem.shift) * coef if problem.shift else scores,
        float(gap.max()),
        steps,
    )


def _few_support_vectors(problem: _Problem, loss: _Loss) -> Bools:
    """Which problems have so few that their equations are better solved one by one; one answer a
    problem."""
    if loss.diagonal is None:
        return np.zeros(len(loss.value), bool)
    n = len(loss.diagonal)
    most = (DIRECT * n * n) ** (1 / 3) if problem.gram else n / FEW if problem.scaled else 0
    return np.count_nonzero(loss.diagonal, axis=0) <= most


def _direction(
    problem: _Problem, loss: _Loss, b: Array, g: Array, u: Array, gg: Array, few: Bools
) -> tuple[Array, Array]:
    """Newton directions and their scores, for the `few` from their support vectors alone; `u` are
    the scores of the gradient `g`."""
    if not few.any():
        return _truncated(problem, loss.curvature, loss.diagonal, g, u, gg)
    assert loss.diagonal is not None
    diagonal = loss.diagonal
    d, image = np.empty_like(g), np.empty_like(u)
    if problem.gram:
        # these systems are small, and scipy's BLAS threads and numpy's would wait for one another
        with _blas().limit(limits=1):
            for k in np.flatnonzero(few):
                d[:, k] = _exact(problem, diagonal[:, k], b[:, k], g[:, k])
    else:
        for k in np.flatnonzero(few):
            own = np.flatnonzero(diagonal[:, k])
            d[:, k] = _on_own_rows(problem.A[own], diagonal[own, k], g[:, k])
    image[:, few] = problem.forward(d[:, few])
    if not few.all():
        rest = diagonal[:, ~few]
        d[:, ~few], image[:, ~few] = _truncated(
            problem, lambda v: rest * v, rest, g[:, ~few], u[:, ~few], gg[~few]
        )
    return d, image


def _on_own_rows(rows: Array, diagonal: Array, g: Array) -> Array:
    """The step of one problem in the primal: `(I + rowsᵀ diag rows) d = −g`, by conjugate gradients
    scaled by the diagonal."""
    scale = 1 + diagonal @ (rows * rows)
    d, r = np.zeros_like(g), -g
    s = r / scale
    p, rs = s, float(r @ s)
    goal = OWN_FORCING**2 * rs
    for _ in range(CG_STEPS):
        if rs <= goal:
            break
        bent = p + rows.T @ (diagonal * (rows @ p))
        a = rs / float(p @ bent)
        d += a * p
        r = r - a * bent
        s = r / scale
        new = float(r @ s)
        p, rs = s + (new / rs) * p, new
    return d


@functools.cache
def _blas() -> ThreadpoolController:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


def _exact(problem: _Problem, diagonal: Array, b: Array, g: Array) -> Array:
    """The whole Newton step of one problem with coefficients `b` and gradient `g`: one system in
    its support vectors.

    It is solved for the step and not for its end, so that it agrees with the scores as they were
    rounded.
    """
    own, outside = np.flatnonzero(diagonal), np.where(diagonal == 0, b, 0)
    inverse = 1 / diagonal[own]
    rows = problem.A[own]  # then columns: faster than both at once
    right = rows @ outside - inverse * g[own] if outside.any() else -inverse * g[own]
    system = rows[:, own]
    d = -g
    if len(own):
        d[own] = _positive_solve(system, problem.shift + inverse, right)
    return d


def _positive_solve(K: Array, ridge: Array, right: Array) -> Array:
    """`(K + diag(ridge))⁻¹ right`, by Cholesky; `K` is overwritten. In float64 where float32 would
    not see the ridge."""
    from scipy.linalg import cho_factor, cho_solve

    if np.trace(K) * np.finfo(K.dtype).eps > ROUNDING * ridge.min():
        K = K.astype(np.float64)
    K[np.diag_indices(len(K))] += ridge
    return cho_solve(
        cho_factor(K, lower=True, overwrite_a=True, check_finite=False), right, check_finite=False
    )


def _truncated(
    problem: _Problem,
    curvature_of: Callable[[Array], Array],
    diagonal: Array | None,
    g: Array,
    u: Array,
    gg: Array,
) -> tuple[Array, Array]:
    """A truncated Newton direction by conjugate gradients, and its scores."""
    scale = problem.scale(diagonal)
    if scale is None:
        r, p, image, rr = -g, -g, -u, gg
    else:
        r, p = -g, -g / scale
        image = problem.forward(p)
        rr = problem.inner(r, p, image)
    d, total = np.zeros_like(p), np.zeros_like(image)
    goal = FORCING**2 * rr
    for _ in range(CG_STEPS):
        bent = curvature_of(image)
        curvature = problem.inner(p, p, image) + problem.sums(image, bent)
        # float32 may lose the sign of a vanishing curvature: stop there
        open_ = (rr > goal) & (curvature > 0)
        if not open_.any():
            break
        a = problem.spread(np.where(open_, rr / np.where(open_, curvature, 1), 0))
        d += a * p
        total += a * image
        r = r - a * (p + problem.back(bent))
        s = r if scale is None else r / scale
        z = problem.forward(s)
        new = np.where(open_, np.maximum(problem.inner(r, s, z), 0), 0)
        beta = problem.spread(np.where(open_, new / np.where(open_, rr, 1), 0))
        p, image, rr = s + beta * p, z + beta * image, new
    return d, total


def _step_length(
    problem: _Problem,
    evaluate: Callable[[Array], _Loss],
    b: Array,
    f: Array,
    g: Array,
    u: Array,
    d: Array,
    image: Array,
) -> Array:
    """The minimum along `d`, by Newton's method on the slope inside a shrinking bracket."""
    first = problem.inner(d, g, u)
    linear, square = problem.inner(d, b, f), problem.inner(d, d, image)
    low, high = np.zeros(len(first)), np.full(len(first), np.inf)
    t = np.ones(len(first))
    for _ in range(LINE_STEPS):
        loss = evaluate(f + problem.spread(t) * image)
        slope = linear + t * square + problem.sums(loss.gradient, image)
        done = np.abs(slope) <= 0.05 * np.abs(first)
        if done.all():
            break
        low, high = np.where(slope < 0, t, low), np.where(slope < 0, high, t)
        bend = square + problem.sums(image, loss.curvature(image))
        new = t - slope / np.maximum(bend, 1e-30)
        middle = np.where(np.isfinite(high), (low + high) / 2, 2 * np.maximum(low, 1))
        t = np.where(done, t, np.where((new > low) & (new < high), new, middle))
    return t
