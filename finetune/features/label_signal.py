"""Whether labels have anything to do with features: nearest neighbours against shuffled labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune.check import Check
from finetune.features import knn

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

NEIGHBOURS = 5
ROWS = 2000  # images that are looked at
ASKED = 40  # neighbours that are looked up, so that some of another group are left
SHUFFLES = 200
CHANCE = 0.01  # probability of such an accuracy with shuffled labels: below, labels mean something
WEAK = 0.10  # share of the way from chance to 1: below, they hardly do
MODEST = 0.25  # the same: what enough images must be able to show before labels are called wrong
NAME = "labels"


@dataclass(frozen=True)
class Signal:
    """Leave-one-out accuracy of `n` images, and that of shuffled labels: its mean, its standard
    deviation, its largest value, and the permutation p-value (Phipson & Smyth 2010: never 0)."""

    n: int
    accuracy: float
    mean: float
    spread: float
    largest: float
    p: float

    @property
    def would_show(self) -> bool:
        """Whether so many images would show labels that mean a little (`MODEST`)."""
        return MODEST * (1 - self.mean) > 3 * self.spread

    @property
    def share(self) -> float:
        """How much of the way from chance to perfection."""
        return (self.accuracy - self.mean) / max(1e-9, 1 - self.mean)


def measure(features: Floats, y: Ints, groups: Ints, *, seed: int = 0) -> Signal | None:
    """Vote of the nearest neighbours (cosine) of other groups, `NEIGHBOURS` at most, for a seeded
    sample of the rows; None where there are too few. `features` (n, d), `y` and `groups` (n,)."""
    rng = np.random.default_rng([seed, 13])
    rows = np.sort(rng.permutation(len(y))[:ROWS])
    if len(rows) <= NEIGHBOURS or len(np.unique(y[rows])) < 2:
        return None
    _, labels = np.unique(y[rows], return_inverse=True)
    _, found = knn.neighbours(np.asarray(features[rows]), ASKED)
    near = _of_others(found, groups[rows])
    accuracy = _accuracy(labels, near)
    shuffled = [_accuracy(rng.permutation(labels), near) for _ in range(SHUFFLES)]
    p = (1 + sum(one >= accuracy for one in shuffled)) / (1 + SHUFFLES)
    mean, spread = float(np.mean(shuffled)), float(np.std(shuffled))
    return Signal(len(rows), accuracy, mean, spread, max(shuffled), p)


def _of_others(found: Ints, groups: Ints) -> Ints:
    """The first `NEIGHBOURS` positions of each row that are of another group, −1 where there are
    no more: copies of an image, and what was taken together, prove nothing."""
    result = np.full((len(found), NEIGHBOURS), -1)
    other = groups[found] != groups[:, None]
    rank = np.cumsum(other, axis=1) - 1
    take = other & (rank < NEIGHBOURS)
    row, column = np.nonzero(take)
    result[row, rank[row, column]] = found[row, column]
    return result


def _accuracy(y: Ints, near: Ints) -> float:
    votes = np.zeros((len(y), int(y.max()) + 1))
    for j in range(near.shape[1]):
        known = np.flatnonzero(near[:, j] >= 0)
        # the nearest decides a tie
        votes[known, y[near[known, j]]] += 1 + 1e-3 * (near.shape[1] - j)
    return float(((votes.argmax(1) == y) & (votes.max(1) > 0)).mean())


def judged(signal: Signal | None) -> Check:
    """Whether the labels say more of the images than shuffled ones would."""
    if signal is None:
        why = "too few images, or one class alone"
        return Check(NAME, "skip", "not measured", why)
    value = (
        f"the nearest neighbours are right for {signal.accuracy:.1%} of {signal.n} images; with "
        f"shuffled labels for {signal.mean:.1%}, {signal.largest:.1%} at most in {SHUFFLES} "
        f"shuffles (p = {signal.p:.3f})"
    )
    look = "look at some images and their labels: a table that was sorted, or names out of step?"
    if signal.p > CHANCE and not signal.would_show:
        meaning = (
            "nothing can be said of the labels: too few images, and hard ones for this network"
        )
        return Check(NAME, "warn", value, meaning, look)
    if signal.p > CHANCE:
        meaning = "the labels say nothing about the images that this network can see"
        return Check(NAME, "fail", value, meaning, look)
    if signal.share < WEAK:
        meaning = "the labels have little to do with what this network sees"
        return Check(NAME, "warn", value, meaning, look)
    return Check(NAME, "pass", value, "the labels go with the images")
