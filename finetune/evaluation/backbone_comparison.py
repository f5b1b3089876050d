"""Backbones side by side on the same images: cross-validated SVM, nearest neighbours, speed and
size, and which one to take.

Every network is asked about the same training images out of fold, so that a difference between two
is one of paired answers: images that both get right or wrong do not blur it. A lead within its
standard error may be luck. The test part judges the network to take, once, and no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune import analysis, metrics, options, recipe
from finetune.analysis import Look
from finetune.backbones import catalog
from finetune.data.images import ImageSet
from finetune.errors import UserError
from finetune.evaluation import fitting
from finetune.features import engine, label_signal
from finetune.features.store import Store
from finetune.files import Digests
from finetune.heads import svm
from finetune.heads.svm import SvmResult
from finetune.metrics import Estimate, Paired
from finetune.network import Tap
from finetune.progress import Bar, Say, no_bar, quiet
from finetune.recipe import Recipe

PUBLISHED = {  # ImageNet top-1, float32, from the README of EfficientNet-Lite
    "tf_efficientnet_lite0": 0.751,
    "tf_efficientnet_lite1": 0.767,
    "tf_efficientnet_lite2": 0.776,
}

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One network on these images.

    `accuracy` and its standard `error` are those of the SVM out of fold, `predicted` `(n,)` its
    classes, −1 for images outside the subset that chose. `knn` is the leave-one-out accuracy of
    nearest neighbours on pooled features. `images_per_second` is the network's own pace here,
    without decoding. `parameters` and `multiply_adds` (of one image) include ImageNet's classifier,
    as they are published; so is `imagenet`, the top-1 accuracy.
    """

    name: str
    accuracy: float
    error: float
    knn: float | None
    images_per_second: float
    parameters: int
    multiply_adds: int
    size: int
    head: str
    is_random: bool
    predicted: Ints = field(repr=False)

    @property
    def imagenet(self) -> float | None:
        return None if self.is_random else PUBLISHED.get(self.name)

    @property
    def milliseconds(self) -> float:
        return 1000 / self.images_per_second

    def to_json(self) -> dict[str, Any]:
        shown = {key: value for key, value in vars(self).items() if key != "predicted"}
        return {**shown, "imagenet_top1": self.imagenet}


@dataclass(frozen=True)
class Budget:
    """What the network to take may cost: milliseconds an image here, millions of parameters."""

    milliseconds: float | None = None
    parameters: float | None = None

    def allows(self, row: Row) -> bool:
        return (self.milliseconds is None or row.milliseconds <= self.milliseconds) and (
            self.parameters is None or row.parameters <= self.parameters * 1e6
        )

    @property
    def is_set(self) -> bool:
        return self.milliseconds is not None or self.parameters is not None

    def __str__(self) -> str:
        parts = [
            f"{self.milliseconds:g} ms an image" if self.milliseconds is not None else "",
            f"{self.parameters:g} million parameters" if self.parameters is not None else "",
        ]
        return " and ".join(filter(None, parts)) or "no budget"


@dataclass(frozen=True, eq=False)
class Comparison:
    """Networks compared on `n` training images, the cheapest first; `failed` are those that could
    not be, with the reason.

    Among those within the budget, `best` has the highest accuracy out of fold; `gaps` holds how
    much better it is than each of the others, image by image; `taken` is the cheapest within one
    paired standard error of it. `test` is the accuracy of `taken` on the test part.
    """

    rows: tuple[Row, ...]
    failed: dict[str, str]
    n: int
    budget: Budget
    best: Row | None
    taken: Row | None
    gaps: dict[str, Paired]
    test: Estimate | None

    @property
    def near(self) -> tuple[str, ...]:
        """Networks that the best is not ahead of by more than one paired standard error."""
        return tuple(name for name, gap in self.gaps.items() if _is_near(gap))

    @property
    def front(self) -> tuple[Row, ...]:
        """The Pareto front: networks that none is both cheaper than and as good as."""
        return tuple(
            row
            for k, row in enumerate(self.rows)
            if all(row.accuracy > other.accuracy for other in self.rows[:k])
        )


def compare(
    data: str | Path | None = None,
    *,
    backbones: Sequence[str] | str | None = None,
    max_ms: float | None = None,
    max_params: float | None = None,
    assignments: Sequence[str] = (),
    say: Say = quiet,
    bar: Bar = no_bar,
    **given: Any,
) -> Comparison:
    """Compare `backbones` (all whose weights are on this machine, where none are named) on the
    training part of `data`.

    `max_ms` (milliseconds an image) and `max_params` (millions) limit which one to take. Other
    options are those of `fit`. A network that does not load is told with its reason; raises
    `UserError` where none does.
    """
    chosen = options.listed(backbones) if backbones else _here()
    settings, _ = options.build(
        data, None, assignments, {**given, "strategy": "svm"}, "compare-backbones"
    )
    names = list(dict.fromkeys(chosen))
    if len(names) > 1 and settings.backbone.weights not in ("auto", "random"):
        raise UserError(
            f"one file of weights for {len(names)} networks",
            where="--weights",
            fix="leave it out, or name one network",
        )
    store = Store()
    try:
        pictures, ids = analysis.scan(settings, store, say)
        looks, failed = _looks(settings, names, (pictures, ids), store=store, say=say, bar=bar)
        first, _ = next(iter(looks.values()))
        rows = [_row(name, *look, say) for name, look in looks.items()]
        train = first.part("train")
        budget = Budget(max_ms, max_params)
        found = choose(rows, failed, first.images.labels[train], first.groups[train], budget)
        if found.taken is None:
            return found
        return _with_test(found, *looks[found.taken.name])
    finally:
        store.close()


def choose(
    rows: Sequence[Row],
    failed: dict[str, str],
    y: Ints,
    groups: Ints | None = None,
    budget: Budget | None = None,
) -> Comparison:
    """The best of `rows` within the budget and the one to take, by their predictions of the images
    with classes `y` `(n,)`; images of one of `groups` stand or fall together."""
    budget = budget or Budget()
    ordered = tuple(sorted(rows, key=lambda row: (row.multiply_adds, -row.accuracy)))
    known = np.all([row.predicted >= 0 for row in ordered], axis=0)
    own = None if groups is None else groups[known]
    allowed = [row for row in ordered if budget.allows(row)]
    best = max(allowed, key=lambda row: row.accuracy) if allowed else None  # of equals: the cheaper
    gaps = {
        row.name: metrics.paired(y[known], row.predicted[known], best.predicted[known], own)
        for row in allowed
        if best is not None and row is not best
    }
    near = [row for row in allowed if row is best or _is_near(gaps[row.name])]
    taken = near[0] if near else None
    return Comparison(ordered, failed, int(known.sum()), budget, best, taken, gaps, None)


def _is_near(gap: Paired) -> bool:
    slack = 1e-9  # one image alone is a difference of exactly one standard error
    return gap.difference.value <= gap.standard_error + slack


# --------------------------------------------------------------------------------------- one by one


def _here() -> list[str]:
    return [row["name"] for row in catalog.here() if row["here"]]


def _looks(
    settings: Recipe,
    names: Sequence[str],
    source: tuple[ImageSet, Digests],
    *,
    store: Store,
    say: Say,
    bar: Bar,
) -> tuple[dict[str, tuple[Look, SvmResult]], dict[str, str]]:
    """Features and SVM of every network that loads; the reasons of the others."""
    looks: dict[str, tuple[Look, SvmResult]] = {}
    failed: dict[str, UserError] = {}
    for name in names:
        try:
            own = recipe.update(settings, {"backbone.names": [name]})
            seen = analysis.take(own, *source, store, say, bar)
            base = fitting.baseline(seen, say)
        except UserError as error:
            failed[name] = error
            say(f"left out   {name}: {error.what}")
            continue
        if not base.candidates:
            raise UserError(
                "too few images to hold any out, so that networks cannot be compared",
                where="DATA",
                fix="give at least two training images a class",
            )
        looks[name] = seen, base
        source = seen.images, seen.digests  # without what could not be read
    if looks:
        return looks, {name: error.what for name, error in failed.items()}
    if len({error.what for error in failed.values()}) == 1:  # of the images, or of the only network
        raise next(iter(failed.values()))
    reasons = "\n".join(f"{name}: {error.what}" for name, error in failed.items())
    raise UserError(
        f"no network loads:\n{reasons}", where="--backbones", fix="`finetune backbones` lists some"
    )


def _row(name: str, seen: Look, base: SvmResult, say: Say) -> Row:
    from finetune.backbones import profile

    train, network = seen.part("train"), seen.named.network
    signal = label_signal.measure(
        np.asarray(seen.features.blocks[Tap("pooled")][train]),
        seen.images.labels[train],
        seen.groups[train],
        seed=seen.recipe.data.seed,
    )
    way = seen.features.way
    pace = engine.rates(network, tuple(seen.features.blocks), seen.named.load, [way])[str(way)]
    counted = profile.profile(network.name, network.preprocess.size)
    scores = base.oof_scores
    row = Row(
        name=name,
        accuracy=base.cv_accuracy,
        error=base.cv_error,
        knn=None if signal is None else signal.accuracy,
        images_per_second=pace,
        parameters=counted.parameters,
        multiply_adds=counted.multiply_adds,
        size=counted.size,
        head=f"{' + '.join(map(str, base.head.taps))}, {base.head.kind}",
        is_random=seen.recipe.backbone.weights == "random",
        predicted=np.where(np.isnan(scores).any(axis=1), -1, scores.argmax(axis=1)),
    )
    say(
        f"speed      {name}: {pace:.0f} images/s by {way.engine} in {way.precision}, "
        f"{row.multiply_adds / 1e6:.0f} M multiply-adds, {row.parameters / 1e6:.1f} M parameters"
    )
    return row


def _with_test(found: Comparison, seen: Look, base: SvmResult) -> Comparison:
    """The network to take on the test part, its SVM fitted on all that is not test: as a job does
    with what it ships."""
    test, rest = seen.part("test"), seen.part("train", "val")
    if not len(test):
        return found
    labels = seen.images.labels
    head = svm.refit(base, seen.blocks(rest), labels[rest])
    blocks = seen.blocks(test)
    predicted = head.scores([blocks[tap] for tap in head.taps]).argmax(axis=1)
    judged = metrics.accuracy(labels[test], predicted, seen.groups[test])
    return Comparison(**{**vars(found), "test": judged})
