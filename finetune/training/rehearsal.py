"""The planned fine-tuning tried out on a sample, through the steps of the loop itself."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from finetune.backbones.stages import Backbone
from finetune.check import Check
from finetune.training import first_loss, loop, range_test, step_checks, subject
from finetune.training.checkpoints import Trainable
from finetune.training.inputs import Feed, Items, Job, open_feed
from finetune.training.preflight import Preflight
from finetune.training.range_test import RangeTest
from finetune.training.subject import Batch, Subject

if TYPE_CHECKING:
    from finetune.data.images import ImageSet
    from finetune.training.config import Training

Ints = NDArray[np.int64]

CLASSES = 200  # of a sample, at most
PER_CLASS = 3  # images that the head is fitted on, at least
FITTED = 96  # images that the head is fitted on, at least where there are as many
STEPPED = 48  # images that the steps are made on, others than those
BATCH = 8  # of a step
TOLERANCE = 0.05  # between two ways to the same loss; bf16 differs by a hundredth


@dataclass(frozen=True)
class Sample:
    """Positions of images: a head is `fitted` on some, steps are made on others (`stepped`)."""

    fitted: Ints
    stepped: Ints


def sample(labels: Ints, index: Ints, seed: int) -> Sample:
    """A seeded sample of the images at `index`, with as many of each class as the fewest allow.

    Where there are too few images for two parts, both are the same.
    """
    rng = np.random.default_rng([seed, 11])
    order = rng.permutation(index)
    names = rng.permutation(np.unique(labels[order]))[:CLASSES]
    turns = np.empty(len(order), np.int64)
    for name in names:
        own = labels[order] == name
        turns[own] = np.arange(own.sum())
    known = np.isin(labels[order], names)
    order = order[known][np.argsort(turns[known], kind="stable")]
    count = max(FITTED, PER_CLASS * len(names))
    if len(order) < len(names) * 2 + 8:
        return Sample(np.sort(order[:count]), order[:STEPPED])
    stepped = min(STEPPED, len(order) // 3)
    fitted = order[: min(count, len(order) - stepped)]
    return Sample(np.sort(fitted), order[len(fitted) : len(fitted) + stepped])


def rehearse(
    backbone: Backbone,
    images: ImageSet,
    train: Ints,
    training: Training,
    *,
    classes: int,
    seed: int,
    precision: str = "auto",
    quick: bool = False,
) -> Preflight:
    """Check the planned training on a sample of the images at `train`; `backbone` is left as it is.

    A head of zeros must cost ln C; the planned start of the head must cost on the training's own
    path what it costs on the features that it was fitted to; gradients and updates of the first
    steps are looked at. Unless `quick`, twenty images are learned by heart, and the learning rates
    of all groups are raised together until the loss rises. Raises `UserError` for an unreadable
    image and for settings that the loop refuses.
    """
    chosen = sample(images.labels, train, seed)
    both = np.union1d(chosen.fitted, chosen.stepped)
    count = len(train) * training.epochs
    short = dataclasses.replace(training, epochs=1, views=1, mixup=0.0, ema=False)
    with (
        loop.open_job(
            backbone,
            images,
            both,
            None,
            short,
            classes=classes,
            seed=seed,
            precision=precision,
            count=count,
        ) as job,
        open_feed(job, []) as feed,
    ):
        return _checked(job, feed, chosen, quick)


def _checked(job: Job, feed: Feed, chosen: Sample, quick: bool) -> Preflight:
    edges = range(0, len(chosen.stepped), BATCH)
    parts = [_items(chosen.stepped[low : low + BATCH]) for low in edges]
    batches: list[Batch] = [
        (inputs, job.labels(items))
        for items, inputs in zip(parts, feed.batches(parts), strict=True)
    ]
    trainable = Trainable.of(job)
    seen = subject.of_job(job, feed, trainable, batches)
    checks = [_of_zeros(job, seen)]
    fitted = job.training.head_init == "probe"
    if fitted:
        checks.append(_start(job, feed, seen, chosen))
    else:
        seen.clear_head()
    checks += step_checks.gradients(
        seen, fitted=("head",) if fitted else (), dead=step_checks.IDLE, seed=job.seed
    )
    if quick:
        return Preflight(tuple(checks))
    test: RangeTest | None = None
    if not any(check.name == "gradients" and check.status == "fail" for check in checks):
        test = range_test.run(seen, seed=job.seed, classes=len(job.class_weights))
        checks.append(range_test.judged(test))
        checks.append(_by_heart(job, feed, trainable, chosen, test.brisk))
    return Preflight(tuple(checks), test)


def _items(index: Ints) -> Items:
    return [(int(i), 0) for i in index]


def _of_zeros(job: Job, seen: Subject) -> Check:
    """The first loss of a head of zeros, with the planned label smoothing and class weights."""
    classes = len(job.class_weights)
    want = first_loss.expected("cross-entropy", classes)
    with seen.trial(seed=job.seed):
        seen.clear_head()
        stats = seen.step(seen.batches[0])
    value = f"a head of zeros costs {stats.loss:.4f}, ln {classes} = {want:.4f}"
    if abs(stats.loss - want) <= first_loss.CLOSE:
        return Check("initial loss", "pass", value, "the loss is a mean over the right classes")
    meaning = "the loss is not that of guessing: features, classes or loss are not what they seem"
    return Check("initial loss", "fail", value, meaning, "check the weights of the backbone")


def _start(job: Job, feed: Feed, seen: Subject, chosen: Sample) -> Check:
    """Give the head its planned start, and compare what it costs on both ways to the same images:
    on the features that it was fitted to, and on the path of the training."""
    job.backbone.module.eval()
    labels = job.labels(_items(chosen.fitted))
    features = loop.features_of(job, feed, chosen.fitted)
    part = dataclasses.replace(job, train=chosen.fitted)
    weight, bias = loop.linear_start(part, features.cpu().numpy())
    with torch.no_grad():
        job.head.weight.copy_(torch.as_tensor(weight))
        job.head.bias.copy_(torch.as_tensor(bias))
        own = _cost(features.double() @ job.head.weight.double().T + job.head.bias.double(), labels)
        with seen.trial(seed=job.seed, still=True):
            parts = feed.batches([_items(chosen.fitted)])
            there = _cost(seen.scores(next(parts)), labels)
            others = [(seen.scores(x), y) for x, y in seen.batches]
            apart = _cost(torch.cat([s for s, _ in others]), torch.cat([y for _, y in others]))
    return _of_start(own, there, apart, len(labels), len(chosen.stepped), len(job.class_weights))


def _cost(scores: Tensor, labels: Tensor) -> float:
    return nn.functional.cross_entropy(scores, labels).item()


def _of_start(own: float, there: float, apart: float, n: int, m: int, classes: int) -> Check:
    name, guess = "planned start", math.log(classes)
    value = (
        f"the fitted head costs {there:.3f} in training and {own:.3f} by itself on its {n} images, "
        f"{apart:.3f} on {m} others (guessing: {guess:.3f})"
    )
    if not math.isfinite(own + there + apart):
        return Check(name, "fail", value, "not finite", "use --precision float32")
    if abs(there - own) > max(TOLERANCE, TOLERANCE * own):
        meaning = "the training sees other features than the head was fitted on"
        fix = "compare --precision float32, and --set train.augment=none"
        return Check(name, "fail", value, meaning, fix)
    if apart >= guess:
        meaning = "on other images the start is no better than guessing"
        return Check(name, "warn", value, meaning, "check the labels, or collect more images")
    return Check(name, "pass", value, "the training goes on from what the head knows")


def _by_heart(
    job: Job, feed: Feed, trainable: Trainable, chosen: Sample, factors: tuple[float, ...]
) -> Check:
    """A few images with all that makes learning harder left out; BatchNorm as planned."""
    index = np.concatenate([chosen.stepped, chosen.fitted])[: step_checks.BY_HEART]
    items = _items(np.unique(index))
    calm = dataclasses.replace(job.training, label_smoothing=0.0, l2_sp=0.0)
    weights = torch.ones_like(job.class_weights)
    plain = dataclasses.replace(job, training=calm, class_weights=weights)
    batch: Batch = (next(feed.batches([items])), job.labels(items))
    seen = subject.of_job(plain, feed, trainable, [batch])
    return step_checks.by_heart(
        seen,
        batch,
        lambda scores, labels: scores.argmax(1) == labels,
        factors=factors,
        seed=job.seed,
    )
