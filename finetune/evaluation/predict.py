"""What a finished run says about images: predictions as rows, as text and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.classifier import Predictions
from finetune.data import loose, omissions
from finetune.data.faults import Fault
from finetune.data.loose import Picture
from finetune.errors import UserError
from finetune.evaluation import predictions
from finetune.evaluation.ensemble import open_run
from finetune.heads.head import Array
from finetune.names import shown
from finetune.progress import Bar, Say, no_bar, quiet

Row = dict[str, Any]


def predict(
    path: Path,
    pictures: Sequence[Picture],
    *,
    engine_name: str | None = None,
    precision: str | None = None,
    on_bad: str = "stop",
    say: Say = quiet,
    bar: Bar = no_bar,
) -> Predictions:
    """What the run in `path` says about files and folders, a row an image, in the order given;
    `say` tells what is left out."""
    source = loose.load(pictures, on_bad=on_bad)
    for line in omissions.told(source):
        say(line)
    with (
        open_run(path, engine_name=engine_name, precision=precision) as model,
        bar("predict") as progress,
    ):
        found = model.predict(source, on_bad=on_bad, progress=progress)
    say_faults(found.faults, say)
    return found


def say_faults(faults: Sequence[Fault], say: Say) -> None:
    """A line for each image that could not be read."""
    for fault in faults:
        say(f"left out: {fault.to_text()}")


def unfamiliar(path: Path, found: Predictions) -> Array:
    """How unlike the training images each image is, or a `UserError` where the run does not
    know."""
    if found.unfamiliar is None:
        raise UserError(
            "this run cannot tell which images are unlike its training images: it is of a version "
            "that did not keep what that needs",
            where=path,
            fix="fit it again (`finetune fit --recipe` with its recipe.yaml), or leave --unknown "
            "out",
        )
    return found.unfamiliar


def rows(
    found: Predictions, unsure: float | None = None, unknown: float | None = None
) -> list[Row]:
    """Rows `{path, prediction, score, second, second_score, unsure?, unfamiliar?, unknown?,
    probabilities}`; `unsure`: whether the score is below it; `unknown`: whether the image is more
    unlike the training images than this level."""
    result = []
    strange = None if unknown is None or found.unfamiliar is None else found.unfamiliar.tolist()
    order = predictions.ranked(found.probabilities)
    for i, (name, values, (first, *others)) in enumerate(
        zip(found.images.paths, found.probabilities.tolist(), order, strict=True)
    ):
        row: Row = {"path": shown(name), "prediction": found.classes[first], "score": values[first]}
        for second in others:
            row |= {"second": found.classes[second], "second_score": values[second]}
        if unsure is not None:
            row["unsure"] = bool(values[first] < unsure)
        if strange is not None and unknown is not None:
            row |= {"unfamiliar": strange[i], "unknown": bool(strange[i] > unknown)}
        result.append(row | {"probabilities": dict(zip(found.classes, values, strict=True))})
    return result


def write_csv(
    path: Path, found: Predictions, unsure: float | None = None, unknown: float | None = None
) -> None:
    """Write the table that a run's predictions.csv is, without labels, and with the runner-up, what
    is unsure and what is unknown."""
    labels = [""] * len(found.images)
    predictions.write_predictions(
        path,
        found.images.paths,
        labels,
        found.classes,
        found.probabilities,
        runner_up=len(found.classes) > 1,
        unsure=unsure,
        unfamiliar=None if unknown is None else found.unfamiliar,
        unknown=1.0 if unknown is None else unknown,
    )


def table(found: Sequence[Row]) -> str:
    """Rows for a person: path, class, probability, and the runner-up."""
    width = max((len(row["path"]) for row in found), default=0)
    names = max((len(row["prediction"]) for row in found), default=0)
    lines = []
    for row in found:
        second = f"   then {row['second']} {row['second_score']:.2f}" if "second" in row else ""
        doubt = "   unsure" if row.get("unsure") else ""
        doubt += "   unlike the training images" if row.get("unknown") else ""
        lines.append(
            f"{row['path']:<{width}}  {row['prediction']:<{names}}  "
            f"{row['score']:.2f}{second}{doubt}"
        )
    return "\n".join(lines)
