"""The page of a comparison of backbones: accuracy against multiply-adds, points as large as their
parameters, the Pareto front, a table and the verdicts in words."""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path
from typing import Any

from finetune import files
from finetune.errors import UserError
from finetune.evaluation.backbone_comparison import Comparison, Row
from finetune.report import backbones_told as told

WIDTH, HEIGHT = 620, 320  # units of the picture
LARGEST = 26.0  # radius of the network with the most parameters; areas go by parameters
MARGIN = 0.12  # of the range of values, left free at either end


def places(out: str | Path) -> tuple[Path, Path]:
    """The page and the JSON file that are written: in a folder, or beside `name.html`."""
    path = Path(out)
    if path.suffix.lower() == ".html":
        return path, path.with_suffix(".json")
    if path.suffix or path.is_file():
        raise UserError(
            "neither a folder nor a page", where=path, fix="name a folder, or a file NAME.html"
        )
    return path / "backbones.html", path / "backbones.json"


def write(found: Comparison, out: str | Path, title: str) -> Path:
    """Write the page and what it shows as JSON; returns the page's path."""
    page, data = places(out)
    page.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(data, told.to_json(found))
    files.write_text(page, render(found, title))
    return page


def render(found: Comparison, title: str) -> str:
    """The page as HTML, without external files."""
    from jinja2 import Environment, StrictUndefined

    template = resources.files("finetune.report").joinpath("backbones.html").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(
        title=title,
        found=found,
        checks=told.checks(found),
        picture=picture(found),
        source=told.SOURCE,
        published=any(row.imagenet is not None for row in found.rows),
    )


def picture(found: Comparison) -> dict[str, Any]:
    """Places of the networks as an SVG has them: across by the logarithm of the multiply-adds, up
    by accuracy, with one standard error either way."""
    costs = [math.log(max(1, row.multiply_adds)) for row in found.rows]
    ends = [row.accuracy + sign * row.error for row in found.rows for sign in (-1, 1)]
    left, right = _widened(min(costs), max(costs), 0.2)
    low, high = _widened(min(ends), max(ends), 0.004)
    most = max(row.parameters for row in found.rows)

    def up(value: float) -> float:
        return round(HEIGHT * (1 - (value - low) / (high - low)), 1)

    def place(row: Row, cost: float) -> dict[str, Any]:
        return {
            "row": row,
            "x": round(WIDTH * (cost - left) / (right - left), 1),
            "y": up(row.accuracy),
            "top": up(row.accuracy + row.error),
            "bottom": up(row.accuracy - row.error),
            "r": round(LARGEST * math.sqrt(row.parameters / max(1, most)), 1),
            "taken": row is found.taken,
            "best": row is found.best,
        }

    points = [place(row, cost) for row, cost in zip(found.rows, costs, strict=True)]
    step = next(s for s in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if high - low <= 7 * s)
    ticks = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "points": points,
        "front": " ".join(f"{p['x']},{p['y']}" for p in points if p["row"] in found.front),
        "ticks": [(up(value), f"{100 * value:.{1 if step < 0.01 else 0}f} %") for value in ticks],
    }


def _widened(low: float, high: float, least: float) -> tuple[float, float]:
    """The range with a margin; at least `least` either way."""
    room = max(least, MARGIN * (high - low))
    return low - room, high + room
