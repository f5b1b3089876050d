"""What a loss must be before anything is learned: formulas for scores of zero."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from finetune.training.subject import Loss

Kind = Literal["cross-entropy", "binary", "focal"]
CLOSE = 1e-3  # of a formula


def expected(kind: Kind, classes: int, *, gamma: float = 2.0) -> float:
    """The mean loss in nats of a model that gives every one of `classes` the same score, 0.

    Cross-entropy: ln C, whatever the label smoothing, for the smoothed target sums to one. Binary
    cross-entropy: ln 2, a mean over all outputs. Focal loss (Lin et al. 2017): (1 − 1/C)^γ ln C.
    """
    if kind == "binary":
        return math.log(2)
    factor = (1 - 1 / classes) ** gamma if kind == "focal" else 1.0
    return factor * math.log(classes)


def floor(classes: int, smoothing: float) -> float:
    """The lowest cross-entropy that label smoothing allows: the entropy of the smoothed target.

    0.199 for 2 classes and a smoothing of 0.1, 0.500 for 10, 0.778 for 100.
    """
    other = smoothing / classes
    own = 1 - smoothing + other
    parts = [own] * (own > 0) + [other] * (classes - 1) * (other > 0)
    return -sum(part * math.log(part) for part in parts)


def recognised(value: float, classes: int) -> Kind | None:
    """Which formula a loss of zero scores follows, if any."""
    kinds: tuple[Kind, ...] = ("cross-entropy", "binary", "focal")
    near = (kind for kind in kinds if abs(value - expected(kind, classes)) < CLOSE)
    return next(near, None)


def summed(value: float, classes: int, count: int) -> bool:
    """Whether `value` is a sum over `count` images (or over all their outputs), not a mean."""
    if count < 2:
        return False
    return any(recognised(value / n, classes) is not None for n in (count, count * classes))


def of_zeros(loss: Loss, output: Tensor, y: Tensor) -> float:
    """The loss of scores that are all 0."""
    with torch.no_grad():
        return float(loss(torch.zeros_like(output), y))


def unsmoothed(loss: Loss) -> Loss:
    """The same loss without label smoothing, where it is torch's own; else itself."""
    if isinstance(loss, nn.CrossEntropyLoss) and loss.label_smoothing:
        return nn.CrossEntropyLoss(
            weight=loss.weight, ignore_index=loss.ignore_index, reduction=loss.reduction
        )
    return loss
