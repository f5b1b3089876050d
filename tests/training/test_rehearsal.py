"""The planned fine-tuning, tried out on a sample: healthy plans pass, faults are named, and nothing
is left behind."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from test_restore import fingerprint
from trainings import TRAIN, fit, make, outcome, plan

from finetune.backbones import stages
from finetune.backbones.stages import Backbone
from finetune.check import Check
from finetune.data.images import ImageSet
from finetune.training import optim, rehearsal, step_checks
from finetune.training.preflight import Preflight

pytestmark = pytest.mark.usefixtures("one_thread")


def rehearse(backbone: Backbone, data: ImageSet, quick: bool = False, **changes: Any) -> Preflight:
    training = plan(backbone, **{"lr": 1e-3, "trunk_lr_scale": 1.0, **changes})
    return rehearsal.rehearse(
        backbone, data, TRAIN, training, classes=3, seed=0, precision="float32", quick=quick
    )


def of(found: Preflight, name: str) -> Check:
    (check,) = (check for check in found.checks if check.name == name)
    return check


@pytest.fixture(scope="module")
def healthy(data: ImageSet) -> Preflight:
    return rehearse(make(), data, label_smoothing=0.1, mixup=0.2, augment="strong")


def test_a_healthy_plan_passes(healthy: Preflight) -> None:
    """Initial loss, start, gradients, updates, learning rate and overfit, though the plan smooths,
    mixes and augments."""
    assert "pass" == healthy.status, str(healthy)
    assert [
        "initial loss", "planned start", "gradients", "update ratio", "learning rate", "overfit",
    ] == [check.name for check in healthy.checks]  # fmt: skip
    assert f"ln 3 = {math.log(3):.4f}" in of(healthy, "initial loss").value
    assert "100% right" in of(healthy, "overfit").value


def test_all_groups_rise_by_one_factor(data: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every step of the range test the ratios of the groups' rates are those of the plan."""
    seen: list[list[float]] = []
    plain = optim.set_rates

    def noted(groups: Any, factor: float) -> None:
        plain(groups, factor)
        seen.append([group["lr"] / group["base_lr"] for group in groups])

    monkeypatch.setattr(optim, "set_rates", noted)
    backbone = make()
    found = rehearse(backbone, data, trainable=stages.last_stages(backbone, 2), layer_decay=0.5)

    assert found.range_test is not None
    assert len(set(found.range_test.groups.values())) > 2
    assert max(map(max, seen)) > 1
    assert all(ratios == pytest.approx([ratios[0]] * len(ratios)) for ratios in seen)


@pytest.mark.parametrize("norm_moves", [False, True])
def test_the_backbone_is_left_as_it_was(data: ImageSet, norm_moves: bool) -> None:
    """Weights, running statistics, modes and random numbers have the same bits before and after."""
    backbone = make("resnet")
    before = fingerprint([backbone.module], None)
    found = rehearse(backbone, data, norm_moves=norm_moves)
    backbone.module.requires_grad_(True)  # freezing is the plan's, not the check's

    assert "fail" not in [check.status for check in found.checks if check.name != "planned start"]
    assert before == fingerprint([backbone.module], None)


def test_a_training_after_it_is_the_same_training(data: ImageSet) -> None:
    """The result of `fit` is bit-identical with and without a rehearsal before it."""
    results = []
    for first in (False, True):
        backbone = make()
        if first:
            rehearse(backbone, data, quick=True)
        results.append(outcome(backbone, fit(backbone, data)))

    assert results[0] == results[1]


def test_the_quick_form_tries_no_rates_and_learns_nothing_by_heart(data: ImageSet) -> None:
    """A few steps are enough for it."""
    found = rehearse(make(), data, quick=True)

    assert ["initial loss", "planned start", "gradients", "update ratio"] == [
        check.name for check in found.checks
    ]
    assert found.range_test is None


def test_a_rate_a_thousand_times_too_high_fails(data: ImageSet) -> None:
    """By the update ratio, which names the stages. (Fifteen images are learned by heart before the
    rate gets there: on so few the range test alone would not do.)"""
    found = rehearse(make(), data, quick=True, lr=1.0)

    assert "fail" == of(found, "update ratio").status, str(found)
    assert "stage5" in of(found, "update ratio").meaning


def test_a_rate_of_nearly_nothing_is_warned_of(
    data: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways."""
    monkeypatch.setattr(step_checks, "LONGEST", 3)
    found = rehearse(make(), data, lr=1e-8)

    assert "warn" == of(found, "update ratio").status
    assert "these hardly learn" in of(found, "update ratio").meaning
    assert "warn" == of(found, "learning rate").status


def test_a_head_from_zero_is_warming(data: ImageSet) -> None:
    """A plan that starts the head at zero gets no alarm for it."""
    found = rehearse(make(), data, quick=True, head_init="zero")

    assert "head warming" in of(found, "update ratio").value
    assert "pass" == of(found, "update ratio").status
    assert "planned start" not in [check.name for check in found.checks]


def test_a_nan_in_the_weights_is_named_with_its_stage(data: ImageSet) -> None:
    """It fails, names the group, and nothing is tried after it."""
    backbone = make()
    last = dict(backbone.module.named_parameters())[_matrix(backbone)]
    with torch.no_grad():
        last.view(-1)[0] = float("nan")
    found = rehearse(backbone, data, head_init="zero")

    assert "fail" == of(found, "gradients").status
    assert "weights of neck" in of(found, "gradients").value
    assert "skip" == of(found, "update ratio").status
    assert "overfit" not in [check.name for check in found.checks]


def _matrix(backbone: Backbone) -> str:
    return next(key for key in backbone.stages[-1].keys if key.endswith("weight"))


def test_a_sample_holds_every_class_in_both_parts(data: ImageSet) -> None:
    """As many of each class as there are, none in both parts, the same for the same seed."""
    labels = np.repeat(np.arange(10), [40] * 9 + [6])
    found = rehearsal.sample(labels, np.arange(len(labels)), 0)

    assert not np.intersect1d(found.fitted, found.stepped).size
    assert 10 == len(np.unique(labels[found.fitted]))
    assert (
        dataclasses.astuple(found)[0].tolist()
        == rehearsal.sample(labels, np.arange(len(labels)), 0).fitted.tolist()
    )
    few = rehearsal.sample(np.arange(4), np.arange(4), 0)
    assert [0, 1, 2, 3] == sorted(few.stepped) == sorted(few.fitted)
