"""What a comparison of backbones says: verdicts, as text and as JSON."""

from __future__ import annotations

from typing import Any

from finetune.check import Check
from finetune.evaluation.backbone_comparison import Comparison
from finetune.metrics import Paired

SOURCE = (
    "the README of EfficientNet-Lite, github.com/tensorflow/tpu"  # of ImageNet's top-1 accuracies
)
ENOUGH = 8  # networks, below which an order of theirs does not tell which score foretells it


def checks(found: Comparison) -> list[Check]:
    """What can be said of the comparison, in words."""
    said = [_best(found), _take(found), _lead(found), _judged(found), _ranking(found)]
    return [check for check in (*said, *_odd(found)) if check is not None]


def to_json(found: Comparison) -> dict[str, Any]:
    return {
        "n": found.n,
        "backbones": [row.to_json() for row in found.rows],
        "failed": found.failed,
        "budget": vars(found.budget),
        "best": found.best.name if found.best else None,
        "take": found.taken.name if found.taken else None,
        "within_one_standard_error": list(found.near),
        "behind_the_best": {name: gap.to_json() for name, gap in found.gaps.items()},
        "front": [row.name for row in found.front],
        "test": found.test.to_json() if found.test else None,
        "imagenet_source": SOURCE,
        "checks": [check.to_json() for check in checks(found)],
    }


def to_text(found: Comparison) -> str:
    """The table and the verdicts for a terminal."""
    wide = max(len(name) for name in (*(row.name for row in found.rows), *found.failed))
    lines = [
        f"{'backbone':<{wide}}  SVM out of fold  neighbours  images/s  parameters  multiply-adds  "
        "ImageNet"
    ]
    for row in found.rows:
        knn = "–" if row.knn is None else f"{row.knn:.1%}"
        top1 = "–" if row.imagenet is None else f"{row.imagenet:.1%}"
        lines.append(
            f"{row.name:<{wide}}  {f'{row.accuracy:.1%} ± {row.error:.1%}':>15}  {knn:>10}  "
            f"{row.images_per_second:>8.0f}  {row.parameters / 1e6:>8.1f} M  "
            f"{row.multiply_adds / 1e6:>11.0f} M  {top1:>8}{' random' * row.is_random}"
        )
    lines += [f"{name:<{wide}}  left out: {reason}" for name, reason in found.failed.items()]
    if any(row.imagenet is not None for row in found.rows):
        lines.append(f"(ImageNet: top-1, published in {SOURCE})")
    return "\n".join([*lines, "", *(check.to_text() for check in checks(found))])


def _best(found: Comparison) -> Check:
    best = found.best
    if best is None:
        least = min(found.rows, key=lambda row: row.milliseconds)
        small = min(found.rows, key=lambda row: row.parameters)
        return Check(
            "best",
            "fail",
            f"no network within {found.budget}",
            f"the fastest, {least.name}, takes {least.milliseconds:.3g} ms; the smallest, "
            f"{small.name}, has {small.parameters / 1e6:.3g} million parameters",
            "allow more, or name other networks with --backbones",
        )
    value = f"{best.name}, {best.accuracy:.1%} ± {best.error:.1%} out of fold, n = {found.n}"
    within = f" within {found.budget}" if found.budget.is_set else ""
    return Check(
        "best",
        "pass",
        value,
        f"the highest accuracy{within}; being that of a winner, it is a little flattered",
    )


def _take(found: Comparison) -> Check | None:
    best, taken = found.best, found.taken
    if best is None or taken is None:
        return None
    fit = f"finetune fit DATA --backbone {taken.name}"
    if taken is best:
        return Check(
            "take", "pass", taken.name, "no cheaper one comes within one paired standard error", fit
        )
    saved = best.multiply_adds / max(1, taken.multiply_adds)
    meaning = (
        f"the cheapest within one paired standard error of {best.name}: "
        f"{saved:.1f} times fewer multiply-adds"
    )
    return Check("take", "pass", f"{taken.name}, {_gap(found.gaps[taken.name])}", meaning, fit)


def _lead(found: Comparison) -> Check | None:
    if found.best is None:
        return None
    if not found.gaps:
        return Check("lead", "skip", "one network", "there is nothing to compare it with")
    values = "; ".join(f"{name} {_gap(gap)}" for name, gap in found.gaps.items())
    if open_ := [name for name, gap in found.gaps.items() if gap.difference.low <= 0]:
        return Check(
            "lead",
            "warn",
            values,
            f"{found.best.name} is not shown to be better than {', '.join(open_)}: on other images "
            "the order may be another",
            "let cost decide between them, or label more images",
        )
    return Check("lead", "pass", values, f"{found.best.name} is ahead of each of the others")


def _gap(gap: Paired) -> str:
    """How far behind the best, in percentage points."""
    one = gap.difference
    return (
        f"behind by {100 * one.value:.1f} ± {100 * gap.standard_error:.1f} points "
        f"(95 %: {100 * one.low:.1f} to {100 * one.high:.1f})"
    )


def _judged(found: Comparison) -> Check | None:
    if found.taken is None:
        return None
    if found.test is None:
        return Check("test", "skip", "no test images", "nothing but cross-validation judges")
    one = found.test
    value = f"{found.taken.name}, {one.value:.1%} ({one.low:.1%}–{one.high:.1%}, n = {one.n})"
    return Check("test", "pass", value, "the one to take, judged once; no other saw the test part")


def _ranking(found: Comparison) -> Check | None:
    count = len(found.rows)
    if count >= ENOUGH:
        return None
    return Check(
        "ranking",
        "skip",
        f"{count} network{'s' * (count != 1)}",
        f"fewer than {ENOUGH} do not tell which score (neighbours, cross-validation, ImageNet's) "
        "ranks networks best",
    )


def _odd(found: Comparison) -> list[Check]:
    said = []
    if any(row.is_random for row in found.rows):
        said.append(
            Check(
                "weights",
                "warn",
                "random",
                "networks without pretraining say nothing about the trained ones",
                "leave out --weights random",
            )
        )
    if found.failed:
        value = "; ".join(f"{name}: {reason}" for name, reason in found.failed.items())
        meaning = "they could not be compared"
        said.append(Check("left out", "warn", value, meaning, "`finetune backbones` lists some"))
    return said
