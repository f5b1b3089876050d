"""Similarity: the distance by hand, the words, and the order of real images."""

from __future__ import annotations

import numpy as np
import pytest

from finetune import files, similarity
from finetune.backbones.catalog import Named
from finetune.backbones.stages import Backbone


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

    (note,) = similarity.second_opinion(first, clear, y).notes
    assert "disagree" in note
    assert note.endswith("nothing needs to be done")


def test_an_interval_across_two_words_is_said() -> None:
    """A distance near a threshold is not sold as certain."""
    assert similarity._border(0.09, 0.07, 0.12) != ()
    assert similarity._border(0.03, 0.02, 0.04) == ()


def test_the_interval_holds_the_distance_of_few_images() -> None:
    """A resample of few images is farther away than they are; the interval is moved back by that,
    and its width stays."""
    rng = np.random.default_rng(0)
    layers = [layer([0.0] * 50, [1.0] * 50)]
    images = rng.normal(0.5, 1.0, (12, 50))
    rows = np.concatenate([images, images**2], axis=1)
    value = similarity.distance(rows.mean(0), layers)
    share = rng.multinomial(12, np.full(12, 1 / 12), size=500) / 12
    spread = [similarity.distance(drawn, layers) for drawn in share @ rows]
    raw = np.quantile(spread, [0.05, 0.95])
    low, high = similarity._interval(value, spread)

    assert low < value < high
    assert high - low == pytest.approx(raw[1] - raw[0])
    assert low < raw[0]
    assert (0.2, 0.2) == similarity._interval(0.2, [0.0, 0.0, 0.0])


def test_the_ruler_is_made_once(tiny: Backbone) -> None:
    """Its statistics are kept: the next process does not make the network for them, and has the
    same bits."""
    first = similarity._layers(Named(tiny.network, lambda: tiny))
    again = similarity._layers(Named(tiny.network, lambda: pytest.fail("it was made again")))

    assert len(first) == len(again) > 0
    for (mean, var, eps), (mean2, var2, eps2) in zip(first, again, strict=True):
        assert (mean.tobytes(), var.tobytes(), eps) == (mean2.tobytes(), var2.tobytes(), eps2)
    (path,) = files.cache_dir("networks").glob(f"statistics-{tiny.network.digest[:24]}.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    assert len(first) == len(similarity._layers(Named(tiny.network, lambda: tiny)))
