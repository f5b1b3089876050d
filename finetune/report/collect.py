"""From what a job knows to what its report shows: plain values, thumbnails, and what the curves say
in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetune import metrics, policy, similarity
from finetune.analysis import Look
from finetune.classifier import Classifier, Predictions
from finetune.data import corrections, decode, omissions
from finetune.data.images import ImageSet
from finetune.errors import UserError
from finetune.evaluation import diagnosis, suspects
from finetune.evaluation.fitting import Fitted, shipped_name
from finetune.evaluation.judgement import Judgement
from finetune.heads.svm import SvmResult
from finetune.metrics import Estimate
from finetune.names import shown, typed
from finetune.report.render import (
    Candidate,
    Contender,
    Curve,
    Distance,
    Doubt,
    Matrix,
    Mistake,
    ReportData,
)

if TYPE_CHECKING:
    from finetune.training.loop import TrainResult

MISTAKES = 12  # pictures of the worst mistakes
DOUBTS = 12  # pictures of labels that are doubted
THUMBNAIL = 128  # pixels, the long side
CANDIDATES = 12  # rows of the SVM's comparison


def collect(
    seen: Look,
    fitted: Fitted,
    judged: Judgement,
    on_test: Mapping[str, Predictions],
    verdict: tuple[str, str],
    path: Path,
) -> ReportData:
    """Everything that the page of a run shows; `verdict` are its two sentences, `judged` what it
    was judged on, `on_test` what every contender says of the test images."""
    baseline, choice = fitted.baseline, fitted.choice
    training = fitted.tuned.result if fitted.tuned else None
    found, classes = judged.found, seen.images.classes
    nothing = np.zeros((len(classes), len(classes)), dtype=np.int64)
    train = seen.images.labels[seen.part("train")]
    doubts, doubted = _doubts(seen, baseline)
    return ReportData(
        title=shown(seen.images.name),
        made=datetime.now(UTC).strftime("%Y-%m-%d"),
        headline=verdict[0],
        second=verdict[1],
        shipped=shipped_name(seen, fitted),
        classes=classes,
        training=tuple(int(n) for n in np.bincount(train, minlength=len(classes))),
        confusion=metrics.confusion(found.images.labels, found.best, len(classes))
        if found
        else nothing,
        metrics=judged.metrics,
        matrix=_matrix(seen),
        distance=_distance(seen),
        seconds=tuple((name, value) for name, value in seen.seconds.items() if name != "all"),
        commands=_commands(path),
        warnings=_warnings(seen, baseline, training),
        contenders=_contenders(seen, fitted, judged, on_test),
        pair=choice.pair if choice else None,
        pair_on=choice.selection.words if choice else "",
        candidates=_candidates(baseline),
        curves=_curves(training) if training else (),
        best_epoch=training.best_epoch if training else None,
        diagnosis=tuple(map(diagnosis.line, diagnosis.of_run(path))) if training else (),
        mistakes=mistakes(found) if found else (),
        doubts=doubts,
        doubted=doubted,
        facts=_facts(seen, fitted),
        test_evaluations=int(judged.part == "test"),
        judged_on=judged.on,
    )


def _matrix(seen: Look) -> Matrix:
    rows = tuple(policy.row_words().values())
    names = tuple(name for name, _, _ in policy.ROWS)
    cells = tuple(
        tuple(policy.MATRIX[row, column].strategy for column in policy.COLUMNS) for row in names
    )
    plan = seen.plan
    chosen = names.index(plan.row), policy.COLUMNS.index(plan.column)
    return Matrix(rows, policy.COLUMNS, cells, chosen, plan.strategy, plan.because, plan.advice)


def _distance(seen: Look) -> Distance:
    near = seen.similarity
    second = (
        ""
        if near.knn is None
        else f"{similarity.KNN}-NN on the features, leave-one-out: "
        f"{near.knn:.0%} right, which says {near.knn_word}"
    )
    return Distance(
        near.word,
        near.distance,
        near.low,
        near.high,
        near.n,
        similarity.NEAR,
        similarity.FAR,
        second,
        near.notes,
    )


def _commands(path: Path) -> tuple[tuple[str, str], ...]:
    run = typed(path)
    return (
        ("classes of images", f"finetune predict {run} IMAGE…"),
        ("a folder, to a table", f"finetune predict {run} FOLDER/ -o predictions.csv --unsure 0.6"),
        ("from Python", f"import finetune\nfinetune.load({str(path)!r}).predict(['img.jpg'])"),
        ("the same again", f"finetune fit --recipe {typed(path / 'recipe.yaml')} --out NEW"),
    )


def _warnings(seen: Look, baseline: SvmResult, training: TrainResult | None) -> tuple[str, ...]:
    loud: tuple[str, ...] = ()
    if seen.named.network.pretraining == "random":
        loud = ("THE BACKBONE'S WEIGHTS ARE RANDOM: nothing here says anything about transfer.",)
    bad = (
        ()
        if not seen.features.faults
        else (f"{len(seen.features.faults)} unreadable images were left out.",)
    )
    same = (text,) if (text := omissions.leaks(seen.images, seen.digests)) else ()
    return (*loud, *bad, *same, *baseline.warnings, *(training.warnings if training else ()))


def _contenders(
    seen: Look, fitted: Fitted, judged: Judgement, on_test: Mapping[str, Predictions]
) -> tuple[Contender, ...]:
    """The models on the test images; where the SVM was the only one, its out-of-fold accuracy
    stands below."""
    top1, baseline = judged.metrics.get("top1"), fitted.baseline
    if not isinstance(top1, Estimate):
        return ()
    if fitted.choice is not None and on_test:
        rows = [
            Contender(
                one.name,
                metrics.accuracy(found.images.labels, found.best, found.images.groups),
                "test images",
                one is fitted.choice.winner,
                "" if one.kind in fitted.refitted else "not fitted again on the validation images",
            )
            for one in fitted.choice.contenders
            if (found := on_test.get(one.kind))
        ]
        return tuple(sorted(rows, key=lambda row: not row.shipped))
    name = f"SVM on {' + '.join(map(str, baseline.head.taps))}"
    if judged.part != "test":
        shipped = fitted.choice.winner.name if fitted.choice else name
        return (Contender(shipped, top1, judged.on, True),)
    rows = [Contender(name, top1, "test images", True)]
    if math.isfinite(baseline.cv_accuracy):
        half = 1.96 * baseline.cv_error
        low, high = max(0.0, baseline.cv_accuracy - half), min(1.0, baseline.cv_accuracy + half)
        n = len(seen.part("train"))
        folds = Estimate(baseline.cv_accuracy, low, high, n, "normal, over folds")
        before = f"{name}, before it was refitted"
        rows.append(Contender(before, folds, "training images, out of fold", False))
    return tuple(rows)


def _candidates(baseline: SvmResult) -> tuple[Candidate, ...]:
    rows = []
    for i, found in enumerate(baseline.candidates[:CANDIDATES]):
        setting = f"C = {found.C:g}" if found.kernel != "knn" else f"{similarity.KNN} neighbours"
        taps = " + ".join(map(str, found.taps))
        rows.append(
            Candidate(
                f"{found.kernel} on {taps}",
                found.accuracy,
                found.error,
                f"{setting}{'; ' if found.note else ''}{found.note}",
                i == 0,
            )
        )
    return tuple(rows)


def _curves(training: TrainResult) -> tuple[Curve, ...]:
    """Loss, accuracy and learning rates over epochs; epoch 0 is the start, judged before the first
    step. Vectors that are not decayed learn at their stage's rate: one line stands for both."""
    before = {key: value for key, value in training.start.items() if key.startswith("val/")}
    history = [*([{"epoch": 0, **before}] if before else []), *training.history]
    keys = list(dict.fromkeys(key for row in history for key in row))
    panels = {"train/loss": "loss", "val/loss": "loss", "val/top1": "accuracy"}
    curves = []
    for key in keys:
        panel = panels.get(key) or ("learning rate" if key.startswith("lr/") else None)
        if panel is None or key.endswith("/no-decay"):
            continue
        points = [
            (row["epoch"], row[key]) for row in history if isinstance(row.get(key), (int, float))
        ]
        curves.append(
            Curve(
                panel,
                key.partition("/")[2] if panel == "learning rate" else key,
                [x for x, _ in points],
                [v for _, v in points],
            )
        )
    return tuple(curves)


def mistakes(found: Predictions) -> tuple[Mistake, ...]:
    """The wrong predictions that the model was surest of."""
    y, best = found.images.labels, found.best
    wrong = np.flatnonzero(best != y)
    score = found.probabilities[np.arange(len(y)), best]
    worst = wrong[np.argsort(-score[wrong], kind="stable")][:MISTAKES]
    return tuple(
        Mistake(
            shown(found.images.paths[i]),
            found.classes[y[i]],
            found.classes[best[i]],
            float(score[i]),
            picture,
        )
        for i in worst
        if (picture := thumbnail(found.images, int(i)))
    )


def _doubts(seen: Look, baseline: SvmResult) -> tuple[tuple[Doubt, ...], str]:
    """The labels of training and validation images that the SVM doubts the most, and what is to be
    said of them."""
    found = suspects.find(seen, baseline, free=True, near=0)
    names, count = seen.images.classes, len(found.training)
    rows = tuple(
        Doubt(
            shown(seen.images.paths[one.index]),
            names[one.given],
            one.own,
            names[one.proposed],
            one.confidence,
            thumbnail(seen.images, one.index),
        )
        for one in found.training[:DOUBTS]
    )
    words = (
        f"{count} of {found.looked_at[0]:,} training and validation images, each judged by an SVM "
        f"that had not seen it; the most doubted first. A suspicion is no error. "
        f"finetune check {typed(seen.images.name)} --labels -o suspects.html lists all, with a "
        f"table to correct."
    )
    return rows, words


def thumbnail(images: ImageSet, i: int, side: int = THUMBNAIL) -> bytes:
    """A small JPEG of image i, or no bytes where it cannot be read; tiny pictures are enlarged
    without smoothing."""
    from PIL import Image

    try:
        image = decode.decode(images.read(i), short_side=side)
    except (decode.DecodeError, UserError):
        return b""
    if max(image.size) < side // 2:
        factor = side // max(image.size)
        image = image.resize(
            (image.width * factor, image.height * factor), Image.Resampling.NEAREST
        )
    image.thumbnail((side, side))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _facts(seen: Look, fitted: Fitted) -> tuple[tuple[str, str], ...]:
    network, counts = (
        seen.named.network,
        {name: len(seen.part(name)) for name in ("train", "val", "test")},
    )
    used = seen.how
    return (
        (
            "images",
            f"{counts['train']} training, {counts['val']} validation, {counts['test']} test",
        ),
        ("backbone", f"{network.name} ({network.source})"),
        *(("head", words) for words in _heads(fitted)),
        ("engine", f"{used[0]} in {used[1]}"),
        *_moving_average(fitted),
        ("seed", str(seen.recipe.data.seed)),
        *_corrected(seen),
        *(("left out", f"{line} (left_out.csv)") for line in omissions.told(seen.images)),
    )


def _corrected(seen: Look) -> tuple[tuple[str, str], ...]:
    """How many labels were corrected, where a table was given."""
    if seen.recipe.data.labels is None:
        return ()
    counts = corrections.changed(seen.images)
    words = (
        f"{counts['train']} training, {counts['val']} validation, {counts['test']} test labels by "
        f"{seen.recipe.data.labels} (corrections.csv)"
    )
    return (("corrected", words),)


def _moving_average(fitted: Fitted) -> list[tuple[str, str]]:
    """How much of the moving average of the weights is still what the training began with."""
    share = fitted.tuned.result.start_share if fitted.tuned else None
    if share is None:
        return []
    return [("average", f"moving, of the weights; the initial ones have {share:.1%} of it")]


def _heads(fitted: Fitted) -> list[str]:
    """The heads of what ships, each with its taps."""
    model = fitted.model
    members = [model] if isinstance(model, Classifier) else list(model.members.values())
    return [f"{one.head.kind} on {' + '.join(map(str, one.head.taps))}" for one in members]
