"""The line between old and new weights, its numbers and its choice."""

from __future__ import annotations

import numpy as np
import pytest

from finetune import metrics
from finetune.combining import weight_line
from finetune.combining.weight_line import INTERPOLATED, Ends, Point
from finetune.heads.head import Head
from finetune.metrics import Estimate
from finetune.network import Tap

RNG = np.random.default_rng(0)


def test_cka_is_one_up_to_rotation_and_scale() -> None:
    """And shifted, and with other widths; two independent sets of many images are near 0."""
    x = RNG.normal(size=(400, 8))
    turn, _ = np.linalg.qr(RNG.normal(size=(8, 8)))

    assert 1 == pytest.approx(weight_line.linear_cka(x, 3 * x @ turn + 5))
    assert weight_line.linear_cka(x, RNG.normal(size=(400, 5))) < 0.05
    assert np.isnan(weight_line.linear_cka(x, np.ones((400, 3))))


def test_both_ways_to_compute_cka_agree() -> None:
    """By products of features, and, with fewer images than features, by products of images."""
    x, y = RNG.normal(size=(30, 40)), RNG.normal(size=(30, 20))
    first, second = x - x.mean(0), y - y.mean(0)
    by_features = np.square(second.T @ first).sum() / (
        np.linalg.norm(first.T @ first) * np.linalg.norm(second.T @ second)
    )

    assert by_features == pytest.approx(weight_line.linear_cka(x, y))


def test_the_ends_of_the_line_are_both_heads_to_the_last_bit() -> None:
    """And the middle is their mean."""
    start, new = (
        Head(
            (Tap("pooled"),),
            ("a", "b"),
            *(RNG.normal(size=s).astype(np.float32) for s in ((2, 3), 2)),
        )
        for _ in range(2)
    )
    ends = Ends({}, {}, start, new)

    assert np.array_equal(start.weight, ends.head_at(0.0).weight)
    assert np.array_equal(new.bias, ends.head_at(1.0).bias)
    assert (start.weight + new.weight) / 2 == pytest.approx(ends.head_at(0.5).weight, abs=1e-6)


def point(alpha: float, right: int, retention: float, n: int = 100) -> Point:
    """A point that names the first `right` of `n` images of class 0 right."""
    scores = np.zeros((n, 2), np.float32)
    scores[:right, 0], scores[right:, 1] = 2, 2
    y = np.zeros(n, np.int64)
    loss = float(metrics.log_losses(y, weight_line.softmax(scores)).mean())
    kept = Estimate(retention, retention, retention, n, "")
    return Point(
        alpha, INTERPOLATED, metrics.accuracy(y, scores.argmax(1)), loss, 1.0, kept, scores
    )


def test_the_most_accurate_point_is_chosen_and_retention_decides_between_equals() -> None:
    """A point that is clearly worse is not chosen, however much it retains."""
    points = [point(0.0, 60, 1.0), point(0.5, 90, 0.8), point(1.0, 90, 0.3)]
    y = np.zeros(100, np.int64)

    assert points[1] is weight_line.choose(points, y)
    assert points[1] is weight_line.choose(points, y, by_retention=True)
    near = [*points[:1], point(0.5, 90, 0.8), point(1.0, 91, 0.3)]
    assert near[2] is weight_line.choose(near, y)
    assert near[1] is weight_line.choose(near, y, by_retention=True)
