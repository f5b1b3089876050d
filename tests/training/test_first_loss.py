"""What scores of zero cost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from finetune.training import first_loss

Y = torch.tensor([0, 1, 2, 3, 1, 0])
ZEROS = torch.zeros(6, 5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_of_zeros_is_ln_c_whatever_the_smoothing(smoothing: float) -> None:
    """Torch's own loss agrees with the formula."""
    loss = nn.CrossEntropyLoss(label_smoothing=smoothing)

    assert first_loss.expected("cross-entropy", 5) == pytest.approx(loss(ZEROS, Y).item())


def test_binary_and_focal_losses_of_zeros_follow_their_formulas() -> None:
    """ln 2 for binary cross-entropy, (1 − 1/C)² ln C for the focal loss with γ = 2."""
    target = nn.functional.one_hot(Y, 5).float()
    binary = nn.functional.binary_cross_entropy_with_logits(ZEROS, target)
    p = torch.softmax(ZEROS, 1)[torch.arange(6), Y]
    focal = -((1 - p) ** 2 * p.log()).mean()

    assert first_loss.expected("binary", 5) == pytest.approx(binary.item())
    assert first_loss.expected("focal", 5) == pytest.approx(focal.item())
    assert first_loss.expected("focal", 5) == pytest.approx(0.64 * math.log(5))


@pytest.mark.parametrize(("classes", "low"), [(2, 0.199), (10, 0.500), (100, 0.778)])
def test_smoothing_sets_a_floor(classes: int, low: float) -> None:
    """With a smoothing of 0.1 no cross-entropy is lower: why the overfit check leaves it out."""
    scores = torch.full((1, classes), 0.0)
    own = 0.9 + 0.1 / classes
    scores[0, 0] = math.log(own / ((1 - own) / (classes - 1)))
    best = nn.functional.cross_entropy(scores, torch.tensor([0]), label_smoothing=0.1)

    assert first_loss.floor(classes, 0.1) == pytest.approx(low, abs=1e-3)
    assert first_loss.floor(classes, 0.1) == pytest.approx(best.item(), abs=1e-5)


def test_sums_are_told_from_means() -> None:
    """A sum over the images is recognised, a mean is not called one."""
    whole = nn.CrossEntropyLoss(reduction="sum")(ZEROS, Y).item()

    assert first_loss.summed(whole, 5, 6)
    assert not first_loss.summed(whole / 6, 5, 6)
    assert first_loss.recognised(whole, 5) is None
    assert "cross-entropy" == first_loss.recognised(whole / 6, 5)
