"""A search draws from ranges, compares on images that are not test images, and goes on where it was
stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune import files, job, recipe
from finetune.errors import UserError
from finetune.evaluation import search
from finetune.evaluation.search import Range, Tried

TINY: dict[str, Any] = {
    "backbone": ["test_efficientnet"],
    "weights": "random",
    "engine": "torch",
    "precision": "float32",
    "strategy": "stages:1",
    "taps": ["pooled"],
    "assignments": (
        *("backbone.frame=crop", "svm.kernels=[linear]", "train.epochs=3"),
        *("train.input_size=64", "train.taps=[pooled]"),
    ),
    "ranges": ("lr=1e-4..1e-1", "mixup=0..0.4"),
}
LR = Range("lr", 1e-4, 1e-2)


def tried(number: int, lr: float, loss: float, spread: float = 0.0) -> Tried:
    losses = np.array([loss - spread, loss + spread])
    return Tried(number, "coarse", {"lr": lr}, loss, 0.5, 1, 1.0, losses)


# --- in ranges


def test_a_range_from_zero_is_drawn_evenly_and_one_above_it_by_its_logarithm() -> None:
    assert LR.at(0.5) == pytest.approx(1e-3)
    assert Range("mixup", 0, 0.4).at(0.5) == pytest.approx(0.2)
    assert LR.share(LR.at(0.3)) == pytest.approx(0.3)


def test_every_trial_draws_its_own_values_and_the_same_in_every_process() -> None:
    drawn = [search.draw((LR,), 0, number)["lr"] for number in range(50)]
    assert len(set(drawn)) == 50
    assert drawn == [search.draw((LR,), 0, number)["lr"] for number in range(50)]
    assert 1e-4 < min(drawn) < 2e-4
    assert 5e-3 < max(drawn) < 1e-2


def test_the_next_round_searches_where_the_best_quarter_lay() -> None:
    trials = [tried(k, LR.at(k / 10), abs(k - 4) + 1.0) for k in range(1, 9)]
    (own,) = search.narrowed((LR,), trials)
    assert LR.share(own.low) == pytest.approx(0.2)  # trials 3 and 4, a tenth wider
    assert LR.share(own.high) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr=1e-3", "not a range"),
        ("colour=1..2", "not a range"),
        ("epochs=1..9", "names: lr"),
        ("lr=1e-1..1e-3", "has to rise"),
        ("lr=-1..1", "has to rise"),
        ("lr=nan..1", "has to rise"),
    ],
)
def test_a_range_that_cannot_be_searched_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        search.parse((text,))


def test_one_value_has_one_range() -> None:
    with pytest.raises(UserError, match="two ranges of lr"):
        search.parse(("lr=1e-5..1e-3", "train.lr=1e-4..1e-2"))


# --- verdicts


def found(best: Tried, others: tuple[Tried, ...], plan: Tried) -> search.Found:
    near = tuple(one.number for one in (best, *others) if search._is_near(one, best))
    return search.Found({"coarse": (LR,)}, (best, *others), 0, best, plan, near, 2)


def test_a_best_value_near_the_end_of_its_range_asks_for_a_wider_one() -> None:
    plan = tried(-1, 1e-3, 2.0)
    inside, _, _ = found(tried(0, 1e-3, 1.0), (), plan).checks()
    edge, _, _ = found(tried(0, 9e-3, 1.0), (), plan).checks()
    assert inside.status == "pass"
    assert (edge.status, "upper end" in edge.meaning) == ("warn", True)
    assert "--range lr" in edge.action


def test_trials_that_cannot_be_told_apart_are_counted() -> None:
    others = tuple(tried(k, 1e-3, 1.0 + 1e-3, spread=0.1) for k in range(1, 9))
    _, plateau, _ = found(tried(0, 1e-3, 1.0), others, tried(-1, 1e-3, 2.0)).checks()
    assert plateau.status == "warn"
    assert plateau.value.startswith("9 of 9")


def test_a_winner_that_is_no_better_than_the_plan_is_said_to_be_none() -> None:
    best = tried(0, 1e-3, 1.0)
    *_, same = found(best, (), tried(-1, 1e-3, 1.01, spread=0.5)).checks()
    *_, better = found(best, (), tried(-1, 1e-3, 2.0)).checks()
    assert (same.status, better.status) == ("warn", "pass")


# --- the search


@pytest.fixture(scope="module")
def done(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[float]]]:
    """A search that was stopped after two trials and then gone on with; the values of each."""
    pytest.importorskip("optuna")
    out = tmp_path_factory.mktemp("search") / "out"
    drawn: list[list[float]] = []
    judged = search._judged

    def stop(*given: Any) -> Any:
        if len(drawn) == 2:
            drawn.append([])
            raise KeyboardInterrupt
        drawn.append([1.0])
        return judged(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_judged", stop)
        with pytest.raises(KeyboardInterrupt):
            job.search(shapes, out=out, trials=(4, 1, 0), prune=False, **TINY)
        job.search(shapes, out=out, trials=(4, 1, 0), prune=False, **TINY)
    return out, drawn


def test_a_search_that_was_killed_goes_on_and_does_nothing_twice(
    done: tuple[Path, list[list[float]]],
) -> None:
    out, judged = done
    trials = files.read_json(out / "search.json")["trials"]
    assert [one["round"] for one in trials] == ["coarse"] * 4 + ["fine"]
    assert len({one["values"]["lr"] for one in trials}) == 5
    assert len(judged) == 7  # four, the one that was cut short, the fine one, and the plan's


def test_the_recipe_of_the_best_trial_trains_with_its_values(
    done: tuple[Path, list[list[float]]],
) -> None:
    out, _ = done
    best = files.read_json(out / "search.json")["best"]
    own = recipe.load(out / "best.yaml")
    assert own.train.lr == best["values"]["lr"]
    assert own.train.mixup == best["values"]["mixup"]
    assert own.policy.strategy == "stages:1"


def test_the_page_shows_every_trial(done: tuple[Path, list[list[float]]]) -> None:
    out, _ = done
    page = (out / "search.html").read_text(encoding="utf-8")
    assert page.count("<circle") == 4 + 4  # trials of the first round, and the grid
    assert page.count("<tr") == 1 + 5


def test_another_search_in_the_same_folder_is_refused(
    done: tuple[Path, list[list[float]]], shapes: Path
) -> None:
    out, _ = done
    with pytest.raises(UserError, match="--out"):
        job.search(shapes, out=out, trials=(5, 1, 0), **TINY)


def test_where_the_plan_trains_nothing_there_is_nothing_to_search(
    shapes: Path, tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(UserError, match="--strategy"):
        job.search(shapes, out=tmp_path / "out", **{**TINY, "strategy": "svm"})
