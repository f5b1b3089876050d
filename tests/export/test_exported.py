"""`finetune export`, from a run to a folder that others load."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import combined
import exports
import numpy as np
import pytest
from click.testing import CliRunner

from finetune.cli import cli
from finetune.errors import UserError
from finetune.evaluation import ensemble
from finetune.export import exported
from finetune.export.agreement import Asked


def code(folder: Path) -> str:
    """The Python of a card."""
    (found,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.S)
    return str(found)


@pytest.fixture(scope="module")
def made(combined_runs: combined.Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run in two formats, by the command."""
    home = tmp_path_factory.mktemp("exports")
    for to in ("onnx", "openvino"):
        words = [str(combined_runs.first), "--to", to, "-o", str(home / to), "--limit", "4"]
        done = CliRunner().invoke(cli, ["export", *words])
        assert 0 == done.exit_code, done.output
        assert "pass" in done.output
    return {to: home / to for to in ("onnx", "openvino")}


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_the_code_of_the_card_says_what_the_run_says(
    to: str, made: dict[str, Path], combined_runs: combined.Runs, shapes: Path
) -> None:
    """In a process that cannot import Regraft."""
    picture = shapes / "circle" / "00.png"
    shutil.copy(picture, made[to] / "photo.jpg")
    label, score = exports.without_regraft(code(made[to]), made[to]).rsplit(" ", 1)
    with ensemble.open_run(combined_runs.first) as model:
        said = model.predict(picture)

    assert said.classes[said.best[0]] == label
    assert said.probabilities[0].max() == pytest.approx(float(score), abs=1e-3)


def test_the_card_has_numbers_with_intervals(
    made: dict[str, Path], combined_runs: combined.Runs
) -> None:
    """Metrics with intervals and n, data, classes, the weights' origin, and what was compared."""
    page = (made["openvino"] / "README.md").read_text("utf-8")
    measured = json.loads((combined_runs.first / "metrics.json").read_text())["test/top1"]

    assert f"| accuracy (test) | {measured['value']:.3f} |" in page
    assert f"| {measured['n']} | wilson |" in page
    assert "`circle`, `square`, `triangle`" in page
    assert "RANDOM weights" in page
    assert "100.0% of 4 labels are equal" in page


def test_an_export_is_replaced_only_when_asked(
    made: dict[str, Path], combined_runs: combined.Runs
) -> None:
    """A second time it asks for --force, before any work."""
    with pytest.raises(UserError, match="--force"):
        exported.export(combined_runs.first, "onnx", made["onnx"])


def test_what_disagrees_is_not_written(
    combined_runs: combined.Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that answers otherwise is refused, and nothing is left behind."""

    def written(work: Path, member: Any, model: Any, *_: Any) -> Any:
        (work / "model.xml").write_text("")
        answer = np.array([[0.1, 0.1, 0.8]])
        pre = model.network.preprocess
        return [], [Asked(pre, 1.0, lambda x: np.repeat(answer, len(x), axis=0))], "openvino"

    monkeypatch.setattr(exported, "_written", written)
    with pytest.raises(UserError, match="does not say what the run says"):
        exported.export(combined_runs.first, "openvino", tmp_path / "out", most=3)

    assert [] == list(tmp_path.iterdir())


def test_a_folder_of_others_is_left_alone(combined_runs: combined.Runs, tmp_path: Path) -> None:
    """Even with --force: only an export is replaced."""
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="no export wrote"):
        exported.export(combined_runs.first, "openvino", tmp_path, force=True)

    assert "mine" == (tmp_path / "mine.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "openvino", "torch-export"])
def test_an_average_of_other_sizes_is_a_folder_with_its_recipe(
    to: str, combined_runs: combined.Runs, shapes: Path, tmp_path: Path
) -> None:
    """A file for each size; the code of the card averages them, without Regraft."""
    from finetune.report import ensembles

    ensembles.make((combined_runs.first, combined_runs.second), tmp_path / "both")
    out = tmp_path / "out"
    result = exported.export(tmp_path / "both", to, out, most=5)
    shutil.copy(shapes / "square" / "00.png", out / "photo.jpg")
    label, _ = exports.without_regraft(code(out), out).rsplit(" ", 1)
    with ensemble.open_run(tmp_path / "both") as model:
        said = model.predict(shapes / "square" / "00.png")

    assert said.classes[said.best[0]] == label
    assert all((out / row["file"]).exists() for row in result["parts"])
