"""When nothing needs to be trained, and what the verdict says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.evaluation import model_selection
from finetune.evaluation.contenders import Contender, choose, log_probabilities
from finetune.network import Tap

CLASSES, TRAIN, VALIDATION = 4, 300, 200
LABELS = np.arange(TRAIN + VALIDATION) % CLASSES


def answers(right: float, count: int, seed: int = 0) -> NDArray[np.float64]:
    """Scores of the last `count` images: so large a share is right, and the others are off by one
    class."""
    wrong = np.random.default_rng(seed).permutation(count) >= right * count
    return np.eye(CLASSES)[(LABELS[-count:] + wrong) % CLASSES]


def situation(svm: float, strategy: str = "auto", trains: bool = True) -> tuple[Any, Any]:
    """A look at images with a validation part of 200, and an SVM that is right on this share of
    them."""
    tap = Tap("pooled")
    scores = np.concatenate([np.zeros((TRAIN, CLASSES)), answers(svm, VALIDATION)])
    seen = SimpleNamespace(
        images=SimpleNamespace(labels=LABELS, groups=None),
        groups=np.arange(len(LABELS)),
        features=SimpleNamespace(blocks={tap: scores}),
        recipe=SimpleNamespace(
            data=SimpleNamespace(seed=0), policy=SimpleNamespace(strategy=strategy)
        ),
        plan=SimpleNamespace(
            training={} if trains else None, strategy="last stage", because=("the images are few",)
        ),
        named=SimpleNamespace(network=SimpleNamespace(pretraining="ImageNet-1k")),
        seconds={},
        part=lambda name: (
            np.arange(TRAIN, TRAIN + VALIDATION) if name == "val" else np.arange(TRAIN)
        ),
    )
    head = SimpleNamespace(taps=(tap,), scores=lambda blocks: blocks[0], temperature=1.0)
    return seen, SimpleNamespace(head=head, oof_scores=np.zeros((TRAIN, CLASSES)))


def judged() -> dict[str, Any]:
    return {"test/top1": {"value": 0.9, "low": 0.85, "high": 0.94, "n": 100}, "test/majority": 0.25}


def test_training_is_left_out_where_nothing_could_ship() -> None:
    """An SVM without a hundredth of errors cannot be beaten clearly; one with a fifth can, and
    whoever asks gets it tried."""
    assert "not even a model without errors" in model_selection.reason_to_skip(*situation(1.0))
    assert "" == model_selection.reason_to_skip(*situation(0.8))
    assert "" == model_selection.reason_to_skip(*situation(1.0, strategy="full"))
    assert "" == model_selection.reason_to_skip(*situation(1.0, trains=False))


def test_without_training_the_verdict_says_why() -> None:
    """The plan's own reason, and the share of the largest class."""
    seen, svm = situation(0.8, trains=False)
    first, second = model_selection.verdict(seen, judged(), svm, None)

    assert "Ship the SVM on pooled: accuracy 90.0% (85.0%–94.0%) on 100 test images." == first
    assert (
        "Always saying the largest class gives 25.0%. Nothing was fine-tuned: the images are few."
        == second
    )


def test_random_weights_are_said_loudly() -> None:
    """Whatever comes out says nothing about transfer."""
    seen, svm = situation(0.8, trains=False)
    seen.named.network.pretraining = "random"

    assert "WEIGHTS ARE RANDOM" in model_selection.verdict(seen, judged(), svm, None)[1]


def test_the_verdict_names_what_ships_and_why() -> None:
    """The winner's name begins it, and the comparison with the SVM follows."""
    seen, svm = situation(0.8)
    chosen = model_selection.selection(seen)
    first = model_selection.svm_contender(seen, svm, chosen)
    scores = log_probabilities(5 * answers(0.95, VALIDATION, 1))
    rival = Contender(kind="fine-tuned", name="the fine-tuned model (full)", scores=scores)
    choice = choose((first, rival), chosen)
    ships, why = model_selection.verdict(seen, judged(), svm, choice)

    assert ships.startswith("Ship the fine-tuned model (full): accuracy 90.0%")
    assert why.startswith("The fine-tuned model (full) against the SVM: +")
    assert "200 validation images: the fine-tuned model (full) ships" in why
