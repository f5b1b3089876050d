"""Which taps, which kernel and which C: settings compared by the log loss of rows held out.

Three steps, each on out-of-fold scores: an early look at every tap alone, on a subset of the rows
and with squared errors, which have a closed form; the best taps side by side, added one at a time
as long as that helps; then linear machine, logistic regression and RBF machines (squared hinge,
squared errors) on the few sets left, each along a path of C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from finetune import hardware
from finetune.heads.crossval import RBF, Array, Blocks, Ints, Kernel, Rows, Setting, Trial, subset
from finetune.network import Tap

T = TypeVar("T")

C_GRID = tuple(10.0 ** (e / 2) for e in range(-3, 9))  # 0.03 … 10,000
C_START = 1.0  # where a path of C begins: unit-length features are best above it nearly always
# a relative, or an absolute, gain of the log loss below it is none
C_FLAT, C_FLAT_NATS = (1e-2, 5e-4)
LOOK_C = (1.0, 10.0, 100.0)
GAMMA = 1.0  # over the number of taps: rows of k normalised taps have squared length k
GAMMAS = (0.5, 2.0)  # factors tried for the best set of taps
LOOK_ROWS = 600  # of the early look, at most
MIDDLE_ROWS = (
    1000  # more rows than this: kernels are compared on a subset of this size, the best two on all
)
LOOK_CLASSES = 50  # more classes than this: taps are compared on these
KEPT, MOST_TAPS, SETS, FINALISTS = 8, 4, 2, 2
# relative loss by which another tap may look worse in the early look: the machine itself decides
LOSS = 1e-2


@dataclass(frozen=True)
class Candidate:
    """One set of taps with one kernel at its best C. `accuracy` and `log_loss` are out of fold, on
    `n` rows; `error` is the standard error of the accuracy over the folds. `gamma` is the RBF's;
    for k-NN, a measure that never ships, `C` is k."""

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


class Comparison:
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
        looked = sorted(self.look(), key=log_loss)
        sets = list(dict.fromkeys(trial.setting.taps for trial in looked))[:SETS]
        gammas = {
            trial.setting.taps: trial.setting.gamma
            for trial in reversed(looked)
            if trial.setting.kernel in RBF
        }
        share = next((gammas[taps] * len(taps) for taps in sets if taps in gammas), GAMMA)
        settings = [
            Setting(taps, kind, share / len(taps) if kind in RBF else 0.0)
            for taps in sets
            for kind in self.first
        ]
        settings += [
            Setting(default, kind, share / len(default) if kind in RBF else 0.0)
            for kind in self.first[:1]
        ]
        if "logistic" in self.kernels:
            settings.append(Setting(sets[0], "logistic"))
        paths = self.paths(self.middle, dict.fromkeys(settings))
        if self.middle is not self.table:
            paths = self.paths(self.table, {trial.setting: trial.C for trial in paths[:FINALISTS]})
        for trial in looked:
            if trial.setting.taps not in {one.setting.taps for one, _, _ in self.seen}:
                self.seen.append((trial, len(self.early), "early look, squared errors"))
        if knn:
            self.seen.append(
                (
                    self.early.neighbours(paths[0].setting.taps),
                    len(self.early),
                    "a measure, never shipped",
                )
            )
        return paths[0]

    @property
    def first(self) -> list[Kernel]:
        """The kernels that every set of taps is tried with; logistic regression only where it is
        all there is."""
        return [kernel for kernel in self.kernels if kernel != "logistic"] or ["logistic"]

    def look(self) -> list[Trial]:
        """Every tap alone, then the best side by side: the best trial of every set of taps, with
        squared errors."""
        kinds: list[Kernel] = ["lssvm"] if {*RBF} & {*self.kernels} else []
        if {*self.kernels} - {*RBF}:
            kinds.append("linear")

        def best(setting: Setting) -> Trial:
            return min(self.early.least_squares(setting, LOOK_C), key=log_loss)

        def alone(tap: Tap) -> Trial:
            return min(
                (best(Setting((tap,), kind, GAMMA if kind in RBF else 0.0)) for kind in kinds),
                key=log_loss,
            )

        singles = sorted(_side_by_side(alone, self.early.blocks), key=log_loss)
        kept = [trial.setting.taps[0] for trial in singles[:KEPT]]
        chain = singles[:1]
        while len(chain) < MOST_TAPS:
            now = chain[-1]
            more = [(*now.setting.taps, tap) for tap in kept if tap not in now.setting.taps]
            kind = now.setting.kernel
            tried = _side_by_side(
                best,
                [Setting(taps, kind, GAMMA / len(taps) if kind in RBF else 0.0) for taps in more],
            )
            step = min(tried, key=log_loss, default=now)
            if step is now or step.log_loss > now.log_loss * (1 + LOSS):
                break
            chain.append(step)
        top = min(chain, key=log_loss).setting
        widths = (
            [replace(top, gamma=top.gamma * factor) for factor in GAMMAS]
            if top.kernel in RBF
            else []
        )
        return [*_side_by_side(best, widths), *chain, *singles[1:]]

    def paths(self, rows: Rows, settings: Mapping[Setting, float | None]) -> list[Trial]:
        """The best C of every setting, the best setting first; the values are where to start."""
        found = _side_by_side(lambda item: self.path(rows, *item), settings.items())
        self.seen += [(trial, len(rows), "") for trial in found]
        return sorted(found, key=log_loss)

    def path(self, rows: Rows, setting: Setting, start: float | None = None) -> Trial:
        """The best C: upward from `start` while the log loss falls, and downward where the first
        was the best.

        A machine that did not converge ends the way up, and counts only where none did.
        """
        if self.grid is not None:
            found = list(rows.trials(setting, self.grid))
        else:
            begin = C_START if start is None else max(start / 3.5, C_GRID[0])
            found = []
            for trial in rows.trials(setting, [C for C in C_GRID if begin * 0.99 <= C]):
                found.append(trial)
                if not trial.converged or (
                    len(found) > 1 and trial.log_loss > found[-2].log_loss - _least_gain(found[-2])
                ):
                    break
            for C in [C for C in reversed(C_GRID) if begin * 0.99 > C]:
                if found[0].converged and found[0].log_loss > min(
                    trial.log_loss for trial in found if trial.converged
                ):
                    break
                found.insert(0, next(rows.trials(setting, [C])))
        best = min(
            (trial for trial in found if trial.converged),
            key=log_loss,
            default=min(found, key=log_loss),
        )
        return replace(best, seconds=sum(trial.seconds for trial in found))

    def doubts(self, best: Trial) -> list[str]:
        """Whether the best C lies at an edge of what was tried, and whether its machine
        converged."""
        notes = []
        tried = self.grid or C_GRID
        low, high = tried[0], tried[-1]
        if low < high and best.C in (low, high):
            edge = "upper" if best.C == high else "lower"
            notes.append(f"the best C, {best.C:.3g}, is at the {edge} edge of those tried")
        if not best.converged:
            notes.append(
                f"the solver stopped at C = {best.C:.3g} before it "
                f"converged: the scores are approximate"
            )
        return notes

    def candidates(self, winner: Trial) -> tuple[Candidate, ...]:
        """All that were compared: the winner, then those measured on the most rows, best first."""
        order = sorted(
            self.seen,
            key=lambda one: (one[0] is not winner, "never" in one[2], -one[1], one[0].log_loss),
        )
        most = len(self.table)
        return tuple(
            _candidate(
                trial, n, ", ".join(filter(None, (f"on {n} images" if n < most else "", note)))
            )
            for trial, n, note in order
        )


def log_loss(trial: Trial) -> float:
    return trial.log_loss


def _least_gain(trial: Trial) -> float:
    """What the next C has to gain in log loss for the way up to go on."""
    return max(C_FLAT * trial.log_loss, C_FLAT_NATS)


def _side_by_side(work: Callable[[T], Trial], items: Iterable[T]) -> list[Trial]:
    """`work` on every item, in one thread a core with one BLAS thread each: the matrices are too
    small to share one."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(hardware.cores()) as pool:
        return list(pool.map(work, items))


def _candidate(trial: Trial, n: int, note: str) -> Candidate:
    s = trial.setting
    words = ", ".join(
        part for part in (f"gamma {s.gamma:.3g}" if s.kernel in RBF else "", note) if part
    )
    return Candidate(
        s.taps,
        s.kernel,
        trial.C,
        trial.accuracy,
        trial.error,
        trial.seconds,
        words,
        s.gamma,
        trial.log_loss,
        n,
    )
