"""The policy: images per class × similarity to the pretraining domain → a `Plan`, with its reasons
in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.errors import UserError
from finetune.training.config import Training, check_strategy, trainable


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix: the strategy, and why in a few words."""

    strategy: str
    why: str


@dataclass(frozen=True)
class Plan:
    """What was decided. `strategy` is svm, probe, stages:K, half, full or scratch; `training` is
    None for svm and probe.

    `row` and `column` name the chosen cell of the matrix; `taps` are the features that the SVM may
    read; `advice` is for the user, `because` are the reasons, `minutes` an estimate of what
    fine-tuning costs here.
    """

    strategy: str
    row: str
    column: str
    taps: tuple[str, ...]
    training: Training | None
    because: tuple[str, ...]
    advice: tuple[str, ...]
    minutes: float | None
    images_per_class: float
    smallest_class: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# --------------------------------------------------------------------------------------- the matrix
# Rows: training images per class (mean). Columns: similarity to the pretraining photographs. The
# cells follow what was measured with EfficientNet-Lite0 (docs/log.md): with under 100 images a
# class, moving the backbone lost to an SVM on well-chosen taps at every similarity; with more, the
# SVM still runs beside whatever the cell says, and the better of the two ships. Where the images
# are unlike photographs, the earlier taps carry them (Head2Toe, Evci et al. 2022).

ROWS = (("few", 0, 20), ("small", 20, 100), ("medium", 100, 1000), ("large", 1000, None))
COLUMNS = ("near", "moderate", "far")

MATRIX: dict[tuple[str, str], Cell] = {
    ("few", "near"): Cell("svm", "too few images to move a backbone that already fits"),
    ("few", "moderate"): Cell(
        "svm", "too few images to move a backbone; the tap is chosen by cross-validation"
    ),
    ("few", "far"): Cell("svm", "few and unlike photographs: earlier taps, not a moved backbone"),
    ("small", "near"): Cell(
        "svm", "the pretrained features fit, and there is little to learn more from"
    ),
    ("small", "moderate"): Cell("svm", "little data: well-chosen taps beat a moved backbone"),
    ("small", "far"): Cell("svm", "little data, unlike photographs: an SVM on earlier taps"),
    ("medium", "near"): Cell(
        "stages:1", "enough to adapt the last stage, which is the most tied to the old classes"
    ),
    ("medium", "moderate"): Cell("stages:2", "enough to adapt the last stages"),
    ("medium", "far"): Cell(
        "stages:2", "enough to adapt the last stages to what they have not seen"
    ),
    ("large", "near"): Cell("half", "much data: the upper half may adapt"),
    ("large", "moderate"): Cell("half", "much data, somewhat different: the upper half may adapt"),
    ("large", "far"): Cell("full", "much data, unlike photographs: everything may adapt"),
}

FEW = 20  # images: a class with fewer is named in the advice
ENOUGH = (
    100  # images per class that the advice asks for: where the matrix first lets the backbone move
)
TINY = 64  # pixels: sources below gain nothing from a large input, and fine-tuning pays for it
UNKNOWN_COLUMN = "moderate"  # where similarity is unknown: the middle


@dataclass(frozen=True)
class Facts:
    """What the policy looks at: counts of the training part, similarity, the backbone's stages, the
    images' size."""

    counts: dict[str, int]
    similarity: str
    stages: tuple[str, ...]
    input_size: int
    short_side: int
    flip: bool = True
    trunk_seconds: float | None = (
        None  # a forward pass of one image through the whole backbone, in training precision
    )


def decide(
    facts: Facts,
    *,
    strategy: str = "auto",
    taps: Sequence[str] = (),
    budget: float | None = None,
    overrides: dict[str, Any] | None = None,
) -> Plan:
    """The plan for a training set. `strategy` other than auto overrides the matrix, `overrides`
    single training values.

    `budget` (minutes) moves down to the dearest strategy that fits. Raises `UserError` for words
    that do not exist.
    """
    total, smallest = sum(facts.counts.values()), min(facts.counts.values())
    per_class = total / len(facts.counts)
    row = next(name for name, low, high in ROWS if high is None or per_class < high)
    column = facts.similarity if facts.similarity in COLUMNS else UNKNOWN_COLUMN
    cell = MATRIX[row, column]
    because = [
        f"{total} training images in {len(facts.counts)} classes: {per_class:.0f} per class → "
        f"row '{row}'",
        f"similarity to ImageNet's photographs is {facts.similarity} → column '{column}'",
        f"{cell.strategy}: {cell.why}",
    ]
    chosen = cell.strategy
    if strategy != "auto":
        chosen = check_strategy(strategy)
        because.append(f"--strategy {strategy} was asked for")
    training = _training(chosen, facts, total, overrides or {})
    minutes = _minutes(training, facts, total)
    while (
        strategy == "auto"
        and budget is not None
        and training is not None
        and minutes is not None
        and minutes > budget
    ):
        because.append(
            f"{chosen} would take about {minutes:.0f} minutes, more than the budget of {budget:g}"
        )
        chosen = _cheaper(chosen)
        training = _training(chosen, facts, total, overrides or {})
        minutes = _minutes(training, facts, total)
    return Plan(
        chosen,
        row,
        column,
        tuple(taps),
        training,
        tuple(because),
        _advice(facts.counts, row),
        minutes,
        per_class,
        smallest,
    )


def _training(
    strategy: str, facts: Facts, total: int, overrides: dict[str, Any]
) -> Training | None:
    if strategy in ("svm", "probe"):
        return None
    moving = trainable(strategy, facts.stages)
    scratch = strategy == "scratch"
    size = facts.input_size
    if facts.short_side < TINY and not scratch:
        size = min(size, max(96, 32 * round(facts.short_side * 3 / 32)))
    # BiT's rule (Kolesnikov et al. 2020): the number of steps, not of epochs, follows the size of
    # the data.
    batch = 32 if total < 20_000 else 64
    epochs = max(3, min(10, round(900 * batch / total))) if not scratch else 60
    values: dict[str, Any] = {
        "trainable": moving,
        "head_init": "zero" if scratch else "probe",
        "lr": 1e-3,
        "trunk_lr_scale": 1.0 if scratch else 0.3,
        "layer_decay": 1.0 if scratch else 0.8,
        "epochs": epochs,
        "batch_size": batch,
        "weight_decay": 0.05 if scratch else 1e-4,
        "label_smoothing": 0.1 if total >= 5_000 else 0.0,
        "mixup": 0.1 if total >= 20_000 else 0.0,
        "ema": True,
        "l2_sp": 1e-2 if total < 1_000 and not scratch else 0.0,
        "augment": "medium" if total >= 5_000 or scratch else "light",
        "flip": facts.flip,
        "views": 4 if total < 2_000 else 2,
        "input_size": size,
        "norm_moves": scratch,
    }
    known = {field.name for field in dataclasses.fields(Training)}
    if unknown := set(overrides) - known:
        raise UserError(
            f"no training value is called {', '.join(sorted(unknown))}",
            where="--set train",
            fix=f"choose from {', '.join(sorted(known))}",
        )
    return Training(
        **{**values, **{key: value for key, value in overrides.items() if value is not None}}
    )


def _minutes(training: Training | None, facts: Facts, total: int) -> float | None:
    """What fine-tuning will take: the frozen part once a view, the moving part three passes
    (forward and backward) an epoch."""
    if training is None or facts.trunk_seconds is None:
        return None
    numbered = [name for name in facts.stages if name.startswith("stage")] or ["stage1"]
    share = sum(name in training.trainable for name in numbered) / len(numbered)
    scale = (training.input_size / facts.input_size) ** 2
    passes = training.views * (1 - share) + 3 * training.epochs * share
    return total * passes * scale * facts.trunk_seconds / 60


def _cheaper(strategy: str) -> str:
    order = ["full", "half", "stages:2", "stages:1", "svm"]
    if strategy.startswith("stages:"):
        count = int(strategy.partition(":")[2])
        return f"stages:{count - 1}" if count > 1 else "svm"
    return order[order.index(strategy) + 1] if strategy in order else "half"


def _advice(counts: dict[str, int], row: str) -> tuple[str, ...]:
    """Advice in words: which classes are too small, and what more images would change."""
    few = sorted((n, name) for name, n in counts.items() if n < FEW)
    advice = [
        f"{n} images in class '{name}': collect at least {ENOUGH} per class" for n, name in few[:5]
    ]
    if len(few) > 5:
        advice.append(f"… and {len(few) - 5} more classes with fewer than {FEW} images")
    small = sum(FEW <= n < ENOUGH for n in counts.values())
    if row in ("few", "small") and small:
        pay = f"with {ENOUGH} each, adapting the backbone may pay"
        advice.append(f"{small} of {len(counts)} classes have {FEW} to {ENOUGH - 1} images: {pay}")
    largest, smallest = max(counts.values()), min(counts.values())
    if smallest and largest >= 5 * smallest:
        times = f"the largest class has {largest / smallest:.0f} times the images of the smallest"
        advice.append(f"{times}: judge by balanced accuracy, and collect for the small ones")
    return tuple(advice)


def row_words() -> dict[str, str]:
    """The rows of the matrix by name, with the images per class that they cover."""
    return {
        name: f"{name} ({low} to {high - 1})" if high else f"{name} ({low} or more)"
        for name, low, high in ROWS
    }


def matrix_text(plan: Plan) -> str:
    """The matrix for a terminal, the chosen cell marked, with reasons and advice."""
    width = max(len(cell.strategy) for cell in MATRIX.values()) + 4
    names = row_words()
    left = max(map(len, names.values())) + 2
    lines = [
        "images per class ↓   similarity to ImageNet's photographs →",
        "",
        " " * left + "".join(f"{name:<{width}}" for name in COLUMNS),
    ]
    for name, _, _ in ROWS:
        cells = []
        for column in COLUMNS:
            text = MATRIX[name, column].strategy
            chosen = (name, column) == (plan.row, plan.column)
            cells.append(f"{f'[{text}]' if chosen else f' {text}':<{width}}")
        lines.append(f"{names[name]:<{left}}" + "".join(cells).rstrip())
    lines += ["", f"→ {plan.strategy}"] + [f"  because {reason}" for reason in plan.because]
    if plan.minutes is not None:
        lines.append(
            f"  fine-tuning takes about {max(plan.minutes, 0.1):.1f} minutes here (an estimate)"
        )
    lines += [f"  advice: {text}" for text in plan.advice]
    return "\n".join(lines)
