"""What a run is judged on: its test images or, where it has none, training images that a model had
not been fitted on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune import metrics
from finetune.analysis import Floats, Ints, Look
from finetune.classifier import Predictions
from finetune.heads.head import AnyHead, softmax
from finetune.heads.svm import SvmResult
from finetune.metrics import Estimate, Paired

OUT_OF_FOLD = "training images, out of fold"
HELD_OUT = "training images that it was not fitted on when it was chosen"


@dataclass(frozen=True)
class Judgement:
    """Predictions whose truth is known, and the metrics of them; both are missing where nothing
    could be held out.

    `part` begins the names in metrics.json: `test`; `cv` (the SVM out of fold, whose settings the
    same images chose) or `choice` (the fine-tuned model on the images that chose it), which are a
    little flattered. `on` says it in words.
    """

    part: str
    on: str
    found: Predictions | None
    metrics: dict[str, Estimate | float]

    def to_json(self) -> dict[str, Any]:
        """The metrics as they stand in metrics.json."""
        return {
            f"{self.part}/{name}": v.to_json() if isinstance(v, Estimate) else v
            for name, v in self.metrics.items()
        }


def on_test(found: Predictions) -> Judgement:
    """The shipped model on the test part."""
    return Judgement("test", "test images", found, _metrics(found))


def out_of_fold(seen: Look, baseline: SvmResult) -> Judgement:
    """The SVM on the training images, each answered by a machine that had not seen it."""
    if not baseline.candidates:
        return Judgement("cv", "no image", None, {})
    rows = np.flatnonzero(np.isfinite(baseline.oof_scores).all(axis=1))
    probabilities = softmax(baseline.oof_scores[rows], baseline.head.temperature)
    found = Predictions(
        seen.images.subset(seen.part("train")[rows]), seen.images.classes, probabilities, ()
    )
    return Judgement("cv", OUT_OF_FOLD, found, _metrics(found))


def when_chosen(seen: Look, scores: Floats, index: Ints) -> Judgement:
    """The fine-tuned model on the images (by position) that chose it; `scores` are those of the
    model before the refit."""
    found = Predictions(seen.images.subset(index), seen.images.classes, softmax(scores), ())
    return Judgement("choice", HELD_OUT, found, _metrics(found))


def beside(seen: Look, svm_head: AnyHead, judged: Judgement) -> tuple[Estimate, Paired]:
    """The SVM on the test images beside the fine-tuned model that ships."""
    assert judged.found is not None
    test = seen.part("test")
    y, groups = judged.found.images.labels, judged.found.images.groups
    answers = svm_head.scores(
        [np.asarray(seen.features.blocks[tap][test]) for tap in svm_head.taps]
    ).argmax(1)
    return metrics.accuracy(y, answers, groups), metrics.paired(
        y, answers, judged.found.best, groups
    )


def _metrics(found: Predictions) -> dict[str, Estimate | float]:
    return metrics.judge(
        found.images.labels, found.probabilities, found.classes, found.images.groups
    )
