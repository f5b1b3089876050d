"""Features → head: which taps, which kernel and which C, decided by cross-validation inside the rows given.

Three steps, each on out-of-fold scores: an early look at every tap alone, on a subset of the rows and with squared errors,
which have a closed form; the best taps side by side, added one at a time as long as that helps; then linear machine,
logistic regression and RBF machines (squared hinge, squared errors) on the few sets left, each along a path of C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from finetune import machine, solvers
from finetune.classifier import AnyHead, Head, KernelHead, rbf, side_by_side
from finetune.crossval import (
    RBF,
    Array,
    Blocks,
    Ints,
    Kernel,
    Rows,
    Setting,
    Trial,
    assign_folds,
    class_weights,
    subset,
    with_ones,
)
from finetune.errors import UserError
from finetune.network import Tap

T = TypeVar("T")
Weight = Literal["auto", "balanced"] | None

KERNELS: tuple[Kernel, ...] = ("linear", "logistic", "rbf", "lssvm", "knn")
KINDS: dict[Kernel, str] = {"linear": "svm", "logistic": "logistic", "rbf": "rbf-svm", "lssvm": "rbf-lssvm"}  # of heads
C_GRID = tuple(10.0 ** (e / 2) for e in range(-3, 9))  # 0.03 … 10,000
C_START = 1.0  # where a path of C begins: unit-length features are best above it nearly always
C_FLAT, C_FLAT_NATS = 1e-2, 5e-4  # a relative, or an absolute, gain of the log loss below it is none
DEFAULT_C = 1.0  # where nothing can be held out
DEFAULT_TEMPERATURE = 0.25  # the same
LOOK_C = (1.0, 10.0, 100.0)
GAMMA = 1.0  # over the number of taps: rows of k normalised taps have squared length k
GAMMAS = (0.5, 2.0)  # factors tried for the best set of taps
LOOK_ROWS = 600  # of the early look, at most
MIDDLE_ROWS = 1000  # more rows than this: kernels are compared on a subset of this size, the best two on all
LOOK_CLASSES = 50  # more classes than this: taps are compared on these
ROWS = 3000  # more rows than this: the choice is made on a stratified subset of this size, the head fitted on all
WIDE = 100  # classes from which only the linear machine is compared: its classes are independent
EXACT = 6000  # rows to which an RBF machine has all rows as candidates for support vectors; beyond: Nyström
LANDMARKS = 3000  # of Nyström's approximation (Williams and Seeger 2001)
KEPT, MOST_TAPS, SETS, FINALISTS = 8, 4, 2, 2
LOSS = 1e-2  # relative loss by which another tap may look worse in the early look: the machine itself decides
BALANCE_FROM = 10.0  # largest class over smallest, from which "auto" weighs the classes


@dataclass(frozen=True)
class Candidate:
    """One set of taps with one kernel at its best C. `accuracy` and `log_loss` are out of fold, on `n` rows; `error` is the
    standard error of the accuracy over the folds. `gamma` is the RBF's; for k-NN, a measure that never ships, `C` is k."""

    taps: tuple[Tap, ...]
    kernel: Kernel
    C: float
    accuracy: float
    error: float
    seconds: float
    note: str = ""
    gamma: float = 0.0
    log_loss: float = float("nan")
    n: int = 0


@dataclass(frozen=True)
class SvmResult:
    """The head that was chosen, fitted on all the rows given, and what it was chosen from.

    `oof_scores` `(n, C)` are decision values of every row by a machine that had not seen it: NaN for rows outside the
    subset that chose, zeros where nothing could be held out. `cv_accuracy` is their accuracy; being that of the winner, it
    is a little flattered. `candidates` are all that were compared, the winner first; `balanced` says whether classes were
    weighted, `note` on how many images the choice was made where these are not all.
    """

    head: AnyHead
    oof_scores: NDArray[np.float32]
    cv_accuracy: float
    cv_error: float
    candidates: tuple[Candidate, ...]
    warnings: tuple[str, ...]
    balanced: bool = False
    note: str = ""


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

    `blocks` holds one `(n, d)` float32 array a tap (a memory map will do), `y` `(n,)` indices into `classes`. Rows of
    one group are never on both sides of a fold. `default_taps` are used where nothing can be held out (one image a
    class). `grid` are the values of C to try instead of a path that ends by itself. `class_weight` "auto" weighs every
    class by 1 / its size where the largest has `BALANCE_FROM` times the images of the smallest.
    Raises `UserError` for features or labels that do not fit together.
    """
    labels = _check(blocks, y, classes, groups, kernels, default_taps)
    balanced = class_weight == "balanced" or (class_weight == "auto" and _imbalance(labels) >= BALANCE_FROM)
    weights = class_weights(labels) if balanced else None
    fold, notes = assign_folds(labels, groups, folds, seed, classes)
    ship = [kernel for kernel in kernels if kernel != "knn"]
    if fold is None:
        setting = Setting(tuple(default_taps), "linear" if "linear" in ship else ship[0], GAMMA / len(default_taps))
        head = fit_head(blocks, labels, classes, setting, grid[0] if grid else DEFAULT_C, weights, DEFAULT_TEMPERATURE)
        nothing = np.zeros((len(labels), len(classes)), np.float32)
        return SvmResult(head, nothing, float("nan"), float("nan"), (), tuple(notes), balanced)
    if len(classes) > WIDE:
        ship = ["linear"] if "linear" in ship else ship
    rows = subset(labels, np.arange(len(labels)), ROWS, seed)
    part = f"taps, kernel and C were chosen on {len(rows)} of {len(labels)} images; the head is fitted on all"
    search = _Search(blocks, labels, rows, fold, weights, ship, grid, seed)
    best = search.run((*default_taps,), "knn" in kernels)
    notes += _path_warnings(best, grid)
    head = fit_head(blocks, labels, classes, best.setting, best.C, weights, best.temperature)
    scores = np.full((len(labels), len(classes)), np.nan, np.float32)
    scores[np.ix_(rows, search.table.labels)] = best.scores
    if len(search.table.labels) < len(classes):
        scores[np.ix_(rows, np.setdiff1d(np.arange(len(classes)), search.table.labels))] = best.scores.min() - 1
    return SvmResult(
        head,
        scores,
        best.accuracy,
        best.error,
        search.candidates(best),
        tuple(notes),
        balanced,
        part if len(rows) < len(labels) else "",
    )


def refit(result: SvmResult, blocks: Blocks, y: Array) -> AnyHead:
    """The winner's taps, kernel, C and temperature on other rows (training and validation together)."""
    head = result.head
    labels = _check(blocks, y, head.classes, None, ("linear",), head.taps)
    weights = class_weights(labels) if result.balanced else None
    if not result.candidates:
        kernel = next(kernel for kernel, kind in KINDS.items() if kind == head.kind)
        setting = Setting(head.taps, kernel, GAMMA / len(head.taps))
        return fit_head(blocks, labels, head.classes, setting, DEFAULT_C, weights, head.temperature)
    winner = result.candidates[0]
    setting = Setting(winner.taps, winner.kernel, winner.gamma)
    return fit_head(blocks, labels, head.classes, setting, winner.C, weights, head.temperature)


def quick(blocks: Blocks, y: Array, *, groups: Array | None = None, seed: int = 0) -> Trial | None:
    """The best trial of an early look, a fast measure of the features: which rows are right out of fold, and their losses.

    None where nothing can be held out.
    """
    names, labels = np.unique(y, return_inverse=True)
    if len(names) < 2:
        return None
    fold, _ = assign_folds(labels, groups, 5, seed, [str(name) for name in names])
    if fold is None:
        return None
    search = _Search(blocks, labels, np.arange(len(labels)), fold, None, ["linear", "lssvm"], None, seed)
    search.early = search.table
    return min(search.look(), key=_log_loss)


# ----------------------------------------------------------------------------------------------------------- choosing


class _Search:
    """The comparison: which trials were made, on how many rows."""

    def __init__(
        self,
        blocks: Blocks,
        y: Ints,
        rows: Ints,
        fold: Ints,
        weights: Array | None,
        kernels: Sequence[Kernel],
        grid: Sequence[float] | None,
        seed: int,
    ) -> None:
        self.kernels, self.grid = kernels, None if grid is None else sorted(grid)
        self.table = Rows(blocks, y, rows, fold, weights)

        def part(size: int, most: int | None = None) -> Rows:
            some = subset(y, rows, size, seed, most)
            return self.table if len(some) == len(rows) else Rows(blocks, y, some, fold, weights)

        self.early, self.middle = part(LOOK_ROWS, LOOK_CLASSES), part(MIDDLE_ROWS)
        self.seen: list[tuple[Trial, int, str]] = []

    def run(self, default: tuple[Tap, ...], knn: bool) -> Trial:
        """The trial with the least log loss on all the rows that choose."""
        looked = sorted(self.look(), key=_log_loss)
        sets = list(dict.fromkeys(trial.setting.taps for trial in looked))[:SETS]
        gammas = {trial.setting.taps: trial.setting.gamma for trial in reversed(looked) if trial.setting.kernel in RBF}
        share = next((gammas[taps] * len(taps) for taps in sets if taps in gammas), GAMMA)
        settings = [Setting(taps, kind, share / len(taps) if kind in RBF else 0.0) for taps in sets for kind in self.first]
        settings += [Setting(default, kind, share / len(default) if kind in RBF else 0.0) for kind in self.first[:1]]
        if "logistic" in self.kernels:
            settings.append(Setting(sets[0], "logistic"))
        paths = self.paths(self.middle, dict.fromkeys(settings))
        if self.middle is not self.table:
            paths = self.paths(self.table, {trial.setting: trial.C for trial in paths[:FINALISTS]})
        for trial in looked:
            if trial.setting.taps not in {one.setting.taps for one, _, _ in self.seen}:
                self.seen.append((trial, len(self.early), "early look, squared errors"))
        if knn:
            self.seen.append((self.early.neighbours(paths[0].setting.taps), len(self.early), "a measure, never shipped"))
        return paths[0]

    @property
    def first(self) -> list[Kernel]:
        """The kernels that every set of taps is tried with; logistic regression only where it is all there is."""
        return [kernel for kernel in self.kernels if kernel != "logistic"] or ["logistic"]

    def look(self) -> list[Trial]:
        """Every tap alone, then the best side by side: the best trial of every set of taps, with squared errors."""
        kinds: list[Kernel] = ["lssvm"] if {*RBF} & {*self.kernels} else []
        if {*self.kernels} - {*RBF}:
            kinds.append("linear")

        def best(setting: Setting) -> Trial:
            return min(self.early.least_squares(setting, LOOK_C), key=_log_loss)

        def alone(tap: Tap) -> Trial:
            return min((best(Setting((tap,), kind, GAMMA if kind in RBF else 0.0)) for kind in kinds), key=_log_loss)

        singles = sorted(_side_by_side(alone, self.early.blocks), key=_log_loss)
        kept = [trial.setting.taps[0] for trial in singles[:KEPT]]
        chain = singles[:1]
        while len(chain) < MOST_TAPS:
            now = chain[-1]
            more = [(*now.setting.taps, tap) for tap in kept if tap not in now.setting.taps]
            kind = now.setting.kernel
            tried = _side_by_side(best, [Setting(taps, kind, GAMMA / len(taps) if kind in RBF else 0.0) for taps in more])
            step = min(tried, key=_log_loss, default=now)
            if step is now or step.log_loss > now.log_loss * (1 + LOSS):
                break
            chain.append(step)
        top = min(chain, key=_log_loss).setting
        widths = [replace(top, gamma=top.gamma * factor) for factor in GAMMAS] if top.kernel in RBF else []
        return [*_side_by_side(best, widths), *chain, *singles[1:]]

    def paths(self, rows: Rows, settings: Mapping[Setting, float | None]) -> list[Trial]:
        """The best C of every setting, the best setting first; the values are where to start."""
        found = _side_by_side(lambda item: self.path(rows, *item), settings.items())
        self.seen += [(trial, len(rows), "") for trial in found]
        return sorted(found, key=_log_loss)

    def path(self, rows: Rows, setting: Setting, start: float | None = None) -> Trial:
        """The best C: upward from `start` while the log loss falls, and downward where the first was the best.

        A machine that did not converge ends the way up, and counts only where none did.
        """
        if self.grid is not None:
            found = list(rows.trials(setting, self.grid))
        else:
            begin = C_START if start is None else max(start / 3.5, C_GRID[0])
            found = []
            for trial in rows.trials(setting, [C for C in C_GRID if begin * 0.99 <= C]):
                found.append(trial)
                if not trial.converged or (len(found) > 1 and trial.log_loss > found[-2].log_loss - _least_gain(found[-2])):
                    break
            for C in [C for C in reversed(C_GRID) if begin * 0.99 > C]:
                if found[0].converged and found[0].log_loss > min(trial.log_loss for trial in found if trial.converged):
                    break
                found.insert(0, next(rows.trials(setting, [C])))
        best = min((trial for trial in found if trial.converged), key=_log_loss, default=min(found, key=_log_loss))
        return replace(best, seconds=sum(trial.seconds for trial in found))

    def candidates(self, winner: Trial) -> tuple[Candidate, ...]:
        """All that were compared: the winner, then those measured on the most rows, best first."""
        order = sorted(self.seen, key=lambda one: (one[0] is not winner, "never" in one[2], -one[1], one[0].log_loss))
        most = len(self.table)
        return tuple(
            _candidate(trial, n, ", ".join(filter(None, (f"on {n} images" if n < most else "", note))))
            for trial, n, note in order
        )


def _log_loss(trial: Trial) -> float:
    return trial.log_loss


def _least_gain(trial: Trial) -> float:
    """What the next C has to gain in log loss for the way up to go on."""
    return max(C_FLAT * trial.log_loss, C_FLAT_NATS)


def _side_by_side(work: Callable[[T], Trial], items: Iterable[T]) -> list[Trial]:
    """`work` on every item, in one thread a core with one BLAS thread each: the matrices are too small to share one."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(machine.cores()) as pool:
        return list(pool.map(work, items))


def _candidate(trial: Trial, n: int, note: str) -> Candidate:
    s = trial.setting
    words = ", ".join(part for part in (f"gamma {s.gamma:.3g}" if s.kernel in RBF else "", note) if part)
    return Candidate(s.taps, s.kernel, trial.C, trial.accuracy, trial.error, trial.seconds, words, s.gamma, trial.log_loss, n)


def _path_warnings(best: Trial, grid: Sequence[float] | None) -> list[str]:
    """Whether the best C lies at an edge of what was tried, and whether its machine converged."""
    notes = []
    low, high = (min(grid), max(grid)) if grid else (C_GRID[0], C_GRID[-1])
    if low < high and best.C in (low, high):
        notes.append(f"the best C, {best.C:.3g}, is at the {'upper' if best.C == high else 'lower'} edge of those tried")
    if not best.converged:
        notes.append(f"the solver stopped at C = {best.C:.3g} before it converged: the scores are approximate")
    return notes


# ------------------------------------------------------------------------------------------------------------ fitting


def fit_head(
    blocks: Blocks, y: Ints, classes: Sequence[str], setting: Setting, C: float, weights: Array | None, temperature: float
) -> AnyHead:
    """The head of one setting, fitted on all rows. `y` may lack classes: their scores are lower than any other's."""
    x = side_by_side([blocks[tap] for tap in setting.taps], normalize=True)
    present, own = np.unique(y, return_inverse=True)
    scale = np.full((len(y), 1), C) if weights is None else weights[:, None] * C
    common: dict[str, Any] = {"taps": setting.taps, "classes": tuple(classes), "temperature": temperature}
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


def _fit_rbf(x: Array, y: Ints, classes: int, scale: Array, setting: Setting) -> tuple[Array, Array, Array]:
    """Support vectors `(m, D)`, coefficients `(m, classes)` and bias; Nyström on landmarks where the rows are many."""
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
    mapped = with_ones(np.concatenate([rbf(x[i : i + 4096], landmarks, setting.gamma) @ root for i in range(0, len(x), 4096)]))
    if squares:
        coef = solvers.least_squares(mapped, y, classes, scale[:, 0], gram=False)
    else:
        coef, *_ = solvers.solve(mapped, y, classes, scale, loss="hinge", gram=False)
    return landmarks, root @ coef[:-1], coef[-1]


def _whole(weight: Array, bias: Array, present: Ints, classes: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One row a class; classes without rows get no weight and a bias of −100: never the best."""
    weights, biases = np.zeros((len(classes), weight.shape[1]), np.float32), np.full(len(classes), -100, np.float32)
    weights[present], biases[present] = weight, bias
    return weights, biases


def _imbalance(y: Ints) -> float:
    counts = np.bincount(y)
    return float(counts.max() / counts[counts > 0].min())


def _check(
    blocks: Blocks, y: Array, classes: Sequence[str], groups: Array | None, kernels: Sequence[Kernel], taps: Sequence[Tap]
) -> Ints:
    """Labels as int64, or a `UserError` that names what does not fit."""
    y = np.asarray(y)
    if len(classes) < 2:
        what = f"{len(classes)} class: nothing to tell apart"
        raise UserError(what, where="classes", fix="give images of at least two classes")
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer) or len(y) == 0 or y.min() < 0 or y.max() >= len(classes):
        raise UserError(f"labels must be whole numbers from 0 to {len(classes) - 1}, one an image", where="y")
    counts = np.bincount(y, minlength=len(classes))
    if empty := [name for name, count in zip(classes, counts, strict=True) if not count]:
        raise UserError(f"no image of class {', '.join(map(repr, empty))}", where="y", fix="add images, or leave the class out")
    if groups is not None and len(groups) != len(y):
        raise UserError(f"{len(groups)} groups for {len(y)} images", where="groups")
    if {*kernels} - {*KERNELS} or not {*kernels} - {"knn"}:
        fix = "choose from linear, logistic, rbf, lssvm (knn is a measure)"
        raise UserError(f"kernels {list(kernels)}: none that ships", where="kernels", fix=fix)
    missing = [str(tap) for tap in taps if tap not in blocks]
    if missing or not taps:
        raise UserError(f"no features of tap {', '.join(missing)}", where="taps", fix=f"given: {', '.join(map(str, blocks))}")
    for tap, block in blocks.items():
        if block.ndim != 2 or len(block) != len(y):
            raise UserError(f"features of shape {block.shape} for {len(y)} images", where=str(tap))
        for low in range(0, len(block), solvers.ROWS):
            if not np.isfinite(block[low : low + solvers.ROWS]).all():
                fix = "extract the features again, with --precision float32"
                raise UserError("not every feature is a finite number", where=str(tap), fix=fix)
    return y.astype(np.int64)
