"""A run told to other tools: TensorBoard, MLflow, Weights & Biases and trackio.

`log.jsonl` is replayed when the run is complete; nothing is sent anywhere (Weights & Biases is
opened offline), and no model is stored a second time.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import files, run
from finetune.errors import UserError
from finetune.names import shown

Values = dict[str, float]


@dataclass(frozen=True)
class Story:
    """What a tracker is told of a run: its name, the `settings` of its recipe by dotted key, a row
    of values `(step, values)` per epoch, and the `results` of metrics.json."""

    name: str
    settings: dict[str, str]
    rows: tuple[tuple[int, Values], ...]
    results: Values


def track(path: Path, tracker: str, output: Path | None = None) -> str:
    """Replay a finished run into `tracker` (a name in `TRACKERS`); returns a line that says where.

    `output` is the tracker's folder, by default one of its name beside the run. Raises `UserError`
    where the run is not finished, and where the tracker is not known or not installed.
    """
    check(tracker)
    _, write, show = TRACKERS[tracker]
    home = output or path.resolve().parent / tracker
    write(story(path), home)
    return f"{tracker:<10} {shown(home)}: {show.format(home=shown(home))}"


def check(tracker: str) -> None:
    """Refuse a tracker that is not known or not installed, before anything takes time."""
    if tracker not in TRACKERS:
        raise UserError(
            f"no tracker is called {tracker!r}", where="--track", fix=f"use {', '.join(TRACKERS)}"
        )
    package = TRACKERS[tracker][0]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{package} is not installed", where=f"--track {tracker}", fix=f"pip install {package}"
        )


def story(path: Path) -> Story:
    """Read what is told from the files of a finished run."""
    about = run.load_run(path)
    judged = files.read_json(path / run.METRICS)
    results = {
        name: float(entry["value"])
        for name, entry in judged.items()
        if isinstance(entry, dict) and _is_number(entry.get("value"))
    }
    return Story(
        path.resolve().name,
        dict(_flat(about.get("recipe", {}))),
        tuple(_rows(path)),
        results,
    )


def _rows(path: Path) -> Iterator[tuple[int, Values]]:
    """Step and values of every epoch; what was computed in another phase than the first is told
    apart by its name."""
    first: str | None = None
    for entry in run.history(path):
        if not entry["epoch"]:
            continue
        phase = str(entry.get("phase", ""))
        first = phase if first is None else first
        prefix = "" if phase == first else f"{phase}/"
        values = {
            f"{prefix}{key}": float(value)
            for key, value in entry.items()
            if key not in ("epoch", "step") and _is_number(value)
        }
        yield int(entry["epoch"]), values


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", shown(str(inner))


# -------------------------------------------------------------------------------- one function each


def _tensorboard(told: Story, home: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    place = home / told.name
    for old in place.glob("events.out.tfevents.*"):  # replayed again: no curve is shown twice
        old.unlink()
    with SummaryWriter(str(place)) as writer:
        for step, values in told.rows:
            for key, value in values.items():
                writer.add_scalar(key, value, step)
        last = told.rows[-1][0] if told.rows else 0
        for key, value in told.results.items():
            writer.add_scalar(key, value, last)
        lines = "\n".join(f"    {key}: {value}" for key, value in told.settings.items())
        writer.add_text("recipe", lines)


def _mlflow(told: Story, home: Path) -> None:
    import logging

    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # the making of its tables, line by line
    home.mkdir(parents=True, exist_ok=True)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{home.resolve() / 'mlflow.db'}")
    found = client.get_experiment_by_name("regraft")
    experiment = (
        found.experiment_id
        if found
        else client.create_experiment("regraft", (home.resolve() / "artifacts").as_uri())
    )
    one = client.create_run(experiment, run_name=told.name).info.run_id
    for key, text in told.settings.items():
        client.log_param(one, key, text[:500])
    for step, values in told.rows:
        for key, value in values.items():
            client.log_metric(one, key, value, step=step)
    for key, value in told.results.items():
        client.log_metric(one, key, value)
    client.set_terminated(one)


def _wandb(told: Story, home: Path) -> None:
    import wandb

    home.mkdir(parents=True, exist_ok=True)
    one = wandb.init(
        project="regraft", name=told.name, dir=str(home), mode="offline", config=told.settings
    )
    for step, values in told.rows:
        one.log(values, step=step)
    one.summary.update(told.results)
    one.finish()


def _trackio(told: Story, home: Path) -> None:
    import os

    import trackio

    home.mkdir(parents=True, exist_ok=True)
    os.environ["TRACKIO_DIR"] = str(home)
    trackio.init(project="regraft", name=told.name, config=told.settings)
    for step, values in told.rows:
        trackio.log(values, step=step)
    trackio.log(told.results)
    trackio.finish()


# what must be installed, the function, and how the user looks at it
TRACKERS: dict[str, tuple[str, Callable[[Story, Path], None], str]] = {
    "tensorboard": ("tensorboard", _tensorboard, "tensorboard --logdir {home}"),
    "mlflow": ("mlflow", _mlflow, "mlflow ui --backend-store-uri sqlite:///{home}/mlflow.db"),
    "wandb": ("wandb", _wandb, "kept here; wandb sync {home}/wandb/offline-* sends it"),
    "trackio": ("trackio", _trackio, "TRACKIO_DIR={home} trackio show --project regraft"),
}
