"""Parameter groups, schedules against torch's own, moving averages, L2-SP, the loss, and when
training stops."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from finetune.backbones import create as home
from finetune.backbones import stages
from finetune.backbones.stages import Backbone
from finetune.errors import UserError
from finetune.training import optim, schedules
from finetune.training.config import Training

NAMES = ("test_resnet", "test_efficientnet", "test_convnext", "test_vit")


@pytest.fixture(scope="module", params=NAMES)
def any_backbone(request: pytest.FixtureRequest) -> Backbone:
    return home.load(request.param, "random")


@pytest.fixture(scope="module")
def small() -> Backbone:
    return home.load("test_efficientnet", "random")


def everything(backbone: Backbone, **changes: Any) -> tuple[list[optim.Group], nn.Module, Training]:
    """Groups with every stage trainable."""
    training = Training(tuple(stage.name for stage in backbone.stages), **changes)
    stages.freeze(backbone, training.trainable)
    head = nn.Linear(backbone.network.widths["pooled"], 5)
    return optim.param_groups(backbone, head, training), head, training


# ------------------------------------------------------------------------------------------- groups


def test_groups_hold_every_trainable_parameter_once(any_backbone: Backbone) -> None:
    """Tokens, position tables and layer scales included: the union of the groups is the model and
    its head."""
    groups, head, _ = everything(any_backbone)
    members = [id(parameter) for group in groups for parameter in group["params"]]
    expected = {
        id(parameter) for parameter in (*any_backbone.module.parameters(), *head.parameters())
    }

    assert len(members) == len(set(members))
    assert expected == set(members)


def test_groups_leave_frozen_stages_out(any_backbone: Backbone) -> None:
    """Only the stages that may move, and the head, have groups."""
    last = stages.last_stages(any_backbone, 1)
    stages.freeze(any_backbone, last)
    head = nn.Linear(4, 2)
    groups = optim.param_groups(any_backbone, head, Training(last))

    assert {*last, "head"} >= {group["name"].partition("/")[0] for group in groups}
    assert all(parameter.requires_grad for group in groups for parameter in group["params"])


def test_vectors_and_tokens_are_not_decayed(any_backbone: Backbone) -> None:
    """Biases, norms, layer scales, tokens and position tables stand in groups without weight decay,
    and only those."""
    groups, _, _ = everything(any_backbone, weight_decay=0.05)
    named = getattr(any_backbone.module, "no_weight_decay", set)()
    spared = {id(p) for key, p in any_backbone.module.named_parameters() if key in named}
    for group in groups:
        plain = group["name"].endswith("/no-decay")

        assert (0.0 if plain else 0.05) == group["weight_decay"], group["name"]
        assert {plain} == {p.ndim <= 1 or id(p) in spared for p in group["params"]}, group["name"]


def test_a_vit_names_its_tokens() -> None:
    """The class token and the position table of a ViT are in a group without decay, though they
    have three dimensions."""
    backbone = home.load("test_vit", "random")
    groups, _, _ = everything(backbone)
    plain = {id(p) for group in groups if group["name"] == "stem/no-decay" for p in group["params"]}

    assert {id(backbone.module.cls_token), id(backbone.module.pos_embed)} <= plain


def test_learning_rates_fall_by_stage(any_backbone: Backbone) -> None:
    """The head has the plan's rate; the stage next to it the trunk's share, and each further one a
    factor less."""
    groups, _, _ = everything(any_backbone, lr=0.01, trunk_lr_scale=0.5, layer_decay=0.8)
    order = [stage.name for stage in any_backbone.stages]
    for group in groups:
        stage = group["name"].partition("/")[0]
        expected = (
            0.01 if stage == "head" else 0.01 * 0.5 * 0.8 ** (len(order) - 1 - order.index(stage))
        )

        assert expected == pytest.approx(group["lr"]), stage


def test_l2_sp_replaces_weight_decay_in_the_trunk(small: Backbone) -> None:
    """What pulls to the start and what pulls to zero do not both act on the trunk; the head is
    still decayed."""
    groups, _, _ = everything(small, weight_decay=0.05, l2_sp=0.01)

    assert {0.0} == {group["weight_decay"] for group in groups if group["name"] != "head"}
    assert [0.05] == [group["weight_decay"] for group in groups if group["name"] == "head"]


def test_the_table_says_what_every_group_holds(small: Backbone) -> None:
    """The log shows name, size, rate and decay of each group; the sizes add up to the model."""
    groups, head, _ = everything(small, lr=0.01)
    table = optim.group_table(groups)

    assert [group["name"] for group in groups] == [row["name"] for row in table]
    assert sum(p.numel() for p in (*small.module.parameters(), *head.parameters())) == sum(
        row["parameters"] for row in table
    )
    assert {
        "name": "head",
        "tensors": 1,
        "parameters": head.weight.numel(),
        "lr": 0.01,
        "weight_decay": 1e-4,
    } == table[-2]


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_group_rates_keep_their_ratios_under_a_schedule(small: Backbone, name: str) -> None:
    """The rate of every group that the optimizer uses is its own times the factor, at every
    step."""
    groups, _, training = everything(small, optimizer=name, schedule="cosine", warmup=0.2)
    optimizer, factor = optim.optimizer(groups, training), schedules.factors(training, 10)
    for step in range(10):
        optim.set_rates(optimizer.param_groups, factor(step))
        for group in optimizer.param_groups:
            assert group["base_lr"] * factor(step) == group["lr"]


def test_adamw_steps_as_torchs_default_does() -> None:
    """The fused kernel moves a weight as the plain implementation does, decay and rate of the group
    included."""
    start = torch.linspace(-1, 1, 12).view(3, 4)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    group = {"name": "w", "params": [ours], "lr": 0.05, "base_lr": 0.05, "weight_decay": 0.1}
    mine = optim.optimizer([group], Training((), optimizer="adamw"))
    reference = torch.optim.AdamW([theirs], lr=0.05, weight_decay=0.1, fused=False, foreach=False)
    for _ in range(5):
        for weight, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            weight.pow(3).sum().backward()
            optimizer.step()

    assert torch.allclose(theirs, ours, rtol=1e-5, atol=1e-7)


def test_unknown_names_are_refused(small: Backbone) -> None:
    """A misspelt optimizer is named, with those that exist."""
    groups, _, training = everything(small)
    with pytest.raises(UserError, match=r"(?s)'adam'.*adamw or sgd"):
        optim.optimizer(groups, dataclasses.replace(training, optimizer="adam"))


# ------------------------------------------------------------------------------- averages and L2-SP


@pytest.mark.parametrize("steps", [1, 3, 5, 6, 20, 200, 1_000, 50_000, 1_000_000])
def test_the_average_forgets_the_initial_weights(steps: int) -> None:
    """At the end of a run of any length the initial weights make less than 5 % of the average."""
    start, average = torch.zeros(()), {"w": torch.ones(())}
    decay = optim.ema_decay(steps)

    assert decay**steps < 0.05
    for _ in range(min(steps, 1_000)):
        optim.blend(average, {"w": start}, decay)
    assert average["w"].item() == pytest.approx(decay ** min(steps, 1_000), rel=1e-3, abs=1e-6)


def test_averages_copy_counters() -> None:
    """Whole numbers, such as BatchNorm's count of batches, are copied and keep their type; floats
    are averaged."""
    average = {"count": torch.tensor(3), "w": torch.tensor([0.0, 4.0])}
    optim.blend(average, {"count": torch.tensor(8), "w": torch.tensor([1.0, 0.0])}, 0.75)

    assert torch.int64 == average["count"].dtype
    assert 8 == average["count"].item()
    assert [0.25, 3.0] == average["w"].tolist()


def test_l2_sp_is_zero_at_the_start_and_pulls_back() -> None:
    """Where the weights stand at their start the penalty and its gradient are 0; away from it they
    are the formula."""
    weight, start = nn.Parameter(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0])
    penalty = optim.l2_sp([(weight, start)], 0.1)
    penalty.backward()

    assert 0.0 == penalty.item()
    assert [0.0, 0.0] == weight.grad.tolist()

    moved = nn.Parameter(torch.tensor([3.0, 1.0]))
    penalty = optim.l2_sp([(moved, start)], 0.1)
    penalty.backward()

    assert 0.05 * (4 + 1) == pytest.approx(penalty.item())
    assert [0.2, -0.1] == pytest.approx(moved.grad.tolist())


# ----------------------------------------------------------------------------------- loss, stopping


def test_the_loss_is_torchs_cross_entropy() -> None:
    """One-hot targets: equal to torch's loss with class weights, and to torch's with label
    smoothing."""
    torch.manual_seed(0)
    logits, labels, weights = (
        torch.randn(9, 4),
        torch.randint(4, (9,)),
        torch.tensor([1.0, 2.0, 0.5, 3.0]),
    )
    targets, even = nn.functional.one_hot(labels, 4).float(), torch.ones(4)
    weighted = nn.functional.cross_entropy(logits, labels, weight=weights)
    smoothed = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)

    assert weighted.item() == pytest.approx(
        optim.soft_cross_entropy(logits, targets, weights).item(), rel=1e-5
    )
    assert smoothed.item() == pytest.approx(
        optim.soft_cross_entropy(logits, targets, even, 0.1).item(), rel=1e-5
    )


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_a_zero_head_loses_ln_c(classes: int) -> None:
    """Even logits give ln C, with smoothing, mixed targets and class weights as well."""
    mixed = torch.full((3, classes), 1 / classes)
    weights = torch.rand(classes) + 0.1

    assert math.log(classes) == pytest.approx(
        optim.soft_cross_entropy(torch.zeros(3, classes), mixed, weights, 0.1).item()
    )


# --------------------------------------------------------------------------------- health of a step


def group(name: str, *tensors: torch.Tensor) -> optim.Group:
    return {"name": name, "params": [nn.Parameter(tensor) for tensor in tensors]}


def test_broken_groups_are_named() -> None:
    """NaN in a weight and infinity in a gradient are found, each in its group."""
    groups = [
        group("stage1", torch.ones(2)),
        group("stage2", torch.tensor([1.0, math.nan])),
        group("head", torch.ones(2)),
    ]
    groups[2]["params"][0].grad = torch.tensor([0.0, math.inf])

    assert ["stage2"] == optim.broken_groups(groups, gradients=False)
    assert ["head"] == optim.broken_groups(groups, gradients=True)


def test_update_ratios_are_by_hand() -> None:
    """‖Δw‖ / ‖w‖ over the tensors of a group: (3, 4) moved by (0, .5) is .1."""
    groups = [group("stage1", torch.tensor([3.0]), torch.tensor([4.0]))]
    before = optim.copies(groups)
    groups[0]["params"][1].data += 0.5

    assert {"stage1": pytest.approx(0.1)} == optim.update_ratios(groups, before)


def test_a_head_of_zeros_is_warming() -> None:
    """Nothing is divided by zero: zero tensors are left out, and a group of nothing else is called
    warming."""
    groups = [group("head", torch.zeros(3)), group("stage1", torch.zeros(2), torch.tensor([2.0]))]
    before = optim.copies(groups)
    for parameter in itertools.chain.from_iterable(g["params"] for g in groups):
        parameter.data += 1

    assert {"head": "warming", "stage1": pytest.approx(0.5)} == optim.update_ratios(groups, before)


def test_decay_spares_norms_and_biases_unless_it_is_asked_for(small: Backbone) -> None:
    groups, _, _ = everything(small)
    spared = {group["name"] for group in groups if not group["weight_decay"]}
    assert all(name.endswith("/no-decay") for name in spared)
    all_decay, _, _ = everything(small, decay_norms=True)
    assert [group["name"] for group in all_decay if not group["weight_decay"]] == []
    counts = [
        sum(p.numel() for group in own for p in group["params"]) for own in (groups, all_decay)
    ]
    assert counts[0] == counts[1]


def test_the_share_of_the_initial_weights_is_what_blending_leaves() -> None:
    """An average of ones, blended with zeros: what is left after every step, and less than 1 % at
    the end of a training of 100 steps."""
    decay = optim.ema_decay(100)
    average = {"w": torch.ones(1, dtype=torch.float64)}
    for _ in range(100):
        optim.blend(average, {"w": torch.zeros(1, dtype=torch.float64)}, decay)

    assert optim.start_share(decay, 100) == pytest.approx(average["w"].item())
    assert 1 == optim.start_share(decay, 0)
    assert optim.start_share(decay, 100) < 0.01
