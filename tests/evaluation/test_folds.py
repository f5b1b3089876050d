"""Folds judge the whole procedure, and what ships is fitted on everything."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune import files, job
from finetune.errors import UserError

TINY: dict[str, Any] = {
    "backbone": ["test_efficientnet"],
    "weights": "random",
    "engine": "torch",
    "precision": "float32",
    "strategy": "svm",
    "folds": 3,
    "taps": ["pooled"],
    "assignments": ("backbone.frame=crop", "svm.kernels=[linear]"),
}

WIDE = {key: value for key, value in TINY.items() if key not in ("taps", "assignments")}


@pytest.fixture(scope="module")
def judged(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in three folds of the shapes, among them a copy of one image."""
    data = tmp_path_factory.mktemp("folds") / "shapes"
    shutil.copytree(shapes, data)
    first = next(path for path in sorted((data / "circle").iterdir()))
    shutil.copy(first, first.with_name("copy.png"))
    return job.fit(data, out=data.parent / "run", **TINY).path


def rows(path: Path) -> list[dict[str, str]]:
    with (path / "predictions-folds.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_image_is_answered_once_and_the_accuracy_is_that_of_all_of_them(
    judged: Path,
) -> None:
    found, metrics = rows(judged), files.read_json(judged / "metrics.json")
    right = [row["prediction"] == row["label"] for row in found]
    assert len({row["path"] for row in found}) == len(found) == metrics["folds/top1"]["n"]
    assert metrics["folds/top1"]["value"] == pytest.approx(sum(right) / len(right))
    assert metrics["folds/lowest-fold"] <= metrics["folds/top1"]["value"]


def test_the_folds_are_listed_with_what_each_of_them_shipped(judged: Path) -> None:
    listed = files.read_json(judged / "folds.json")
    assert [row["fold"] for row in listed] == [1, 2, 3]
    assert sum(row["n"] for row in listed) == len(rows(judged))
    assert all(row["shipped"] for row in listed)


def test_no_image_is_left_for_a_test_and_the_verdict_says_so(judged: Path) -> None:
    about = files.read_json(judged / "run.json")
    assert about["test_evaluations"] == 0
    assert "fitted on all of them" in about["verdict"]
    assert "test/top1" not in files.read_json(judged / "metrics.json")


def test_a_job_that_was_killed_between_folds_does_none_of_them_twice(
    shapes: Path, tmp_path: Path
) -> None:
    said: list[str] = []

    def killed(line: str) -> None:
        said.append(line)
        if line.startswith("fold-2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.fit(shapes, out=tmp_path / "run", say=killed, **TINY)
    again: list[str] = []
    job.fit(shapes, out=tmp_path / "run", say=again.append, **TINY)
    assert [line[:6] for line in said if line.startswith("fold-")] == ["fold-1", "fold-2"]
    assert [line[:6] for line in again if line.startswith("fold-")] == ["fold-3"]


@pytest.mark.slow
def test_labels_by_chance_are_judged_as_chance(shapes: Path, tmp_path: Path) -> None:
    """The choice of taps and kernel is inside the folds: choosing among many machines flatters
    nobody."""
    table = tmp_path / "chance.csv"
    paths = sorted(shapes.rglob("*.png"))
    lines = [f"{path},{'ab'[(7 * i * i + i // 5) % 2]}" for i, path in enumerate(paths)]
    table.write_text("path,label\n" + "\n".join(lines), encoding="utf-8")
    outcome = job.fit(table, out=tmp_path / "run", **WIDE)
    top1 = outcome.metrics["folds/top1"]
    assert top1["low"] < 0.6


def test_test_images_beside_folds_are_refused_with_the_way_on(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave --folds or --test out"):
        job.fit(shapes, test=str(shapes), out=tmp_path / "run", **TINY)


def test_without_two_images_of_a_class_nothing_can_be_held_out(
    shapes: Path, tmp_path: Path
) -> None:
    for name in ("circle", "square"):
        (tmp_path / "few" / name).mkdir(parents=True)
        image = sorted((shapes / name).iterdir())[0]
        shutil.copy(image, tmp_path / "few" / name)
    with pytest.raises(UserError, match="--test none"):
        job.fit(tmp_path / "few", out=tmp_path / "run", **TINY)


def test_a_class_of_one_image_trains_and_is_not_judged(shapes: Path, tmp_path: Path) -> None:
    data = tmp_path / "lone"
    shutil.copytree(shapes, data)
    (data / "cross").mkdir()
    shutil.move(sorted((data / "square").iterdir())[0], data / "cross")
    said: list[str] = []
    path = job.fit(data, out=tmp_path / "run", say=said.append, **TINY).path
    assert any("1 images of classes with one image" in line for line in said)
    assert "cross" not in {row["label"] for row in rows(path)}
    assert "p:cross" in rows(path)[0]
    assert json.loads((path / "folds.json").read_text())
