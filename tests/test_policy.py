"""The policy: what each cell decides, what overrides it, and what it advises."""

from __future__ import annotations

import dataclasses

import pytest

from finetune import policy
from finetune.errors import UserError
from finetune.policy import Facts
from finetune.training import config

LITE0 = ("stem", *(f"stage{i}" for i in range(1, 8)), "neck")


def facts(
    per_class: int = 44, classes: int = 10, similarity: str = "near", **changes: object
) -> Facts:
    counts = {f"class{i}": per_class for i in range(classes)}
    return dataclasses.replace(Facts(counts, similarity, LITE0, 224, 256), **changes)


def test_every_cell_of_the_matrix_gives_a_plan_with_reasons() -> None:
    """Each row × column leads to the strategy that the table shows, with the reasons that led
    there."""
    examples = {"few": 5, "small": 44, "medium": 400, "large": 2000}
    for (row, column), cell in policy.MATRIX.items():
        plan = policy.decide(facts(examples[row], similarity=column))

        assert (row, column, cell.strategy) == (plan.row, plan.column, plan.strategy)
        assert len(plan.because) >= 3


def test_the_matrix_covers_every_row_and_column() -> None:
    """No combination of size and similarity is left without an answer."""
    assert {(row, column) for row, _, _ in policy.ROWS for column in policy.COLUMNS} == set(
        policy.MATRIX
    )


def test_rows_meet_without_gap() -> None:
    """19 and 20, 99 and 100, 999 and 1000 images per class fall into neighbouring rows."""
    rows = [policy.decide(facts(n)).row for n in (1, 19, 20, 99, 100, 999, 1000)]

    assert ["few", "few", "small", "small", "medium", "medium", "large"] == rows


def test_few_similar_and_many_different_images_get_different_strategies() -> None:
    """Photographs with 44 images a class and drawn digits with 320 are not treated alike."""
    assert (
        policy.decide(facts(44, similarity="near")).strategy
        != policy.decide(facts(320, similarity="far")).strategy
    )


def test_unknown_similarity_takes_the_middle_column() -> None:
    """A backbone of another pretraining is neither called near nor far."""
    plan = policy.decide(facts(similarity="unknown"))

    assert plan.column == "moderate"
    assert any("unknown" in reason for reason in plan.because)


def test_a_strategy_that_was_asked_for_overrides_the_matrix() -> None:
    """--strategy wins, and the reasons say so; the cell that the matrix would have chosen stays
    named."""
    plan = policy.decide(facts(5), strategy="full")

    assert ("full", "few") == (plan.strategy, plan.row)
    assert plan.training is not None
    assert LITE0 == plan.training.trainable
    assert any("asked for" in reason for reason in plan.because)


def test_trainable_stages_are_the_last_ones_and_the_neck() -> None:
    """stages:2 moves the last two stages and what follows them; half moves the upper half."""
    assert ("stage6", "stage7", "neck") == config.trainable("stages:2", LITE0)
    assert ("stage4", "stage5", "stage6", "stage7", "neck") == config.trainable("half", LITE0)
    assert () == config.trainable("svm", LITE0)
    assert LITE0 == config.trainable("full", LITE0)


@pytest.mark.parametrize("word", ["stages", "stages:0", "all", "stages:x", ""])
def test_a_strategy_that_does_not_exist_is_refused_with_those_that_do(word: str) -> None:
    """The message lists the strategies."""
    with pytest.raises(UserError, match="stages:K"):
        config.check_strategy(word)


def test_more_stages_than_the_backbone_has_are_refused() -> None:
    """The message says how many there are."""
    with pytest.raises(UserError, match="7 stages"):
        policy.decide(facts(), strategy="stages:8")


def test_overrides_reach_the_training_and_unknown_ones_are_refused() -> None:
    """A value that the user sets replaces the policy's, and a misspelt one names those that
    exist."""
    plan = policy.decide(facts(400), overrides={"epochs": 2, "lr": 0.01})

    assert plan.training is not None
    assert (2, 0.01) == (plan.training.epochs, plan.training.lr)
    with pytest.raises(UserError, match="epochs"):
        policy.decide(facts(400), overrides={"epoch": 2})


def test_a_budget_moves_to_a_cheaper_strategy_and_says_why() -> None:
    """What would take too long is not planned; the reasons name the time."""
    dear = policy.decide(facts(2000, similarity="far", trunk_seconds=0.02))
    cheap = policy.decide(facts(2000, similarity="far", trunk_seconds=0.02), budget=1.0)

    assert dear.strategy == "full"
    assert dear.minutes is not None
    assert dear.minutes > 1
    assert cheap.minutes is None or cheap.minutes <= 1
    assert any("budget" in reason for reason in cheap.because)


def test_tiny_sources_train_on_a_smaller_input() -> None:
    """28-pixel digits are not blown up to 224 for fine-tuning."""
    small = policy.decide(facts(400, short_side=28))
    large = policy.decide(facts(400, short_side=300))

    assert small.training is not None
    assert large.training is not None
    assert 64 == small.training.input_size
    assert 160 == large.training.input_size
    assert ("affine", "photo") == (small.training.augment, large.training.augment)


def test_flips_are_the_users_word() -> None:
    """--no-flip reaches the augmentation."""
    plan = policy.decide(facts(400, flip=False))

    assert plan.training is not None
    assert not plan.training.flip


def test_tiny_images_unlike_photographs_are_not_mirrored() -> None:
    """Digits and letters change their class in a mirror; stamps do not."""
    digits = policy.decide(facts(400, similarity="far", short_side=28))
    stamps = policy.decide(facts(44, similarity="near"))

    assert digits.training is not None
    assert stamps.training is not None
    assert (False, True) == (digits.training.flip, stamps.training.flip)
    assert any("train.flip=true" in line for line in digits.advice)
    asked = policy.decide(facts(400, similarity="far", short_side=28), overrides={"flip": True})
    assert asked.training is not None
    assert asked.training.flip
    assert not any("mirrored" in line for line in asked.advice)


def test_the_number_of_steps_is_bounded() -> None:
    """More images mean fewer epochs, down to four."""
    plans = [policy.decide(facts(n, similarity="far")).training for n in (30, 400, 5000)]

    assert [12, 12, 4] == [plan.epochs for plan in plans if plan]


def test_small_classes_are_named_with_what_to_collect() -> None:
    """The advice names the class, its number of images, and how many are worth having."""
    plan = policy.decide(dataclasses.replace(facts(), counts={"lynx": 9, "cat": 80}))

    assert "9 images in class 'lynx': collect at least 100 per class" in plan.advice
    assert any("balanced accuracy" in text for text in plan.advice)


def test_the_printed_matrix_marks_the_chosen_cell_once() -> None:
    """The cell stands in brackets, and the reasons and the advice follow."""
    text = policy.matrix_text(policy.decide(facts(320, similarity="far")))

    assert 1 == text.count("[")
    assert "[full]" in text
    assert "because" in text
