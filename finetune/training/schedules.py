"""How the learning rate changes over a training: one factor for every group, at each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.training.config import Training

SCHEDULES = (
    "cosine",
    "step",
    "linear",
    "constant",
    "rsqrt",
    "onecycle",
    "restarts",
    "plateau",
)
CYCLES = 3  # of warm restarts
DIVIDED, LAST = 25.0, 1e4  # one-cycle: its peak over its start, and its start over its end
PATIENCE, LOWERED = 2, 0.2  # plateau: epochs without gain, and the factor that follows
THRESHOLD = 1e-4  # plateau: the share by which a loss has to fall to count as a gain
BARS = "▁▂▃▄▅▆▇█"

Factor = Callable[[int], float]


def factors(training: Training, total_steps: int) -> Factor:
    """The factor on every learning rate at step t = 0, 1, …, T − 1, with T = `total_steps`.

    Over the first W = `round(warmup * T)` steps it rises as (t + 1) / W. After that, with p = (t −
    W) / (T − W): cosine (1 + cos πp) / 2; linear 1 − p; step 0.1 ** ⌊3p⌋ (a tenth after each
    third); constant and plateau 1 (`lowered` comes on top of it); restarts cosine `CYCLES` times
    over (SGDR, Loshchilov and Hutter 2017); and rsqrt, the inverse square root √(W / (t + 1)) of
    Vaswani et al. 2017, with W at least 1. onecycle rises over W by a cosine from 1 / 25, and falls
    by one to 1 / 250,000 (Smith and Topin 2018, as in torch; the momentum stays).
    """
    shape = training.schedule
    if shape not in SCHEDULES:
        raise UserError(
            f"no schedule is called {shape!r}",
            where="train.schedule",
            fix=f"use {', '.join(SCHEDULES)}",
        )
    if shape == "onecycle":
        return _one_cycle(training.warmup, total_steps)
    warm = min(round(training.warmup * total_steps), max(total_steps - 1, 0))
    rest = max(total_steps - warm, 1)
    cycle = math.ceil(rest / CYCLES)

    def factor(t: int) -> float:
        if t < warm:
            return (t + 1) / warm
        p = (t - warm) / rest
        if shape == "cosine":
            return (1 + math.cos(math.pi * p)) / 2
        if shape == "restarts":
            return (1 + math.cos(math.pi * ((t - warm) % cycle) / cycle)) / 2
        if shape == "linear":
            return 1 - p
        if shape == "step":
            # 1e-9: a third that rounding puts a hair below its edge still counts as reached.
            return 0.1 ** math.floor(3 * p + 1e-9)
        return math.sqrt(max(warm, 1) / (t + 1)) if shape == "rsqrt" else 1.0

    return factor


def _one_cycle(warmup: float, total_steps: int) -> Factor:
    """Up over the share `warmup` of the steps and down over the rest, by half cosines."""
    peak = max(warmup * total_steps - 1, 0.0)
    end = max(total_steps - 1, peak + 1e-9)

    def between(start: float, stop: float, p: float) -> float:
        return stop + (start - stop) / 2 * (1 + math.cos(math.pi * p))

    def factor(t: int) -> float:
        if t < peak:
            return between(1 / DIVIDED, 1.0, t / peak)
        return between(1.0, 1 / (DIVIDED * LAST), (t - peak) / (end - peak))

    return factor


def lowered(losses: Sequence[float]) -> float:
    """The factor of the schedule plateau after epochs of these validation losses (of the training
    loss, where nothing validates).

    It falls to `LOWERED` of itself when the loss has not fallen by `THRESHOLD` of the lowest one in
    more than `PATIENCE` epochs, and counts anew from there: torch's `ReduceLROnPlateau`. It follows
    from the losses alone, so that a training that goes on has the same.
    """
    factor, best, waited = 1.0, math.inf, 0
    for loss in losses:
        if loss < best * (1 - THRESHOLD):
            best, waited = loss, 0
        else:
            waited += 1
        if waited > PATIENCE:
            factor, waited = factor * LOWERED, 0
    return factor


def drawn(training: Training, width: int = 60) -> str:
    """The factor over a training as one line of bars."""
    factor = factors(training, width)
    return "".join(BARS[min(len(BARS) - 1, int(factor(t) * len(BARS)))] for t in range(width))
