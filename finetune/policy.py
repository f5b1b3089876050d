"""The policy: images per class × similarity to the pretraining domain → a `Plan`, with its reasons
in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.errors import UserError
from finetune.training import schedules
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
# cells follow what was measured with EfficientNet-Lite0 (docs/log.md). The SVM runs beside whatever
# a cell says, and so does the average of both: the best of the three ships. Where the images are
# unlike photographs, the earlier taps carry them (Head2Toe, Evci et al. 2022), and an input-level
# shift asks for the first stages to move (surgical fine-tuning, Lee et al. 2023).

ROWS = (("few", 0, 20), ("small", 20, 100), ("medium", 100, 1000), ("large", 1000, None))
COLUMNS = ("near", "moderate", "far")

MATRIX: dict[tuple[str, str], Cell] = {
    ("few", "near"): Cell("svm", "too few images to move a backbone that already fits"),
    ("few", "moderate"): Cell(
        "svm", "too few images to move a backbone; the tap is chosen by cross-validation"
    ),
    ("few", "far"): Cell("svm", "few and unlike photographs: earlier taps, not a moved backbone"),
    ("small", "near"): Cell("stages:3", "the last stages move gently from the SVM's side"),
    ("small", "moderate"): Cell("stages:3", "the last stages move gently from the SVM's side"),
    ("small", "far"): Cell("full", "unlike photographs: the first stages have to adapt, too"),
    ("medium", "near"): Cell("stages:3", "enough to adapt the last stages"),
    ("medium", "moderate"): Cell("full", "enough for everything to adapt"),
    ("medium", "far"): Cell("full", "enough for everything to adapt to what it has not seen"),
    ("large", "near"): Cell("half", "much data: the upper half may adapt"),
    ("large", "moderate"): Cell("full", "much data, somewhat different: everything may adapt"),
    ("large", "far"): Cell("full", "much data, unlike photographs: everything may adapt"),
}

FEW = 20  # images: a class with fewer is named in the advice
ENOUGH = 100  # images per class that the advice asks for
TINY = 64  # pixels: sources below gain nothing from a large input, and fine-tuning pays for it
TRAINED = 160  # pixels: the side of the input of a training, at most
STEPS = 1500  # of a training, at most
WARMUP = 0.25  # of the steps: a fitted head must not be shaken
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
        because.append(f"the strategy {strategy} was asked for")
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
        (*_advice(facts.counts, row), *_of_flips(facts, training)),
        minutes,
        per_class,
        smallest,
    )


def _training(
    strategy: str, facts: Facts, total: int, overrides: dict[str, Any]
) -> Training | None:
    """The settings of a strategy, from the size of the data and of the images (docs/log.md)."""
    if strategy in ("svm", "probe"):
        return None
    scratch, whole = strategy == "scratch", strategy in ("full", "scratch")
    tiny = facts.short_side < TINY
    batch = 32 if total < 20_000 else 64
    most = 60 if scratch else 12 if whole else 6
    # BiT's rule (Kolesnikov et al. 2020): the number of steps, not of epochs, follows the size of
    # the data.
    epochs = most if scratch else max(4, min(most, round(STEPS * batch / total)))
    epochs = overrides.get("epochs") or epochs
    values: dict[str, Any] = {
        "trainable": trainable(strategy, facts.stages),
        "head_init": "zero" if scratch else "probe",
        "taps": ("pooled",) if scratch else ("svm",),
        # A fitted head moves gently, and what is below it more gently still.
        "lr": 3e-3 if whole else 9e-4,
        "trunk_lr_scale": 1.0 if scratch else 1 / 3,
        "layer_decay": 1.0,
        "epochs": epochs,
        "batch_size": batch,
        "warmup": WARMUP,
        "weight_decay": 0.02 if whole else 1e-4,
        "label_smoothing": 0.1,
        "ema": True,
        # Crops cut strokes off; small images are turned, shifted and scaled as a whole.
        "augment": "affine" if tiny else "medium" if scratch else "photo",
        "flip": facts.flip and not _like_signs(facts),
        # One for each epoch: seen again and again, a few views are learned by heart.
        "views": epochs,
        "input_size": facts.input_size if scratch else _input_size(facts),
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


def _of_flips(facts: Facts, training: Training | None) -> tuple[str, ...]:
    """A line where images are not mirrored though nobody has forbidden it."""
    if training is None or training.augment == "none" or training.flip or not facts.flip:
        return ()
    what = "tiny images unlike photographs, digits perhaps, are not mirrored in the training"
    return (f"{what}: if a mirrored one keeps its class, --set train.flip=true",)


def _like_signs(facts: Facts) -> bool:
    """Whether the images may be digits, letters or the like, of which a mirror makes others."""
    return facts.short_side < TINY and facts.similarity == "far"


def _input_size(facts: Facts) -> int:
    """The side of the input: a little over twice that of tiny images, else at most `TRAINED`."""
    if facts.short_side < TINY:
        return min(facts.input_size, max(TINY, 32 * round(facts.short_side * 2.25 / 32)))
    return min(facts.input_size, TRAINED)


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
        few_words = f"{small} of {len(counts)} classes have {FEW} to {ENOUGH - 1} images"
        advice.append(f"{few_words}: collect for them, too; {ENOUGH} each are worth having")
    largest, smallest = max(counts.values()), min(counts.values())
    if smallest and largest >= 5 * smallest:
        times = f"the largest class has {largest / smallest:.0f} times the images of the smallest"
        advice.append(f"{times}: judge by balanced accuracy, and collect for the small ones")
    return tuple(advice)


def schedule_line(asked: Mapping[str, Any]) -> str:
    """The learning rate over a training, drawn in a line. What `asked` (training values, None: not
    said) leaves open is the policy's."""
    words = {name: asked[name] for name in ("schedule", "warmup") if asked.get(name) is not None}
    training = Training((), **{"warmup": WARMUP, **words})
    who = "as the recipe says" if words else "as the policy plans"
    shape = f"{training.schedule}, {training.warmup:.0%} warm-up"
    return f"learning rate  {schedules.drawn(training)}  {shape}, {who}"


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
