"""How much each member of an average counts: the same, or what the images that choose say.

The average is the weighted mean of calibrated log-probabilities (a geometric mean of
probabilities), as in `ensemble.Ensemble`. Weights are chosen on images that no member was fitted
on; whether they are better than equal ones is judged on folds of these images that did not choose
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune import metrics
from finetune.evaluation import contenders
from finetune.heads.head import softmax

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

WAYS = ("equal", "learned", "greedy")
SMALLEST = 1e-30  # probabilities below count as this, as in `Ensemble.predict`
STEPS = 500  # of the descent that learns weights
RATE = 0.5  # of that descent
DRAWS = 25  # members that the greedy choice draws at most, with replacement
NOTHING = 0.005  # a share below this is left out


@dataclass(frozen=True)
class Weighing:
    """The weight of each member, `(k,)`, that sum to 1, and in words how they were found."""

    weights: tuple[float, ...]
    words: str


def combine(said: Sequence[NDArray[Any]], weights: Sequence[float]) -> NDArray[np.float32]:
    """The weighted geometric mean of probabilities `(n, C)` each, normalised, `(n, C)`."""
    total = sum(w * logs for w, logs in zip(weights, map(_logs, said), strict=True) if w)
    return softmax(np.asarray(total))


def weigh(
    way: str, said: Sequence[NDArray[Any]], y: Ints, seed: int = 0, words: str = "images"
) -> Weighing:
    """The weights that `way` (learned or greedy) finds on probabilities `(n, C)` of the images that
    choose, and whether they beat equal ones on folds of these that did not choose them."""
    logs = np.stack([_logs(one) for one in said])
    found = _find(way)(logs, y)
    fold = contenders.folds(len(y), None, seed)
    equal = np.full(len(logs), 1 / len(logs))
    gains = np.zeros(len(y))
    for k in np.unique(fold):
        held = fold == k
        if (~held).any():
            inside = _find(way)(logs[:, ~held], y[~held])
            gains[held] = _losses(logs[:, held], y[held], equal) - _losses(
                logs[:, held], y[held], inside
            )
    gain, error = float(gains.mean()), float(gains.std() / np.sqrt(len(gains)))
    sign = "lower" if gain >= 0 else "higher"
    shown = "better than" if gain > error else "not shown to be better than"
    return Weighing(
        tuple(map(float, found)),
        f"{way} on {len(y)} {words}: log loss {sign} by {abs(gain):.3f} ± {error:.3f} than with "
        f"equal weights, on folds that did not choose them: {shown} equal weights",
    )


def equal(count: int) -> Weighing:
    return Weighing((1 / count,) * count, "every run counts the same")


def _find(way: str) -> Callable[[Floats, Ints], Floats]:
    return {"learned": learned, "greedy": greedy}[way]


def learned(logs: Floats, y: Ints) -> Floats:
    """The weights on the simplex with the least log loss of the average; `logs` is `(k, n, C)`.

    The loss is convex in the weights; exponentiated gradient descent (Kivinen & Warmuth 1997) from
    equal ones stays on the simplex.
    """
    weights = np.full(len(logs), 1 / len(logs))
    true = logs[:, np.arange(len(y)), y]
    best, least = weights, np.inf
    for _ in range(STEPS):
        mixed = np.tensordot(weights, logs, 1)
        likely = np.exp(mixed - mixed.max(1, keepdims=True))
        likely /= likely.sum(1, keepdims=True)
        loss = float(_losses(logs, y, weights).mean())
        if loss < least:
            best, least = weights, loss
        slope = (np.einsum("knc,nc->kn", logs, likely) - true).mean(1)
        weights = weights * np.exp(-RATE * (slope - slope.min()))
        weights /= weights.sum()
    return _rounded(best)


def greedy(logs: Floats, y: Ints) -> Floats:
    """Caruana et al. (2004): begin with the member of the least log loss, draw the one that lowers
    the loss of the average most, again and again, with replacement, as long as one lowers it."""
    counts = np.zeros(len(logs))
    least = np.inf
    for _ in range(DRAWS):
        losses = [
            float(_losses(logs, y, (counts + one) / (counts.sum() + 1)).mean())
            for one in np.eye(len(logs))
        ]
        if min(losses) >= least - 1e-9:
            break
        least = min(losses)
        counts[int(np.argmin(losses))] += 1
    return np.asarray(counts / counts.sum())


def _rounded(weights: Floats) -> Floats:
    kept = np.where(weights < NOTHING, 0.0, weights)
    return np.asarray(kept / kept.sum())


def _logs(probabilities: NDArray[Any]) -> Floats:
    return np.log(np.maximum(np.asarray(probabilities, dtype=np.float64), SMALLEST))


def _losses(logs: Floats, y: Ints, weights: Floats) -> Floats:
    """The log loss of the average, an image each, `(n,)`."""
    mixed = softmax(np.tensordot(weights, logs, 1))
    return metrics.log_losses(y, mixed)
