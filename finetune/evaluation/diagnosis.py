"""What the curves of a training say, in words: named rules over the epochs that its log tells.

Every rule looks at numbers alone and gives a `Check` or nothing. The first that speaks, in the
order of `RULES`, is the primary finding, since its cause explains those below it. Training is
judged by the clean loss (training images as validation images are judged) where the log has it,
and by the change since epoch 0, so that a start from a probe is neither overfitting nor a rate too
low. The thresholds are rules of thumb, tried with `benchmarks/diagnosis.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import run
from finetune.check import Check

Row = Mapping[str, Any]

ABOVE = 1.2  # times the loss of guessing or of the start: worse than no training
RISES = 0.3  # of the epochs with a loss well above the one before: the steps are too long
HARDLY = 0.1  # of the loss at the start: less has not been learned
STILL = 0.1  # of the loss, in the last epoch: still falling
DROP = 4.0  # times lower from one epoch to the next: a step of the schedule
TURNED = 1.1  # times its lowest, means of two epochs each: a validation loss that turned upwards
LEARNED = 0.9  # accuracy on training images from which on nothing is underfitted
STARTED = 0.7  # of the loss of guessing: what begins lower was fitted before
FEW = 100  # validation images: fewer tell epochs apart by 10 points at best
MOVES = 1e-5  # ‖Δw‖ / ‖w‖ of a step: below it weights hardly move; about 1e-3 is healthy
DEAD = 1e-8  # of the same: below it no gradient arrives, which no learning rate explains

NOTHING = Check(
    "nothing trained",
    "skip",
    "the log has no epochs",
    "No network was trained in this run, so there are no curves to read.",
)


@dataclass(frozen=True)
class Curves:
    """What the rules look at, one number an epoch, that of epoch 0 first where the log has it.

    `fit` is the clean loss, else the training loss (`clean` says which); `fit_top1`, `val`, `top1`
    are empty where nobody measured them. `lr` (one fewer where epoch 0 is there) is the head's.
    `moves` are the largest update ratios of the trunk, or of the head where nothing else moves.
    `guess` is the loss of guessing, ln C, or the first loss where C is not known; `chance` the
    validation accuracy of guessing.
    """

    fit: list[float]
    fit_top1: list[float]
    val: list[float]
    top1: list[float]
    lr: list[float]
    moves: list[float]
    clean: bool
    guess: float
    chance: float | None
    n_val: int | None

    @property
    def creeps(self) -> bool:
        """Whether the trunk's weights moved in the first half, but by next to nothing."""
        early = sorted(self.moves[: max(1, len(self.moves) // 2)])
        return bool(early) and DEAD < early[len(early) // 2] and early[-1] < MOVES

    @property
    def error(self) -> float | None:
        """A binomial standard error of the last validation accuracy; its value at 1/2 images from
        0 and 1, where the formula would give nothing."""
        if not self.n_val or not self.top1:
            return None
        p = min(max(self.top1[-1], 0.5 / self.n_val), 1 - 0.5 / self.n_val)
        return math.sqrt(p * (1 - p) / self.n_val)


# --- the door ----------------------------------------------------------------------------------


def of_run(path: Path) -> tuple[Check, ...]:
    """The findings on the training of a run, finished or not; of several (folds, the refit) the
    first that was validated. Raises `UserError` where no run is."""
    if not (path / run.LOG).exists():
        run.load_run(path)  # refuses what is no run
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in run.history(path):
        groups.setdefault((str(row.get("part", "")), str(row.get("phase", ""))), []).append(row)
    told = [rows for rows in groups.values() if any(row["epoch"] for row in rows)]
    validated = [rows for rows in told if any("val/loss" in row for row in rows)]
    return diagnose(next(iter(validated or told), []))


def diagnose(rows: Sequence[Row]) -> tuple[Check, ...]:
    """The findings on a training whose epochs are `rows`, as `run.history` gives them: the primary
    one first, at least one."""
    if not any(row["epoch"] for row in rows):
        return (NOTHING,)
    curves = read(rows)
    if not curves.fit:
        return (NOTHING,)
    found = tuple(check for rule in RULES if (check := rule(curves)) is not None)
    primary = [check for check in found if check.name != "noisy validation" or _noise_leads(curves)]
    beneath = [check for check in found if check not in primary]
    return (*(primary or [_healthy(curves)]), *beneath)


def read(rows: Sequence[Row]) -> Curves:
    """The curves in `rows`, in the order of their epochs."""
    rows = sorted(rows, key=lambda row: int(row["epoch"]))
    clean = sum("clean/loss" in row for row in rows) >= 2
    fit = _column(rows, "clean/loss" if clean else "train/loss")
    about = rows[0] if not rows[0]["epoch"] else {}
    classes = about.get("classes")
    return Curves(
        fit=fit,
        fit_top1=_column(rows, "clean/top1"),
        val=_column(rows, "val/loss"),
        top1=_column(rows, "val/top1"),
        lr=_column(rows, "lr/head"),
        moves=[max(found) for row in rows if (found := _ratios(row))],
        clean=clean,
        guess=math.log(classes) if classes else (fit[0] if fit else 0.0),
        chance=about.get("chance") or (1 / classes if classes else None),
        n_val=about.get("images", {}).get("val"),
    )


def _column(rows: Sequence[Row], key: str) -> list[float]:
    return [float(row[key]) for row in rows if isinstance(row.get(key), int | float)]


def _ratios(row: Row) -> list[float]:
    """The update ratios of the trunk's groups; a head that starts at zero has none worth reading,
    but is better than nothing."""
    found = {
        key.split("/")[1]: float(value)
        for key, value in row.items()
        if key.startswith("update_ratio/") and not key.endswith("/no-decay")
        if isinstance(value, int | float)
    }
    return [value for name, value in found.items() if name != "head"] or list(found.values())


# --- the rules ---------------------------------------------------------------------------------


def _diverging(c: Curves) -> Check | None:
    worst = ABOVE * max(c.guess, c.fit[0])
    if len(c.fit) < 2 or c.fit[-1] <= worst:
        return None
    return Check(
        "diverging",
        "fail",
        f"{_name(c)} went from {c.fit[0]:.3g} to {c.fit[-1]:.3g}; guessing has {c.guess:.3g}",
        "The steps overshoot: after training the model is surer of wrong answers than guessing is.",
        "divide the learning rate by 10 or more (--set train.lr), and keep train.clip at 1",
    )


def _rate_too_high(c: Curves) -> Check | None:
    top = max(c.fit[1:], default=c.fit[0])
    lost = top > 1.5 * c.fit[0] and top - c.fit[0] > 0.25
    above = top > ABOVE * max(c.guess, c.fit[0])
    pairs = list(zip(c.fit[1:], c.fit[2:], strict=False))
    rises = sum(b > 1.15 * a and b > 0.1 for a, b in pairs)
    shaken = len(pairs) >= 4 and rises >= RISES * len(pairs) and c.fit[-1] > 0.1 * c.fit[0]
    if _diverging(c) or not ((c.clean and (lost or above)) or shaken):
        return None
    value = (
        f"{_name(c)} rose from {c.fit[0]:.2f} to {top:.2f} before it fell to {c.fit[-1]:.2f}"
        if lost or above
        else f"{_name(c)} rose in {rises} of {len(pairs)} epochs, and ended at {c.fit[-1]:.2f}"
    )
    return Check(
        "learning rate too high",
        "warn",
        value,
        "The first steps destroyed what was there, or later ones jump across the minimum; such a "
        "training ends on a high plateau or with over-sure answers.",
        "divide the learning rate by 3 to 10 (--set train.lr), or warm up longer (train.warmup)",
    )


def _slow_start(c: Curves) -> Check | None:
    if len(c.fit) < 4:
        return None
    fall = c.fit[0] - min(c.fit)
    guesses = c.chance is not None and bool(c.fit_top1) and c.fit_top1[-1] < c.chance + 0.1
    if (
        guesses
        and not c.creeps
        and fall < 0.02 * c.fit[0]
        and abs(c.fit[0] - c.guess) < 0.05 * c.guess
    ):
        value = f"{_name(c)} stayed at {c.fit[0]:.2f}, that of guessing, in {len(c.fit) - 1} epochs"
        return _start_check(value)
    if c.fit[0] < STARTED * c.guess:  # a fitted head: it has begun already
        return None
    flat = _first(c.fit, lambda k: c.fit[0] - c.fit[k] > 0.05 * fall) - 1
    warm = sum(rate < 0.3 * max(c.lr) for rate in c.lr[: flat + 1]) if c.lr else 0
    if fall < 0.3 * c.fit[0] or flat - warm < max(2, 0.15 * len(c.fit)):
        return None
    return _start_check(f"{_name(c)} did not move for {flat} epochs, then fell by {fall:.2f}")


def _start_check(value: str) -> Check:
    return Check(
        "slow start",
        "warn",
        value,
        "The signal hardly passes the network at first: weights that moved were initialised too "
        "small, too large or all alike, or units are dead.",
        "start from pretrained weights, or from a probe (--set train.head_init=probe)",
    )


def _rate_too_low(c: Curves) -> Check | None:
    fall = (c.fit[0] - min(c.fit)) / max(c.fit[0], 1e-9)
    begun = c.fit[0] < 0.8 * c.guess and (not c.fit_top1 or c.fit_top1[-1] >= LEARNED)
    if c.chance is None:  # an old log: a start from a probe is known by what it gets right
        begun = c.fit[0] < 1 or (bool(c.top1) and c.top1[0] > 0.5)
    little = fall < HARDLY and not begun and c.fit[0] >= 0.5 * c.guess
    if len(c.fit) < 2 or not (c.creeps or little) or c.fit[-1] > 1.02 * c.fit[0] or _slow_start(c):
        return None
    ratio = f"{max(c.moves):.0e}" if c.creeps else ""
    moved = f"; a step moved the weights by {ratio} of their length" if ratio else ""
    return Check(
        "learning rate too low",
        "warn",
        f"{_name(c)} fell by {max(fall, 0):.1%} in all ({c.fit[0]:.2f} → {c.fit[-1]:.2f}){moved}",
        "The weights hardly left where they started: what was planned has not been learned.",
        "multiply the learning rate by 10 (--set train.lr); `finetune preflight` tests its range",
    )


def _wrong_labels(c: Curves) -> Check | None:
    if c.chance is None or c.error is None or not c.fit_top1 or len(c.top1) < 3:
        return None
    late = c.top1[len(c.top1) // 2 :]
    reached, limit = sum(late) / len(late), c.chance + 2 * c.error
    learned = c.fit_top1[-1] - max(c.fit_top1[0], c.chance)
    if reached > limit or learned < 0.15:
        return None
    return Check(
        "wrong labels",
        "fail",
        f"training accuracy reached {c.fit_top1[-1]:.0%}, validation accuracy {reached:.0%}, where "
        f"guessing has {c.chance:.0%}",
        "The training images are learned by heart, and nothing of it holds for others: the labels "
        "say nothing about the pictures, or those of one part are mixed up.",
        "look at some images of each class, and at how labels meet paths (`finetune check DATA`)",
    )


def _decayed_too_early(c: Curves) -> Check | None:
    offset = len(c.fit) - len(c.lr)  # epoch 0 has no rate
    falls = [k for k in range(1, len(c.lr)) if c.lr[k - 1] > DROP * c.lr[k] > 0]
    if not falls or offset not in (0, 1) or len(c.lr) < 4 or falls[0] > len(c.lr) / 2:
        return None
    at = falls[0] - 1 + offset  # the last epoch at the higher rate
    if at < 1 or at + 1 >= len(c.fit):
        return None
    before, after = c.fit[at - 1] - c.fit[at], c.fit[at] - c.fit[at + 1]
    if before < STILL * c.fit[at - 1] or after > before / 3 or c.fit[-1] < 0.1 * c.fit[0]:
        return None
    return Check(
        "decayed too early",
        "warn",
        f"{_name(c)} fell by {before:.2f} in the epoch before the learning rate dropped, by "
        f"{after:.2f} in the one after; it ended at {c.fit[-1]:.2f}",
        "The step came while the curve was still steep: what was left had to be learned at a rate "
        "too low for it.",
        "let the step come later, or use --set train.schedule=cosine",
    )


def _overfitting(c: Curves) -> Check | None:
    if len(c.val) < 4 or len(c.fit) < 4:
        return None
    means = [(a + b) / 2 for a, b in zip(c.val, c.val[1:], strict=False)]
    low = min(range(len(means)), key=means.__getitem__)
    rise, back = means[-1] - means[low], len(means) - 1 - low
    if back < 2 or means[-1] < TURNED * means[low] or rise < 0.03:
        return None
    if c.fit[-1] > c.fit[max(len(c.fit) - 1 - back, 0)] or c.fit[-1] > c.fit[0]:
        return None
    gap = (c.val[-1] - c.val[0]) - (c.fit[-1] - c.fit[0])
    return Check(
        "overfitting",
        "warn",
        f"validation loss turned upwards around epoch {low + 1} ({means[low]:.2f} → "
        f"{means[-1]:.2f}) while {_name(c)} fell on; its lead has grown by {gap:.2f}",
        "The model learns its training images by heart; on others it gets surer, not better.",
        "fewer epochs or stages, more augmentation (train.augment), weight decay, or more images",
    )


def _underfitting(c: Curves) -> Check | None:
    if len(c.fit) < 5 or not c.fit_top1 or not c.top1:
        return None
    late = c.fit[-1 - max(2, len(c.fit) // 4)]
    settled = abs(late - c.fit[-1]) < STILL * c.fit[-1]
    poor = c.fit_top1[-1] < LEARNED and c.fit[-1] > 0.25 * c.guess
    apart = c.fit_top1[-1] - c.top1[-1]
    quiet = not any(rule(c) for rule in (_decayed_too_early, _rate_too_low, _slow_start))
    if not (settled and poor and quiet) or apart > max(0.2, 2 * (c.error or 0)):
        return None
    return Check(
        "underfitting",
        "warn",
        f"{_name(c)} settled at {c.fit[-1]:.2f} with {c.fit_top1[-1]:.0%} of the training images "
        f"right, {c.top1[-1]:.0%} of the validation images",
        "The model cannot follow even its training images: too little of it moves, or it is held "
        "back by regularisation.",
        "train more stages (--strategy), less weight decay and augmentation, a larger input size",
    )


def _stopped_too_soon(c: Curves) -> Check | None:
    if len(c.fit) < 3 or _rate_too_low(c) or _diverging(c):
        return None
    last = (c.fit[-2] - c.fit[-1]) / max(c.fit[-2], 1e-9)
    high = not c.lr or c.lr[-1] > 0.3 * max(c.lr)
    val_falls = len(c.val) < 2 or c.val[-1] < min(c.val[:-1]) * 0.99
    if last < STILL or not val_falls or c.fit[-1] < 0.1 * c.guess or not (high or last > 0.2):
        return None
    return Check(
        "stopped too soon",
        "warn",
        f"in the last epoch {_name(c)} still fell by {last:.0%} (to {c.fit[-1]:.2f})",
        "Training and validation loss had not settled: more was to be had for more time.",
        "train twice as long (--epochs)",
    )


def _noisy_validation(c: Curves) -> Check | None:
    if c.error is None or len(c.top1) < 2:
        return None
    spread, gain = max(c.top1[1:]) - min(c.top1[1:]), c.top1[-1] - c.top1[0]
    if max(spread, abs(gain)) > 2 * c.error:
        return None
    return Check(
        "noisy validation",
        "warn",
        f"validation accuracy changed by {gain:+.1%} in all, and stayed within {spread:.1%}; its "
        f"standard error with {c.n_val} images is {c.error:.1%}",
        "The changes are no larger than chance makes them: these images cannot tell epochs apart.",
        "give more validation images, or judge by folds (--folds); do not choose an epoch by them",
    )


def _noise_leads(c: Curves) -> bool:
    """Whether noise is the finding, or but a remark on a training that is sound."""
    return c.n_val is not None and c.n_val < FEW


def _healthy(c: Curves) -> Check:
    value = f"{_name(c)} {c.fit[0]:.2f} → {c.fit[-1]:.2f}"
    if c.val:
        value += f", validation loss {c.val[0]:.2f} → {c.val[-1]:.2f}"
    return Check("healthy", "pass", value, "Nothing unusual: the losses fell, or stayed low.")


RULES: tuple[Callable[[Curves], Check | None], ...] = (
    _diverging,
    _rate_too_high,
    _slow_start,
    _rate_too_low,
    _wrong_labels,
    _decayed_too_early,
    _overfitting,
    _underfitting,
    _stopped_too_soon,
    _noisy_validation,
)


def _name(c: Curves) -> str:
    return "clean training loss" if c.clean else "training loss"


def _first(values: Sequence[float], holds: Callable[[int], bool]) -> int:
    return next((k for k in range(len(values)) if holds(k)), len(values))


# --- in words ----------------------------------------------------------------------------------


def text(checks: Sequence[Check]) -> str:
    """The primary finding, and what else was seen beneath it."""
    first, *others = (check.to_text() for check in checks)
    return "\n".join([first, *(["", "also:"] if others else []), *others])


def line(check: Check) -> str:
    """A finding on one line, for the report."""
    action = f" → {check.action}" if check.action else ""
    return f"{check.name.capitalize()}: {check.value}. {check.meaning}{action}"
