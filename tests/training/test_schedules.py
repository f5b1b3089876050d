"""Schedules are torch's own, point by point."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from finetune.errors import UserError
from finetune.training import schedules
from finetune.training.config import Training


def factors(total: int, **changes: Any) -> list[float]:
    factor = schedules.factors(Training((), **changes), total)
    return [factor(step) for step in range(total)]


def reference(make: Any, steps: int, rate: float = 1.0) -> list[float]:
    """What a scheduler of torch gives over `steps`."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = make(optimizer)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


SHAPES = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=30),
    "linear": lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.0, total_iters=30),
    "step": lambda o: lr_scheduler.StepLR(o, step_size=10, gamma=0.1),
    "constant": lambda o: lr_scheduler.ConstantLR(o, factor=1.0),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_schedules_are_those_of_torch(shape: str) -> None:
    """Without warm-up, cosine, linear, step and constant are torch's schedulers."""
    assert reference(SHAPES[shape], 30) == pytest.approx(
        factors(30, schedule=shape, warmup=0.0), abs=1e-9
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_warm_up_is_torchs_linear_one(shape: str) -> None:
    """A quarter of warm-up is LinearLR up to 1, and the schedule then runs over the rest as if it
    began there."""
    warm = reference(
        lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, end_factor=1.0, total_iters=9), 10
    )

    assert [*warm, *reference(SHAPES[shape], 30)] == pytest.approx(
        factors(40, schedule=shape, warmup=0.25), abs=1e-9
    )


def test_inverse_square_root_is_the_formula() -> None:
    """Vaswani et al.: min(s / W, √(W / s)) at step s = t + 1, its peak of 1 at s = W."""
    expected = [min(s / 10, math.sqrt(10 / s)) for s in range(1, 41)]

    assert expected == pytest.approx(factors(40, schedule="rsqrt", warmup=0.25))
    assert [math.sqrt(1 / s) for s in range(1, 6)] == pytest.approx(
        factors(5, schedule="rsqrt", warmup=0.0)
    )


@settings(deadline=None)
@given(st.sampled_from(schedules.SCHEDULES), st.integers(1, 300), st.floats(0, 0.99))
def test_factors_stay_between_zero_and_one(shape: str, total: int, warmup: float) -> None:
    """However short a run or long its warm-up, every step has a rate above 0, and none above the
    planned one."""
    values = factors(total, schedule=shape, warmup=warmup)

    assert 0 < min(values) <= max(values) <= 1


def test_a_misspelt_schedule_is_named_with_those_that_exist() -> None:
    with pytest.raises(UserError, match=r"(?s)'cosin'.*cosine, step, linear, constant, rsqrt"):
        schedules.factors(Training((), schedule="cosin"), 10)


def test_warm_restarts_are_torchs() -> None:
    """Three cosines of ten steps each, behind the warm-up."""
    theirs = reference(lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=10), 30)

    assert theirs == pytest.approx(factors(30, schedule="restarts", warmup=0.0))
    assert theirs == pytest.approx(factors(40, schedule="restarts", warmup=0.25)[10:])


@pytest.mark.parametrize(("steps", "warmup"), [(40, 0.25), (50, 0.3), (17, 0.5)])
def test_one_cycle_is_torchs(steps: int, warmup: float) -> None:
    theirs = reference(
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=steps, pct_start=warmup), steps
    )

    assert theirs == pytest.approx(factors(steps, schedule="onecycle", warmup=warmup))


@given(st.lists(st.floats(0.01, 10), max_size=40))
def test_a_plateau_lowers_the_rate_as_torchs_does(losses: list[float]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=schedules.LOWERED, patience=schedules.PATIENCE
    )
    for loss in losses:
        scheduler.step(loss)

    # torch moves a rate by no less than its eps
    assert optimizer.param_groups[0]["lr"] == pytest.approx(schedules.lowered(losses), abs=1e-7)


def test_a_schedule_is_drawn_in_one_line() -> None:
    line = schedules.drawn(Training((), schedule="step", warmup=0.0), 12)
    assert line == "████▁▁▁▁▁▁▁▁"
