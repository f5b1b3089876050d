"""Labels against shuffled labels."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.features import label_signal

N, C = 120, 4


def clusters(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features in four clusters that overlap a little, and their labels."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, C, N)
    return (rng.normal(size=(N, 8)) + 2 * np.eye(C, 8)[y]).astype(np.float32), y


def test_true_labels_pass() -> None:
    """Far above every shuffle."""
    X, y = clusters()
    check = label_signal.judged(label_signal.measure(X, y, np.arange(N)))

    assert "pass" == check.status
    assert "p = 0.005" in check.value


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_labels_fail(seed: int) -> None:
    """They are no better than other shuffles."""
    X, y = clusters(seed)
    signal = label_signal.measure(X, np.random.default_rng(seed).permutation(y), np.arange(N))

    assert "fail" == label_signal.judged(signal).status


def test_copies_in_a_group_prove_nothing() -> None:
    """Each image twice, under the same random label: the copies find each other, and are not
    asked."""
    X, y = clusters()
    y = np.random.default_rng(1).permutation(y)
    twice, labels = np.concatenate([X, X]), np.concatenate([y, y])
    groups = np.concatenate([np.arange(N)] * 2)
    alone = label_signal.measure(twice, labels, np.arange(2 * N))
    grouped = label_signal.measure(twice, labels, groups)

    assert alone is not None
    assert grouped is not None
    assert "pass" == label_signal.judged(alone).status
    assert "fail" == label_signal.judged(grouped).status


def test_the_null_is_chance() -> None:
    """The mean of shuffles is near the share of pairs of one class, and p is never 0."""
    X, y = clusters()
    signal = label_signal.measure(X, y, np.arange(N))

    assert signal is not None
    assert signal.mean == pytest.approx(1 / C, abs=0.08)
    assert 0 < signal.p <= 1
    assert signal.mean < signal.largest < signal.accuracy


def test_too_few_images_are_skipped() -> None:
    """With words instead of a number."""
    X, y = clusters()

    assert label_signal.measure(X[:4], y[:4], np.arange(4)) is None
    assert label_signal.measure(X, np.zeros(N, np.int64), np.arange(N)) is None
    assert "skip" == label_signal.judged(None).status


def test_few_images_at_chance_are_only_warned_of() -> None:
    """Thirty hard images cannot show that labels mean nothing."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(30, 8)).astype(np.float32), np.arange(30) % 2
    check = label_signal.judged(label_signal.measure(X, y, np.arange(30)))

    assert "warn" == check.status
    assert "too few images" in check.meaning
