"""The models that may ship, side by side on images that none of them was fitted on, and the rule
that chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune import metrics
from finetune.metrics import Estimate, Paired

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

FOLDS = 5  # on which a temperature is fitted, to calibrate the images of the other
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the SVM in an average
# selection images: fewer cannot choose a weight, and both members count the same
CHOOSES = 200
DEARER = 1.5  # times the milliseconds per image, from which a gain must show beyond its noise


@dataclass(frozen=True)
class Selection:
    """The images that choose between contenders, by position: `groups` belong together, `words`
    say what they are."""

    index: Ints
    labels: Ints
    groups: Ints | None
    words: str

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, kw_only=True, eq=False)
class Contender:
    """A model that may ship. `scores` (n, C) are its calibrated log-probabilities of the selection
    images; `members` the weights of the contenders that it averages, by kind; `passes` the networks
    that an image goes through; `seconds` what fitting it took; `doubt` why it cannot ship."""

    kind: str  # svm | fine-tuned | average
    name: str
    scores: Floats
    seconds: float = 0.0
    passes: int = 1
    members: dict[str, float] = field(default_factory=dict)
    doubt: str = ""

    def losses(self, y: Ints) -> NDArray[np.float64]:
        """The log loss of every selection image, in nats."""
        return -self.scores[np.arange(len(y)), y].astype(np.float64)

    def right(self, y: Ints) -> NDArray[np.bool_]:
        return np.asarray(self.scores.argmax(1) == y)

    def to_json(self, chosen: Choice) -> dict[str, Any]:
        """Its row of contenders.json, but for what the test part says."""
        y, groups = chosen.selection.labels, chosen.selection.groups
        accuracy = metrics.accuracy(y, self.scores.argmax(1), groups)
        return {
            "kind": self.kind,
            "name": self.name,
            "shipped": self is chosen.winner,
            "would_ship": self is chosen.by_rule,
            "members": self.members,
            "selection": {
                "accuracy": accuracy.to_json(),
                "log_loss": float(self.losses(y).mean()),
                "images": chosen.selection.words,
            },
            "seconds": self.seconds,
            "passes": self.passes,
        }


@dataclass(frozen=True)
class Choice:
    """What was chosen, and from what: `winner` ships, `by_rule` is what the rule alone would ship.
    `pair` compares the winner, or the best rival of a winning
    SVM, with the SVM; `because` says why in a sentence."""

    winner: Contender
    by_rule: Contender
    contenders: tuple[Contender, ...]
    selection: Selection
    pair: Paired | None
    because: str


def log_probabilities(scores: NDArray[Any], temperature: float = 1.0) -> Floats:
    """Row-wise log-softmax of `scores / temperature`, `(n, C)`."""
    z = np.asarray(scores, dtype=np.float64) / temperature
    z -= z.max(axis=1, keepdims=True)
    result: Floats = (z - np.log(np.exp(z).sum(axis=1, keepdims=True))).astype(np.float32)
    return result


def folds(n: int, groups: Ints | None, seed: int) -> Ints:
    """A fold for each of `n` images, whole groups together, `(n,)`."""
    unit = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    order = np.random.default_rng([seed, 11]).permutation(int(unit.max(initial=0)) + 1)
    return np.asarray(order[unit] % FOLDS, dtype=np.int64)


def calibrated(scores: NDArray[Any], selection: Selection, seed: int) -> tuple[Floats, float]:
    """Log-probabilities `(n, C)`, each fold's with the temperature of the others, so that the
    images that judge have not fitted it; and the temperature of all."""
    y, fold = selection.labels, folds(len(selection), selection.groups, seed)
    result = np.empty(np.shape(scores), np.float32)
    for k in np.unique(fold):
        held = fold == k
        known = ~held if (~held).any() else held
        result[held] = log_probabilities(
            scores[held], metrics.fit_temperature(scores[known], y[known])
        )
    return result, metrics.fit_temperature(scores, y)


def average(first: Contender, second: Contender, selection: Selection, seed: int) -> Contender:
    """The weighted mean of two contenders' log-probabilities (a geometric mean of probabilities).

    The weight is one half; with `CHOOSES` selection images or more another one of `WEIGHTS` takes
    its place where it is better by more than a paired standard error of the log loss, judged on
    folds that did not choose it.
    """
    y, scores = selection.labels, {w: _mixed(first, second, w) for w in WEIGHTS}
    losses = {w: -one[np.arange(len(y)), y] for w, one in scores.items()}

    def weight(rows: NDArray[np.bool_]) -> float:
        best = min(WEIGHTS, key=lambda w: float(losses[w][rows].mean()))
        gain = losses[0.5][rows] - losses[best][rows]
        return best if gain.mean() > gain.std() / np.sqrt(len(gain)) else 0.5

    mixed, chosen = scores[0.5], 0.5
    if len(selection) >= CHOOSES:
        fold = folds(len(selection), selection.groups, seed)
        mixed = np.empty_like(mixed)
        for k in range(FOLDS):
            mixed[fold == k] = scores[weight(fold != k)][fold == k]
        chosen = weight(np.ones(len(y), bool))
    return Contender(
        kind="average",
        name="the average of both",
        scores=mixed,
        seconds=first.seconds + second.seconds,
        passes=first.passes + second.passes,
        members={first.kind: chosen, second.kind: 1 - chosen},
        doubt="" if 0 < chosen < 1 else "one of its members has all the weight",
    )


def _mixed(first: Contender, second: Contender, weight: float) -> Floats:
    return log_probabilities(weight * first.scores + (1 - weight) * second.scores)


# ---------------------------------------------------------------------------------------- the rule


def choose(contenders: Sequence[Contender], selection: Selection, ship: str = "auto") -> Choice:
    """Which contender ships; the first, the SVM, where no other is shown to be better; and the one
    of the kind `ship` where that is not auto.

    A rival is better where its accuracy is higher by more than one paired standard error; or not
    lower, while its log loss is lower by more than one. Among the better ones the most accurate
    ships (the log loss decides between equals), but one that needs more than `DEARER` times the
    passes must be better in this sense than each cheaper one, too.
    """
    base, *rivals = contenders
    if not rivals:
        return Choice(base, base, tuple(contenders), selection, None, "nothing else was fitted")
    able = [one for one in rivals if not one.doubt]
    best = base
    for one in sorted(able, key=lambda one: one.passes):
        cheaper = [other for other in (base, *able) if one.passes > DEARER * other.passes]
        shown = all(is_better(one, other, selection) for other in (base, *cheaper))
        if shown and (best in cheaper or _rank(one, selection) > _rank(best, selection)):
            best = one
    by_rule = best
    if ship != "auto":
        best = next(one for one in contenders if one.kind == ship)
    rival = best if best is not base else max(rivals, key=lambda one: _rank(one, selection))
    because = _because(base, rival, best, selection)
    if ship != "auto":
        because += f", as policy.ship {ship} was asked for"
    pair = compared(base, rival, selection)
    return Choice(best, by_rule, tuple(contenders), selection, pair, because)


def compared(first: Contender, second: Contender, selection: Selection) -> Paired:
    """The accuracy of `second` against that of `first`, image by image."""
    y = selection.labels
    return metrics.paired(y, first.scores.argmax(1), second.scores.argmax(1), selection.groups)


def loss_gain(first: Contender, second: Contender, selection: Selection) -> tuple[float, float]:
    """By how much the log loss of `second` is lower, in nats, and the standard error of that, over
    groups where there are any."""
    y = selection.labels
    gain = first.losses(y) - second.losses(y)
    if selection.groups is not None:
        unit = np.unique(selection.groups, return_inverse=True)[1]
        centred = np.bincount(unit, gain - gain.mean())
        count = len(centred)
        spread = count / max(count - 1, 1) * float(centred @ centred)
        return float(gain.mean()), float(np.sqrt(spread)) / len(gain)
    return float(gain.mean()), float(gain.std(ddof=1) / np.sqrt(len(gain))) if len(
        gain
    ) > 1 else np.inf


def is_better(one: Contender, other: Contender, selection: Selection) -> bool:
    """Whether `one` is shown to be better than `other` on the selection images."""
    pair = compared(other, one, selection)
    gain, error = loss_gain(other, one, selection)
    clearly = pair.difference.value > pair.standard_error
    return bool(clearly or (pair.difference.value >= 0 and gain > error))


def _rank(one: Contender, selection: Selection) -> tuple[float, float]:
    y = selection.labels
    return float(one.right(y).mean()), -float(one.losses(y).mean())


def _because(base: Contender, shown: Contender, best: Contender, selection: Selection) -> str:
    pair, (gain, error) = compared(base, shown, selection), loss_gain(base, shown, selection)
    points = f"{100 * pair.difference.value:+.1f} points"
    word = "lower" if gain >= 0 else "higher"
    numbers = (
        f"{shown.name} against the SVM: {points} (one paired standard error is "
        f"{100 * pair.standard_error:.1f}), log loss {word} by {abs(gain):.3f} ± {error:.3f}, "
        f"on {len(selection)} {selection.words}"
    )
    if best is base:
        why = shown.doubt or "not shown to be better"
        return f"{numbers}: {why}, the SVM ships"
    return f"{numbers}: {best.name} ships"


def estimate(one: Contender, selection: Selection) -> Estimate:
    """The accuracy of a contender on the selection images, with its interval."""
    return metrics.accuracy(selection.labels, one.scores.argmax(1), selection.groups)
