"""Which model ships: the fine-tuned one where it is clearly better than the SVM, and its training
did something."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from finetune.evaluation import model_selection
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
        part=lambda name: (
            np.arange(TRAIN, TRAIN + VALIDATION) if name == "val" else np.arange(TRAIN)
        ),
    )
    head = SimpleNamespace(taps=(tap,), scores=lambda blocks: blocks[0])
    return seen, SimpleNamespace(head=head, oof_scores=np.zeros((TRAIN, CLASSES)))


def judged() -> dict[str, Any]:
    return {"test/top1": {"value": 0.9, "low": 0.85, "high": 0.94, "n": 100}, "test/majority": 0.25}


@pytest.mark.parametrize(
    ("tuned", "best_epoch", "ships"),
    [(0.95, 3, True), (0.80, 3, False), (0.81, 3, False), (0.95, 0, False)],
    ids=["clearly better", "equal", "hardly better", "never better than its start"],
)
def test_what_is_said_is_what_ships(tuned: float, best_epoch: int, ships: bool) -> None:
    """The line of the choice and the verdict name the model that ships, and say why it is that
    one."""
    seen, svm = situation(0.8)
    said: list[str] = []
    pair = model_selection.compare(
        seen, svm, answers(tuned, VALIDATION, 1), best_epoch, said.append
    )
    first, second = model_selection.verdict(seen, judged(), svm, pair, ships)

    assert ships == model_selection.ships(pair, best_epoch)
    assert ("→ the fine-tuned model ships" if ships else "→ the SVM ships") in said[0]
    assert ("Ship the fine-tuned model" if ships else "Ship the SVM") in first
    better = tuned > 0.9
    assert better == (", more than one paired standard error" in second)
    assert better == (", not more than one paired standard error" not in second)
    untrained = better and not best_epoch
    assert (
        untrained
        == (model_selection.NOT_TRAINED in said[0])
        == (model_selection.NOT_TRAINED in second)
    )


def test_training_is_left_out_where_nothing_could_ship() -> None:
    """An SVM without a hundredth of errors cannot be beaten clearly; one with a fifth can, and
    whoever asks gets it tried."""
    assert "not even a model without errors" in model_selection.decided(*situation(1.0))
    assert "" == model_selection.decided(*situation(0.8))
    assert "" == model_selection.decided(*situation(1.0, strategy="full"))
    assert "" == model_selection.decided(*situation(1.0, trains=False))


def test_without_training_the_verdict_says_why() -> None:
    """The plan's own reason, and the share of the largest class."""
    seen, svm = situation(0.8, trains=False)
    first, second = model_selection.verdict(seen, judged(), svm, None, False)

    assert "Ship the SVM on pooled: accuracy 90.0% (85.0%–94.0%) on 100 test images." == first
    assert (
        "Always saying the largest class gives 25.0%. Nothing was fine-tuned: the images are few."
        == second
    )


def test_random_weights_are_said_loudly() -> None:
    """Whatever comes out says nothing about transfer."""
    seen, svm = situation(0.8, trains=False)
    seen.named.network.pretraining = "random"

    assert "WEIGHTS ARE RANDOM" in model_selection.verdict(seen, judged(), svm, None, False)[1]
