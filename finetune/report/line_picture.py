"""The line between old and new weights, drawn as one SVG file that needs nothing else."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from html import escape

from finetune.combining.weight_line import INTERPOLATED, REESTIMATED, Point
from finetune.report.render import ticks

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 72, 56  # margins in pixels; names stand to the right
STYLE = """
text { font: 13px system-ui, "DejaVu Sans", sans-serif; fill: #1c2024; }
.small { font-size: 12px; fill: #5c636b; } .title { font-size: 15px; font-weight: 600; }
.grid { stroke: #e3e0d8; } .chosen { stroke: #5c636b; stroke-dasharray: 4 4; }
polyline { fill: none; stroke-width: 2.5; stroke-linejoin: round; stroke-linecap: round; }
.accuracy { stroke: #1d6b50; fill: #1d6b50; } .retention { stroke: #b4622b; fill: #b4622b; }
polyline.re-estimated { stroke-dasharray: 2 6; }
circle.re-estimated { fill: #fbfaf7; stroke-width: 2; }
text.accuracy, text.retention { stroke: none; font-weight: 600; }
"""

Place = Callable[[float], float]


def draw(points: Sequence[Point], chosen: Point | None, accuracy: str, retention: str) -> str:
    """The line as SVG text: `accuracy` and `retention` say in words what is drawn."""
    values = [p.accuracy.value for p in points] + [
        p.retention.value for p in points if p.retention is not None
    ]
    low, high = max(0.0, min(values) - 0.03), min(1.0, max(values) + 0.03)

    def across(alpha: float) -> float:
        return round(LEFT + alpha * (WIDTH - LEFT - RIGHT), 1)

    def down(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{escape(_words(points))}">',
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fbfaf7"/>',
        f'<text class="title" x="{LEFT}" y="22">From the old weights to the new ones</text>',
        f'<text class="small" x="{LEFT}" y="41">solid: BatchNorm interpolated; dotted: '
        f"re-estimated</text>",
        *_axes(across, down, low, high),
    ]
    if chosen is not None:
        x = across(chosen.alpha)
        parts.append(f'<line class="chosen" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    ends: list[tuple[float, str, str, str]] = []
    for kind, words in (("accuracy", accuracy), ("retention", retention)):
        for norms in (INTERPOLATED, REESTIMATED):
            found = [(p.alpha, _value(p, kind)) for p in points if p.norms == norms]
            places = [(across(a), down(v)) for a, v in found if v is not None]
            if places:
                parts += _curve(places, kind, norms)
            if places and norms == INTERPOLATED:
                ends.append((places[-1][1], kind, kind, words))
    parts += _names(ends, across(1.0) + 12)
    if chosen is not None:
        parts.append(
            f'<text class="small" x="{across(chosen.alpha)}" y="{TOP - 4}" '
            f'text-anchor="middle">chosen</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def _value(point: Point, kind: str) -> float | None:
    if kind == "accuracy":
        return point.accuracy.value
    return None if point.retention is None else point.retention.value


def _axes(across: Place, down: Place, low: float, high: float) -> list[str]:
    parts = []
    for value in ticks(low, high, 5):
        y = down(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{across(1)}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="small" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">'
            f"{100 * value:.0f}%</text>"
        )
    foot = HEIGHT - BOTTOM + 18
    parts += [
        f'<text class="small" x="{across(a)}" y="{foot}" text-anchor="middle">{a:g}</text>'
        for a in (0, 0.2, 0.4, 0.6, 0.8, 1)
    ]
    parts.append(
        f'<text class="small" x="{across(0.5)}" y="{foot + 22}" text-anchor="middle">'
        f"share of the new weights</text>"
    )
    return parts


def _curve(places: Sequence[tuple[float, float]], kind: str, norms: str) -> list[str]:
    line = " ".join(f"{x},{y}" for x, y in places)
    dots = [f'<circle class="{kind} {norms}" cx="{x}" cy="{y}" r="3.5"/>' for x, y in places]
    return [f'<polyline class="{kind} {norms}" style="fill:none" points="{line}"/>', *dots]


def _names(ends: Sequence[tuple[float, str, str, str]], x: float) -> list[str]:
    """The name of each curve beside its end, never over another."""
    parts, last = [], -100.0
    for y, kind, name, words in sorted((min(end[0], HEIGHT - 76), *end[1:]) for end in ends):
        y = max(y, last + 82)
        last = y
        parts.append(f'<text class="{kind}" x="{x}" y="{y + 4:.1f}">{name}</text>')
        for i, line in enumerate(_wrapped(words), 1):
            parts.append(
                f'<text class="small" x="{x}" y="{y + 4 + 15 * i:.1f}">{escape(line)}</text>'
            )
    return parts


def _wrapped(words: str, width: int = 26, most: int = 4) -> list[str]:
    """The words in lines; what does not fit is cut."""
    lines = textwrap.wrap(words, width)
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1][: width - 1]}…"]
    return lines


def _words(points: Sequence[Point]) -> str:
    """The same for those who do not see it."""
    said = []
    for point in points:
        kept = "" if point.retention is None else f", retention {point.retention.value:.1%}"
        said.append(f"{point.alpha:.1f} {point.norms}: accuracy {point.accuracy.value:.1%}{kept}")
    return "; ".join(said)
