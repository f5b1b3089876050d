"""Features → head: which taps, which kernel and which C, decided by cross-validation inside the rows given.

Every comparison is made on out-of-fold scores, and by their log loss after one fitted temperature (a smoother measure
than accuracy, so less of the choice is luck). Three steps: an early look at every tap alone on a subset of the rows; the
best ones side by side, added one at a time as long as that helps; then linear machine, logistic regression and RBF
machine on the few sets left, each along a path of C. Features are L2-normalised row by row and tap by tap, which needs
nothing from other rows, so nothing leaks from the rows held out. Where the rows are fewer than the features, and for the
RBF, all of it runs on kernel matrices that are computed once a tap and added.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from finetune import solvers
from finetune.classifier import AnyHead, Head, KernelHead, rbf, side_by_side, softmax
from finetune.errors import UserError
from finetune.network import Tap

Array = NDArray[Any]
Kernel = Literal["linear", "logistic", "rbf", "knn"]
Weight = Literal["auto", "balanced"] | None
Blocks = Mapping[Tap, Array]

KERNELS: tuple[Kernel, ...] = ("linear", "logistic", "rbf", "knn")
C_GRID = tuple(10.0 ** (e / 2) for e in range(-3, 7))  # 0.03 … 1000
BEYOND = (10**0.5, 10.0, 10**1.5)  # beyond an end of the grid that turns out to be the best
QUICK_C = (3.0, 30.0)  # compared in the early look
PATIENCE = 2  # values of C without a better log loss, after which the rest of the path is left out
DEFAULT_C = 1.0  # where nothing can be held out
DEFAULT_TEMPERATURE = 0.25
GAMMA = 1.0  # over the number of taps: rows of k normalised taps have squared length k
GAMMAS = (0.5, 1.5)  # tried for the best set of taps only
NEIGHBOURS = 5
LOOK_ROWS, LOOK_CLASSES = 1000, 50  # the early look
ROWS = 6000  # more rows than this: the choice is made on a stratified subset of this size, the head fitted on all
WIDE = 40_000_000  # rows × classes beyond which only the linear machine is compared: its classes are independent
LANDMARKS, LANDMARK_ELEMENTS = 3000, 250_000_000  # Nyström
MANY_CLASSES = 100  # the same
KEPT, MOST_TAPS, FINALISTS = 6, 4, 4
BALANCE_FROM = 10.0  # largest class over smallest, from which "auto" weighs the classes
DRAWS = 200  # bootstrap draws behind `optimism`


@dataclass(frozen=True)
class Candidate:
    """One set of taps with one kernel at its best C. `accuracy` and `log_loss` are out of fold; `error` is the standard
    error of the accuracy over the folds. `gamma` is the RBF's; for k-NN, a measure that never ships, `C` is k."""

    taps: tuple[Tap, ...]
    kernel: Kernel
    C: float
    accuracy: float
    error: float
    seconds: float
    note: str = ""
    gamma: float = 0.0
    log_loss: float = float("nan")


@dataclass(frozen=True)
class SvmResult:
    """The head that was chosen, fitted on all the rows given, and what it was chosen from.

    `oof_scores` `(n, C)` are decision values for every row by a machine that had not seen it (zeros where nothing could
    be held out). `cv_accuracy` is the accuracy of these; being the accuracy of the winner, it is a little flattered:
    `optimism` estimates by how much (bootstrap of the selection, Tsamardinos et al. 2018). `candidates` are all that were
    compared, best first; `balanced` says whether classes were weighted.
    """

    head: AnyHead
    oof_scores: NDArray[np.float32]
    cv_accuracy: float
    cv_error: float
    candidates: tuple[Candidate, ...]
    warnings: tuple[str, ...]
    optimism: float = 0.0
    balanced: bool = False


@dataclass(frozen=True)
class _Setting:
    taps: tuple[Tap, ...]
    kernel: Kernel
    gamma: float = 0.0


@dataclass(frozen=True)
class _Trial:
    """One setting at one C on some rows: out-of-fold scores and what they are worth."""

    setting: _Setting
    C: float
    oof: Array
    losses: Array
    right: NDArray[np.bool_]
    error: float
    temperature: float
    converged: bool
    seconds: float

    @property
    def log_loss(self) -> float:
        return float(self.losses.mean())

    def candidate(self, note: str) -> Candidate:
        s = self.setting
        note = ", ".join(part for part in (f"gamma {s.gamma:.3g}" if s.kernel == "rbf" else "", note) if part)
        return Candidate(s.taps, s.kernel, self.C, float(self.right.mean()), self.error, self.seconds, note, s.gamma, self.log_loss)


class _Rows:
    """Some of the rows, with their labels, folds and weights, and the matrices of their features, each made once."""

    def __init__(self, blocks: Blocks, y: Array, rows: Array, fold: Array, weights: Array | None) -> None:
        self.blocks, self.rows, self.fold = blocks, rows, fold
        self.labels, self.y = np.unique(y[rows], return_inverse=True)
        self.weights = None if weights is None else weights[rows]
        self.parts: dict[Tap, Array] = {}
        self.grams: dict[Tap, Array] = {}

    def x(self, taps: Sequence[Tap]) -> Array:
        """The normalised features `(n, D)`, side by side."""
        for tap in taps:
            if tap not in self.parts:
                self.parts[tap] = side_by_side([take(self.blocks[tap], self.rows)], normalize=True)
        return np.concatenate([self.parts[tap] for tap in taps], axis=1) if len(taps) > 1 else self.parts[taps[0]]

    def products(self, taps: Sequence[Tap]) -> Array:
        """`x(taps) @ x(taps).T`: the sum of one matrix a tap."""
        total = np.zeros((len(self.rows), len(self.rows)), np.float32)
        for tap in taps:
            if tap not in self.grams:
                x = self.x([tap])
                self.grams[tap] = x @ x.T
            total += self.grams[tap]
        return total

    def matrix(self, s: _Setting) -> tuple[Array, bool]:
        """What the solver needs, and whether that is a kernel matrix."""
        if s.kernel == "rbf":
            K = self.products(s.taps)
            squares = K.diagonal().copy()
            K *= 2
            K -= squares[:, None]
            K -= squares
            np.minimum(K, 0, out=K)
            K *= np.float32(s.gamma)
            np.exp(K, out=K)
            K += 1
            return K, True
        if sum(self.blocks[tap].shape[1] for tap in s.taps) < len(self.rows):
            return with_ones(self.x(s.taps)), False
        return self.products(s.taps) + 1, True

    def trial(self, s: _Setting, C: float, oof: Array, converged: bool, seconds: float) -> _Trial:
        temperature, losses = calibrate(oof, self.y)
        right = oof.argmax(axis=1) == self.y
        by_fold = np.array([right[self.fold == k].mean() for k in np.unique(self.fold)])
        error = float(by_fold.std(ddof=1) / np.sqrt(len(by_fold)))
        return _Trial(s, C, oof.astype(np.float32), losses, right, error, temperature, converged, seconds)

    def trials(self, s: _Setting, Cs: Sequence[float]) -> Iterator[_Trial]:
        """Cross-validation along rising values of C."""
        A, gram = self.matrix(s)
        masks = np.unique(self.fold)[:, None] != self.fold
        loss: solvers.Loss = "logistic" if s.kernel == "logistic" else "hinge"
        began = time.perf_counter()
        for fit in solvers.path(A, self.y, len(self.labels), Cs, loss=loss, gram=gram, masks=masks, weights=self.weights):
            oof = fit.scores[np.searchsorted(np.unique(self.fold), self.fold), np.arange(len(self.y))]
            now = time.perf_counter()
            yield self.trial(s, fit.C, oof, fit.converged, now - began)
            began = time.perf_counter()

    def search(self, s: _Setting, grid: Sequence[float] = C_GRID) -> list[_Trial]:
        """The path of C as far as it is of use, extended by a factor of 30 where the best is at its end."""
        found: list[_Trial] = []
        for trial in self.trials(s, (*grid, *(grid[-1] * step for step in BEYOND))):
            found.append(trial)
            best = int(np.argmin([t.log_loss for t in found]))
            if len(found) - 1 - best >= PATIENCE or (len(found) >= len(grid) and best < len(found) - 1):
                break
        if best == 0:
            found = [*self.trials(s, [grid[0] / step for step in reversed(BEYOND)]), *found]
        return found

    def neighbours(self, taps: tuple[Tap, ...]) -> _Trial:
        """k-NN by cosine: votes of the nearest rows of the other folds."""
        began = time.perf_counter()
        K = self.products(taps)
        K[self.fold[:, None] == self.fold] = -np.inf
        k = min(NEIGHBOURS, len(self.rows) - int(np.bincount(self.fold).max()))
        near = np.argpartition(-K, k - 1, axis=1)[:, :k]
        votes = np.zeros((len(self.rows), len(self.labels)))
        weight = np.take_along_axis(K, near, axis=1)
        np.add.at(votes, (np.arange(len(near))[:, None], self.y[near]), 1 + 1e-3 * weight)
        return self.trial(_Setting(taps, "knn"), float(k), votes, True, time.perf_counter() - began)


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
    progress: Callable[[str], None] | None = None,
    budget_seconds: float | None = None,
    class_weight: Weight = "auto",
) -> SvmResult:
    """Choose taps, kernel and C by cross-validation, and fit the head on all rows.

    `blocks` holds one `(n, d)` float32 array a tap (a memory map will do), `y` `(n,)` indices into `classes`. Rows of
    one group are never on both sides of a fold. `default_taps` are used where nothing can be held out (one image a
    class). Over `budget_seconds` the comparison ends with what it has. `class_weight` "auto" weighs every class by
    1 / its size where the largest has `BALANCE_FROM` times the images of the smallest.
    Raises `UserError` for features or labels that do not fit together.
    """
    y = check(blocks, y, classes, groups, kernels, default_taps)
    say = progress or (lambda line: None)
    notes: list[str] = []
    balanced = class_weight == "balanced" or (class_weight == "auto" and imbalance(y) >= BALANCE_FROM)
    weights = class_weights(y) if balanced else None
    fold = assign_folds(y, groups, folds, seed, classes, notes)
    if fold is None:
        say(f"nothing to hold out: {' + '.join(map(str, default_taps))}, C = {DEFAULT_C:g}")
        return _by_default(blocks, y, classes, tuple(default_taps), kernels, weights, notes)
    rows = subset(y, np.arange(len(y)), ROWS, seed)
    if len(rows) < len(y):
        notes.append(f"taps, kernel and C were chosen on {len(rows)} of {len(y)} images; the head is fitted on all")
    if len(rows) * len(classes) > WIDE or len(classes) > MANY_CLASSES:
        kernels = ["linear"]
    table = _Rows(blocks, y, rows, fold, weights)
    look = look_rows(y, rows, seed)
    early = table if len(look) == len(rows) else _Rows(blocks, y, look, fold, weights)
    until = time.monotonic() + (budget_seconds if budget_seconds is not None else np.inf)
    trials, candidates = _compare(table, early, tuple(default_taps), kernels, say, until, notes)
    best = min(trials, key=lambda t: t.log_loss)
    _judge_path(best, trials, notes)
    say(f"chosen: {' + '.join(map(str, best.setting.taps))}, {best.setting.kernel}, C = {best.C:.3g}")
    head = fit_head(blocks, y, classes, best.setting, best.C, weights, best.temperature)
    oof = _every_row(blocks, y, classes, best, rows, weights)
    flattered = optimism(trials, best, seed)
    return SvmResult(head, oof, float(best.right.mean()), best.error, candidates, tuple(notes), flattered, balanced)


def refit(result: SvmResult, blocks: Blocks, y: Array) -> AnyHead:
    """The winner's taps, kernel, C and temperature on other rows (training and validation together)."""
    winner, head = result.candidates[0], result.head
    y = check(blocks, y, head.classes, None, (winner.kernel,), winner.taps)
    setting = _Setting(winner.taps, winner.kernel, winner.gamma)
    weights = class_weights(y) if result.balanced else None
    return fit_head(blocks, y, head.classes, setting, winner.C, weights, head.temperature)


def check(blocks: Blocks, y: Array, classes: Sequence[str], groups: Array | None, kernels: Sequence[Kernel], taps: Sequence[Tap]) -> Array:
    """Labels as int64, or a `UserError` that names what does not fit."""
    y = np.asarray(y)
    if len(classes) < 2:
        raise UserError(f"{len(classes)} class: nothing to tell apart", where="classes", fix="give images of at least two classes")
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer) or len(y) == 0 or y.min() < 0 or y.max() >= len(classes):
        raise UserError(f"labels must be whole numbers from 0 to {len(classes) - 1}, one an image", where="y")
    empty = [name for name, count in zip(classes, np.bincount(y, minlength=len(classes)), strict=True) if not count]
    if empty:
        raise UserError(f"no image of class {', '.join(map(repr, empty))}", where="y", fix="add images, or leave the class out")
    if groups is not None and len(groups) != len(y):
        raise UserError(f"{len(groups)} groups for {len(y)} images", where="groups")
    unknown = sorted({*kernels} - {*KERNELS})
    if unknown or not {*kernels} - {"knn"}:
        raise UserError(f"kernels {list(kernels)}: none that ships", where="kernels", fix="choose from linear, logistic, rbf (knn is a measure)")
    missing = [str(tap) for tap in taps if tap not in blocks]
    if missing or not taps:
        raise UserError(f"no features of tap {', '.join(missing)}", where="taps", fix=f"given: {', '.join(map(str, blocks))}")
    for tap, block in blocks.items():
        if block.ndim != 2 or len(block) != len(y):
            raise UserError(f"features of shape {block.shape} for {len(y)} images", where=tap)
        for low in range(0, len(block), solvers.ROWS):
            if not np.isfinite(block[low : low + solvers.ROWS]).all():
                raise UserError("not every feature is a finite number", where=tap, fix="extract the features again, with --precision float32")
    return y.astype(np.int64)


def assign_folds(y: Array, groups: Array | None, folds: int, seed: int, classes: Sequence[str], notes: list[str]) -> Array | None:
    """The fold in which every row is held out: stratified, groups whole. None where fewer than two classes have two
    groups: nothing can be held out then. Whatever is less than asked is said in `notes`."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    units = np.arange(len(y)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    sizes = np.array([len(np.unique(units[y == c])) for c in range(len(classes))])
    what = "image" if groups is None else "group"
    if (sizes >= 2).sum() < 2:
        notes.append(f"one {what} a class: no cross-validation is possible; default taps and C, probabilities not calibrated")
        return None
    lone = [str(classes[c]) for c in np.flatnonzero(sizes < 2)]
    if lone:
        notes.append(f"only one {what} in class {', '.join(map(repr, lone))}: cross-validation counts it as an error")
    count = int(min(folds, sizes.max()))
    if count < folds:
        notes.append(f"{count} folds instead of {folds}: the largest class has {count} {what}s")
    splitter = (StratifiedKFold if groups is None else StratifiedGroupKFold)(count, shuffle=True, random_state=seed)
    fold = np.empty(len(y), np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "the least populated class has …": said above
        for k, (_, held) in enumerate(splitter.split(units, y, units)):
            fold[held] = k
    return fold


def subset(y: Array, rows: Array, size: int, seed: int) -> NDArray[np.int64]:
    """At most about `size` of `rows`, drawn class by class in proportion, two of every class at least; sorted."""
    if len(rows) <= size:
        return rows
    random = np.random.default_rng(seed)
    parts = []
    for c in np.unique(y[rows]):
        own = rows[y[rows] == c]
        parts.append(random.choice(own, min(len(own), max(2, round(len(own) * size / len(rows)))), replace=False))
    return np.sort(np.concatenate(parts))


def look_rows(y: Array, rows: Array, seed: int) -> NDArray[np.int64]:
    """The rows of the early look: at most `LOOK_CLASSES` classes, about `LOOK_ROWS` rows."""
    present = np.unique(y[rows])
    if len(present) > LOOK_CLASSES:
        present = np.random.default_rng(seed).choice(present, LOOK_CLASSES, replace=False)
        rows = rows[np.isin(y[rows], present)]
    return subset(y, rows, LOOK_ROWS, seed)


def take(block: Array, rows: Array) -> Array:
    return np.asarray(block) if len(rows) == len(block) else np.asarray(block[rows])


def with_ones(x: Array) -> Array:
    """A column of ones appended: the bias."""
    return np.concatenate([x, np.ones((len(x), 1), x.dtype)], axis=1)


def imbalance(y: Array) -> float:
    counts = np.bincount(y)
    return float(counts.max() / counts[counts > 0].min())


def class_weights(y: Array) -> Array:
    """One weight a row, `n / (classes × rows of its class)`: every class weighs the same in sum."""
    counts = np.bincount(y)
    return (len(y) / (np.count_nonzero(counts) * np.maximum(counts, 1)))[y]


def calibrate(scores: Array, y: Array) -> tuple[float, Array]:
    """The temperature that minimises the mean log loss of `softmax(scores / T)`, and the loss of every row (Guo et al.
    2017). The loss is convex in 1 / T, so its slope is bisected, between 1/50 and 50."""
    z = np.asarray(scores, np.float64)
    z = z - z.max(axis=1, keepdims=True)
    own = z[np.arange(len(y)), y]

    def slope(b: float) -> float:
        p = np.exp(b * z)
        return float(((p * z).sum(axis=1) / p.sum(axis=1) - own).mean())

    low, high = -np.log(50), np.log(50)
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(np.exp(middle)) < 0 else (low, middle)
    b = float(np.exp((low + high) / 2))
    return 1 / b, np.log(np.exp(b * z).sum(axis=1)) - b * own


def optimism(trials: Sequence[_Trial], best: _Trial, seed: int) -> float:
    """How much the winner's accuracy is flattered by having won: the choice is repeated on bootstrap draws of the rows
    and judged on the rows that were not drawn (Tsamardinos, Greasidou and Borboudakis 2018)."""
    random = np.random.default_rng(seed)
    n = len(best.right)
    drawn = random.multinomial(n, np.full(n, 1 / n), size=DRAWS).T
    chosen = (np.stack([t.losses for t in trials]) @ drawn).argmin(axis=0)
    left = drawn == 0
    right = np.stack([t.right for t in trials])[chosen].T
    honest = (right & left).sum(axis=0) / np.maximum(left.sum(axis=0), 1)
    return max(0.0, float(best.right.mean() - honest.mean()))


def _compare(
    table: _Rows, early: _Rows, default: tuple[Tap, ...], kernels: Sequence[Kernel], say: Callable[[str], None], until: float, notes: list[str]
) -> tuple[list[_Trial], tuple[Candidate, ...]]:
    """All trials between which the choice is made, and all candidates that were looked at, best first."""
    ship = [k for k in kernels if k != "knn"]
    late = _Deadline(until, notes)
    singles = _look_at_taps(early, ship, say, late)
    chain = _side_by_side(early, [t.setting.taps[0] for t in singles], ship, say, late)
    sets = list(dict.fromkeys([default, *chain]))
    tried: list[list[_Trial]] = []
    for taps in sets:
        for kernel in ship:
            if not (tried and late()):
                tried.append(early.search(_Setting(taps, kernel, GAMMA / len(taps) if kernel == "rbf" else 0.0)))
    if "rbf" in ship:
        at = _best_of([t for path in tried for t in path if t.setting.kernel == "rbf"])
        for factor in GAMMAS:
            if at and not late():
                tried.append(early.search(replace(at.setting, gamma=at.setting.gamma * factor)))
    winners = sorted((min(path, key=lambda t: t.log_loss) for path in tried), key=lambda t: t.log_loss)
    measured = [early.neighbours(taps) for taps in {winners[0].setting.taps, singles[0].setting.taps}] if "knn" in kernels else []
    passed = [t for t in singles if all(t.setting != w.setting for w in winners)]
    if early is table:
        trials = [t for path in tried for t in path]
        shown = [*(w.candidate("") for w in winners), *(t.candidate("early look") for t in passed)]
    else:
        first = [next(w for w in winners if w.setting.kernel == k) for k in ship if any(w.setting.kernel == k for w in winners)]
        finals = list({w.setting: w for w in [winners[0], *first, *winners]}.values())[:FINALISTS]
        trials, at_full = [], []
        for w in finals:
            if not (trials and late()):
                say(f"{len(table.rows)} images: {' + '.join(map(str, w.setting.taps))}, {w.setting.kernel}")
                path = table.search(w.setting, [C for C in C_GRID if C > w.C / 11])
                trials += path
                at_full.append(min(path, key=lambda t: t.log_loss))
        at_full.sort(key=lambda t: t.log_loss)
        note = f"early look, {len(early.rows)} images"
        rest = [w for w in winners if all(w.setting != f.setting for f in at_full)]
        shown = [*(t.candidate("") for t in at_full), *(t.candidate(note) for t in [*rest, *passed])]
    return trials, (*shown, *(t.candidate("a measure, never shipped") for t in measured))
