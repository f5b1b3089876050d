"""Curves and results of a run reach other tools as they are, and nothing leaves the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from finetune import run
from finetune.cli import cli
from finetune.errors import UserError
from finetune.report import tracking

EPOCHS = ({"epoch": 1, "train/loss": 0.9, "val/top1": 0.5}, {"epoch": 2, "train/loss": 0.4})


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A finished run of two epochs, the first of which was done again in the refit."""
    with run.open_run(tmp_path / "runs" / "photos", "photos", "ab" * 32) as folder:
        folder.log({"phase": "select", "groups": [], "bf16": False})
        for row in EPOCHS:
            folder.log({"phase": "select", "step": 3 * row["epoch"], **row})
        folder.log({"phase": "refit", "epoch": 1, "step": 4, "train/loss": 0.8})
        folder.write_json(
            "metrics.json", {"test/top1": {"value": 0.75, "n": 8}, "test/note": "none"}
        )
        folder.finish({"shipped": "svm", "recipe": {"train": {"lr": 0.01}, "out": None}})
    return tmp_path / "runs" / "photos"


def test_a_story_has_a_row_per_epoch_and_tells_phases_apart(finished: Path) -> None:
    told = tracking.story(finished)
    assert told.rows == (
        (1, {"train/loss": 0.9, "val/top1": 0.5}),
        (2, {"train/loss": 0.4}),
        (1, {"refit/train/loss": 0.8}),
    )
    assert told.results == {"test/top1": 0.75}
    assert told.settings == {"train.lr": "0.01", "out": "None"}


def test_tensorboards_own_reader_finds_every_value_once_even_when_tracked_twice(
    finished: Path,
) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for _ in range(2):
        line = tracking.track(finished, "tensorboard")
    place = finished.parent / "tensorboard"
    assert str(place) in line
    events = reader.EventAccumulator(str(place / "photos"))
    events.Reload()
    losses = [(one.step, pytest.approx(one.value)) for one in events.Scalars("train/loss")]
    assert losses == [(1, 0.9), (2, 0.4)]
    assert [one.value for one in events.Scalars("test/top1")] == [0.75]


@pytest.mark.slow
def test_mlflow_finds_curves_results_and_settings(finished: Path, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    tracking.track(finished, "mlflow", tmp_path / "ml")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'ml' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("regraft")
    (one,) = client.search_runs([experiment.experiment_id])
    assert one.data.metrics["test/top1"] == 0.75
    assert one.data.params["train.lr"] == "0.01"
    assert [m.value for m in client.get_metric_history(one.info.run_id, "train/loss")] == [0.9, 0.4]


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_done(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    asked = CliRunner().invoke(cli, ["fit", "no-such-folder", "--track", "wandb"])
    assert isinstance(asked.exception, UserError)
    assert "pip install wandb" in str(asked.exception)


def test_an_unknown_tracker_is_refused_with_those_that_exist(finished: Path) -> None:
    with pytest.raises(UserError, match="tensorboard, mlflow"):
        tracking.track(finished, "visdom")


def test_an_unfinished_run_is_not_tracked(tmp_path: Path) -> None:
    with run.open_run(tmp_path / "half", "half", "cd" * 32):
        pass
    with pytest.raises(UserError, match="not finished"):
        tracking.track(tmp_path / "half", "tensorboard")
