"""`finetune preflight` and its quick form in `fit`: what a user meets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from finetune import job
from finetune.cli import cli
from finetune.evaluation import plan_checks
from finetune.features import label_signal
from finetune.network import Tap
from finetune.progress import no_bar
from finetune.training import step_checks

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORK = ("--backbone", "test_efficientnet", "--weights", "random", "--engine", "torch")
TINY = (*NETWORK, "--precision", "float32", "--set", "backbone.frame=whole")
TRAINED = ("--strategy", "stages:1", "--set", "train.input_size=64", "--set", "svm.folds=2")


def run(*words: object) -> Result:
    line = ["preflight", *map(str, words), *TINY]
    return CliRunner().invoke(cli, line, catch_exceptions=False)


def statuses(result: Result) -> dict[str, str]:
    return {row["name"]: row["status"] for row in json.loads(result.stdout)["checks"]}


@pytest.fixture(scope="module")
def healthy(shades: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    picture = tmp_path_factory.mktemp("picture") / "rates.html"
    return run(shades, *TRAINED, "--json", "--picture", picture), picture


def test_a_healthy_folder_passes(healthy: tuple[Result, Path]) -> None:
    """Exit code 0, every check in JSON, and the range test as a page of its own."""
    result, picture = healthy
    names = {
        *("labels", "initial loss", "planned start", "gradients", "update ratio"),
        *("learning rate", "overfit"),
    }

    assert 0 == result.exit_code, result.output
    assert names == set(statuses(result))
    assert "fail" not in statuses(result).values(), result.output
    assert json.loads(result.stdout)["range_test"]["factors"]
    page = picture.read_text(encoding="utf-8")
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_shuffled_labels_and_a_rate_a_thousand_times_the_plans_exit_with_1(
    shades: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is seen by its own check, in words, with what to do."""
    monkeypatch.setattr(step_checks, "LONGEST", 2)
    images = sorted(shades.glob("*/*.png"))
    names = np.random.default_rng(4).permutation([path.parent.name for path in images])
    for k, (path, name) in enumerate(zip(images, names, strict=True)):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, tmp_path / "data" / name / f"{k}.png")
    result = run(tmp_path / "data", *TRAINED, "--set", "train.lr=0.9")

    assert 1 == result.exit_code
    assert "WARN  labels" in result.stdout  # so few images cannot prove more
    assert "FAIL  update ratio" in result.stdout
    assert "→ divide the learning rate by 10 or more" in result.stdout
    assert "PASS  learning rate" not in result.stdout


def test_a_plan_that_trains_nothing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are checked; what is not tried says why."""
    monkeypatch.setattr(label_signal, "measure", lambda *_, **__: None)
    rows = np.arange(3)
    seen: Any = SimpleNamespace(
        part=lambda _: rows,
        features=SimpleNamespace(blocks={Tap("pooled"): rows[:, None]}),
        images=SimpleNamespace(labels=rows),
        groups=rows,
        recipe=SimpleNamespace(data=SimpleNamespace(seed=0)),
        plan=SimpleNamespace(training=None, strategy="svm"),
    )
    found = plan_checks.whole(seen, SimpleNamespace(), no_bar)  # type: ignore[arg-type]

    assert {"skip"} == {check.status for check in found.checks}
    assert "the plan trains nothing (svm)" in str(found)


def test_one_class_and_unknown_classes_are_refused_by_name(shades: Path, tmp_path: Path) -> None:
    """Before anything is read: there is nothing to tell apart, or the test part names another
    class."""
    shutil.copytree(shades / "dark", tmp_path / "one" / "dark")
    for part, names in (("train", ("dark", "light")), ("test", ("dark", "lihgt"))):
        for name, source in zip(names, ("dark", "light"), strict=True):
            shutil.copytree(shades / source, tmp_path / "parts" / part / name)

    for folder, words in (("one", "one class alone (dark)"), ("parts", "lihgt")):
        result = CliRunner().invoke(cli, ["preflight", str(tmp_path / folder), *TINY])
        assert 0 != result.exit_code
        assert words in str(result.exception) + result.output


@pytest.mark.parametrize(
    ("name", "words"), [("rates.gif", "'.gif'"), ("no/rates.svg", "folder does not exist")]
)
def test_a_picture_that_cannot_be_written_is_refused_at_once(
    shades: Path, tmp_path: Path, name: str, words: str
) -> None:
    """Before any work."""
    line = ["preflight", str(shades), "--picture", str(tmp_path / name)]
    result = CliRunner().invoke(cli, line)

    assert words in str(result.exception)
    assert not list(tmp_path.iterdir())


def fit(data: Path, out: Path, lines: list[str]) -> Path:
    """A short training at a rate that is far too high."""
    given: dict[str, Any] = {
        "backbone": ["test_efficientnet"],
        "weights": "random",
        "engine": "torch",
        "precision": "float32",
        "strategy": "stages:1",
        "epochs": 1,
    }
    more = ["train.input_size=64", "backbone.frame=whole", "policy.ship=fine-tuned", "train.lr=0.9"]
    return job.fit(data, out=out, say=lines.append, assignments=more, **given).path


def test_fit_begins_with_the_quick_form_and_ends_with_the_same_bits(
    shades: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`preflight.json` holds its verdicts, what does not pass is said in a line each, and what
    ships is bit-identical without it."""
    lines: list[str] = []
    with_it = fit(shades, tmp_path / "with", lines)
    monkeypatch.setattr(plan_checks, "quick", lambda *_: None)
    without = fit(shades, tmp_path / "without", [])
    found = json.loads((with_it / "preflight.json").read_text(encoding="utf-8"))
    told = [line for line in lines if line.startswith("preflight")]

    assert ["initial loss", "planned start", "gradients", "update ratio"] == [
        row["name"] for row in found["checks"]
    ]
    assert len(told) == sum(row["status"] != "pass" for row in found["checks"])
    assert told[-1].startswith("preflight  FAIL update ratio: ")
    assert "→ divide the learning rate by 10 or more" in told[-1]
    assert "preflight.json" in json.loads((with_it / "run.json").read_text())["files"]
    for name in ("model.safetensors", "head.safetensors"):
        arrays, others = (load_file(run / name) for run in (with_it, without))
        assert {k: v.tobytes() for k, v in arrays.items()} == {
            k: v.tobytes() for k, v in others.items()
        }
    name = "predictions.csv"
    assert (with_it / name).read_bytes() == (without / name).read_bytes()
