"""How good a classifier is, and how sure that number: pure functions on arrays. No file, no model,
no torch.

Conventions, the same everywhere: `y` `(n,)` holds class indices, `predicted` `(n,)` too,
`probabilities` `(n, C)` rows that sum to 1. `groups` `(n,)` names what the images were taken of (a
patient, an animal, one photograph saved twice): images of one group are not independent, so
intervals resample whole groups. All intervals are 95 %.

Averages over classes (balanced accuracy, macro-F1) are taken over the classes that occur in `y`. A
class without test images has no recall, and counting it as 0 would punish the model for what was
never asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

Z = NormalDist().inv_cdf(0.975)
RESAMPLES = 1000
CALIBRATION_BINS = 15
SMALLEST_PROBABILITY = (
    1e-12  # a float32 softmax reaches 0, whose logarithm would drown every other image
)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, the number of images behind it, and the method of the
    interval."""

    value: float
    low: float
    high: float
    n: int
    method: str

    def to_json(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "n": self.n,
            "method": self.method,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Estimate:
        return cls(
            float(value["value"]),
            float(value["low"]),
            float(value["high"]),
            int(value["n"]),
            str(value["method"]),
        )


@dataclass(frozen=True)
class PerClass:
    """One value a class, each `(C,)`. Where nothing was predicted, precision is 0; where support is
    0, recall and F1 are 0."""

    precision: Floats
    recall: Floats
    f1: Floats
    support: Ints
    predicted: Ints


@dataclass(frozen=True)
class Paired:
    """Two classifiers on the same images. `difference` is the accuracy of the second minus that of
    the first.

    `standard_error` is the paired one, of that difference. `first_only` and `second_only` count the
    images that one alone got right; `p_value` asks how often chance would tell the two apart this
    clearly, by `test`.
    """

    difference: Estimate
    standard_error: float
    p_value: float
    test: str
    first_only: int
    second_only: int

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "difference": self.difference.to_json()}


# --- one number with its interval ---------------------------------------------------------------


def wilson(value: float, n: float) -> tuple[float, float]:
    """The Wilson score interval of a share `value` seen on `n` independent draws (Wilson 1927)."""
    centre = (value + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(value * (1 - value) / n + Z**2 / (4 * n**2))
    return max(0.0, min(value, centre - half)), min(1.0, max(value, centre + half))


def accuracy(
    y: Ints, predicted: Ints, groups: Sequence[Any] | NDArray[Any] | None = None
) -> Estimate:
    """The share of `predicted` that equals `y`: Wilson's interval, or a bootstrap over whole
    groups."""
    return share(np.asarray(y) == np.asarray(predicted), groups)


def share(right: NDArray[Any], groups: Sequence[Any] | NDArray[Any] | None = None) -> Estimate:
    """The share of true values in `right` `(n,)`: Wilson's interval, or a bootstrap over whole
    groups.

    Raises `UserError` where there is no image.
    """
    right = np.asarray(right, dtype=np.float64)
    _some(len(right))
    value, group = float(right.mean()), _groups(groups, len(right))
    if group is None:
        return Estimate(value, *wilson(value, len(right)), len(right), "wilson")
    sizes, hits = np.bincount(group), np.bincount(group, right)
    flat = bool(np.all(hits * len(right) == sizes * right.sum()))
    return _estimates(
        lambda weights: np.array([weights @ hits / (weights @ sizes)]), len(right), group, flat
    )[0]


def mean(values: NDArray[Any]) -> Estimate:
    """The mean of `values` `(n,)` in [0, 1]: a share where each is 0 or 1, else a bootstrap over
    them.

    Where all are equal, resampling cannot move the mean, and Wilson's interval stands in: no values
    in [0, 1] of that mean vary more than zeros and ones do. Raises `UserError` where there is no
    value.
    """
    values = np.asarray(values, dtype=np.float64)
    _some(len(values))
    if np.all((values == 0) | (values == 1)):
        return share(values)
    flat = bool(np.all(values == values[0]))
    return _estimates(
        lambda weights: np.array([weights @ values / weights.sum()]), len(values), None, flat
    )[0]


def top_k(y: Ints, probabilities: NDArray[Any], k: int) -> NDArray[np.bool_]:
    """Whether the true class is among the `k` most probable ones, `(n,)`.

    Equal probabilities are ranked by class index, so that `k = 1` is exactly `argmax`.
    """
    true = np.take_along_axis(probabilities, y[:, None], axis=1)
    earlier = np.arange(probabilities.shape[1])[None] < y[:, None]
    rank = (probabilities > true).sum(axis=1) + ((probabilities == true) & earlier).sum(axis=1)
    return np.asarray(rank < k)


def majority(y: Ints) -> float:
    """The accuracy of the best constant answer: the share of the most common class in `y`."""
    _some(len(y))
    return float(np.bincount(y).max() / len(y))


# --- classes ------------------------------------------------------------------------------------


def confusion(y: Ints, predicted: Ints, n_classes: int) -> Ints:
    """Counts `(C, C)`: row = true class, column = predicted class."""
    return np.bincount(
        np.asarray(y) * n_classes + np.asarray(predicted), minlength=n_classes**2
    ).reshape(n_classes, n_classes)


def per_class(counts: NDArray[Any]) -> PerClass:
    """Precision, recall, F1, support of every class from a confusion matrix `(C, C)`."""
    return _rates(np.diagonal(counts), counts.sum(axis=1), counts.sum(axis=0))


def balanced_accuracy(y: Ints, predicted: Ints, n_classes: int) -> float:
    """Mean recall over the classes that occur in `y`."""
    rates = per_class(confusion(y, predicted, n_classes))
    return float(rates.recall[rates.support > 0].mean())


def macro_f1(y: Ints, predicted: Ints, n_classes: int) -> float:
    """Mean F1 over the classes that occur in `y`."""
    rates = per_class(confusion(y, predicted, n_classes))
    return float(rates.f1[rates.support > 0].mean())


def _rates(hits: NDArray[Any], support: NDArray[Any], predicted: NDArray[Any]) -> PerClass:
    def over(numerator: NDArray[Any], denominator: NDArray[Any]) -> Floats:
        return np.divide(numerator, denominator, out=np.zeros(len(hits)), where=denominator > 0)

    return PerClass(
        over(hits, predicted),
        over(hits, support),
        over(2 * hits, support + predicted),
        support,
        predicted,
    )


# --- probabilities ------------------------------------------------------------------------------


def calibration_error(y: Ints, probabilities: NDArray[Any], bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error: |accuracy − confidence| in `bins` bins of equal width, weighted
    by their images.

    Confidence is the probability of the predicted class; a bin is `(low, high]` (Guo et al. 2017,
    15 bins). With few images it reads too high, since chance alone parts accuracy and confidence in
    a bin.
    """
    confidence = np.asarray(probabilities.max(axis=1), dtype=np.float64)
    right = (probabilities.argmax(axis=1) == y).astype(np.float64)
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(place, right, minlength=bins) - np.bincount(place, confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(y))


def log_losses(y: Ints, probabilities: NDArray[Any]) -> Floats:
    """−ln of the probability of the true class, `(n,)` nats; probabilities below 1e-12 count as
    1e-12."""
    true = np.take_along_axis(
        np.asarray(probabilities, dtype=np.float64), np.asarray(y)[:, None], axis=1
    )[:, 0]
    return -np.log(np.clip(true, SMALLEST_PROBABILITY, 1.0))


def fit_temperature(scores: NDArray[Any], y: Ints, steps: int = 50) -> float:
    """The temperature T at which `softmax(scores / T)` of scores `(n, C)` has the least log loss
    (Guo et al. 2017). The one rule, for the SVM out of fold and for the fine-tuned model.

    The scores must come from images that the classifier was not fitted on. One image's weight of
    doubt, spread evenly over the classes and the images, keeps T above 0 where every image is right
    (as Platt 1999 did for his sigmoid). The loss is convex in 1 / T: its slope is bisected, in
    `steps` between 1e-4 and 1e4.
    """
    z = np.asarray(scores, dtype=np.float64)
    _some(len(z))
    z = z - z.max(axis=1, keepdims=True)
    doubt = 1 / (len(z) * z.shape[1])
    weight = 1 + doubt * z.shape[1]
    wanted = float(z[np.arange(len(y)), y].sum() + doubt * z.sum())

    def slope(inverse: float) -> float:
        e = np.exp(z * inverse)
        return weight * float(((e * z).sum(axis=1) / e.sum(axis=1)).sum()) - wanted

    low, high = math.log(1e-4), math.log(1e4)
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(math.exp(middle)) > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


# --- two classifiers on the same images ---------------------------------------------------------


def mcnemar_p(first_only: int, second_only: int) -> float:
    """Exact two-sided McNemar test: were the disputed images shared out by a fair coin? (McNemar
    1947)"""
    n, few = first_only + second_only, min(first_only, second_only)
    log_half, log_all = n * math.log(0.5), math.lgamma(n + 1)
    tail = math.fsum(
        math.exp(log_all - math.lgamma(k + 1) - math.lgamma(n - k + 1) + log_half)
        for k in range(few + 1)
    )
    return min(1.0, 2 * tail)


def sign_flip_p(sums: Ints) -> float:
    """Exact two-sided permutation test over groups: in how many sign patterns is |Σ ± sums| as
    large as it was?

    `sums` `(G,)` holds images won minus images lost in each group. With one image a group this is
    McNemar's test. The distribution is built by convolution, so no pattern is left out and none is
    drawn at random.
    """
    steps = np.abs(np.asarray(sums, dtype=np.int64))
    reach = int(steps.sum())
    chance = np.zeros(2 * reach + 1)
    chance[reach] = 1.0
    for step in steps[steps > 0]:
        chance = 0.5 * (np.roll(chance, step) + np.roll(chance, -step))
    far = np.abs(np.arange(-reach, reach + 1)) >= abs(int(np.sum(sums)))
    return min(1.0, float(chance[far].sum()))


def paired(
    y: Ints, first: Ints, second: Ints, groups: Sequence[Any] | NDArray[Any] | None = None
) -> Paired:
    """Compare the predictions `first` and `second`, each `(n,)`, image by image.

    Without groups: exact McNemar test, and the interval of Bonett and Price (2012), which keeps a
    width where the two never differ. With groups: exact sign flips of whole groups, a bootstrap
    over groups, a cluster-robust standard error. One single group tells nothing about the next: its
    standard error is given as 1, the widest there is.
    """
    delta = (np.asarray(second) == y).astype(np.int64) - (np.asarray(first) == y)
    n = len(delta)
    _some(n)
    value, group = float(delta.mean()), _groups(groups, n)
    losses, wins = int((delta < 0).sum()), int((delta > 0).sum())
    index = np.arange(n) if group is None else group
    units = int(index.max()) + 1
    spread = np.bincount(index, delta - value)
    error = math.sqrt(units / (units - 1) * float(spread @ spread)) / n if units > 1 else 1.0
    if group is None:
        difference = Estimate(value, *_bonett_price(losses, wins, n), n, "bonett-price")
        return Paired(difference, error, mcnemar_p(losses, wins), "exact McNemar", losses, wins)
    sums, sizes = np.bincount(group, delta).astype(np.int64), np.bincount(group)
    if units < 2 or np.all(sums * n == sizes * delta.sum()):
        low, high = _bonett_price(losses * units / n, wins * units / n, units)
        difference = Estimate(value, low, high, n, f"bonett-price over {_counted(units)}")
    else:
        difference = _estimates(
            lambda weights: np.array([weights @ sums / (weights @ sizes)]), n, group, False
        )[0]
    return Paired(
        difference, error, sign_flip_p(sums), f"exact sign flips of {_counted(units)}", losses, wins
    )


def _bonett_price(losses: float, wins: float, n: float) -> tuple[float, float]:
    first, second = (losses + 1) / (n + 2), (wins + 1) / (n + 2)
    half = Z * math.sqrt((first + second - (second - first) ** 2) / (n + 2))
    return max(-1.0, second - first - half), min(1.0, second - first + half)


# --- everything at once -------------------------------------------------------------------------


def judge(
    y: NDArray[Any],
    probabilities: NDArray[Any],
    classes: Sequence[str],
    groups: Sequence[Any] | NDArray[Any] | None = None,
) -> dict[str, Estimate | float]:
    """All the numbers of one classifier on one set of images, each under its name.

    `top1`, `balanced`, `macro_f1` and, with more than 5 classes, `top5` are `Estimate`s; `nll`
    (nats), `ece` and `majority` are plain numbers. The predicted class is the first of the most
    probable ones. Raises `UserError` where there is no image, a probability is not finite, or the
    shapes do not fit.
    """
    y, probabilities, n = np.asarray(y, dtype=np.int64), np.asarray(probabilities), len(y)
    _checked(y, probabilities, len(classes))
    predicted, group = probabilities.argmax(axis=1), _groups(groups, n)
    result: dict[str, Estimate | float] = {"top1": accuracy(y, predicted, groups)}
    if len(classes) > 5:
        result["top5"] = share(top_k(y, probabilities, 5), groups)
    result["balanced"], result["macro_f1"] = _over_classes(y, predicted, len(classes), group)
    result["nll"] = float(log_losses(y, probabilities).mean())
    result["ece"] = calibration_error(y, probabilities)
    result["majority"] = majority(y)
    return result


def _over_classes(y: Ints, predicted: Ints, n_classes: int, group: Ints | None) -> list[Estimate]:
    """Balanced accuracy and macro-F1, with a bootstrap over images or groups; Wilson's interval
    where nothing is wrong."""
    right = y == predicted
    true = y[right]

    def means(weights: Floats) -> Floats:
        weight = weights if group is None else weights[group]
        hits = np.bincount(true, weight[right], minlength=n_classes)
        rates = _rates(
            hits,
            np.bincount(y, weight, minlength=n_classes),
            np.bincount(predicted, weight, minlength=n_classes),
        )
        present = rates.support > 0
        return np.array([rates.recall[present].mean(), rates.f1[present].mean()])

    return _estimates(means, len(y), group, bool(right.all() or not right.any()))


def _estimates(
    statistics: Callable[[Floats], Floats], n: int, group: Ints | None, flat: bool
) -> list[Estimate]:
    """Bootstrap shares; where resampling cannot move them (`flat`), Wilson's interval over the
    units stands in."""
    units = n if group is None else int(group.max()) + 1
    over = "" if group is None else f" over {_counted(units)}"
    values = statistics(np.ones(units))
    if flat or units < 2:
        return [
            Estimate(float(value), *wilson(float(value), units), n, f"wilson{over}")
            for value in values
        ]
    lows, highs = _bootstrap(statistics, units)
    return [
        Estimate(
            float(value), float(min(low, value)), float(max(high, value)), n, f"bootstrap{over}"
        )
        for value, low, high in zip(values, lows, highs, strict=True)
    ]


def _bootstrap(statistics: Callable[[Floats], Floats], units: int) -> tuple[Floats, Floats]:
    """The expanded percentile interval of each of `statistics(weights)`, weights `(units,)`
    counting each unit's draws.

    Plain percentiles are too narrow for few units. Hesterberg (2015, "What teachers should know
    about the bootstrap") widens them to the level at which a normal interval would equal Student's
    with units − 1 degrees of freedom.
    """
    rng = np.random.default_rng(0)
    draws = (
        np.bincount(rng.integers(0, units, units), minlength=units).astype(np.float64)
        for _ in range(RESAMPLES)
    )
    tail = NormalDist().cdf(-math.sqrt(units / (units - 1)) * student(units - 1))
    low, high = np.quantile([statistics(weights) for weights in draws], [tail, 1 - tail], axis=0)
    return low, high


def student(freedom: int) -> float:
    """The 97.5 % point of Student's t, by the Cornish-Fisher series (Abramowitz and Stegun 26.7.5).

    Exact to 0.01 from 4 degrees of freedom on, and too small below.
    """
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
        (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160,
    )
    return Z + math.fsum(term / freedom ** (i + 1) for i, term in enumerate(terms))


def _groups(groups: Sequence[Any] | NDArray[Any] | None, n: int) -> Ints | None:
    """Groups as indices 0…G−1, or None where every image is its own group."""
    if groups is None:
        return None
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    if len(index) != n:
        raise UserError(
            f"{len(index)} groups for {n} images", where="groups", fix="give every image one group"
        )
    return None if len(names) == n else index.astype(np.int64)


def _counted(units: int) -> str:
    return f"{units} group" if units == 1 else f"{units} groups"


def _some(n: int) -> None:
    if n == 0:
        raise UserError(
            "there is no image to judge", where="metrics", fix="give at least one labelled image"
        )


def _checked(y: NDArray[Any], probabilities: NDArray[Any], n_classes: int) -> None:
    _some(len(y))
    if probabilities.shape != (len(y), n_classes):
        raise UserError(
            f"probabilities of shape {probabilities.shape} for "
            f"{len(y)} images of {n_classes} classes",
            where="metrics",
        )
    if y.min() < 0 or y.max() >= n_classes:
        raise UserError(
            f"a label {y.min() if y.min() < 0 else y.max()} outside the {n_classes} classes",
            where="metrics",
        )
    bad = ~np.isfinite(probabilities).all(axis=1)
    if bad.any():
        raise UserError(
            f"{int(bad.sum())} of {len(y)} images have a probability that is not finite, first "
            f"number {int(bad.argmax())}",
            where="metrics",
            fix="the network gave NaN: try --precision float32",
        )
