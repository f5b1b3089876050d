"""The line between old and new weights (WiSE-FT, Wortsman et al. 2022): how the accuracy on the
user's images and what the network knew before change from one end to the other.

The old end is the pretrained trunk with the head that training began with; the new end is the run.
Every point is read twice: with the statistics of BatchNorm interpolated as the weights are, and
estimated anew on the training images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune import metrics
from finetune.evaluation import contenders
from finetune.evaluation.contenders import Contender, Selection
from finetune.heads.head import Head, softmax
from finetune.metrics import Estimate, Paired
from finetune.network import Tap
from finetune.training import replay

if TYPE_CHECKING:
    from finetune.training.replay import Kept, Moving

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Blocks = dict[Tap, Floats]

ALPHAS = tuple(i / 10 for i in range(11))  # shares of the new weights
INTERPOLATED, REESTIMATED = "interpolated", "re-estimated"


@dataclass(frozen=True)
class Point:
    """A place on the line: `alpha` is the share of the new weights, `norms` what was done with the
    statistics of BatchNorm.

    `accuracy` and `log_loss` (nats, after one fitted temperature) are of the labelled images of the
    user, `scores` (n, C) what was said of them; `retention` is the share of the other images on
    which it says what it is compared with.
    """

    alpha: float
    norms: str
    accuracy: Estimate
    log_loss: float
    temperature: float
    retention: Estimate | None
    scores: Floats

    def to_json(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha,
            "norms": self.norms,
            "accuracy": self.accuracy.to_json(),
            "log_loss": self.log_loss,
            "retention": self.retention.to_json() if self.retention else None,
        }


@dataclass(frozen=True)
class Ends:
    """Both ends of the line: tensors of the stages that moved, and the heads on the same taps."""

    old: replay.Tensors
    new: replay.Tensors
    start: Head
    head: Head

    def tensors(self, alpha: float) -> replay.Tensors:
        return replay.mixed((self.old, self.new), (1 - alpha, alpha))

    def head_at(self, alpha: float, temperature: float = 1.0) -> Head:
        old, new = self.start, self.head
        return Head(
            new.taps,
            new.classes,
            ((1 - alpha) * old.weight + alpha * new.weight).astype(np.float32),
            ((1 - alpha) * old.bias + alpha * new.bias).astype(np.float32),
            normalize=new.normalize,
            temperature=temperature,
            kind=new.kind,
        )


def line(
    moving: Moving,
    ends: Ends,
    labelled: Kept,
    labels: Ints,
    training: Kept,
    retained: Callable[[], Estimate | None],
    tick: Callable[[], None] = lambda: None,
) -> tuple[Point, ...]:
    """The points of the line; `retained` says how much is retained with the weights that `moving`
    has at the moment. Afterwards, `moving` has the new weights."""
    points = []
    for alpha in ALPHAS:
        place(moving, ends, alpha, INTERPOLATED, training)
        points.append(_point(moving, ends, alpha, INTERPOLATED, labelled, labels, retained))
        if moving.reestimate(training):
            points.append(_point(moving, ends, alpha, REESTIMATED, labelled, labels, retained))
        tick()
    moving.put(ends.new)
    return tuple(points)


def place(moving: Moving, ends: Ends, alpha: float, norms: str, training: Kept) -> None:
    """Give `moving` the weights of a point."""
    moving.put(ends.tensors(alpha))
    if norms == REESTIMATED:
        moving.reestimate(training)


def _point(
    moving: Moving,
    ends: Ends,
    alpha: float,
    norms: str,
    labelled: Kept,
    labels: Ints,
    retained: Callable[[], Estimate | None],
) -> Point:
    head = ends.head_at(alpha)
    blocks = moving.read(labelled)
    scores = head.scores([blocks[tap] for tap in head.taps])
    temperature = metrics.fit_temperature(scores, labels)
    return Point(
        alpha,
        norms,
        metrics.accuracy(labels, scores.argmax(1)),
        float(metrics.log_losses(labels, softmax(scores, temperature)).mean()),
        temperature,
        retained(),
        scores,
    )


def choose(points: Sequence[Point], labels: Ints, by_retention: bool = False) -> Point:
    """The most accurate point; the log loss decides between equals, then the older weights.

    With `by_retention`, of all points of which this one is not shown to be better
    (`contenders.is_better`: one paired standard error), the one that retains most.
    """
    best = max(points, key=lambda p: (p.accuracy.value, -p.log_loss, -p.alpha))
    if not by_retention:
        return best
    chosen_by = Selection(np.arange(len(labels)), labels, None, "")
    rival = _contender(best)
    able = [p for p in points if not contenders.is_better(rival, _contender(p), chosen_by)]
    return max(
        able, key=lambda p: (p.retention.value if p.retention else 0.0, p.accuracy.value, p.alpha)
    )


def _contender(point: Point) -> Contender:
    return Contender(
        kind="line",
        name=str(point.alpha),
        scores=contenders.log_probabilities(point.scores, point.temperature),
    )


def against_new(points: Sequence[Point], chosen: Point, labels: Ints) -> Paired:
    """The chosen point against the run as it is, image by image."""
    new = next(p for p in points if p.alpha == 1 and p.norms == INTERPOLATED)
    return metrics.paired(labels, new.scores.argmax(1), chosen.scores.argmax(1))


def linear_cka(x: NDArray[Any], y: NDArray[Any]) -> float:
    """Linear centred kernel alignment of two sets of features of the same images, `(n, p)` and
    `(n, q)`: ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) of centred columns (Kornblith et al. 2019). 1 where one is a
    rotation and scaling of the other; nan where one does not vary. With fewer images than features
    it is too high."""
    x = np.asarray(x, np.float64) - np.mean(x, axis=0, dtype=np.float64)
    y = np.asarray(y, np.float64) - np.mean(y, axis=0, dtype=np.float64)
    if len(x) < max(x.shape[1], y.shape[1]):  # the same number from the smaller products
        first, second = x @ x.T, y @ y.T
        cross = float((first * second).sum())
        own = float(np.linalg.norm(first) * np.linalg.norm(second))
    else:
        cross = float(np.square(y.T @ x).sum())
        own = float(np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    return cross / own if own else float("nan")
