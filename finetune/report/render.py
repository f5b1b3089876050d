"""`report.html`: the verdict of a run on one self-contained page, from plain values.

The page loads nothing: styles, pictures and the few lines of script are inside, and its own policy
forbids the rest. This module computes what is drawn where; `report.html` beside it is the template,
which escapes every text.
"""

from __future__ import annotations

import base64
import functools
import importlib.resources
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune import metrics
from finetune.metrics import Estimate, Paired

MATRIX_CLASSES = 25  # more classes: the confusions are listed, not drawn
PAIRS = 15  # confusions listed
FIRST_ROWS = 25  # classes shown before "all the others"
# a name in a script that runs from right to left must not turn the sentence around it
ISOLATE, POP = ("\u2068", "\u2069")
# images: below, a class's figures are rough, and more images are the first advice
FEW_TEST, FEW_TRAIN = (10, 20)


@dataclass(frozen=True)
class Matrix:
    """The policy's table: `cells[row][column]` are strategies, `chosen` is (row, column) or
    None."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    chosen: tuple[int, int] | None
    strategy: str
    because: tuple[str, ...]
    advice: tuple[str, ...] = ()


@dataclass(frozen=True)
class Distance:
    """How far the images are from the pretraining photographs. Below `near` is near, above `far`
    far; None: not measured."""

    word: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    near: float
    far: float
    second_opinion: str
    notes: tuple[str, ...] = ()
    interval: str = "90% bootstrap interval"


@dataclass(frozen=True)
class Contender:
    """One model that could have shipped, judged on `on`."""

    name: str
    accuracy: Estimate
    on: str
    shipped: bool
    detail: str = ""


@dataclass(frozen=True)
class Candidate:
    """One setting of the SVM that cross-validation compared: mean accuracy and its standard
    error."""

    name: str
    accuracy: float
    error: float
    detail: str = ""
    chosen: bool = False


@dataclass(frozen=True)
class Curve:
    """A line over training: `panel` groups lines that share an axis. Values that are not finite
    leave a gap."""

    panel: str
    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Mistake:
    """An image that the model got wrong, with a small JPEG or PNG of it."""

    path: str
    true: str
    predicted: str
    score: float
    picture: bytes


@dataclass(frozen=True)
class Doubt:
    """An image whose label the model doubts, with the probabilities of both classes and a small
    picture."""

    path: str
    given: str
    own: float
    proposed: str
    confidence: float
    picture: bytes


@dataclass(frozen=True)
class ReportData:
    """Everything that the page shows. Rows of `confusion` `(C, C)` are the true classes; `training`
    counts images a class.

    `metrics` has the names that `metrics.judge` gives. `pair` compares the SVM (first) with the
    fine-tuned model (second) on the images that `pair_on` names. `metrics` and `confusion` are of
    the images that `judged_on` names; where there are none, they are empty and zero. A run made of
    other runs has no plan: no `matrix` and no `distance`.
    """

    title: str
    made: str
    headline: str
    second: str
    shipped: str
    classes: tuple[str, ...]
    training: tuple[int, ...]
    confusion: NDArray[Any]
    metrics: Mapping[str, Estimate | float]
    matrix: Matrix | None
    distance: Distance | None
    seconds: tuple[tuple[str, float], ...]
    commands: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...] = ()
    contenders: tuple[Contender, ...] = ()
    pair: Paired | None = None
    pair_on: str = ""
    candidates: tuple[Candidate, ...] = ()
    curves: tuple[Curve, ...] = ()
    best_epoch: float | None = None
    diagnosis: tuple[str, ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    doubts: tuple[Doubt, ...] = ()
    doubted: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    test_evaluations: int = 1
    judged_on: str = "test images"


def render(report: ReportData) -> str:
    """The page as HTML text."""
    classes = class_rows(report)
    view = {
        "tiles": _tiles(report),
        "ruler": _ruler(report.distance),
        "contenders": _contenders(report),
        "candidates": _candidates(report.candidates),
        "panels": _panels(report),
        "confusion": _confusion(report),
        "pairs": confused(report.confusion, report.classes)[:PAIRS],
        "mistakes": [(mistake, _data_url(mistake.picture)) for mistake in report.mistakes],
        "doubts": [(doubt, _data_url(doubt.picture)) for doubt in report.doubts],
        "classes": (classes[:FIRST_ROWS], classes[FIRST_ROWS:]),
        "times": _times(report.seconds),
    }
    return str(_template().render(r=report, **view))


@functools.cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    text = (
        importlib.resources.files("finetune.report")
        .joinpath("report.html")
        .read_text(encoding="utf-8")
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "chance": chance,
        "duration": duration,
    }
    return environment.from_string(text)


# --- numbers for people -------------------------------------------------------------------------


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%"


def points(difference: float) -> str:
    """A difference of two shares in points, signed, with a true minus."""
    text = f"{100 * difference:+.1f}"
    return "±0.0" if float(text) == 0 else text.replace("-", "−")


def chance(p_value: float) -> str:
    return (
        "< 0.001"
        if p_value < 0.001
        else f"= {p_value:.3f}"
        if p_value < 0.1
        else f"= {p_value:.2f}"
    )


def duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers in [low, high], `about` of them, in steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = min((power * m for m in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    return [
        round(i * step, 12)
        for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


# --- what is drawn ------------------------------------------------------------------------------


def _tiles(report: ReportData) -> list[dict[str, str]]:
    """The headline numbers, with the interval and one line on what each means."""
    meanings = {
        "top1": ("Accuracy", f"{report.judged_on} named right"),
        "balanced": ("Balanced accuracy", "every class counts the same"),
        "macro_f1": ("Macro-F1", "mean F1 over the classes"),
        "top5": ("Right among 5", "the true class is in the first five"),
        "ece": (
            "Calibration error",
            f"stated confidence against truth, {metrics.CALIBRATION_BINS} bins",
        ),
        "majority": ("Majority baseline", "always the commonest class"),
    }
    tiles = []
    for name, (label, meaning) in meanings.items():
        value = report.metrics.get(name)
        if isinstance(value, Estimate):
            interval = f"{100 * value.low:.1f}–{100 * value.high:.1f}% ({value.method})"
            tiles.append(
                {
                    "label": label,
                    "value": percent(value.value),
                    "interval": interval,
                    "meaning": meaning,
                }
            )
        elif value is not None:
            tiles.append(
                {"label": label, "value": percent(value), "interval": "", "meaning": meaning}
            )
    return tiles


def _ruler(distance: Distance | None) -> dict[str, Any] | None:
    """Places, in percent of the ruler's width, on a logarithmic scale around the two borders."""
    if distance is None or distance.value is None or distance.low is None or distance.high is None:
        return None
    start = min(distance.near / 5, distance.low / 1.3)
    end = max(distance.far * 2.5, distance.high * 1.3)

    def place(value: float) -> float:
        return round(100 * math.log(max(value, start) / start) / math.log(end / start), 2)

    near, far = place(distance.near), place(distance.far)
    return {
        "bands": [
            ("near", 0, near),
            ("moderate", near, round(far - near, 2)),
            ("far", far, round(100 - far, 2)),
        ],
        "borders": [(near, f"{distance.near:g}"), (far, f"{distance.far:g}")],
        "value": place(distance.value),
        "low": place(distance.low),
        "width": round(place(distance.high) - place(distance.low), 2),
    }


def _contenders(report: ReportData) -> dict[str, Any] | None:
    """Accuracies with intervals on one axis, cut to where they lie."""
    if not report.contenders:
        return None
    low = max(0.0, math.floor(20 * (min(c.accuracy.low for c in report.contenders) - 0.02)) / 20)
    high = min(1.0, math.ceil(20 * (max(c.accuracy.high for c in report.contenders) + 0.005)) / 20)

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    rows = [
        {
            "c": c,
            "low": place(c.accuracy.low),
            "width": place(c.accuracy.high) - place(c.accuracy.low),
            "value": place(c.accuracy.value),
        }
        for c in report.contenders
    ]
    return {
        "rows": rows,
        "ticks": [(place(tick), percent(tick, 0)) for tick in ticks(low, high, 4)],
    }


def _candidates(candidates: Sequence[Candidate]) -> list[tuple[Candidate, float]]:
    """Candidates, best first, with the length of their bar: the axis starts below the worst, so
    that differences show."""
    if not candidates:
        return []
    best, worst = max(c.accuracy for c in candidates), min(c.accuracy for c in candidates)
    start = max(0.0, worst - 0.25 * (best - worst) - 0.01)
    return [
        (c, round(100 * (c.accuracy - start) / (best - start), 1))
        for c in sorted(candidates, key=lambda c: -c.accuracy)
    ]


def _panels(report: ReportData) -> list[dict[str, Any]]:
    """One panel an axis: lines as points in a square of 100 × 100 that the page stretches, and
    labels in percent."""
    panels = []
    for name in dict.fromkeys(curve.panel for curve in report.curves):
        curves = [curve for curve in report.curves if curve.panel == name]
        xs = [float(x) for curve in curves for x in curve.x]
        ys = [float(y) for curve in curves for y in curve.y if math.isfinite(y)]
        if not ys:
            continue
        left, right, bottom, top = min(xs), max(xs), min(ys), max(ys)
        margin = 0.06 * (top - bottom) or 0.05 * abs(top) or 0.5
        bottom, top, right = (
            bottom - margin if bottom - margin > 0 or bottom < 0 else 0.0,
            top + margin,
            right if right > left else left + 1,
        )

        def across(x: float, left: float = left, right: float = right) -> float:
            return round(100 * (x - left) / (right - left), 2)

        def down(y: float, bottom: float = bottom, top: float = top) -> float:
            return round(100 - 100 * (y - bottom) / (top - bottom), 2)

        lines = [
            {"name": c.name, "pieces": _pieces(c, across, down), "last": _last(c)} for c in curves
        ]
        best = (
            across(report.best_epoch)
            if report.best_epoch is not None and left <= report.best_epoch <= right
            else None
        )
        panels.append(
            {
                "name": name,
                "lines": lines,
                "best": best,
                "x": [(across(x), f"{x:g}") for x in ticks(left, right, 5)],
                "y": [(down(y), f"{y:g}") for y in ticks(bottom, top, 4)],
                "words": "; ".join(f"{line['name']}: {line['last']}" for line in lines),
            }
        )
    return panels


def _pieces(curve: Curve, across: Any, down: Any) -> list[str]:
    """The unbroken parts of a line as SVG points."""
    pieces: list[list[str]] = [[]]
    for x, y in zip(curve.x, curve.y, strict=True):
        if math.isfinite(y):
            pieces[-1].append(f"{across(x)},{down(y)}")
        elif pieces[-1]:
            pieces.append([])
    # One point alone draws no line: doubled, its round end makes a dot.
    return [" ".join(piece * 2 if len(piece) == 1 else piece) for piece in pieces if piece]


def _last(curve: Curve) -> str:
    finite = [float(y) for y in curve.y if math.isfinite(y)]
    return f"from {finite[0]:.3g} to {finite[-1]:.3g}" if finite else "no values"


def _confusion(report: ReportData) -> list[dict[str, Any]] | None:
    """Rows of the confusion matrix with each cell's share of its row, or None where it would not
    fit a page."""
    if len(report.classes) > MATRIX_CLASSES:
        return None
    rows = []
    for i, counts in enumerate(report.confusion):
        total = max(1, int(counts.sum()))
        cells = [
            {"count": int(n), "share": round(float(n) / total, 3), "right": i == j}
            for j, n in enumerate(counts)
        ]
        rows.append({"name": report.classes[i], "cells": cells, "total": int(counts.sum())})
    return rows


def confused(counts: NDArray[Any], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Pairs of different classes by how many images of the first were taken for the second, most
    first."""
    off = np.array(counts)
    np.fill_diagonal(off, 0)
    support = np.asarray(counts).sum(axis=1)
    pairs = [(int(off[i, j]), int(i), int(j)) for i, j in zip(*np.nonzero(off), strict=True)]
    pairs.sort(key=lambda pair: (-pair[0], -pair[0] / support[pair[1]], pair[1:]))
    most = pairs[0][0] if pairs else 1
    return [
        {
            "true": classes[i],
            "predicted": classes[j],
            "count": n,
            "of": int(support[i]),
            "bar": round(100 * n / most, 1),
        }
        for n, i, j in pairs
    ]


def class_rows(report: ReportData) -> list[dict[str, Any]]:
    """One row a class, the lowest F1 first, classes without test images last, each with advice in
    words."""
    rates = metrics.per_class(report.confusion)
    rows = []
    for i, name in enumerate(report.classes):
        support = int(rates.support[i])
        row = {
            "name": name,
            "support": support,
            "training": report.training[i],
            "f1": float(rates.f1[i]),
        }
        row |= {"precision": float(rates.precision[i]), "recall": float(rates.recall[i])}
        rows.append(row | {"advice": advice(report, i, row)})
    return sorted(rows, key=lambda row: (row["support"] == 0, row["f1"], row["name"]))


def advice(report: ReportData, i: int, row: Mapping[str, Any]) -> str:
    """What the numbers of class `i` suggest, or nothing where it does well."""
    if row["support"] == 0:
        return (
            "No test images: nothing is known about this class." if report.test_evaluations else ""
        )
    said = []
    wrong = np.array(report.confusion[i])
    wrong[i] = 0
    if wrong.any():
        other = int(wrong.argmax())
        said.append(
            f"{int(wrong[other])} of {row['support']} taken for "
            f"{ISOLATE}{report.classes[other]}{POP}."
        )
    attracted = int(report.confusion[:, i].sum()) - int(report.confusion[i, i])
    if attracted > max(1, 0.25 * row["support"]) and row["precision"] < row["recall"]:
        said.append(f"{attracted} images of other classes land here.")
    if row["f1"] < 0.9 and row["training"] < FEW_TRAIN:
        said.append(f"Only {row['training']} training images: collect more.")
    if row["f1"] < 0.99 and row["support"] < FEW_TEST and report.test_evaluations:
        said.append(f"Only {row['support']} test images: these figures are rough.")
    return " ".join(said)


def _times(seconds: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    total = sum(value for _, value in seconds) or 1.0
    return [
        {"name": name, "text": duration(value), "share": round(100 * value / total, 2)}
        for name, value in seconds
    ]


def _data_url(picture: bytes) -> str:
    """A picture as a `data:` URL, or nothing where there are no bytes that a browser shows."""
    kinds = ((b"\xff\xd8\xff", "jpeg"), (b"\x89PNG", "png"), (b"RIFF", "webp"))
    kind = next((kind for start, kind in kinds if picture.startswith(start)), None)
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}" if kind else ""
