"""Which model ships, on images that none was fitted on."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from finetune import metrics
from finetune.evaluation import contenders
from finetune.evaluation.contenders import Contender, Selection

CLASSES, COUNT = 4, 400
LABELS = np.arange(COUNT) % CLASSES


def selection(count: int = COUNT, groups: NDArray[np.int64] | None = None) -> Selection:
    return Selection(np.arange(count), LABELS[:count], groups, "validation images")


def scores(
    right: float, sure: float = 4.0, seed: int = 0, count: int = COUNT
) -> NDArray[np.float64]:
    """Scores of which so large a share is right, each surer of its answer by `sure`."""
    wrong = np.random.default_rng(seed).permutation(count) >= right * count
    return sure * np.eye(CLASSES)[(LABELS[:count] + wrong) % CLASSES]


def contender(
    kind: str, right: float, seed: int = 0, count: int = COUNT, **more: object
) -> Contender:
    """A calibrated model that is right on this share of the images."""
    logs, _ = contenders.calibrated(scores(right, seed=seed, count=count), selection(count), 0)
    return Contender(kind=kind, name=kind, scores=logs, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tuned", "doubt", "winner"),
    [(0.95, "", "fine-tuned"), (0.80, "", "svm"), (0.70, "", "svm"), (0.95, "not trained", "svm")],
    ids=["clearly better", "the same", "worse", "never better than its start"],
)
def test_a_rival_ships_where_it_is_shown_to_be_better(
    tuned: float, doubt: str, winner: str
) -> None:
    """The SVM is what ships otherwise, and the sentence says which it is and why."""
    rival = contender("fine-tuned", tuned, 0 if tuned == 0.80 else 1, doubt=doubt)
    choice = contenders.choose((contender("svm", 0.8), rival), selection())

    assert winner == choice.winner.kind
    assert (doubt or "ships") in choice.because
    assert choice.pair is not None
    assert tuned - 0.8 == pytest.approx(choice.pair.difference.value, abs=1e-9)


def test_a_better_log_loss_counts_where_no_image_is_lost() -> None:
    """The same answers, but surer where they are right: the accuracy cannot show it, the log loss
    does."""
    y, base = LABELS, scores(0.8)
    wrong = base.argmax(1) != y
    honest = np.where(wrong[:, None], 0.3 * base, base)
    pair = [
        Contender(kind=kind, name=kind, scores=contenders.calibrated(s, selection(), 0)[0])
        for kind, s in (("svm", base), ("fine-tuned", honest))
    ]

    assert "fine-tuned" == contenders.choose(pair, selection()).winner.kind


def test_a_dearer_model_has_to_be_better_than_the_cheaper_ones() -> None:
    """Two networks per image are not run for the answers of one."""
    svm, tuned = contender("svm", 0.8), contender("fine-tuned", 0.95, 1)
    same = Contender(kind="average", name="average", scores=tuned.scores, passes=2)

    assert "fine-tuned" == contenders.choose((svm, tuned, same), selection()).winner.kind


def test_the_average_has_to_beat_its_cheaper_member_too() -> None:
    """Better than the SVM is not enough where the fine-tuned model alone says the same, though it
    is not shown to be better than the SVM itself."""
    svm, tuned = contender("svm", 0.95), contender("fine-tuned", 0.955, 1)
    rows = svm.scores.copy()
    wrong = np.flatnonzero(rows.argmax(1) != LABELS)
    rows[wrong] = tuned.scores[wrong]
    both = Contender(kind="average", name="average", scores=rows, passes=2)
    alike = Contender(kind="fine-tuned", name="fine-tuned", scores=rows)

    assert "average" == contenders.choose((svm, tuned, both), selection()).winner.kind
    assert "fine-tuned" == contenders.choose((svm, alike, both), selection()).winner.kind


def test_what_was_asked_for_ships() -> None:
    """Whatever the comparison says, which is told beside it."""
    pair = contender("svm", 0.95), contender("fine-tuned", 0.6, 1)
    asked = contenders.choose(pair, selection(), "fine-tuned")
    kept = contenders.choose((pair[1].__class__(**vars(pair[0])), pair[1]), selection(), "svm")

    assert ("fine-tuned", "svm") == (asked.winner.kind, kept.winner.kind)
    assert "asked for" in asked.because
    assert kept.pair is not None


def test_the_average_is_the_geometric_mean() -> None:
    """With few images both count the same: the mean of the log-probabilities, normalised."""
    few = 60
    first, second = (contender(k, r, s, few) for k, r, s in (("svm", 0.8, 0), ("tuned", 0.7, 1)))
    both = contenders.average(first, second, selection(few), 0)
    product = np.sqrt(np.exp(first.scores.astype(np.float64) + second.scores))

    assert {"svm": 0.5, "tuned": 0.5} == both.members
    assert product / product.sum(1, keepdims=True) == pytest.approx(np.exp(both.scores), abs=1e-6)
    assert 2 == both.passes


def test_a_useless_member_loses_its_weight() -> None:
    """With enough images the weight is chosen; an average of one model alone cannot ship."""
    both = contenders.average(contender("svm", 0.95), contender("noise", 0.25, 1), selection(), 0)

    assert both.members["svm"] > 0.5
    assert (
        contenders.average(
            contender("svm", 1.0), contender("noise", 0.25, 1), selection(), 0
        ).members["svm"]
        >= both.members["svm"]
    )


def test_calibration_is_judged_on_images_that_did_not_fit_it() -> None:
    """Each fold has the temperature of the others: one image of it cannot change its own."""
    raw = scores(0.9, sure=20.0)
    logs, temperature = contenders.calibrated(raw, selection(), 0)
    fold = contenders.folds(COUNT, None, 0)
    held = fold == 2
    own = metrics.fit_temperature(raw[~held], LABELS[~held])

    assert logs[held] == pytest.approx(contenders.log_probabilities(raw[held], own))
    assert temperature == metrics.fit_temperature(raw, LABELS)


def test_groups_stay_together() -> None:
    """Images of one group are in one fold, and count as one in the errors."""
    groups = np.repeat(np.arange(40), 10)
    fold = contenders.folds(COUNT, groups, 0)
    svm, tuned = contender("svm", 0.8), contender("fine-tuned", 0.85, 1)

    assert all(1 == len(set(fold[groups == g])) for g in range(40))
    alone = contenders.loss_gain(svm, tuned, selection())[1]
    grouped = contenders.loss_gain(svm, tuned, selection(groups=np.repeat(np.arange(4), 100)))[1]
    assert alone > 0
    assert grouped != pytest.approx(alone)
