"""The page of a search: its trials in the plane of two values, what a grid of as many would have
seen, and the verdicts in words."""

from __future__ import annotations

import math
from importlib import resources
from typing import Any

from finetune.evaluation.search import Found, Range, Tried, in_words

SIDE = 300  # units of the picture, the plane's side
RADII = (3.0, 8.0)  # of the worst and the best trial


def render(found: Found, title: str) -> str:
    """The page as HTML, without external files."""
    from jinja2 import Environment, StrictUndefined

    template = resources.files("finetune.report").joinpath("search.html").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    first = next(iter(found.ranges.values()))
    own = [one for one in found.tried if one.round == next(iter(found.ranges))]
    return environment.from_string(template).render(
        title=title,
        found=found,
        checks=found.checks(),
        best=in_words(found.best),
        names=[one.name for one in first],
        side=SIDE,
        plane=plane(first, own, found.best) if own else None,
        rows=[_row(one, found) for one in sorted(found.tried, key=_order(found))],
    )


def plane(ranges: tuple[Range, ...], tried: list[Tried], best: Tried) -> dict[str, Any]:
    """Places of the trials in the plane of the first two values (of one: along a line), as an SVG
    has them; and of a grid with as many points."""
    across = ranges[0]
    up = ranges[1] if len(ranges) > 1 else None
    losses = [one.log_loss for one in tried]
    low, high = min(losses), max(losses)

    def place(one: Tried) -> dict[str, float]:
        worth = 1.0 if high == low else (high - one.log_loss) / (high - low)
        return {
            "x": round(SIDE * across.share(one.values[across.name]), 1),
            "y": round(SIDE * (1 - up.share(one.values[up.name])), 1) if up else SIDE / 2,
            "r": round(RADII[0] + worth**3 * (RADII[1] - RADII[0]), 1),
            "worth": round(0.25 + 0.75 * worth**3, 2),
            "loss": one.log_loss,
            "best": one.number == best.number,
        }

    count = max(1, math.isqrt(len(tried))) if up else len(tried)
    steps = [round(SIDE * (k + 0.5) / count, 1) for k in range(count)]
    return {
        "across": across.name,
        "up": up.name if up else "",
        "ends": [f"{value:.0e}" if across.log else f"{value:g}" for value in _ends(across)],
        "heights": [f"{value:.0e}" if up.log else f"{value:g}" for value in _ends(up)]
        if up
        else [],
        "points": [place(one) for one in tried],
        "grid": [(x, y) for x in steps for y in (steps if up else [SIDE / 2])],
        "steps": steps,
        "count": count,
    }


def _ends(one: Range) -> tuple[float, float]:
    return one.low, one.high


def _order(found: Found) -> Any:
    rounds = {name: -k for k, name in enumerate(found.ranges)}
    return lambda one: (rounds[one.round], one.log_loss)


def _row(one: Tried, found: Found) -> dict[str, Any]:
    return {
        "one": one,
        "best": one.number == found.best.number,
        "near": one.number in found.near,
        "values": [f"{value:.3g}" for value in one.values.values()],
    }
