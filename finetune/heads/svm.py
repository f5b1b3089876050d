"""Features → head: taps, kernel and C chosen by cross-validation inside the rows given
(`comparison`), then fitted on all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.heads import solvers
from finetune.heads.crossval import (
    RBF,
    Array,
    Blocks,
    Ints,
    Kernel,
    Setting,
    Trial,
    assign_folds,
    class_weights,
    subset,
    take,
    with_ones,
)
from finetune.heads.head import AnyHead, Head, KernelHead, rbf, side_by_side
from finetune.heads.tap_search import GAMMA, Candidate, Comparison, log_loss
from finetune.network import Tap

Weight = Literal["auto", "balanced"] | None

KERNELS: tuple[Kernel, ...] = ("linear", "logistic", "rbf", "lssvm", "knn")
# of heads
KINDS: dict[Kernel, str] = {
    "linear": "svm",
    "logistic": "logistic",
    "rbf": "rbf-svm",
    "lssvm": "rbf-lssvm",
}
DEFAULT_C = 1.0  # where nothing can be held out
DEFAULT_TEMPERATURE = 0.25  # the same
# more rows than this: the choice is made on a stratified subset of this size, the head fitted on
# all
ROWS = 3000
WIDE = 100  # classes from which only the linear machine is compared: its classes are independent
# rows to which an RBF machine has all rows as candidates for support vectors; beyond: Nyström
EXACT = 6000
LANDMARKS = 3000  # of Nyström's approximation (Williams and Seeger 2001)
BALANCE_FROM = 10.0  # largest class over smallest, from which "auto" weighs the classes


@dataclass(frozen=True)
class SvmResult:
    """The head that was chosen, fitted on all the rows given, and what it was chosen from.

    `oof_scores` `(n, C)` are decision values of every row by a machine that had not seen it: NaN
    for rows outside the subset that chose, zeros where nothing could be held out. `cv_accuracy` is
    their accuracy; being that of the winner, it is a little flattered. `candidates` are all that
    were compared, the winner first; `balanced` says whether classes were weighted, `note` on how
    many images the choice was made where these are not all. `C` is that of the head.
    """

    head: AnyHead
    oof_scores: NDArray[np.float32]
    cv_accuracy: float
    cv_error: float
    candidates: tuple[Candidate, ...]
    warnings: tuple[str, ...]
    balanced: bool = False
    note: str = ""
    C: float = DEFAULT_C


def choose(
    blocks: Blocks,
    y: Array,
    classes: Sequence[str],
    *,
    default_taps: Sequence[Tap],
    groups: Array | None = None,
    folds: int = 5,
    seed: int = 0,
    kernels: Sequence[Kernel] = KERNELS,
    grid: Sequence[float] | None = None,
    class_weight: Weight = "auto",
) -> SvmResult:
    """Choose taps, kernel and C by cross-validation, and fit the head on all rows.

    `blocks` holds one `(n, d)` float32 array a tap (a memory map will do), `y` `(n,)` indices into
    `classes`. Rows of one group are never on both sides of a fold. `default_taps` are used where
    nothing can be held out (one image a class). `grid` are the values of C to try instead of a path
    that ends by itself. `class_weight` "auto" weighs every class by 1 / its size where the largest
    has `BALANCE_FROM` times the images of the smallest. Raises `UserError` for features or labels
    that do not fit together.
    """
    labels = _check(blocks, y, classes, groups, kernels, default_taps)
    balanced = class_weight == "balanced" or (
        class_weight == "auto" and _imbalance(labels) >= BALANCE_FROM
    )
    weights = class_weights(labels) if balanced else None
    fold, notes = assign_folds(labels, groups, folds, seed, classes)
    ship = [kernel for kernel in kernels if kernel != "knn"]
    if fold is None:
        setting = Setting(
            tuple(default_taps),
            "linear" if "linear" in ship else ship[0],
            GAMMA / len(default_taps),
        )
        C = grid[0] if grid else DEFAULT_C
        notes += [f"C = {C:g}, the first of those that were named, is taken"] if grid else []
        head = fit_head(blocks, labels, classes, setting, C, weights, DEFAULT_TEMPERATURE)
        nothing = np.zeros((len(labels), len(classes)), np.float32)
        return SvmResult(head, nothing, float("nan"), float("nan"), (), tuple(notes), balanced, C=C)
    if len(classes) > WIDE:
        ship = ["linear"] if "linear" in ship else ship
    rows = subset(labels, np.arange(len(labels)), ROWS, seed)
    part = (
        f"taps, kernel and C were chosen on {len(rows)} of "
        f"{len(labels)} images; the head is fitted on all"
    )
    search = Comparison(blocks, labels, rows, fold, weights, ship, grid, seed)
    best = search.run((*default_taps,), "knn" in kernels)
    notes += search.doubts(best)
    head = fit_head(blocks, labels, classes, best.setting, best.C, weights, best.temperature)
    scores = np.full((len(labels), len(classes)), np.nan, np.float32)
    scores[np.ix_(rows, search.table.labels)] = best.scores
    if len(search.table.labels) < len(classes):
        scores[np.ix_(rows, np.setdiff1d(np.arange(len(classes)), search.table.labels))] = (
            best.scores.min() - 1
        )
    return SvmResult(
        head,
        scores,
        best.accuracy,
        best.error,
        search.candidates(best),
        tuple(notes),
        balanced,
        part if len(rows) < len(labels) else "",
        best.C,
    )


def refit(result: SvmResult, blocks: Blocks, y: Array) -> AnyHead:
    """The winner's taps, kernel, C and temperature on other rows (training and validation
    together)."""
    head = result.head
    labels = _check(blocks, y, head.classes, None, ("linear",), head.taps)
    weights = class_weights(labels) if result.balanced else None
    if not result.candidates:
        kernel = next(kernel for kernel, kind in KINDS.items() if kind == head.kind)
        setting = Setting(head.taps, kernel, GAMMA / len(head.taps))
        return fit_head(blocks, labels, head.classes, setting, result.C, weights, head.temperature)
    winner = result.candidates[0]
    setting = Setting(winner.taps, winner.kernel, winner.gamma)
    return fit_head(blocks, labels, head.classes, setting, winner.C, weights, head.temperature)


def unseen(result: SvmResult, blocks: Blocks, y: Array) -> NDArray[np.float32]:
    """Scores `(n, C)` of every row by a machine that had not seen it: those out of fold and, of
    rows outside the subset that chose, those of the winner fitted on that subset."""
    scores = np.array(result.oof_scores)
    rest = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if len(rest):
        known = np.setdiff1d(np.arange(len(y)), rest)
        head = refit(result, {tap: take(block, known) for tap, block in blocks.items()}, y[known])
        scores[rest] = head.scores([take(blocks[tap], rest) for tap in head.taps])
    return scores


def quick(blocks: Blocks, y: Array, *, groups: Array | None = None, seed: int = 0) -> Trial | None:
    """The best trial of an early look, a fast measure of the features: which rows are right out of
    fold, and their losses.

    None where nothing can be held out.
    """
    names, labels = np.unique(y, return_inverse=True)
    if len(names) < 2:
        return None
    fold, _ = assign_folds(labels, groups, 5, seed, [str(name) for name in names])
    if fold is None:
        return None
    search = Comparison(
        blocks, labels, np.arange(len(labels)), fold, None, ["linear", "lssvm"], None, seed
    )
    search.early = search.table
    return min(search.look(), key=log_loss)


# ------------------------------------------------------------------------------------------ fitting


def fit_head(
    blocks: Blocks,
    y: Ints,
    classes: Sequence[str],
    setting: Setting,
    C: float,
    weights: Array | None,
    temperature: float,
) -> AnyHead:
    """The head of one setting, fitted on all rows. `y` may lack classes: their scores are lower
    than any other's."""
    x = side_by_side([blocks[tap] for tap in setting.taps], normalize=True)
    present, own = np.unique(y, return_inverse=True)
    scale = np.full((len(y), 1), C) if weights is None else weights[:, None] * C
    common: dict[str, Any] = {
        "taps": setting.taps,
        "classes": tuple(classes),
        "temperature": temperature,
    }
    common["kind"] = KINDS[setting.kernel]
    if setting.kernel in RBF:
        support, coef, bias = _fit_rbf(x, own, len(present), scale, setting)
        weight, offset = _whole(coef.T, bias, present, classes)
        return KernelHead(support=support, coef=weight, bias=offset, gamma=setting.gamma, **common)
    loss: solvers.Loss = "logistic" if setting.kernel == "logistic" else "hinge"
    if solvers.gram_is_faster(*x.shape):
        dual, *_ = solvers.solve(x @ x.T + 1, own, len(present), scale, loss=loss, gram=True)
        weight, bias = dual.T @ x, dual.sum(axis=0)
    else:
        coef, *_ = solvers.solve(with_ones(x), own, len(present), scale, loss=loss, gram=False)
        weight, bias = coef[:-1].T, coef[-1]
    weight, bias = _whole(weight, bias, present, classes)
    return Head(weight=weight, bias=bias, **common)


def _fit_rbf(
    x: Array, y: Ints, classes: int, scale: Array, setting: Setting
) -> tuple[Array, Array, Array]:
    """Support vectors `(m, D)`, coefficients `(m, classes)` and bias; Nyström on landmarks where
    the rows are many."""
    squares = setting.kernel == "lssvm"
    if len(x) <= EXACT:
        K = rbf(x, x, setting.gamma) + 1
        if squares:
            coef = solvers.least_squares(K, y, classes, scale[:, 0])
            return x, coef, coef.sum(axis=0)
        coef, *_ = solvers.solve(K, y, classes, scale, loss="hinge", gram=True)
        used = np.flatnonzero(np.abs(coef).max(axis=1) > 0)
        return x[used], coef[used], coef.sum(axis=0)
    landmarks = x[subset(y, np.arange(len(x)), LANDMARKS, 0)]
    values, vectors = np.linalg.eigh(rbf(landmarks, landmarks, setting.gamma).astype(np.float64))
    keep = values > values[-1] * 1e-7
    root = (vectors[:, keep] / np.sqrt(values[keep])).astype(np.float32)
    mapped = with_ones(
        np.concatenate(
            [rbf(x[i : i + 4096], landmarks, setting.gamma) @ root for i in range(0, len(x), 4096)]
        )
    )
    if squares:
        coef = solvers.least_squares(mapped, y, classes, scale[:, 0], gram=False)
    else:
        coef, *_ = solvers.solve(mapped, y, classes, scale, loss="hinge", gram=False)
    return landmarks, root @ coef[:-1], coef[-1]


def _whole(
    weight: Array, bias: Array, present: Ints, classes: Sequence[str]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One row a class; classes without rows get no weight and a bias of −100: never the best."""
    weights, biases = (
        np.zeros((len(classes), weight.shape[1]), np.float32),
        np.full(len(classes), -100, np.float32),
    )
    weights[present], biases[present] = weight, bias
    return weights, biases


def _imbalance(y: Ints) -> float:
    counts = np.bincount(y)
    return float(counts.max() / counts[counts > 0].min())


def _check(
    blocks: Blocks,
    y: Array,
    classes: Sequence[str],
    groups: Array | None,
    kernels: Sequence[Kernel],
    taps: Sequence[Tap],
) -> Ints:
    """Labels as int64, or a `UserError` that names what does not fit."""
    y = np.asarray(y)
    if len(classes) < 2:
        what = f"{len(classes)} class: nothing to tell apart"
        raise UserError(what, where="classes", fix="give images of at least two classes")
    if (
        y.ndim != 1
        or not np.issubdtype(y.dtype, np.integer)
        or len(y) == 0
        or y.min() < 0
        or y.max() >= len(classes)
    ):
        raise UserError(
            f"labels must be whole numbers from 0 to {len(classes) - 1}, one an image", where="y"
        )
    counts = np.bincount(y, minlength=len(classes))
    if empty := [name for name, count in zip(classes, counts, strict=True) if not count]:
        raise UserError(
            f"no image of class {', '.join(map(repr, empty))}",
            where="y",
            fix="add images, or leave the class out",
        )
    if groups is not None and len(groups) != len(y):
        raise UserError(f"{len(groups)} groups for {len(y)} images", where="groups")
    if {*kernels} - {*KERNELS} or not {*kernels} - {"knn"}:
        fix = "choose from linear, logistic, rbf, lssvm (knn is a measure)"
        raise UserError(f"kernels {list(kernels)}: none that ships", where="kernels", fix=fix)
    missing = [str(tap) for tap in taps if tap not in blocks]
    if missing or not taps:
        raise UserError(
            f"no features of tap {', '.join(missing)}",
            where="taps",
            fix=f"given: {', '.join(map(str, blocks))}",
        )
    for tap, block in blocks.items():
        if block.ndim != 2 or len(block) != len(y):
            raise UserError(f"features of shape {block.shape} for {len(y)} images", where=str(tap))
        for low in range(0, len(block), solvers.ROWS):
            if not np.isfinite(block[low : low + solvers.ROWS]).all():
                fix = "extract the features again, with --precision float32"
                raise UserError("not every feature is a finite number", where=str(tap), fix=fix)
    return y.astype(np.int64)
