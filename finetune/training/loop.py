"""The one visible loop: fine-tune the trainable stages of a backbone and a linear head, with
everything decided beforehand.

Where the first stages are frozen, they run once: their activations at the freeze boundary are
stored for a few views of each image, and only the moving tail is trained. The same seed gives the
same bits on one machine's CPU; a run that was killed goes on from its last epoch and ends with the
bits of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from finetune import hardware, metrics
from finetune.backbones.stages import Backbone, freeze
from finetune.data import augment
from finetune.errors import UserError
from finetune.network import Tap
from finetune.progress import Progress
from finetune.training import checkpoints, optim, probe, schedules, speed
from finetune.training.checkpoints import State, Trainable, copied
from finetune.training.inputs import (
    STORE_BATCH,
    Feed,
    Inputs,
    Items,
    Job,
    Log,
    even_batches,
    open_feed,
)
from finetune.training.partial_forward import replaced, slow_in_bf16

if TYPE_CHECKING:
    from finetune.data.images import ImageSet
    from finetune.training.config import Training

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# validation images: fewer cannot tell epochs apart, and the last one is kept
CHOOSES = 200
CLEAN = 200  # training images whose unaugmented loss is logged: enough for ± 3 points of accuracy
LOWER = "lower --set train.lr, or use --precision float32"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What `fit` made; the backbone's module holds the weights that go with it.

    `head_weight` (C, width) and `head_bias` (C,) read the taps of the training, side by side (a
    pooled end alone as it is, several L2-normalised). `history` has one row per epoch: `epoch`,
    `step`, `train/loss`, `lr/<group>`, `update_ratio/<group>`, `seconds`, `clean/loss` and
    `clean/top1` (the same `CLEAN` training images in every epoch, without augmentation, mixup and
    smoothing), and with a validation part `val/loss`, `val/top1` and `val/calibrated`; `start` is
    the same before the first step (its `train/loss` is that of the first batch). `best_epoch` is
    the epoch whose weights were kept (0: those before the first step); `val_scores` (epochs + 1, n,
    C) are the scores of the validation images before the first step and after each epoch.
    `start_share` is the share that the initial weights have in the moving average, where one was
    kept.
    """

    head_weight: Floats
    head_bias: Floats
    history: tuple[dict[str, Any], ...]
    start: dict[str, float]
    best_epoch: int
    steps: int
    stopped: str
    val_scores: Floats | None
    warnings: tuple[str, ...]
    start_share: float | None = None


class DivergedError(UserError):
    """Loss, gradients or weights are no longer finite."""


# ------------------------------------------------------------------------------------- the one door


def fit(
    backbone: Backbone,
    images: ImageSet,
    train_index: ArrayLike,
    val_index: ArrayLike | None,
    training: Training,
    *,
    classes: int,
    seed: int,
    head_start: tuple[NDArray[Any], NDArray[Any]] | None = None,
    checkpoint: Path | None = None,
    log: Log | None = None,
    progress: Progress | None = None,
    class_weights: ArrayLike | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> TrainResult:
    """Fine-tune `backbone` (changed in place) and a head for `classes` classes on `images` at
    `train_index`.

    `head_start` is a `(weight, bias)` on the taps; without it the head starts at zero or from a
    logistic regression on them, as `training.head_init` says. `class_weights` (C,) weigh the images
    of a class; without them `training.class_weight` "balanced" gives n / (C n_c), everything
    else 1. With at least `CHOOSES` validation images the epoch of the best validation accuracy is
    kept (`_worth`), and `training.patience` epochs without a gain stop the training (0: never);
    else the last is kept. `checkpoint` is a folder: every epoch is saved there, and the same call
    goes on from it. `precision` is bf16, float32 or auto, the faster one. The input size is that of
    `backbone`.

    Raises `UserError` for bad input, an unreadable image and a full disk, and where the loss or a
    gradient is no longer finite; the backbone then holds the weights of the last finished epoch.
    After any other end, Ctrl-C included, it holds those it started with.
    """
    with open_job(
        backbone,
        images,
        train_index,
        val_index,
        training,
        classes=classes,
        seed=seed,
        checkpoint=checkpoint,
        log=log,
        progress=progress,
        class_weights=class_weights,
        device=device,
        precision=precision,
    ) as job:
        return _run(job, head_start)


@contextlib.contextmanager
def open_job(
    backbone: Backbone,
    images: ImageSet,
    train_index: ArrayLike,
    val_index: ArrayLike | None,
    training: Training,
    *,
    classes: int,
    seed: int,
    checkpoint: Path | None = None,
    log: Log | None = None,
    progress: Progress | None = None,
    class_weights: ArrayLike | None = None,
    device: str = "auto",
    precision: str = "auto",
    count: int | None = None,
) -> Iterator[Job]:
    """What `fit` works on, checked, frozen and on its device; everything is put back at the end.

    The way to compute is settled for `count` images in all epochs together (those of the job
    itself, unless it is a sample of a longer one).
    """
    log, progress = log or (lambda row: None), progress or (lambda done, total: None)
    where = _device(device)
    train, val = (
        np.asarray(train_index, np.int64),
        np.asarray([] if val_index is None else val_index, np.int64),
    )
    _check(images.labels, train, val, classes, training)
    weights = class_weights_of(images.labels[train], classes, training, class_weights).to(where)
    way = speed.settle(
        backbone,
        training,
        where,
        precision,
        count=len(train) * training.epochs if count is None else count,
        folder=checkpoint,
    )
    with (
        torch.random.fork_rng(devices=[where] if where.type == "cuda" else []),
        _prepared(backbone, training, where, way),
    ):
        taps = map(Tap.parse, training.taps)
        width = sum(backbone.network.width(tap) for tap in taps)
        yield Job(
            backbone=backbone,
            images=images,
            train=train,
            val=val,
            clean=_clean_subset(train, seed),
            training=training,
            seed=seed,
            class_weights=weights,
            head=nn.Linear(width, classes, device=where),
            device=where,
            half=way.bf16,
            folder=checkpoint,
            log=log,
            progress=progress,
        )


def _run(job: Job, head_start: tuple[NDArray[Any], NDArray[Any]] | None) -> TrainResult:
    """Start or go on, train, and leave the chosen weights in the module."""
    trainable = Trainable.of(job)
    mark = checkpoints.mark_of(job, head_start)
    state = checkpoints.load(job, mark, trainable)
    try:
        if not state.stopped:
            with open_feed(job, state.warnings) as feed:
                if not state.good:
                    _begin(job, feed, state, trainable, head_start)
                _loop(job, feed, state, trainable, mark)
    except DivergedError:
        checkpoints.put(trainable.live, state.good or trainable.initial)
        raise
    except BaseException:
        checkpoints.put(trainable.live, trainable.initial)
        raise
    checkpoints.put(trainable.live, state.best or state.average or trainable.live)
    return _result(job, state)


def _result(job: Job, state: State) -> TrainResult:
    return TrainResult(
        head_weight=job.head.weight.detach().cpu().numpy().copy(),
        head_bias=job.head.bias.detach().cpu().numpy().copy(),
        history=tuple(state.history),
        start=state.start,
        best_epoch=state.best_epoch,
        steps=state.step,
        stopped=state.stopped,
        val_scores=None if state.scores is None else state.scores.cpu().numpy(),
        warnings=(*state.warnings, *_doubts(state, len(job.val))),
        start_share=_start_share(job, state) if job.training.ema else None,
    )


def trial(
    job: Job, feed: Feed, head_start: tuple[NDArray[Any], NDArray[Any]] | None
) -> TrainResult:
    """Train on a `feed` that is open already, one of many times: no checkpoint is kept, and the
    weights are put back."""
    trainable = Trainable.of(job)
    state = State()
    try:
        _begin(job, feed, state, trainable, head_start)
        _loop(job, feed, state, trainable, "")
    finally:
        checkpoints.put(trainable.live, trainable.initial)
    return _result(job, state)


def _planned_steps(job: Job) -> int:
    return math.ceil(len(job.train) / job.training.batch_size) * job.training.epochs


def _start_share(job: Job, state: State) -> float:
    """The share of the initial weights in the average that was kept."""
    kept = state.best_epoch if len(job.val) else len(state.history)
    steps = state.history[kept - 1]["step"] if kept else 0
    return optim.start_share(optim.ema_decay(_planned_steps(job)), steps)


def _begin(
    job: Job,
    feed: Feed,
    state: State,
    trainable: Trainable,
    head_start: tuple[NDArray[Any], NDArray[Any]] | None,
) -> None:
    """Give the head its first weights, and judge the model before the first step."""
    nn.init.zeros_(job.head.weight)
    nn.init.zeros_(job.head.bias)
    job.backbone.module.eval()
    if head_start is None and job.training.head_init == "probe":
        head_start = linear_start(job, features_of(job, feed, job.train).cpu().numpy())
    if head_start is not None:
        with torch.no_grad():
            job.head.weight.copy_(torch.as_tensor(head_start[0]))
            job.head.bias.copy_(torch.as_tensor(head_start[1]))
    state.good = copied(trainable.live)
    state.average = copied(trainable.live) if job.training.ema else {}
    state.start = _evaluate_clean(job, feed)
    if len(job.val):
        found, scores = _evaluate(job, feed)
        if not math.isfinite(found["val/loss"]):
            raise DivergedError(
                f"the validation loss is {found['val/loss']} before the first step",
                where="training",
                fix="check the weights",
            )
        state.start |= found
        state.scores = scores[None]
        state.best = copied(trainable.live)


def linear_start(job: Job, features: Floats) -> tuple[Floats, Floats]:
    """`(weight, bias)` of a logistic regression on what the head reads, `(n, width)`."""
    labels, weights = job.images.labels[job.train], job.class_weights.cpu().numpy()
    edges = np.cumsum([job.backbone.network.width(tap) for tap in job.taps])[:-1]
    blocks = dict(zip(job.taps, np.split(features, edges, axis=1), strict=True))
    return probe.head_start(job.training, blocks, labels, job.images.classes, weights)


def _loop(job: Job, feed: Feed, state: State, trainable: Trainable, mark: str) -> None:
    """Every epoch from `state` on: its steps, the validation, what is kept, the checkpoint."""
    training, groups = job.training, trainable.groups
    steps = _planned_steps(job)
    factor, decay = schedules.factors(training, steps), optim.ema_decay(steps)
    job.log(
        {
            "groups": optim.group_table(groups),
            "device": str(job.device),
            "bf16": job.half,
            "stored_views": feed.views,
            "images": {"train": len(job.train), "val": len(job.val), "clean": len(job.clean)},
            "classes": len(job.class_weights),
            **({"chance": _chance(job)} if len(job.val) else {}),
            **{f"start/{k}": v for k, v in state.start.items() if not k.startswith("train/")},
        }
    )
    if training.ema:
        share = optim.start_share(decay, steps)
        job.log({"ema_decay": decay, "ema_start_share_at_end": share})
    feed.tick(state.epoch * len(job.train))
    for epoch in range(state.epoch + 1, training.epochs + 1):
        began = time.perf_counter()
        # dropout, drop-path
        torch.manual_seed(int(np.random.default_rng([job.seed, epoch, 1]).integers(2**62)))
        rng = np.random.default_rng([job.seed, epoch])
        plan = _order(job, feed, epoch, rng)
        job.backbone.module.train()
        total, ratios = 0.0, dict[str, float | str]()
        scale = _lowered(job, state)
        for number, (items, x) in enumerate(zip(plan, feed.batches(plan), strict=True), 1):
            targets = nn.functional.one_hot(job.labels(items), len(job.class_weights)).float()
            if training.mixup:
                share, other = augment.mixing(len(targets), training.mixup, rng)
                other = other.to(job.device)
                x, targets = x.mixed(share, other), targets * share + targets[other] * (1 - share)
            optim.set_rates(groups, scale * factor(state.step))
            before = optim.copies(groups) if number == len(plan) else None
            stats = step(job, feed, trainable, x, targets)
            if not stats.finite:
                raise _diverged(str(stats), state.step, epoch, groups)
            if state.step == 0:
                _check_first_loss(job, state, stats)
            if before is not None:
                ratios = optim.update_ratios(groups, before)
            if training.ema:
                optim.blend(state.average, trainable.live, decay)
            state.step += 1
            total += stats.loss * len(items)
            feed.tick(len(items))
        if optim.broken_groups(groups, gradients=False):
            raise _diverged(
                "a step gave weights that are not finite", state.step - 1, epoch, groups
            )
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": state.step,
            "train/loss": total / len(job.train),
        }
        row |= {f"lr/{group['name']}": group["lr"] for group in groups}
        row |= {f"update_ratio/{name}": ratio for name, ratio in ratios.items()}
        live = copied(trainable.live)
        row |= _judge(job, feed, state, trainable, epoch)
        if not math.isfinite(row.get("val/loss", 0.0)):
            raise _diverged(
                f"the validation loss is {row['val/loss']}", state.step - 1, epoch, groups
            )
        state.epoch, state.good = epoch, live
        row["seconds"] = time.perf_counter() - began
        state.history.append(row)
        state.stopped = _reason_to_stop(job, state)
        # before the checkpoint: an epoch that is done again is told once, one that is not would be
        # missing
        job.log(row)
        checkpoints.save(job, mark, state, trainable)
        if state.stopped:
            break


def _lowered(job: Job, state: State) -> float:
    """By how much a plateau has lowered the learning rates."""
    if job.training.schedule != "plateau":
        return 1.0
    key = "val/loss" if len(job.val) else "train/loss"
    return schedules.lowered([row[key] for row in state.history])


@dataclass(frozen=True)
class StepStats:
    """What a step met: the loss that learns, the same with the pull of L2-SP, whether the head was
    all zeros before it, and the norm of the whole gradient before clipping. A step that is not
    `finite` has changed nothing."""

    loss: float
    penalised: float
    zero_head: bool
    norm: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.penalised + self.norm)

    def __str__(self) -> str:
        return f"the loss is {self.penalised:.3g} and the norm of its gradient {self.norm:.3g}"


def step(job: Job, feed: Feed, trainable: Trainable, x: Inputs, targets: Tensor) -> StepStats:
    """One step on one batch: forward, loss, gradients, clipping, update, at the learning rates that
    the groups hold.

    `x` is what `feed.batches` gives, `targets` (n, C) are probabilities. A loss or gradient that is
    not finite updates nothing: the caller decides what that means.
    """
    training = job.training
    with job.autocast():
        features = feed.features(x)
    logits = job.head(features.float())
    loss = optim.soft_cross_entropy(logits, targets, job.class_weights, training.label_smoothing)
    penalised = loss + optim.l2_sp(trainable.moved(), training.l2_sp) if training.l2_sp else loss
    trainable.optimizer.zero_grad()
    penalised.backward()
    parameters = trainable.parameters
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    stats = StepStats(loss.item(), penalised.item(), not job.head.weight.any(), norm.item())
    if stats.finite:
        if training.clip:
            nn.utils.clip_grads_with_norm_(parameters, training.clip, norm)
        trainable.optimizer.step()
    return stats


def _order(job: Job, feed: Feed, epoch: int, rng: np.random.Generator) -> list[Items]:
    """The batches of an epoch: every training image once, in random order, each in the view that is
    its turn."""
    order = rng.permutation(len(job.train)).tolist()
    return even_batches(
        [(int(job.train[k]), _view(job, feed, epoch, k)) for k in order], job.training.batch_size
    )


def _reason_to_stop(job: Job, state: State) -> str:
    """Why this epoch was the last, or no text."""
    patience, epochs = job.training.patience, job.training.epochs
    if patience and len(job.val) >= CHOOSES and state.epoch - state.best_epoch >= patience:
        return f"validation accuracy has not gained in {patience} epochs"
    return f"all {epochs} epochs" if state.epoch == epochs else ""


def _view(job: Job, feed: Feed, epoch: int, k: int) -> int:
    """Which view of the k-th training image an epoch sees: the stored ones in turn, else a new
    one."""
    if job.training.augment == "none":
        return 0
    return (epoch - 1 + k) % feed.views if feed.views else epoch


def _judge(
    job: Job, feed: Feed, state: State, trainable: Trainable, epoch: int
) -> dict[str, float]:
    """Judge the live weights, or their average, on clean training images and the validation images,
    and keep them where they are what ships."""
    live = copied(trainable.live)
    current = state.average or live
    checkpoints.put(trainable.live, current)
    clean = _evaluate_clean(job, feed)
    if not len(job.val):
        checkpoints.put(trainable.live, live)
        return clean
    found, scores = _evaluate(job, feed)
    assert state.scores is not None
    state.scores = torch.cat([state.scores, scores[None]])
    rows = [state.start, *state.history, found]
    if len(job.val) < CHOOSES or _worth(rows, epoch) > _worth(rows, state.best_epoch):
        state.best, state.best_epoch = {key: t.clone() for key, t in current.items()}, epoch
    checkpoints.put(trainable.live, live)
    return clean | found


def _worth(rows: Sequence[Mapping[str, float]], epoch: int) -> tuple[float, float]:
    """What an epoch is chosen by: accuracy, then calibrated log loss, each the mean of the epoch
    and the one before, since single epochs are noisy. The start stands for itself."""
    pair = rows[max(epoch - 1, 0) : epoch + 1]
    top1 = sum(row["val/top1"] for row in pair) / len(pair)
    return top1, -sum(row["val/calibrated"] for row in pair) / len(pair)


def features_of(job: Job, feed: Feed, index: Ints) -> Tensor:
    """What the head reads of unaugmented images, `(n, width)`."""
    plan = even_batches([(int(i), 0) for i in index], STORE_BATCH)
    with torch.no_grad(), job.autocast():
        return torch.cat([feed.features(x).float() for x in feed.batches(plan)])


def _evaluate(job: Job, feed: Feed) -> tuple[dict[str, float], Tensor]:
    """Mean cross-entropy (no smoothing, no class weights), the same after one fitted temperature,
    top-1; and the scores (n, C) of the validation images."""
    job.backbone.module.eval()
    features = features_of(job, feed, job.val)
    with torch.no_grad():
        scores, labels = job.head(features), job.labels([(int(i), 0) for i in job.val])
        loss = nn.functional.cross_entropy(scores, labels).item()
        top1 = (scores.argmax(1) == labels).float().mean().item()
        calibrated = loss
        if math.isfinite(loss):
            temperature = metrics.fit_temperature(scores.cpu().numpy(), labels.cpu().numpy())
            calibrated = nn.functional.cross_entropy(scores / temperature, labels).item()
    return {"val/loss": loss, "val/top1": top1, "val/calibrated": calibrated}, scores


def _evaluate_clean(job: Job, feed: Feed) -> dict[str, float]:
    """Mean cross-entropy and top-1 of training images as validation images are judged, so that the
    two curves can be compared. Draws nothing at random; a loss that is not finite is left out."""
    if not len(job.clean):
        return {}
    job.backbone.module.eval()
    features = features_of(job, feed, job.clean)
    with torch.no_grad():
        scores, labels = job.head(features), job.labels([(int(i), 0) for i in job.clean])
        loss = nn.functional.cross_entropy(scores, labels).item()
        top1 = (scores.argmax(1) == labels).float().mean().item()
    return {**({"clean/loss": loss} if math.isfinite(loss) else {}), "clean/top1": top1}


# ------------------------------------------------------------------------ before and after the loop


def _chance(job: Job) -> float:
    """The validation accuracy of naming the most frequent class of the validation images."""
    return float(np.bincount(job.images.labels[job.val]).max() / len(job.val))


def _clean_subset(train: Ints, seed: int) -> Ints:
    """At most `CLEAN` of the training images, from a generator of their own."""
    rng = np.random.default_rng([seed, 29])
    return np.sort(rng.choice(train, min(CLEAN, len(train)), replace=False))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"no device {name!r} here", where="device", fix="use auto or cpu"
        ) from error
    hardware.keep_memory()
    return torch.device(name)


def _check(labels: Ints, train: Ints, val: Ints, classes: int, training: Training) -> None:
    if not len(train):
        raise UserError(
            "no training images", where="training", fix="give at least one image of each class"
        )
    if training.batch_size < 1:
        raise UserError(
            f"batch_size is {training.batch_size}", where="train.batch_size", fix="use 1 or more"
        )
    if training.head_init not in ("probe", "zero"):
        raise UserError(
            f"no head_init is called {training.head_init!r}",
            where="train.head_init",
            fix="use probe or zero",
        )
    if shared := np.intersect1d(train, val).tolist():
        raise UserError(
            f"images {shared[:3]} train and validate",
            where="training",
            fix="make the parts disjoint",
        )
    outside = sorted(
        {int(label) for label in labels[np.concatenate([train, val])] if not 0 <= label < classes}
    )
    if outside:
        raise UserError(
            f"label {outside[0]} is none of the {classes} classes",
            where="training",
            fix="label every image",
        )
    if (
        training.norm_moves
        and min(
            len(part) for part in even_batches([(int(i), 0) for i in train], training.batch_size)
        )
        == 1
    ):
        raise UserError(
            "BatchNorm cannot learn from batches of one image",
            where="train.batch_size",
            fix="use 2 or more",
        )


def class_weights_of(
    labels: Ints, classes: int, training: Training, given: ArrayLike | None = None
) -> Tensor:
    if given is not None:
        weights = torch.as_tensor(np.asarray(given, np.float32))
        if (
            weights.shape != (classes,)
            or not (weights > 0).all()
            or not torch.isfinite(weights).all()
        ):
            raise UserError(
                "class weights must be one number above 0 a class",
                where="class_weights",
                fix=f"give {classes}",
            )
        return weights
    if training.class_weight != "balanced":
        return torch.ones(classes)
    counts = np.bincount(labels, minlength=classes)
    return torch.from_numpy((len(labels) / (classes * np.maximum(counts, 1))).astype(np.float32))


@contextlib.contextmanager
def _prepared(
    backbone: Backbone, training: Training, device: torch.device, way: speed.Way
) -> Iterator[None]:
    """Freeze, and bring the module to the device in the layout of `way`; afterwards, back."""
    freeze(backbone, training.trainable, norm_moves=training.norm_moves)
    backbone.module.to(device=device, memory_format=way.memory_format)  # type: ignore[call-overload]
    slow = slow_in_bf16(backbone.module) if way.bf16 and device.type == "cpu" else {}
    try:
        with replaced(backbone.module, slow), way.in_threads():
            yield
    finally:
        backbone.module.eval()
        backbone.module.to(device="cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        backbone.module.zero_grad()


def _check_first_loss(job: Job, state: State, first: StepStats) -> None:
    """Keep the loss of the first batch; a head of zeros must give ln C, whatever the features
    are."""
    state.start["train/loss"] = first.loss
    expected = math.log(len(job.class_weights))
    if first.zero_head and abs(first.loss - expected) > 1e-3:
        raise UserError(
            f"the first loss of a zero head is {first.loss:.4f}, not ln C = {expected:.4f}",
            where="training",
        )


def _diverged(what: str, step: int, epoch: int, groups: Sequence[optim.Group]) -> DivergedError:
    """Name the step and the groups: those with broken weights where there are any, else those with
    broken gradients."""
    weights, gradients = (
        optim.broken_groups(groups, gradients=False),
        optim.broken_groups(groups, gradients=True),
    )
    names = (
        f"weights of {', '.join(weights)}"
        if weights
        else f"gradients of {', '.join(gradients) or 'none'}"
    )
    return DivergedError(
        f"{what} at step {step + 1} (epoch {epoch}); not finite: {names}",
        where="training",
        fix=LOWER,
    )


def _doubts(state: State, n: int) -> list[str]:
    """What the validation curve does not prove."""
    best = state.best_epoch
    if not n or not state.history:
        return []
    if best == 0:
        return ["no epoch was better than the weights from before the first step: they were kept"]
    before, after = state.start["val/top1"], state.history[best - 1]["val/top1"]
    error = math.sqrt(after * (1 - after) / n)
    if after - before >= error:
        return []
    if after < before:
        return [f"validation top-1 fell from {before:.1%} to {after:.1%} (n = {n})"]
    change = f"validation top-1 went from {before:.1%} to {after:.1%}"
    return [f"{change}: less than one binomial standard error ({error:.1%} with {n} images)"]
