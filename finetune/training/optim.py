"""Parameter groups with real learning rates, moving averages, L2-SP and the loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune.backbones.stages import Backbone, group_of
from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.training.config import Training

OPTIMIZERS = ("adamw", "sgd")
LONGEST_DECAY = 0.9998  # of a moving average, however many the steps

Group = dict[str, Any]
Tensors = dict[str, Tensor]


def param_groups(backbone: Backbone, head: nn.Module, training: Training) -> list[Group]:
    """Every trainable parameter once, in groups `{name, params, lr, base_lr, weight_decay}` from
    stem to head.

    The head learns at `training.lr`, a stage at `lr * trunk_lr_scale * layer_decay ** (stages
    between it and the head)`. Vectors, scalars and what the network's `no_weight_decay()` names
    (tokens, position tables) are not decayed unless `training.decay_norms`: their group is called
    `<stage>/no-decay`. With L2-SP,
    which pulls the trunk to its start, weight decay would pull it to zero as well, so that the
    trunk has none.
    """
    between = {stage.name: i for i, stage in enumerate(reversed(backbone.stages))}
    stage_of = group_of(backbone)
    named = getattr(backbone.module, "no_weight_decay", None)
    spared: set[str] = set(named()) if callable(named) else set()
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for key, parameter in backbone.module.named_parameters():
        if parameter.requires_grad:
            decays = training.decay_norms or (parameter.ndim > 1 and key not in spared)
            members.setdefault((stage_of(key), decays), []).append(parameter)
    for parameter in head.parameters():
        decays = training.decay_norms or parameter.ndim > 1
        members.setdefault(("head", decays), []).append(parameter)
    groups: list[Group] = []
    for stage in [*(stage.name for stage in backbone.stages), "head"]:
        lr, decay = training.lr, training.weight_decay
        if stage != "head":
            lr *= training.trunk_lr_scale * training.layer_decay ** between[stage]
            decay = 0.0 if training.l2_sp else decay
        for decays in (True, False):
            if parameters := members.get((stage, decays)):
                name = stage if decays else f"{stage}/no-decay"
                weight_decay = decay if decays else 0.0
                groups.append(
                    {
                        "name": name,
                        "params": parameters,
                        "lr": lr,
                        "base_lr": lr,
                        "weight_decay": weight_decay,
                    }
                )
    return groups


def group_table(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What each group holds, for the log: name, number of tensors and of numbers, learning rate,
    weight decay."""
    return [
        {
            "name": group["name"],
            "tensors": len(group["params"]),
            "parameters": sum(parameter.numel() for parameter in group["params"]),
            "lr": group["base_lr"],
            "weight_decay": group["weight_decay"],
        }
        for group in groups
    ]


def optimizer(groups: list[Group], training: Training) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), or SGD with momentum 0.9, over `groups`."""
    if training.optimizer == "adamw":
        # The fused kernel takes one pass over each tensor; it exists for these devices.
        fused = all(
            parameter.device.type in ("cpu", "cuda")
            for group in groups
            for parameter in group["params"]
        )
        return torch.optim.AdamW(groups, lr=training.lr, fused=fused)
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.lr, momentum=0.9)
    raise UserError(
        f"no optimizer is called {training.optimizer!r}",
        where="train.optimizer",
        fix=f"use {' or '.join(OPTIMIZERS)}",
    )


def set_rates(groups: Iterable[Group], factor: float) -> None:
    """Give every group its own learning rate times `factor`, so that their ratios never change."""
    for group in groups:
        group["lr"] = group["base_lr"] * factor


# ------------------------------------------------------------------------------- averages and L2-SP


def ema_decay(total_steps: int) -> float:
    """Decay d of a moving average over `total_steps`: 1 − 5 / T, at most 0.9998.

    The initial weights keep a share d ** T, which is below e⁻⁵ < 1 %. A fixed 0.9998 would still be
    mostly the initial model after a few hundred steps.
    """
    return min(LONGEST_DECAY, max(0.0, 1 - 5 / max(total_steps, 1)))


def start_share(decay: float, steps: int) -> float:
    """The share that the initial weights still have in a moving average after `steps`: d ** t."""
    return decay**steps


@torch.no_grad()
def blend(average: Tensors, current: Mapping[str, Tensor], decay: float) -> None:
    """One step of a moving average in place: `decay * average + (1 - decay) * current`; counters
    are copied."""
    for key, value in current.items():
        if value.is_floating_point():
            average[key].lerp_(value.detach(), 1 - decay)
        else:
            average[key].copy_(value)


def l2_sp(pairs: Iterable[tuple[Tensor, Tensor]], strength: float) -> Tensor:
    """The penalty `strength / 2 * Σ ‖w − w₀‖²` over pairs of a weight and its start (Li et al.
    2018)."""
    distances = [(weight - start).square().sum() for weight, start in pairs]
    return strength / 2 * torch.stack(distances).sum() if distances else torch.zeros(())


# ----------------------------------------------------------------------------------------- the loss


def soft_cross_entropy(
    logits: Tensor, targets: Tensor, class_weights: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy with probabilities `targets` (n, C), smoothed towards 1 / C, as a mean weighted
    by class.

    An image weighs what its target's classes weigh on average; for one-hot targets without
    smoothing this is `F.cross_entropy(logits, labels, weight=class_weights)`.
    """
    weights = targets @ class_weights
    smooth = targets * (1 - smoothing) + smoothing / targets.shape[1]
    losses = -(smooth * torch.log_softmax(logits, 1)).sum(1)
    return (weights * losses).sum() / weights.sum()


def broken_groups(groups: Sequence[Group], *, gradients: bool) -> list[str]:
    """Names of the groups in which a weight (or a gradient, where `gradients`) is NaN or
    infinite."""
    names = []
    for group in groups:
        tensors = [parameter.grad if gradients else parameter for parameter in group["params"]]
        if any(tensor is not None and not torch.isfinite(tensor).all() for tensor in tensors):
            names.append(group["name"])
    return names


def copies(groups: Sequence[Group]) -> list[list[Tensor]]:
    """The weights of every group as they are now, for `update_ratios`."""
    return [[parameter.detach().clone() for parameter in group["params"]] for group in groups]


@torch.no_grad()
def update_ratios(
    groups: Sequence[Group], before: Sequence[Sequence[Tensor]]
) -> dict[str, float | str]:
    """‖Δw‖ / ‖w‖ of one step a group: about 1e-3 is healthy.

    Tensors that were all zero have no such ratio and are left out; a group of nothing else is
    `"warming"`: a new head, or biases that have only begun.
    """
    ratios: dict[str, float | str] = {}
    for group, olds in zip(groups, before, strict=True):
        pairs = [(old, new) for old, new in zip(olds, group["params"], strict=True) if old.any()]
        if not pairs:
            ratios[group["name"]] = "warming"
            continue
        moved = math.hypot(*(_norm(new - old) for old, new in pairs))
        ratios[group["name"]] = moved / math.hypot(*(_norm(old) for old, _ in pairs))
    return ratios


def _norm(tensor: Tensor) -> float:
    """Euclidean norm in float64, in which the squares of large weights do not overflow."""
    return float(tensor.cpu().double().norm())
