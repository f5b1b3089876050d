"""Backbones are compared on the same images, one that does not load is told, and no lucky winner is
taken."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from finetune.cli import cli
from finetune.errors import UserError
from finetune.evaluation import backbone_comparison as home
from finetune.evaluation.backbone_comparison import Budget, Comparison, Row
from finetune.report import backbones_page, backbones_told

TINY: dict[str, Any] = {
    "weights": "random",
    "engine": "torch",
    "precision": "float32",
    "assignments": ("backbone.frame=crop", "svm.kernels=[linear]", "backbone.taps=[pooled]"),
}
Y = np.zeros(100, dtype=np.int64)


def row(name: str, cost: int, wrong: slice, parameters: int = 1_000_000, pace: float = 100) -> Row:
    """A network that answers all images but `wrong` rightly."""
    predicted = Y.copy()
    predicted[wrong] = 1
    right = float((predicted == Y).mean())
    return Row(
        name=name,
        accuracy=right,
        error=0.03,
        knn=0.5,
        images_per_second=pace,
        parameters=parameters,
        multiply_adds=cost,
        size=224,
        head="pooled, svm",
        is_random=False,
        predicted=predicted,
    )


SMALL = row("small", 10, slice(0, 20), parameters=1_000_000)
MIDDLE = row("middle", 20, slice(0, 11), parameters=3_000_000, pace=50)
LARGE = row("large", 40, slice(1, 11), parameters=9_000_000, pace=20)


def status(found: Comparison) -> dict[str, str]:
    return {check.name: check.status for check in backbones_told.checks(found)}


# --- which one to take


def test_a_cheaper_network_within_one_paired_standard_error_of_the_best_is_taken() -> None:
    found = home.choose([LARGE, SMALL, MIDDLE], {}, Y)
    assert (found.best, found.taken) == (LARGE, MIDDLE)
    assert found.near == ("middle",)
    assert status(found)["lead"] == "warn"


def test_the_difference_is_judged_on_paired_answers_and_not_by_both_standard_errors() -> None:
    """Nine images more of a hundred are within the two errors of 3 %, but all go one way."""
    found = home.choose([SMALL, MIDDLE], {}, Y)
    assert found.taken is MIDDLE
    assert found.gaps["small"].difference.low > 0
    assert status(found)["lead"] == "pass"


def test_images_of_one_group_stand_or_fall_together() -> None:
    """The nine images are copies of one: a single draw, which shows nothing."""
    groups = np.arange(100)
    groups[11:20] = 11
    found = home.choose([SMALL, MIDDLE], {}, Y, groups)
    assert found.gaps["small"].standard_error > 0.08  # 0.03 for as many images on their own
    assert status(found)["lead"] == "warn"


def test_a_budget_excludes_networks_from_taking_but_not_from_the_table() -> None:
    found = home.choose([LARGE, SMALL, MIDDLE], {}, Y, budget=Budget(parameters=2))
    assert (found.best, found.taken, len(found.rows)) == (SMALL, SMALL, 3)
    slow = home.choose([LARGE, SMALL, MIDDLE], {}, Y, budget=Budget(milliseconds=25))
    assert slow.best is MIDDLE
    none = home.choose([LARGE, SMALL, MIDDLE], {}, Y, budget=Budget(1, 0.5))
    assert (none.taken, status(none)["best"]) == (None, "fail")
    assert "over budget" in backbones_page.render(none, "t")


def test_the_front_leaves_out_what_a_cheaper_network_equals() -> None:
    poor = row("poor", 15, slice(0, 20))
    found = home.choose([LARGE, SMALL, MIDDLE, poor], {}, Y)
    assert [one.name for one in found.front] == ["small", "middle", "large"]


def test_points_are_as_large_as_their_parameters_and_within_the_picture() -> None:
    found = home.choose([LARGE, SMALL, MIDDLE], {}, Y)
    drawn = backbones_page.picture(found)
    small, _, large = drawn["points"]
    assert (large["r"] / small["r"]) ** 2 == pytest.approx(9, rel=0.02)
    assert small["x"] < large["x"]
    assert large["y"] < small["y"]
    assert all(0 <= p["top"] < p["bottom"] <= drawn["height"] for p in drawn["points"])


# --- on images


@pytest.fixture(scope="module")
def done(shapes: Path) -> tuple[Comparison, list[str]]:
    lines: list[str] = []
    names = ["test_efficientnet", "nonesuch", "test_byobnet"]
    return home.compare(shapes, backbones=names, say=lines.append, **TINY), lines


def test_each_network_has_its_scores_and_its_size(done: tuple[Comparison, list[str]]) -> None:
    found, _ = done
    assert {one.name for one in found.rows} == {"test_efficientnet", "test_byobnet"}
    for one in found.rows:
        assert 0 < one.accuracy <= 1
        assert one.knn is not None
        assert one.parameters > 1e5
        assert one.multiply_adds > 1e6
        assert len(one.predicted) == found.n


def test_a_network_that_does_not_load_is_a_row_with_its_reason(
    done: tuple[Comparison, list[str]],
) -> None:
    found, lines = done
    assert list(found.failed) == ["nonesuch"]
    assert any(line.startswith("left out   nonesuch") for line in lines)
    assert "nonesuch" in backbones_page.render(found, "t")


def test_random_weights_are_marked(done: tuple[Comparison, list[str]]) -> None:
    found, _ = done
    assert status(found)["weights"] == "warn"
    assert "random" in backbones_told.to_text(found)


def test_the_one_to_take_alone_is_judged_on_the_test_part(
    done: tuple[Comparison, list[str]], shapes: Path
) -> None:
    found, _ = done
    assert found.taken is not None
    assert found.test is not None
    assert found.test.n > 0
    (judged,) = [check for check in backbones_told.checks(found) if check.name == "test"]
    assert found.taken.name in judged.value


def test_where_no_network_loads_the_reasons_are_told(shapes: Path) -> None:
    with pytest.raises(UserError, match=r"no network loads:\n.*nonesuch.*\n.*nowhere"):
        home.compare(shapes, backbones="nonesuch,nowhere", **TINY)


def test_one_file_of_weights_is_not_for_two_networks(shapes: Path) -> None:
    with pytest.raises(UserError, match="one file of weights for 2 networks"):
        home.compare(shapes, backbones="a,b", **{**TINY, "weights": "mine.pth"})


def test_the_command_writes_a_page_that_needs_no_other_file(
    done: tuple[Comparison, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def compare(data: str, **options: Any) -> Comparison:
        given.update(options, data=data)
        return done[0]

    monkeypatch.setattr(home, "compare", compare)
    page = tmp_path / "new" / "b.html"
    words = ["--backbones", "a,b", "--max-ms", "20", "-o", str(page), "--json"]
    ran = CliRunner().invoke(cli, ["compare-backbones", "photos", *words])
    assert ran.exit_code == 0, ran.output
    assert (given["data"], given["backbones"], given["max_ms"]) == ("photos", "a,b", 20)
    told = json.loads(ran.stdout)
    assert done[0].taken is not None
    assert told["take"] == done[0].taken.name
    assert json.loads(page.with_suffix(".json").read_text()) == told
    text = page.read_text("utf-8")
    assert "<svg" in text
    assert not re.search(r"(src|href)=|<script", text)


def test_a_page_has_to_be_named_as_one() -> None:
    with pytest.raises(UserError, match="neither a folder nor a page"):
        backbones_page.places("page.pdf")


@pytest.mark.slow
def test_trained_networks_are_all_found_and_know_their_published_accuracy(shapes: Path) -> None:
    """The Lites that are installed are compared where none is named."""
    found = home.compare(shapes, assignments=TINY["assignments"])
    (lite0,) = [one for one in found.rows if one.name == "tf_efficientnet_lite0"]
    assert lite0.imagenet == 0.751
    assert lite0.accuracy > 0.8
    assert abs(lite0.parameters - 4.65e6) < 1e5  # as published
    assert abs(lite0.multiply_adds - 385e6) < 40e6
