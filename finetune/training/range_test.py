"""Learning-rate range test (Smith 2017, arXiv 1506.01186): all rates rise together, by one factor a
step, until the loss goes up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.check import Check
from finetune.training import optim
from finetune.training.subject import Subject

Floats = NDArray[np.float64]

LOWEST, HIGHEST = -3.0, 2.0  # decades around the planned rates
DEEPER = 3.0  # decades further down, where the loss blows up at once
PER_DECADE = 6  # steps
SMOOTH = 0.6  # share of the past in the smoothed loss
BLOWN = 2.0  # times the loss at the start, and worse than guessing: it has blown up
FALL = 0.02  # of the loss at the start: what counts as falling
RISE = 0.2  # of the whole fall: from there on the loss rises
SLOW = 1000.0  # a planned rate this far below that of the lowest loss hardly learns


@dataclass(frozen=True, kw_only=True)
class RangeTest:
    """What the test met, step by step: `factors` on every planned rate, the `losses` as they came,
    `smooth` and its `slope` against the decimal logarithm of the rate, each `(steps,)`.

    `rate` is the planned learning rate of the last group (the head), `groups` are the planned rates
    of all. `blown` says whether the loss blew up at the last step.
    """

    rate: float
    groups: dict[str, float]
    factors: Floats
    losses: Floats
    smooth: Floats
    slope: Floats
    blown: bool

    @property
    def start(self) -> float:
        return float(self.smooth[0])

    @property
    def lowest(self) -> float:
        """The factor at the lowest smoothed loss before it first rises by `RISE` of its whole fall,
        at least half of which is made: a loss that was thrown up and falls again says nothing about
        good rates."""
        lowest = np.minimum.accumulate(self.smooth)
        fall = self.start - lowest
        most = max(float(fall.max()), FALL * self.start)
        risen = (self.smooth - lowest > RISE * most) & (fall >= most / 2)
        end = int(risen.argmax()) if risen.any() else len(risen)
        return float(self.factors[int(self.smooth[: max(end, 1)].argmin())])

    @property
    def steepest(self) -> float:
        """The factor at which the smoothed loss falls fastest, the ends left out."""
        inner = self.slope[2:-2] if len(self.slope) > 6 else self.slope
        return float(self.factors[int(inner.argmin()) + (2 if len(self.slope) > 6 else 0)])

    @property
    def brisk(self) -> tuple[float, float]:
        """Factors to learn a few images quickly with: that of the lowest loss, and, more carefully,
        a tenth of it."""
        return (self.lowest, 0.1 * self.lowest) if self.falls else (1.0, 0.1)

    @property
    def falls(self) -> bool:
        return float(self.smooth.min()) < self.start * (1 - FALL)

    def to_json(self) -> dict[str, Any]:
        arrays = {
            key: [float(f"{v:.6g}") if math.isfinite(v) else None for v in getattr(self, key)]
            for key in ("factors", "losses", "smooth", "slope")
        }
        plain = {"rate": self.rate, "groups": self.groups, "blown": self.blown}
        found = {"lowest": self.rate * self.lowest, "steepest": self.rate * self.steepest}
        return {**plain, **found, **arrays}


def run(subject: Subject, *, seed: int = 0, classes: int | None = None) -> RangeTest:
    """Raise every group's rate from a thousandth of the plan's to a hundredfold, ratios kept.

    The batches of `subject` come in turn. So that their differences do not hide those of the rates,
    each loss is compared with the first one of the same batch. All is put back afterwards
    (`Subject.trial`).
    """
    guess = math.log(classes) if classes else 0.0
    for lowest in (LOWEST, LOWEST - DEEPER):
        factors = np.logspace(lowest, HIGHEST, round((HIGHEST - lowest) * PER_DECADE) + 1)
        with subject.trial(seed=seed):
            losses = _losses(subject, factors, guess)
        if len(losses) > len(subject.batches) + PER_DECADE:
            break
    blown = len(losses) < len(factors) or not math.isfinite(losses[-1])
    losses = losses[np.isfinite(losses)]
    factors = factors[: len(losses)]
    smooth = _smoothed(losses)
    slope = np.gradient(smooth, np.log10(factors)) if len(smooth) > 1 else np.zeros(len(smooth))
    planned = {
        str(group.get("name", f"group {k}")): float(group["base_lr"])
        for k, group in enumerate(subject.optimizer.param_groups)
    }
    return RangeTest(
        rate=subject.rate,
        groups=planned,
        factors=factors,
        losses=losses,
        smooth=smooth,
        slope=slope,
        blown=blown,
    )


def _losses(subject: Subject, factors: Floats, guess: float) -> Floats:
    """The loss at each factor, as far as it goes; the last may be infinite."""
    first, found = dict[int, float](), list[float]()
    number = len(subject.batches)
    for k, factor in enumerate(factors):
        optim.set_rates(subject.optimizer.param_groups, float(factor))
        stats = subject.step(subject.batches[k % number])
        if not stats.finite:
            return np.array([*found, math.inf])
        first.setdefault(k % number, stats.loss)
        start = sum(first.values()) / len(first)
        found.append(stats.loss - first[k % number])
        if k >= number and found[-1] + start > max(BLOWN * start, guess):
            break
    return np.array(found) + sum(first.values()) / len(first)


def _smoothed(losses: Floats) -> Floats:
    """An exponential moving average, free of the bias of its start (Kingma & Ba 2015)."""
    result, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = SMOOTH * total + loss, SMOOTH * weight + 1
        result.append(total / weight)
    return np.array(result)


def judged(test: RangeTest) -> Check:
    """Whether the planned rate lies where the loss falls."""
    name, rate = "learning rate", test.rate
    if len(test.losses) < 4:
        what = f"planned {rate:.1e}; even a millionth of it blows the loss up at once"
        return Check(name, "fail", what, "nothing can be learned", "look at the other checks")
    end = float(test.factors[-1])
    edge = f"the loss blows up at {rate * end:.1e}" if test.blown else "it does not blow up"
    value = (
        f"planned {rate:.1e}; the loss falls fastest at {rate * test.steepest:.1e}, is lowest at "
        f"{rate * test.lowest:.1e}, {edge} (up to {rate * end:.1e}, {len(test.losses)} steps)"
    )
    advice = f"set the rate to {rate * test.lowest / 10:.1e}, a tenth of that of the lowest loss"
    if test.blown and end <= 1:
        meaning = "with the planned rate the training diverges"
        return Check(name, "fail", value, meaning, advice)
    if not test.falls:
        meaning = "no rate lowers the loss: there is nothing to learn from here, or it is learned"
        return Check(name, "warn", value, meaning, "look at the other checks before you train")
    if test.lowest < 1:
        meaning = "at the planned rate the loss already rises"
        return Check(name, "warn", value, meaning, advice)
    if test.lowest > SLOW:
        meaning = "the planned rate is so low that hardly anything is learned"
        return Check(name, "warn", value, meaning, advice)
    return Check(name, "pass", value, "the planned rate lies where the loss falls")
