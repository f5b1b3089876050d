"""How much each member of an average counts."""

from __future__ import annotations

import numpy as np
import pytest

from finetune import metrics
from finetune.combining import averaging
from finetune.heads.head import softmax

RNG = np.random.default_rng(0)
Y = RNG.integers(0, 3, 200)


def member(strength: float) -> np.ndarray:
    """Probabilities that know the truth as well as `strength` says."""
    scores = RNG.normal(size=(len(Y), 3))
    scores[np.arange(len(Y)), Y] += strength
    return softmax(scores)


GOOD, FAIR, NOISE = member(2.0), member(1.5), softmax(RNG.normal(size=(len(Y), 3)) * 3)


def loss(weights: tuple[float, ...]) -> float:
    return float(metrics.log_losses(Y, averaging.combine((GOOD, FAIR, NOISE), weights)).mean())


def test_it_is_the_geometric_mean_computed_by_hand() -> None:
    """The product of powers, normalised, to 1e-6; a weight of 0 leaves a member out."""
    product = GOOD.astype(float) ** 0.3 * FAIR.astype(float) ** 0.7
    found = averaging.combine((GOOD, FAIR, NOISE), (0.3, 0.7, 0.0))

    assert product / product.sum(1, keepdims=True) == pytest.approx(found, abs=1e-6)


def test_an_average_of_averages_is_the_flat_one() -> None:
    """The average of (a, b) and c is that of a, b and c with shares of shares."""
    inner = averaging.combine((GOOD, FAIR), (0.5, 0.5))
    nested = averaging.combine((inner, NOISE), (0.6, 0.4))

    assert nested == pytest.approx(
        averaging.combine((GOOD, FAIR, NOISE), (0.3, 0.3, 0.4)), abs=1e-6
    )


@pytest.mark.parametrize("way", ["learned", "greedy"])
def test_found_weights_are_shares_that_beat_equal_ones_where_a_member_is_noise(way: str) -> None:
    """They sum to 1, none is negative, the noise gets least, the loss is below that of equal
    weights, and the words say that folds which did not choose confirm it."""
    found = averaging.weigh(way, (GOOD, FAIR, NOISE), Y)

    assert 1 == pytest.approx(sum(found.weights))
    assert min(found.weights) >= 0
    assert found.weights[2] == min(found.weights) < 0.05
    assert loss(found.weights) < loss((1 / 3, 1 / 3, 1 / 3)) - 0.05
    assert found.words.endswith(": better than equal weights")


def test_learned_weights_have_the_least_loss_of_a_grid() -> None:
    """No pair of weights on a fine grid is better: the descent has arrived."""
    logs = np.log(np.stack([GOOD, FAIR]).astype(float))
    first, second = averaging.learned(logs, Y)
    grid = [loss((w, 1 - w, 0.0)) for w in np.linspace(0, 1, 101)]

    assert loss((first, second, 0.0)) <= min(grid) + 1e-4


def test_what_chance_gives_is_not_called_better() -> None:
    """Equally good members: the words do not claim a gain."""
    found = averaging.weigh("learned", (GOOD, GOOD[::1].copy()), Y)

    assert "not shown to be better than equal weights" in found.words
