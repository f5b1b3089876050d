"""Cross-validation of head settings on arrays: who is held out when, and what the held-out scores
are worth.

A comparison is made on scores of held-out rows, by their log loss after one fitted temperature: it
is smoother than the accuracy, so less of a choice is luck. Features are L2-normalised row by row
and tap by tap, which needs nothing from other rows, so that nothing leaks from the rows held out.
Everything that does not change between settings (the normalised features of a tap, their kernel
matrix) is computed once.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from finetune import metrics
from finetune.heads import solvers
from finetune.heads.head import side_by_side
from finetune.network import Tap

Array = NDArray[Any]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Kernel = Literal["linear", "logistic", "rbf", "lssvm", "knn"]
# those that read the Gaussian kernel: with the squared hinge, with squared errors
RBF: tuple[Kernel, ...] = ("rbf", "lssvm")
Blocks = Mapping[Tap, Array]

NEIGHBOURS = 5
STEPS = 17  # of bisection, for a temperature to 1e-4 of itself
ROUGH = 1e-2  # relative duality gap at which two settings can be compared


@dataclass(frozen=True)
class Setting:
    """What a head is fitted with, C apart. `gamma` is the RBF's."""

    taps: tuple[Tap, ...]
    kernel: Kernel
    gamma: float = 0.0


@dataclass(frozen=True)
class Trial:
    """One setting at one C: scores of every row `(n, classes present)` by a machine that had not
    seen it, and their worth.

    `error` is the standard error of the accuracy over the folds.
    """

    setting: Setting
    C: float
    scores: Array
    losses: Array
    right: Bools
    error: float
    temperature: float
    converged: bool
    seconds: float

    @property
    def log_loss(self) -> float:
        return float(self.losses.mean())

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


class Rows:
    """Some of the rows, with their folds and weights, and the matrices of their features, each made
    once."""

    def __init__(
        self, blocks: Blocks, y: Ints, rows: Ints, fold: Ints, weights: Array | None
    ) -> None:
        """`fold` and `weights` cover all rows of `y`; `rows` are those that are used."""
        self.blocks, self.rows = blocks, rows
        self.labels, self.y = np.unique(y[rows], return_inverse=True)
        self.folds, self.fold = np.unique(fold[rows], return_inverse=True)
        self.weights = np.ones(len(rows)) if weights is None else weights[rows]
        self._parts: dict[Tap, Array] = {}
        self._products: dict[Tap, Array] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def x(self, taps: Sequence[Tap]) -> Array:
        """The normalised features `(n, D)`, side by side."""
        for tap in taps:
            if tap not in self._parts:
                self._parts[tap] = side_by_side([take(self.blocks[tap], self.rows)], normalize=True)
        return (
            np.concatenate([self._parts[tap] for tap in taps], axis=1)
            if len(taps) > 1
            else self._parts[taps[0]]
        )

    def products(self, taps: Sequence[Tap]) -> Array:
        """`x(taps) @ x(taps).T` `(n, n)`: the sum of one matrix a tap."""
        total = np.zeros((len(self), len(self)), np.float32)
        for tap in taps:
            if tap not in self._products:
                x = self.x([tap])
                self._products[tap] = x @ x.T
            total += self._products[tap]
        return total

    def kernel(self, setting: Setting) -> Array:
        """The kernel matrix `(n, n)` with the bias's constant 1 added."""
        K = self.products(setting.taps)
        if setting.kernel in RBF:
            squares = K.diagonal().copy()
            K *= 2
            K -= squares[:, None]
            K -= squares
            np.minimum(K, 0, out=K)
            K *= np.float32(setting.gamma)
            np.exp(K, out=K)
        K += 1
        return K

    def trials(self, setting: Setting, Cs: Sequence[float], tol: float = ROUGH) -> Iterator[Trial]:
        """Machines along rising values of C, each started from the one before; nothing is computed
        before it is asked for."""
        if setting.kernel == "lssvm":
            yield from self.least_squares(setting, Cs)
            return
        width = sum(self.blocks[tap].shape[1] for tap in setting.taps)
        gram = setting.kernel == "rbf" or solvers.gram_is_faster(len(self), width)
        A = self.kernel(setting) if gram else with_ones(self.x(setting.taps))
        masks = np.arange(len(self.folds))[:, None] != self.fold
        loss: solvers.Loss = "logistic" if setting.kernel == "logistic" else "hinge"
        began = time.perf_counter()
        for fit in solvers.path(
            A,
            self.y,
            len(self.labels),
            Cs,
            loss=loss,
            gram=gram,
            masks=masks,
            weights=self.weights,
            tol=tol,
        ):
            scores = fit.scores[self.fold, np.arange(len(self))]
            yield self._judged(setting, fit.C, scores, fit.gap <= tol, time.perf_counter() - began)
            began = time.perf_counter()

    def least_squares(self, setting: Setting, Cs: Sequence[float]) -> Iterator[Trial]:
        """The same with squared errors in place of the hinge, in closed form: one linear system a
        fold and C (`solvers.least_squares`). It ranks taps as the SVM does, many times faster."""
        K = self.kernel(setting)
        for C in Cs:
            began = time.perf_counter()
            scores = np.empty((len(self), len(self.labels)), K.dtype)
            for k in range(len(self.folds)):
                held, own = np.flatnonzero(self.fold == k), np.flatnonzero(self.fold != k)
                coef = solvers.least_squares(
                    K[np.ix_(own, own)], self.y[own], len(self.labels), C * self.weights[own]
                )
                scores[held] = K[np.ix_(held, own)] @ coef
            yield self._judged(setting, C, scores, True, time.perf_counter() - began)

    def neighbours(self, taps: tuple[Tap, ...]) -> Trial:
        """k-NN by cosine: votes of the nearest rows of the other folds. `C` is k."""
        began = time.perf_counter()
        K = self.products(taps)
        K[self.fold[:, None] == self.fold] = -np.inf
        k = min(NEIGHBOURS, len(self) - int(np.bincount(self.fold).max()))
        near = np.argpartition(-K, k - 1, axis=1)[:, :k]
        votes = np.zeros((len(self), len(self.labels)))
        nearness = np.take_along_axis(K, near, axis=1)
        np.add.at(votes, (np.arange(len(near))[:, None], self.y[near]), 1 + 1e-3 * nearness)
        return self._judged(
            Setting(taps, "knn"), float(k), votes, True, time.perf_counter() - began
        )

    def _judged(
        self, setting: Setting, C: float, scores: Array, converged: bool, seconds: float
    ) -> Trial:
        temperature, losses = calibrate(scores, self.y)
        right = scores.argmax(axis=1) == self.y
        by_fold = np.array([right[self.fold == k].mean() for k in range(len(self.folds))])
        error = float(by_fold.std(ddof=1) / np.sqrt(len(by_fold)))
        return Trial(
            setting,
            C,
            scores.astype(np.float32),
            losses,
            right,
            error,
            temperature,
            converged,
            seconds,
        )


def assign_folds(
    y: Ints, groups: Array | None, folds: int, seed: int, classes: Sequence[str]
) -> tuple[Ints | None, list[str]]:
    """The fold in which every row is held out, stratified, groups whole; and what is less than
    asked, in words.

    None where fewer than two classes have two groups: nothing can be held out then.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    notes = []
    units = (
        np.arange(len(y))
        if groups is None
        else np.unique(np.asarray(groups), return_inverse=True)[1]
    )
    sizes = np.array([len(np.unique(units[y == c])) for c in range(len(classes))])
    what = "image" if len(np.unique(units)) == len(y) else "group"
    if (sizes >= 2).sum() < 2:
        return None, [
            f"one {what} a class: no cross-validation is possible; default taps and C, "
            f"probabilities not calibrated"
        ]
    if lone := [str(classes[int(c)]) for c in np.flatnonzero(sizes < 2)]:
        notes.append(
            f"only one {what} in class {', '.join(map(repr, lone))}: "
            f"cross-validation counts it as an error"
        )
    count = int(min(folds, sizes.max()))
    if count < folds:
        notes.append(f"{count} folds instead of {folds}: the largest class has {count} {what}s")
    splitter = (StratifiedKFold if what == "image" else StratifiedGroupKFold)(
        count, shuffle=True, random_state=seed
    )
    fold = np.empty(len(y), np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "the least populated class has …": said above
        for k, (_, held) in enumerate(splitter.split(units, y, units)):
            fold[held] = k
    return (
        (fold, notes)
        if len(np.unique(fold)) > 1
        else (None, [f"all images in one {what}: no cross-validation is possible"])
    )


def subset(y: Ints, rows: Ints, size: int, seed: int, most_classes: int | None = None) -> Ints:
    """At most about `size` of `rows`, drawn class by class in proportion, two of every class at
    least; sorted.

    With more than `most_classes` classes, a seeded draw of these.
    """
    random = np.random.default_rng(seed)
    present = np.unique(y[rows])
    if most_classes is not None and len(present) > most_classes:
        rows = rows[np.isin(y[rows], random.choice(present, most_classes, replace=False))]
    if len(rows) <= size:
        return rows
    parts = []
    for c in np.unique(y[rows]):
        own = rows[y[rows] == c]
        parts.append(
            random.choice(
                own, min(len(own), max(2, round(len(own) * size / len(rows)))), replace=False
            )
        )
    return np.sort(np.concatenate(parts))


def class_weights(y: Ints) -> NDArray[np.float64]:
    """One weight a row, `n / (classes × rows of its class)`: every class weighs the same in sum."""
    counts = np.bincount(y)
    return (len(y) / (np.count_nonzero(counts) * np.maximum(counts, 1)))[y]


def calibrate(scores: Array, y: Ints) -> tuple[float, NDArray[np.float64]]:
    """The temperature of the scores (`metrics.fit_temperature`), to 1e-4 of itself, and the log
    loss of every row with it."""
    temperature = metrics.fit_temperature(scores, y, steps=STEPS)
    z = np.asarray(scores, np.float64) / temperature
    z = z - z.max(axis=1, keepdims=True)
    return temperature, np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(y)), y]


def take(block: Array, rows: Ints) -> Array:
    return np.asarray(block) if len(rows) == len(block) else np.asarray(block[rows])


def with_ones(x: Array) -> Array:
    """A column of ones appended: the bias."""
    return np.concatenate([x, np.ones((len(x), 1), x.dtype)], axis=1)
