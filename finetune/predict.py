"""What a finished run says about images: predictions as rows and tables, and its judgement on labelled ones."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune import classifier, files, images, metrics, run
from finetune.classifier import Classifier, Predictions
from finetune.columns import Layout
from finetune.errors import UserError
from finetune.images import Fault
from finetune.look import Bar, Say, no_bar, quiet

PROBABILITY = run.PROBABILITY


def open_run(path: str | Path, *, engine_name: str | None = None, precision: str | None = None) -> Classifier:
    """The classifier of a finished run; an unfinished, damaged or missing one is a `UserError`."""
    return classifier.load(run.finished(Path(path)), engine_name=engine_name, precision=precision)


def predict(
    path: Path,
    pictures: Sequence[str | Path],
    *,
    engine_name: str | None = None,
    precision: str | None = None,
    on_bad: str = "stop",
    unsure: float | None = None,
    bar: Bar = no_bar,
) -> tuple[list[dict[str, Any]], tuple[Fault, ...]]:
    """Rows `{path, prediction, score, second, second_score, unsure?, probabilities}` of image files and folders, in order."""
    model = open_run(path, engine_name=engine_name, precision=precision)
    source = images.load_unlabelled(pictures[0] if len(pictures) == 1 else list(pictures))
    with bar("predict") as progress:
        found = model.predict(source, on_bad=on_bad, progress=progress)
    return rows(found, unsure), found.faults


def rows(found: Predictions, unsure: float | None = None) -> list[dict[str, Any]]:
    """Predictions as plain values; `unsure` adds whether the best probability is below it."""
    result = []
    order = np.argsort(-found.probabilities, axis=1, kind="stable")
    for i, name in enumerate(found.images.paths):
        first = int(order[i, 0])
        row: dict[str, Any] = {"path": name, "prediction": found.classes[first], "score": float(found.probabilities[i, first])}
        if len(found.classes) > 1:
            second = int(order[i, 1])
            row |= {"second": found.classes[second], "second_score": float(found.probabilities[i, second])}
        if unsure is not None:
            row["unsure"] = bool(row["score"] < unsure)
        row["probabilities"] = dict(zip(found.classes, map(float, found.probabilities[i]), strict=True))
        result.append(row)
    return result


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row for a table: one column a probability, named `p:CLASS`."""
    plain = {key: value for key, value in row.items() if key != "probabilities"}
    if "unsure" in plain:
        plain["unsure"] = "yes" if plain["unsure"] else "no"
    return plain | {f"{PROBABILITY}{name}": value for name, value in row["probabilities"].items()}


def write_csv(path: Path, found: list[dict[str, Any]]) -> None:
    """Write rows as UTF-8 CSV; floats are written so that they read back bit for bit."""
    text = io.StringIO()
    table = [flat(row) for row in found]
    writer = csv.DictWriter(text, fieldnames=list(table[0]) if table else ["path", "prediction", "score"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: repr(value) if isinstance(value, float) else value for key, value in row.items()} for row in table)
    files.write_text(path, text.getvalue())


def table(found: list[dict[str, Any]]) -> str:
    """Rows for a person: path, class, probability, and the runner-up."""
    width = max((len(row["path"]) for row in found), default=0)
    names = max((len(row["prediction"]) for row in found), default=0)
    lines = []
    for row in found:
        second = f"   then {row['second']} {row['second_score']:.2f}" if "second" in row else ""
        doubt = "   unsure" if row.get("unsure") else ""
        lines.append(f"{row['path']:<{width}}  {row['prediction']:<{names}}  {row['score']:.2f}{second}{doubt}")
    return "\n".join(lines)


def evaluate(
    path: Path,
    data: str | Path,
    *,
    engine_name: str | None = None,
    precision: str | None = None,
    on_bad: str = "stop",
    layout: Layout = images.AS_NAMED,
    say: Say = quiet,
    bar: Bar = no_bar,
) -> dict[str, Any]:
    """Metrics of a run on labelled images: on the test part where `data` has one, else on all of them."""
    model = open_run(path, engine_name=engine_name, precision=precision)
    source = images.with_classes(images.load(data, layout=layout), model.classes)
    for note in source.notes:
        say(note)
    if source.split is not None and "test" in source.split:
        source = source.subset(source.split == "test")
    if not len(source):
        raise UserError("holds no images to judge on", where=data)
    with bar("evaluate") as progress:
        found = model.predict(source, on_bad=on_bad, progress=progress)
    judged = metrics.judge(found.images.labels, found.probabilities, model.classes, found.images.groups)
    plain = {name: value.to_json() if isinstance(value, metrics.Estimate) else value for name, value in judged.items()}
    return {"run": str(path), "data": str(data), "n": len(found.images), "left_out": len(found.faults), "metrics": plain}


WORDS = {
    "top1": "accuracy",
    "top5": "right among 5",
    "balanced": "balanced accuracy",
    "macro_f1": "macro-F1",
    "ece": "calibration error",
    "nll": "negative log-likelihood (nats)",
    "majority": "always the largest class",
}


def metrics_text(result: dict[str, Any]) -> str:
    """Metrics for a person, each with its interval and method."""
    lines = [f"{result['n']} images" + (f", {result['left_out']} left out" if result.get("left_out") else "")]
    for name, value in result["metrics"].items():
        if isinstance(value, dict):
            lines.append(
                f"{WORDS.get(name, name):<32}{value['value']:.3f}  ({value['low']:.3f}–{value['high']:.3f}, {value['method']})"
            )
        else:
            lines.append(f"{WORDS.get(name, name):<32}{value:.3f}")
    return "\n".join(lines)
