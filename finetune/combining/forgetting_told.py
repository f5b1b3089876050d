"""What a study of forgetting found: its verdicts, its tables, and both in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.check import Check, Status
from finetune.classifier import Classifier
from finetune.combining.weight_line import INTERPOLATED, Point
from finetune.metrics import Estimate, Paired

Ints = NDArray[np.int64]

SAME = 0.95  # agreement with the original, and CKA, from which little is changed
REFIT = (
    "fit with --set policy.refit=false, which keeps them unseen; or give other labelled images: "
    "--data FOLDER"
)


@dataclass(frozen=True)
class Drift:
    """How far one stage went: `weights` is ‖new − old‖ / ‖old‖, `alike` the linear CKA of its
    output before and after on the images that `on` names (None where it cannot be read)."""

    stage: str
    moved: bool
    weights: float
    alike: float | None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Study:
    """What was found of one run. `agreement` is with the original network on `on`; `line` is empty
    where nothing moved; `chosen` is None where no held-out image could choose. `place` gives the
    classifier of a point."""

    run: str
    checks: tuple[Check, ...]
    drift: tuple[Drift, ...] = ()
    on: str = ""
    agreement: Estimate | None = None
    source: tuple[Estimate, Estimate] | None = None  # accuracy of the original, and of the run
    line: tuple[Point, ...] = ()
    retains: str = ""
    chosen_on: str = ""
    chosen: Point | None = None
    labels: Ints = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    names: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    place: Callable[[Point], Classifier] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "checks": [check.to_json() for check in self.checks],
            "on": self.on,
            "agreement": self.agreement.to_json() if self.agreement else None,
            "source_accuracy": [one.to_json() for one in self.source] if self.source else None,
            "drift": [one.to_json() for one in self.drift],
            "retention_is": self.retains,
            "chosen_on": self.chosen_on,
            "line": [point.to_json() for point in self.line],
            "chosen": self.chosen.to_json() if self.chosen else None,
        }


def unmoved(same: bool) -> Check:
    """The verdict on a run of which nothing was fine-tuned; `same`: its trunk is the pretrained one
    that loads here, to the last bit."""
    if same:
        return Check(
            "forgetting",
            "pass",
            "the trunk is the pretrained one, to the last bit",
            "Nothing was fine-tuned: nothing moved, and nothing is forgotten.",
        )
    return Check(
        "forgetting",
        "skip",
        "nothing was fine-tuned, and the trunk is not the pretrained network that loads here",
        "The run keeps the weights that it was fitted on; what loads here now has others, so that "
        "the two cannot be compared.",
        "give the weights that the run was fitted on (recipe.yaml names them)",
    )


def of_agreement(
    unknown: str,
    agreement: Estimate | None,
    source: tuple[Estimate, Estimate] | None,
    on: str,
    own: bool,
) -> Check:
    """The verdict on what the old classifier says; `unknown` is why there is none, `own`: it was
    asked on the user's own images."""
    name = "change of behaviour" if own else "forgetting"
    if agreement is None:
        return Check(name, "skip", unknown, "What it knew before cannot be asked.")
    value = (
        f"the old classifier on the new trunk says what it said before on {_range(agreement)} of "
        f"{agreement.n} {on.removeprefix('of ')}"
    )
    if source is not None:
        value += f"; right before on {source[0].value:.1%}, now on {_range(source[1])}"
    status: Status = "pass" if agreement.value >= SAME else "warn"
    if own:
        meaning = (
            "This is a change of behaviour on your images, and not forgetting: what the network "
            "still knows of other things cannot be seen on them."
        )
        return Check(
            name,
            status,
            value,
            meaning,
            "give images of what it was pretrained for: --reference FOLDER",
        )
    if status == "pass":
        return Check(name, status, value, "Little of what it knew on these images is lost.")
    meaning = (
        f"It says something else on {1 - agreement.value:.0%} of them: what it knew there is not "
        f"to be relied on any more."
    )
    action = "choose a point nearer to the old weights (below), or train fewer stages"
    return Check(name, status, value, meaning, action)


def of_drift(drift: Sequence[Drift], on: str) -> Check:
    """The verdict on the stage whose output changed most, on the images `on`."""
    went = [(one.alike, one) for one in drift if one.moved and one.alike is not None]
    if not went:
        return Check("drift", "skip", "no stage that moved can be read", "")
    alike, far = min(went, key=lambda pair: pair[0])
    still = sum(not one.moved for one in drift)
    return Check(
        "drift",
        "pass" if alike >= SAME else "warn",
        f"{far.stage} went furthest: CKA {alike:.3f} on {on}, weights changed by {far.weights:.2%}",
        f"1 is unchanged up to rotation and scale; {still} of {len(drift)} stages did not move by "
        f"a bit.",
    )


def of_line(points: Sequence[Point], chosen: Point | None, pair: Paired | None, on: str) -> Check:
    """The verdict on the line: the chosen point beside the run itself, `pair`, on the images
    `on`."""
    new = next(p for p in points if p.alpha == 1 and p.norms == INTERPOLATED)
    if chosen is None or pair is None:
        return Check(
            "line",
            "skip",
            f"the run: {new.accuracy.value:.1%} on {on}{_kept(new)}",
            "It was fitted again on the images that chose it: accuracy on them flatters every "
            "point, so that none is chosen.",
            REFIT,
        )
    value = (
        f"chosen at {chosen.alpha:.1f} of the new weights, BatchNorm {chosen.norms}: "
        f"{_range(chosen.accuracy)} on {on}{_kept(chosen)}; the run itself "
        f"{new.accuracy.value:.1%}{_kept(new)}"
    )
    if chosen is new:
        return Check(
            "line", "pass", value, "No point between old and new weights is better than the run."
        )
    lead, error = 100 * pair.difference.value, 100 * pair.standard_error
    meaning = f"{lead:+.1f} points against the run (one paired standard error is {error:.1f})"
    if lead <= error and chosen.retention and new.retention:
        more = 100 * (chosen.retention.value - new.retention.value)
        meaning += f": accuracy does not tell the two apart, but it retains {more:.1f} points more"
    meaning += "."
    action = "--save DIR writes this point as a run, judged on the test images"
    return Check("line", "pass", value, meaning, action)


def _kept(point: Point) -> str:
    return "" if point.retention is None else f", retains {point.retention.value:.1%}"


def _range(found: Estimate) -> str:
    return f"{found.value:.1%} ({found.low:.1%}–{found.high:.1%})"


def text(found: Study) -> str:
    """The study for a person: verdicts, the stages, the line."""
    parts = [check.to_text() for check in found.checks]
    if found.drift:
        rows = [("stage", "weights", "CKA")]
        rows += [
            (
                one.stage,
                f"{one.weights:.2%}" if one.moved else "unmoved",
                "–" if one.alike is None else f"{one.alike:.3f}",
            )
            for one in found.drift
        ]
        parts += ["", *_columns(rows)]
    if found.line:
        parts += ["", *_columns(_line_rows(found))]
        parts += [f"accuracy on {found.chosen_on}; retention: {found.retains}"]
    return "\n".join(parts)


def _line_rows(found: Study) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("new", "BatchNorm", "accuracy", "log loss", "retention", "")]
    for point in found.line:
        kept = "–" if point.retention is None else f"{point.retention.value:.1%}"
        mark = "← chosen" if point is found.chosen else ""
        rows.append(
            (
                f"{point.alpha:.1f}",
                point.norms,
                f"{point.accuracy.value:.1%}",
                f"{point.log_loss:.3f}",
                kept,
                mark,
            )
        )
    return rows


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
