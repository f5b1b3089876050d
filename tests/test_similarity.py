"""Similarity: the distance by hand, the words, and the order of real images."""

from __future__ import annotations

import numpy as np
import pytest

from finetune import similarity


def layer(
    mean: list[float], var: list[float], eps: float = 0.0
) -> tuple[np.ndarray, np.ndarray, float]:
    return np.array(mean), np.array(var), eps


def moments(mean: list[float], var: list[float]) -> np.ndarray:
    return np.concatenate([mean, np.array(var) + np.array(mean) ** 2])


def test_the_distance_of_the_training_statistics_to_themselves_is_zero() -> None:
    """Images with the moments that BatchNorm remembers are at distance 0."""
    assert similarity.distance(
        moments([1.0, -2.0], [4.0, 9.0]), [layer([1.0, -2.0], [4.0, 9.0])]
    ) == pytest.approx(0)


def test_the_distance_is_the_median_over_channels_then_over_layers() -> None:
    """By hand: a shift of one deviation gives 1, a doubled deviation gives 1, and medians are
    taken."""
    first = layer([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    shifted = moments([1.0, 0.0, 2.0], [1.0, 4.0, 1.0])  # channels: 1, 1, 4 → median 1
    second = layer([0.0], [1.0])
    far = moments([3.0], [1.0])  # 9

    assert similarity.distance(shifted, [first]) == pytest.approx(1)
    assert similarity.distance(np.concatenate([shifted, far]), [first, second]) == pytest.approx(
        (1 + 9) / 2
    )


def test_a_dead_channel_does_not_divide_by_zero() -> None:
    """A channel whose running variance is 0 is compared with BatchNorm's own eps."""
    value = similarity.distance(moments([0.0], [0.0]), [layer([0.0], [0.0], eps=1e-3)])

    assert value == pytest.approx(0)


def test_knn_of_clear_clusters_says_near_and_of_noise_says_far() -> None:
    """The second opinion follows leave-one-out k-NN accuracy, measured against chance."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(4), 20)
    clear = np.eye(4)[y] * 5 + rng.normal(size=(80, 4))
    first = similarity.Similarity("near", 0.03, 0.02, 0.04, 80, None, "unknown", ())

    assert similarity.second_opinion(first, clear.astype(np.float32), y).knn_word == "near"
    assert (
        similarity.second_opinion(first, rng.normal(size=(80, 4)).astype(np.float32), y).knn_word
        == "far"
    )


def test_a_disagreement_of_the_two_opinions_is_said() -> None:
    """Images that look far while k-NN is right get a note that says so."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(4), 20)
    clear = (np.eye(4)[y] * 5 + rng.normal(size=(80, 4))).astype(np.float32)
    first = similarity.Similarity("far", 0.4, 0.3, 0.5, 80, None, "unknown", ())

    assert any("disagree" in note for note in similarity.second_opinion(first, clear, y).notes)


def test_an_interval_across_two_words_is_said() -> None:
    """A distance near a threshold is not sold as certain."""
    assert similarity._border(0.09, 0.07, 0.12) != ()
    assert similarity._border(0.03, 0.02, 0.04) == ()
