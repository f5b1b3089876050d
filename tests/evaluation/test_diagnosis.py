"""What curves say: each fault has its own finding, and a sound training has none."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from trainings import TRAIN, VAL, colours, make, plan

from finetune import run
from finetune.cli import cli
from finetune.errors import UserError
from finetune.evaluation import diagnosis
from finetune.training import loop, schedules
from finetune.training.config import Training
from finetune.training.inputs import open_feed

Rows = list[dict[str, Any]]
START = 2.3  # ln 10


def curves(
    fit: Sequence[float],
    val: Sequence[float] | None = None,
    *,
    top1: Sequence[float] | None = None,
    fit_top1: float = 0.99,
    lr: Sequence[float] | None = None,
    n_val: int = 400,
) -> Rows:
    """A log of ten classes and `n_val` validation images; `fit` is the clean loss."""
    val = fit if val is None else val
    accuracy = np.linspace(0.1, 0.85, len(fit)) if top1 is None else top1
    rows: Rows = []
    for k, (a, b, right) in enumerate(zip(fit, val, accuracy, strict=True)):
        share = k / (len(fit) - 1)
        row = {"epoch": k, "clean/loss": a, "val/loss": b, "val/top1": float(right)}
        row["clean/top1"] = 0.1 + share * (fit_top1 - 0.1)
        if k:
            row["train/loss"], row["lr/head"] = a, 1e-3 if lr is None else lr[k - 1]
        rows.append(row)
    rows[0] |= {"images": {"train": 800, "val": n_val, "clean": 200}, "classes": 10, "chance": 0.1}
    return rows


FALLING = [START, 1.2, 0.7, 0.4, 0.25, 0.18, 0.14, 0.12, 0.11, 0.11]
CASES: dict[str, tuple[str, Rows]] = {
    "it settles": ("healthy", curves(FALLING)),
    "validation settles above training": (
        "healthy",
        curves(FALLING, [0.4 + 0.8 * v for v in FALLING]),
    ),
    "a start from a probe, with a gap from the beginning": (
        "healthy",
        curves([0.2, 0.15, 0.12, 0.1, 0.09, 0.09], [0.8, 0.75, 0.74, 0.73, 0.74, 0.73]),
    ),
    "a probe that leaves nothing to learn": ("healthy", curves([0.02] * 6, [0.3] * 6)),
    "it rises above guessing and stays": (
        "diverging",
        curves([START, 9.0, 40.0, 33.0, 25.0, 28.0]),
    ),
    "it rises above guessing and comes back": (
        "learning rate too high",
        curves([START, 29.0, 9.0, 4.0, 3.0, 1.5, 0.9, 0.6]),
    ),
    "a probe is destroyed": (
        "learning rate too high",
        curves([0.2, 1.4, 1.0, 0.8, 0.7, 0.7]),
    ),
    "it falls fast and jumps about": (
        "learning rate too high",
        curves([START, 0.9, 1.3, 0.8, 1.2, 0.9, 1.3, 0.9, 1.2]),
    ),
    "it hardly falls": (
        "learning rate too low",
        curves([START - 0.003 * k for k in range(10)], fit_top1=0.6),
    ),
    "it is flat, then falls": (
        "slow start",
        curves([START, 2.3, 2.29, 2.29, 2.28, 1.4, 0.7, 0.4, 0.3, 0.28, 0.28]),
    ),
    "it stays at guessing": ("slow start", curves([START] * 8, top1=[0.1] * 8, fit_top1=0.12)),
    "nothing learned holds for others": (
        "wrong labels",
        curves([START, 2.2, 2.0, 1.7, 1.3, 1.0], [2.3, 2.4, 2.5, 2.6, 2.7, 2.8], top1=[0.1] * 6),
    ),
    "the step comes on the slope": (
        "decayed too early",
        curves(
            [START, 1.6, 1.1, 1.08, 1.06, 1.05, 1.04, 1.03],
            lr=[1e-3, 1e-3, *[1e-4] * 5],
            fit_top1=0.8,
        ),
    ),
    "the step comes on the plateau": (
        "healthy",
        curves([START, 0.5, 0.3, 0.28, 0.2, 0.19, 0.19], lr=[1e-3] * 3 + [1e-4] * 3),
    ),
    "validation turns": (
        "overfitting",
        curves(FALLING, [2.3, 1.4, 1.0, 0.8, 0.78, 0.85, 0.95, 1.05, 1.1, 1.15]),
    ),
    "it settles high": (
        "underfitting",
        curves(
            [START, 1.7, 1.4, 1.3, 1.25, 1.23, 1.22, 1.22],
            top1=[0.1, 0.3, 0.4, 0.5, 0.55, 0.55, 0.55, 0.55],
            fit_top1=0.57,
        ),
    ),
    "it still falls": ("stopped too soon", curves([START, 1.7, 1.2, 0.85])),
    "few images judge": (
        "noisy validation",
        curves(FALLING, top1=[0.8, 0.84, 0.8, 0.84, 0.8, 0.8, 0.84, 0.8, 0.8, 0.8], n_val=25),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_curve_has_its_primary_finding(case: str) -> None:
    """The first finding is the one that the shape stands for, and says what to do."""
    name, rows = CASES[case]
    first, *_ = diagnosis.diagnose(rows)
    assert name == first.name, first.to_text()
    assert (name == "healthy") == (first.status == "pass") == (not first.action)


def test_every_rule_has_a_curve_that_it_names() -> None:
    """No rule is without an example here."""
    named = {name for name, _ in CASES.values()} - {"healthy"}
    assert len(diagnosis.RULES) == len(named)


def test_a_remark_stands_beneath_what_it_follows_from() -> None:
    """With many validation images noise is no fault of a sound training, but is still said."""
    first, *others = diagnosis.diagnose(curves(FALLING, top1=[0.85] * 10))
    assert "healthy" == first.name
    assert ["noisy validation"] == [check.name for check in others]


def test_the_warm_up_is_no_slow_start() -> None:
    """Epochs at a rate that still rises are not held against the initialisation."""
    flat = [START, 2.3, 2.29, 2.29, 1.2, 0.7, 0.4, 0.3, 0.28, 0.28]
    lr = [1e-5, 5e-5, 1e-4, *[1e-3] * 6]
    assert "slow start" != diagnosis.diagnose(curves(flat, lr=lr))[0].name
    assert "slow start" == diagnosis.diagnose(curves(flat))[0].name


@pytest.mark.parametrize(
    ("name", "train", "val"),
    [
        ("healthy", FALLING[1:], FALLING[1:]),
        ("overfitting", FALLING[1:], [1.0, 0.8, 0.78, 0.8, 0.85, 0.95, 1.05, 1.1, 1.15]),
        ("stopped too soon", [2.0, 1.5, 1.1, 0.8], [2.0, 1.6, 1.2, 0.9]),
        ("learning rate too low", [2.3, 2.29, 2.29, 2.28, 2.28], [2.3, 2.3, 2.29, 2.29, 2.29]),
    ],
)
def test_logs_without_a_clean_loss_are_read_by_training_and_validation(
    name: str, train: list[float], val: list[float]
) -> None:
    rows = [
        {"epoch": k, "train/loss": a, "val/loss": b, "lr/head": 1e-3}
        for k, (a, b) in enumerate(zip(train, val, strict=True), 1)
    ]
    assert name == diagnosis.diagnose(rows)[0].name


def test_a_head_that_was_fitted_before_has_no_slow_start() -> None:
    """It begins well below the loss of guessing: what is flat at first has been learned."""
    flat = [0.8, 0.8, 0.79, 0.8, 0.6, 0.4, 0.3, 0.28]
    assert "slow start" == diagnosis.diagnose(curves([START * v / 0.8 for v in flat]))[0].name
    assert "slow start" != diagnosis.diagnose(curves(flat))[0].name


@pytest.mark.parametrize(("ratio", "name"), [(1e-6, "learning rate too low"), (0.0, "slow start")])
def test_how_far_weights_move_tells_a_low_rate_from_a_signal_that_does_not_pass(
    ratio: float, name: str
) -> None:
    """Both curves are flat: with a low rate the weights move a little, without gradients not."""
    rows = curves([START] * 8, top1=[0.1] * 8, fit_top1=0.12)
    rows = [{**row, "update_ratio/stage7": ratio, "update_ratio/head": 0.3} for row in rows]
    assert name == diagnosis.diagnose(rows)[0].name


# --- of runs -----------------------------------------------------------------------------------


def written(folder: Path, rows: Rows) -> Path:
    """A run directory whose log tells of a training, and of its refit."""
    about = {key: rows[0][key] for key in ("images", "classes", "chance")}
    start = {f"start/{key}": value for key, value in rows[0].items() if "/" in key}
    refit = {"phase": "refit", "epoch": 1, "train/loss": 0.1}
    lines = [{"groups": [], **about, **start}, *rows[1:]]
    lines = [{"phase": "fine-tune", **line} for line in lines]
    folder.mkdir()
    (folder / run.LOG).write_text("".join(json.dumps(line) + "\n" for line in [*lines, refit]))
    return folder


def test_the_command_tells_the_training_and_not_its_refit(tmp_path: Path) -> None:
    """Text and JSON give the finding that the rows give, read from the log of a run."""
    rows = CASES["validation turns"][1]
    folder = written(tmp_path / "a", rows)
    told = CliRunner().invoke(cli, ["diagnose", str(folder), "--json"], catch_exceptions=False)
    text = CliRunner().invoke(cli, ["diagnose", str(folder)], catch_exceptions=False).stdout
    assert [c.to_json() for c in diagnosis.diagnose(rows)] == json.loads(told.stdout)
    assert text.startswith("WARN  overfitting: ")


def test_where_nothing_was_trained_one_sentence_says_so(tmp_path: Path) -> None:
    (tmp_path / run.LOG).write_text('{"phase": "svm"}\n')
    (only,) = diagnosis.of_run(tmp_path)
    assert ("nothing trained", "skip") == (only.name, only.status)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run is here"):
        diagnosis.of_run(tmp_path)


def test_a_start_from_a_probe_in_an_old_log_is_no_low_rate() -> None:
    """Without the number of classes, a loss below 1 or a good first accuracy tells it."""
    rows = [{"epoch": k, "train/loss": 0.68 - 0.01 * k, "val/top1": 0.8} for k in range(1, 6)]
    assert "learning rate too low" not in [check.name for check in diagnosis.diagnose(rows)]


# --- provoked ----------------------------------------------------------------------------------


def trained(**changes: Any) -> Rows:
    """The rows of a head trained on the colours by the loop itself."""
    backbone, rows, data = make(), Rows(), colours()
    values = {"trainable": (), "augment": "none", "epochs": 8, "patience": 0, "head_init": "zero"}
    training = plan(backbone, **{**values, **changes})
    with loop.open_job(
        backbone, data, TRAIN, VAL, training, classes=3, seed=0, log=rows.append,
        precision="float32",
    ) as job, open_feed(job, []) as feed, contextlib.suppress(loop.DivergedError):  # fmt: skip
        loop.trial(job, feed, None)
    start = {key[6:]: value for key, value in rows[0].items() if key.startswith("start/")}
    about = {key: rows[0][key] for key in ("images", "classes", "chance")}
    return [{"epoch": 0, **about, **start}, *rows[1:]]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("healthy", {"lr": 0.03, "epochs": 20}),
        ("learning rate too low", {"lr": 1e-5}),
        ("diverging", {"lr": 1e3, "optimizer": "sgd", "clip": 0.0, "schedule": "constant"}),
        ("stopped too soon", {"lr": 0.3, "epochs": 3, "schedule": "constant", "warmup": 0.0}),
    ],
)
def test_provoked_faults_are_named(name: str, changes: dict[str, Any]) -> None:
    """Trainings of the loop, with one setting spoilt, get the finding that belongs to it."""
    first, *_ = diagnosis.diagnose(rows := trained(**changes))
    assert name == first.name, (first.to_text(), [row.get("clean/loss") for row in rows])


@pytest.mark.usefixtures("one_thread")
def test_a_step_after_the_first_epochs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule that falls to a hundredth while the loss is falling decayed too early."""
    before = schedules.factors

    def early(training: Training, steps: int) -> schedules.Factor:
        own = before(training, steps)
        return lambda t: own(t) if t < steps // 4 else own(t) / 100

    monkeypatch.setattr(schedules, "factors", early)
    first, *_ = diagnosis.diagnose(trained(lr=0.3, schedule="constant", warmup=0.0))
    assert "decayed too early" == first.name, first.to_text()
