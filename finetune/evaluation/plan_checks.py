"""What a job plans, checked before it is done: the labels, and the training on a sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from finetune.analysis import Look
from finetune.check import Check
from finetune.evaluation import fitting
from finetune.features import label_signal
from finetune.heads.svm import SvmResult
from finetune.network import Tap
from finetune.progress import Bar, Say, clock
from finetune.run import RunDir

if TYPE_CHECKING:
    from finetune.analysis import Ints
    from finetune.training.preflight import Preflight

FILE = "preflight.json"
OF_TRAINING = ("initial loss", "gradients", "update ratio", "learning rate", "overfit")


def whole(seen: Look, base: SvmResult, bar: Bar) -> Preflight:
    """Every check of what the plan is going to do; `base` is the SVM, whose taps the head reads."""
    from finetune.training.preflight import Preflight

    train = seen.part("train")
    labels = label_signal.judged(
        label_signal.measure(
            np.asarray(seen.features.blocks[Tap("pooled")][train]),
            seen.images.labels[train],
            seen.groups[train],
            seed=seen.recipe.data.seed,
        )
    )
    if seen.plan.training is None:
        why = f"the plan trains nothing ({seen.plan.strategy})"
        return Preflight((labels, *(Check(name, "skip", "not tried", why) for name in OF_TRAINING)))
    with bar("rehearsal") as progress:
        progress(0, 1)
        found = _rehearsed(seen, base, train, quick=False)
        progress(1, 1)
    return Preflight((labels, *found.checks), found.range_test)


def quick(seen: Look, base: SvmResult, train: Ints, folder: RunDir, say: Say) -> None:
    """The quick form, as the first step of a training on the images at `train`: what does not pass
    is said in a line each, and all of it is kept in the run."""
    if (folder.path / FILE).exists():  # a run that goes on
        return
    with clock(seen.seconds, "preflight"):
        found = _rehearsed(seen, base, train, quick=True)
    folder.write_json(FILE, found.to_json())
    for check in found.checks:
        if check.status != "pass":
            action = f" → {check.action}" if check.action else ""
            words = f"{check.name}: {check.value}; {check.meaning}{action}"
            say(f"preflight  {check.status.upper()} {words}")


def _rehearsed(seen: Look, base: SvmResult, train: Ints, *, quick: bool) -> Preflight:
    from finetune.training import rehearsal

    training = fitting.training_of(seen, base)
    return rehearsal.rehearse(
        fitting.backbone_of(seen, training, len(train)),
        seen.images,
        train,
        training,
        classes=len(seen.images.classes),
        seed=seen.recipe.data.seed,
        precision=seen.recipe.backbone.precision,
        quick=quick,
    )
