"""Many trainings of one network on one set of images, which differ in numbers alone: the frozen
stages run once for all of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike, NDArray

from finetune.backbones.stages import Backbone
from finetune.errors import UserError
from finetune.training import loop
from finetune.training.inputs import Log, open_feed

if TYPE_CHECKING:
    from finetune.data.images import ImageSet
    from finetune.training.config import Training
    from finetune.training.loop import TrainResult

# what may differ between trials: numbers that change neither the images' views nor what moves
NUMBERS = (
    "lr",
    "trunk_lr_scale",
    "layer_decay",
    "weight_decay",
    "warmup",
    "label_smoothing",
    "mixup",
    "clip",
    "l2_sp",
)
Trial = Callable[["Training", Log], "TrainResult"]


@contextlib.contextmanager
def open_trials(
    backbone: Backbone,
    images: ImageSet,
    train_index: ArrayLike,
    val_index: ArrayLike,
    training: Training,
    *,
    head_start: tuple[NDArray[Any], NDArray[Any]] | None = None,
    **settings: Any,
) -> Iterator[Trial]:
    """A function that trains `backbone` from its start with other numbers, again and again.

    `training` says what moves and which views are stored (at least as many epochs as a trial will
    have); the function takes a `Training` that differs in `NUMBERS` and `epochs`, and a log, which
    may end the trial by an exception. Afterwards the weights are those of before. `settings` are
    those of `loop.fit`.
    """
    with loop.open_job(
        backbone, images, train_index, val_index, training, **settings
    ) as job, open_feed(job, []) as feed:  # fmt: skip
        start = head_start

        def run(own: Training, log: Log) -> TrainResult:
            nonlocal start
            check(training, own)
            # many trials, judged by validation alone: nothing is spent on the clean curve
            one = dataclasses.replace(job, training=own, log=log, clean=job.clean[:0])
            if start is None and training.head_init == "probe":
                features = loop.features_of(one, feed, job.train).cpu().numpy()
                start = loop.linear_start(one, features)
            return loop.trial(one, feed, start)

        yield run


def check(first: Training, own: Training) -> None:
    """Refuse a training that needs other inputs than the `first`."""
    fixed = {field.name for field in dataclasses.fields(first)} - {*NUMBERS, "epochs", "patience"}
    if other := sorted(name for name in fixed if getattr(first, name) != getattr(own, name)):
        raise UserError(
            f"trials differ in {', '.join(other)}, for which the inputs would have to be made anew",
            where="search",
            fix=f"search over {', '.join(NUMBERS)}",
        )
