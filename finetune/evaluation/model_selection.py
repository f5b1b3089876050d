"""Which images choose between the contenders, when nothing needs to be trained, and the verdict in
words.

Contenders are compared on images that none was fitted on: the validation part where it is large
enough, else a fold of the training part, for which the SVM answers out of fold.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from finetune import metrics
from finetune.analysis import Look
from finetune.data import splits
from finetune.evaluation.contenders import Choice, Contender, Selection, log_probabilities
from finetune.heads.svm import SvmResult

# images: fewer cannot tell two models apart, and out-of-fold scores choose instead
ENOUGH_VALIDATION = 100
NOT_TRAINED = "no epoch of the training was better than its start"
# without a validation part, one fold in five is what the fine-tuned model has not seen
HOLDOUT_FOLDS = 5


def selection(seen: Look) -> Selection:
    """The images that choose between the contenders: the validation part, or one fold of a small
    training part."""
    validation, words = seen.part("val"), "validation images"
    if len(validation) < ENOUGH_VALIDATION:
        validation = splits.hold_out(
            seen.images.labels,
            seen.groups,
            seen.part("train"),
            1 / HOLDOUT_FOLDS,
            seen.recipe.data.seed,
        )
        words = "training images (the SVM's scores are out of fold)"
    groups = seen.groups[validation] if seen.images.groups is not None else None
    return Selection(validation, seen.images.labels[validation], groups, words)


def svm_contender(seen: Look, baseline: SvmResult, chosen: Selection) -> Contender:
    """The SVM on the selection images, which it was not fitted on."""
    if len(seen.part("val")) >= ENOUGH_VALIDATION:
        scores = baseline.head.scores(
            [np.asarray(seen.features.blocks[tap][chosen.index]) for tap in baseline.head.taps]
        )
    else:
        scores = baseline.oof_scores[np.searchsorted(seen.part("train"), chosen.index)]
    return Contender(
        kind="svm",
        name=f"the SVM on {' + '.join(map(str, baseline.head.taps))}",
        scores=log_probabilities(scores, baseline.head.temperature),
        seconds=seen.seconds.get("svm", 0.0),
    )


def reason_to_skip(seen: Look, baseline: SvmResult) -> str:
    """Why nothing that fine-tuning can give would ship, or no text: then it has to be tried, as
    always when it was asked for.

    The rule of shipping decides before the training where not even a model without errors would be
    clearly better.
    """
    if seen.plan.training is None:
        return ""
    chosen = selection(seen)
    if not len(chosen):
        return "no image can be held out that would choose between it and the SVM"
    if seen.recipe.policy.strategy != "auto":
        return ""
    y, first = chosen.labels, svm_contender(seen, baseline, chosen).scores.argmax(1)
    pair = metrics.paired(y, first, y, chosen.groups)
    if pair.difference.value > pair.standard_error:
        return ""
    errors = f"the SVM errs on {int((first != y).sum())} of {len(y)} {chosen.words}"
    return (
        f"{errors}; not even a model without errors would be better "
        f"by more than one paired standard error"
    )


JUDGED_ON = {  # how metrics.json's names begin, and what a few words say of the accuracy there
    "test": "on {n} test images",
    "folds": "on {n} images, each answered without its fold; what ships is fitted on all of them",
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
    seen: Look, judged: dict[str, Any], baseline: SvmResult, chosen: Choice | None
) -> tuple[str, str]:
    """Two sentences: what to ship and how good it is; how it stands beside the others."""
    name = (
        chosen.winner.name if chosen else f"the SVM on {' + '.join(map(str, baseline.head.taps))}"
    )
    first = f"Ship {name}: {short(judged)}."
    if chosen is None or chosen.pair is None:
        largest = [
            f"Always saying the largest class gives {v:.1%}. "
            for key, v in judged.items()
            if key.endswith("/majority")
        ]
        why = reason_to_skip(seen, baseline) or seen.plan.because[-1]
        second = f"{''.join(largest)}Nothing was fine-tuned: {why}."
    else:
        second = f"{chosen.because[0].upper()}{chosen.because[1:]}."
    loud = (
        " THE BACKBONE'S WEIGHTS ARE RANDOM: this says nothing about transfer."
        if seen.named.network.pretraining == "random"
        else ""
    )
    return first, f"{second}{loud}"
