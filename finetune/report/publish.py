"""A run written: the model, what it is judged on, and the report. Whatever fitted the model."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from finetune import classifier, metrics
from finetune.analysis import Look
from finetune.backbones import weights
from finetune.classifier import Classifier, Predictions
from finetune.data import corrections, omissions
from finetune.evaluation import (
    contenders,
    ensemble,
    evaluate,
    judgement,
    model_selection,
    predictions,
)
from finetune.evaluation.ensemble import AnyModel, Ensemble
from finetune.evaluation.fitting import Fitted, shipped_name, svm_head
from finetune.evaluation.folds import Repeated
from finetune.evaluation.judgement import Judgement
from finetune.metrics import Estimate
from finetune.names import shown
from finetune.progress import Bar, Progress, clock
from finetune.report import collect, render
from finetune.run import RunDir


def publish(
    folder: RunDir,
    seen: Look,
    fitted: Fitted,
    began: float,
    bar: Bar,
    repeated: Repeated | None = None,
) -> dict[str, Any]:
    """Write everything that a run holds, `run.json` last; returns what metrics.json holds.

    What folds said (`repeated`) judges the run, where there were any.

    The test part, if there is one, is looked at here for the first time, by all contenders at once,
    and the shipped model goes the way that `predict` goes.
    """
    save_model(folder.path, fitted.model)
    evaluate.record(folder.path, seen.digests.take(fitted.fitted_on))
    name = seen.named.network.name
    if text := weights.notice(name, weights.find(name, seen.recipe.backbone.weights)):
        folder.write_text("LICENSE-weights.txt", text)
    with clock(seen.seconds, "judge"), bar("judge") as progress:
        judged = repeated.judgement() if repeated else _judged(seen, fitted, progress)
        on_test = _on_test(seen, fitted, judged)
    written = judged.to_json()
    if judged.part == "test" and fitted.kind != "svm":
        beside, paired = judgement.beside(seen, svm_head(fitted), judged)
        written |= {"test/svm": beside.to_json(), "test/paired": paired.to_json()}
    written |= _as_given(judged)
    _write_predictions(folder.path, seen, judged)
    _write_selection(folder.path, seen, fitted)
    folder.write_json("metrics.json", written)
    folder.write_json("plan.json", _plan(seen, fitted))
    folder.write_json("contenders.json", _rows(fitted, on_test))
    if repeated:
        folder.write_json("folds.json", list(repeated.rows))
    if left := (*omissions.account(seen.images), *seen.features.faults):
        rows = [fault.cells() for fault in left]
        folder.write_csv("left_out.csv", ("path", "kind", "detail"), rows)
    if seen.images.corrections:
        parts = dict(zip(seen.images.paths, seen.split.tolist(), strict=True))
        changed = [
            (shown(one.path), one.given, one.corrected, parts.get(one.path, ""))
            for one in seen.images.corrections
        ]
        folder.write_csv("corrections.csv", ("path", "given", "corrected", "part"), changed)
    seen.seconds["all"] = time.monotonic() - began
    verdict = model_selection.verdict(seen, written, fitted.baseline, fitted.choice)
    page = collect.collect(seen, fitted, judged, on_test, verdict, folder.path)
    folder.write_text("report.html", render.render(page))
    folder.finish(
        {
            "shipped": shipped_name(seen, fitted),
            "recipe": seen.recipe.model_dump(mode="json"),
            "verdict": " ".join(verdict),
            "stages": seen.seconds,
            "network": named_by(fitted.model).network.to_json(),
            "test_evaluations": int(judged.part == "test"),
            "labels_corrected": corrections.changed(seen.images),
        }
    )
    return written


def named_by(model: AnyModel) -> Classifier:
    """The classifier whose backbone a run is named by: of an ensemble, the last member."""
    return model if isinstance(model, Classifier) else list(model.members.values())[-1]


def save_model(folder: Path, model: AnyModel) -> None:
    """The head, the network's description and its weights, for every member."""
    from finetune.backbones import create

    if isinstance(model, Ensemble):
        folders = ensemble.save(folder, model)
        members = list(zip(model.members.values(), folders, strict=True))
    else:
        classifier.save(folder, model)
        members = [(model, folder)]
    for member, own in members:
        head = member.head
        plain = head.kind == "fine-tuned" and not head.normalize
        arrays = head.arrays()
        pair = (arrays["weight"], arrays["bias"]) if plain else None
        create.save(member.load(), own / "model.safetensors", pair)


def _judged(seen: Look, fitted: Fitted, progress: Progress) -> Judgement:
    """The shipped model on the test part; without one, what is known of it from the images that
    chose it."""
    if len(test := seen.part("test")):
        return judgement.on_test(fitted.model.predict(seen.images.subset(test), progress=progress))
    if fitted.choice is not None and fitted.kind != "svm":
        chosen = fitted.choice
        return judgement.when_chosen(seen, chosen.winner.scores, chosen.selection.index)
    return judgement.out_of_fold(seen, fitted.baseline)


def _as_given(judged: Judgement) -> dict[str, Any]:
    """The accuracy by the labels from before, where a table corrected some of the test part, and
    how many."""
    if judged.part != "test" or judged.found is None:
        return {}
    images, best = judged.found.images, judged.found.best
    before = corrections.given_labels(images)
    if not (count := int((before != images.labels).sum())):
        return {}
    told = metrics.share(best == before, images.groups)
    return {"test/top1_as_given": told.to_json(), "test/labels_changed": count}


def _on_test(seen: Look, fitted: Fitted, judged: Judgement) -> dict[str, Predictions]:
    """What every contender says of the test images, by kind."""
    if judged.part != "test" or judged.found is None:
        return {}
    test = judged.found.images
    said = {fitted.kind: judged.found}
    if fitted.choice is None:
        return said
    head, rows = svm_head(fitted), seen.part("test")
    if "svm" not in said:
        scores = head.scores([np.asarray(seen.features.blocks[tap][rows]) for tap in head.taps])
        probabilities = classifier.softmax(scores, head.temperature)
        said["svm"] = dataclasses.replace(judged.found, probabilities=probabilities)
    if "fine-tuned" not in said:
        said["fine-tuned"] = fitted.models["fine-tuned"].predict(test)
    if "average" not in said:
        share = next(one.members for one in fitted.choice.contenders if one.kind == "average")
        logs = [
            share[kind] * np.log(np.maximum(said[kind].probabilities.astype(np.float64), 1e-30))
            for kind in ("svm", "fine-tuned")
        ]
        said["average"] = dataclasses.replace(
            judged.found, probabilities=classifier.softmax(logs[0] + logs[1])
        )
    return said


def _write_predictions(folder: Path, seen: Look, judged: Judgement) -> None:
    if (found := judged.found) is None:
        return
    name = "predictions.csv" if judged.part == "test" else f"predictions-{judged.part}.csv"
    labels = [seen.images.classes[label] for label in found.images.labels]
    predictions.write_predictions(
        folder / name, found.images.paths, labels, found.classes, found.probabilities
    )


def _write_selection(folder: Path, seen: Look, fitted: Fitted) -> None:
    """What the shipped model said of the images that choose, before it was fitted on them: what
    averages and points on the line to the old weights are chosen by."""
    if fitted.choice is not None:
        chosen, scores = fitted.choice.selection, fitted.choice.winner.scores
    else:
        if not fitted.baseline.candidates:
            return
        chosen = model_selection.selection(seen)
        scores = model_selection.svm_contender(seen, fitted.baseline, chosen).scores
    known = np.flatnonzero(np.isfinite(scores).all(axis=1))
    if len(known):
        rows = seen.images.subset(chosen.index[known])
        predictions.write_predictions(
            folder / predictions.SELECTION,
            rows.paths,
            [rows.classes[label] for label in rows.labels],
            rows.classes,
            np.exp(scores[known].astype(np.float64)),
        )


def accuracy_of(found: Predictions) -> Estimate:
    """The accuracy of predictions whose truth is known, with its interval."""
    return metrics.accuracy(found.images.labels, found.best, found.images.groups)


def _rows(fitted: Fitted, on_test: dict[str, Predictions]) -> list[dict[str, Any]]:
    """contenders.json: every model that could have shipped, on selection and test images."""
    if fitted.choice is None:
        return []
    rows = []
    for one in fitted.choice.contenders:
        row = one.to_json(fitted.choice)
        if found := on_test.get(one.kind):
            y = found.images.labels
            log = contenders.log_probabilities(np.log(np.maximum(found.probabilities, 1e-30)))
            row["test"] = {
                "accuracy": accuracy_of(found).to_json(),
                "log_loss": float(-log[np.arange(len(y)), y].mean()),
                "refitted": one.kind in fitted.refitted,
            }
        rows.append(row)
    return rows


def _plan(seen: Look, fitted: Fitted) -> dict[str, Any]:
    base, pair = fitted.baseline, fitted.choice.pair if fitted.choice else None
    return {
        "plan": seen.plan.to_json(),
        "similarity": seen.similarity.to_json(),
        "svm": {
            "cv_accuracy": base.cv_accuracy if base.candidates else None,
            "cv_error": base.cv_error if base.candidates else None,
            "warnings": list(base.warnings),
            "candidates": [
                {**dataclasses.asdict(c), "taps": [str(tap) for tap in c.taps]}
                for c in base.candidates
            ],
        },
        "choice": pair.to_json() if pair else None,
    }
