"""Which of the two models ships, the SVM or the fine-tuned one, and the verdict in words.

They are compared on images that neither was fitted on: the validation part where it is large
enough, else a fold of the training part, for which the SVM answers out of fold.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from finetune import metrics
from finetune.analysis import Floats, Ints, Look
from finetune.data import splits
from finetune.heads.svm import SvmResult
from finetune.metrics import Paired
from finetune.progress import Say

ENOUGH_VALIDATION = (
    100  # images: fewer cannot tell two models apart, and out-of-fold scores choose instead
)
NOT_TRAINED = "no epoch of the training was better than its start"
HOLDOUT_FOLDS = (
    5  # without a validation part, one fold in five is what the fine-tuned model has not seen
)


def choosing(seen: Look) -> Ints:
    """The images that choose between the models: the validation part, or one fold of a small
    training part."""
    validation = seen.part("val")
    if len(validation) >= ENOUGH_VALIDATION:
        return validation
    return splits.hold_out(
        seen.images.labels,
        seen.groups,
        seen.part("train"),
        1 / HOLDOUT_FOLDS,
        seen.recipe.data.seed,
    )


def svm_answers(seen: Look, baseline: SvmResult) -> tuple[Ints, Ints, Ints | None, str]:
    """What the SVM says of the images that choose, which it was not fitted on: labels, its answers,
    groups, and a word."""
    chosen = choosing(seen)
    groups = seen.groups[chosen] if seen.images.groups is not None else None
    if len(seen.part("val")) >= ENOUGH_VALIDATION:
        scores = baseline.head.scores(
            [np.asarray(seen.features.blocks[tap][chosen]) for tap in baseline.head.taps]
        )
        return seen.images.labels[chosen], scores.argmax(1), groups, "validation images"
    scores = baseline.oof_scores[np.searchsorted(seen.part("train"), chosen)]
    return (
        seen.images.labels[chosen],
        scores.argmax(1),
        groups,
        "training images (the SVM's scores are out of fold)",
    )


def decided(seen: Look, baseline: SvmResult) -> str:
    """Why nothing that fine-tuning can give would ship, or nothing: then it has to be tried, as
    when it was asked for.

    The rule of shipping decides before the training where not even a model without errors would be
    clearly better.
    """
    if seen.plan.training is None:
        return ""
    if not len(choosing(seen)):
        return "no image can be held out that would choose between it and the SVM"
    if seen.recipe.policy.strategy != "auto":
        return ""
    y, first, groups, words = svm_answers(seen, baseline)
    if clearly_better(metrics.paired(y, first, y, groups)):
        return ""
    errors = f"the SVM errs on {int((first != y).sum())} of {len(y)} {words}"
    return (
        f"{errors}; not even a model without errors would be better "
        f"by more than one paired standard error"
    )


def compare(seen: Look, baseline: SvmResult, tuned: Floats, best_epoch: int, say: Say) -> Paired:
    """Both models on images that neither was fitted on; the difference is that of the fine-tuned
    model to the SVM.

    `tuned` (n, C) are its scores on the images that choose, after `best_epoch` epochs.
    """
    y, first, groups, words = svm_answers(seen, baseline)
    pair = metrics.paired(y, first, tuned.argmax(1), groups)
    model = "the fine-tuned model" if ships(pair, best_epoch) else "the SVM"
    untrained = f"; {NOT_TRAINED}" if clearly_better(pair) and not best_epoch else ""
    say(
        f"choose     fine-tuned − SVM = {100 * pair.difference.value:+.1f} points on {len(y)} "
        f"{words}; one paired standard "
        f"error is {100 * pair.standard_error:.1f}{untrained} → {model} ships"
    )
    return pair


def clearly_better(pair: Paired) -> bool:
    """The rule of shipping: the fine-tuned model must be better by more than one paired standard
    error."""
    return pair.difference.value > pair.standard_error


def ships(pair: Paired, best_epoch: int) -> bool:
    """Whether the fine-tuned model does: it is clearly better, and some epoch of its training was
    better than its start."""
    return clearly_better(pair) and best_epoch > 0


JUDGED_ON = {  # how metrics.json's names begin, and what a few words say of the accuracy there
    "test": "on {n} test images",
    "cv": "out of fold on {n} training images, which also chose the settings; no test image",
    "choice": "on {n} training images that it was not fitted on when they chose it; no test image",
}


def short(judged: dict[str, Any]) -> str:
    """How good the shipped model is, in a few words."""
    for part, words in JUDGED_ON.items():
        if top1 := judged.get(f"{part}/top1"):
            return (
                f"accuracy {top1['value']:.1%} ({top1['low']:.1%}–{top1['high']:.1%}) "
                f"{words.format(n=top1['n'])}"
            )
    return "no accuracy is known, as nothing could be held out"


def verdict(
    seen: Look, judged: dict[str, Any], baseline: SvmResult, pair: Paired | None, fine_tuned: bool
) -> tuple[str, str]:
    """Two sentences: what to ship and how good it is; how it stands beside the other model."""
    name = (
        f"the fine-tuned model ({seen.plan.strategy})"
        if fine_tuned
        else f"the SVM on {' + '.join(map(str, baseline.head.taps))}"
    )
    first = f"Ship {name}: {short(judged)}."
    if pair is None:
        largest = [
            f"Always saying the largest class gives {v:.1%}. "
            for key, v in judged.items()
            if key.endswith("/majority")
        ]
        second = (
            f"{''.join(largest)}Nothing was fine-tuned: "
            f"{decided(seen, baseline) or seen.plan.because[-1]}."
        )
    else:
        numbers = (
            f"{100 * pair.difference.value:+.1f} points ({100 * pair.difference.low:+.1f} to "
            f"{100 * pair.difference.high:+.1f})"
        )
        on = f"on {pair.difference.n} images that neither was fitted on"
        why = "more than" if clearly_better(pair) else "not more than"
        error = f"{why} one paired standard error ({100 * pair.standard_error:.1f})"
        if clearly_better(pair) and not fine_tuned:
            error += f"; but {NOT_TRAINED}"
        second = f"Fine-tuning moved the accuracy by {numbers} over the SVM {on}, {error}."
    loud = (
        " THE BACKBONE'S WEIGHTS ARE RANDOM: this says nothing about transfer."
        if seen.named.network.pretraining == "random"
        else ""
    )
    return first, f"{second}{loud}"
