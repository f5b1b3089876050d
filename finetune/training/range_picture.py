"""The learning-rate range test as a picture: SVG that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from finetune.training.range_test import RangeTest

Floats = NDArray[np.float64]

WIDTH, LEFT, RIGHT = 760, 70, 20  # pixels
TOP, TALL, LOW, GAP = 66, 230, 110, 34  # the title, both panels, the space between them
HEIGHT = TOP + TALL + GAP + LOW + 48
INK, GREY, BLUE, RED, GREEN = "#222", "#bbb", "#1f5fa8", "#b3261e", "#1e7d34"


def page(test: RangeTest, title: str) -> str:
    """The picture as an HTML page of its own."""
    words = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{words}</title>\n'
        f'<body style="margin:2em;background:#fff">{svg(test, title)}</body></html>\n'
    )


def svg(test: RangeTest, title: str) -> str:
    """Loss (dots: each step; line: smoothed) above its derivative, both against the head's learning
    rate on a logarithmic axis. Lines mark the planned rate and the one of the lowest loss."""
    rates = test.rate * test.factors
    x = _Axis(math.log10(rates[0]), math.log10(rates[-1]), LEFT, WIDTH - RIGHT)
    top = float(np.quantile(test.losses, 0.95)) if len(test.losses) > 8 else test.losses.max()
    upper = _Axis(0.0, max(float(top), test.start) * 1.1, TOP + TALL, TOP)
    low = min(0.0, float(test.slope.min()))
    high = min(max(float(test.slope.max()), -low / 2), -3 * low if low < 0 else math.inf) or 1.0
    bottom = TOP + TALL + GAP
    lower = _Axis(low * 1.1, high * 1.1, bottom + LOW, bottom)
    logs = np.log10(rates)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(LEFT, 20, html.escape(title), size=15),
        *_grid(x, upper, lower, bottom),
        *(
            f'<circle cx="{x(a):.1f}" cy="{upper(b):.1f}" r="2.2" fill="{GREY}"/>'
            for a, b in zip(logs, test.losses, strict=True)
        ),
        _line(x, upper, logs, test.smooth, BLUE),
        _line(x, lower, logs, test.slope, BLUE),
        *_marks(test, x, bottom),
        _text(LEFT, TOP - 8, "loss: each step (dots), smoothed (line)"),
        _text(LEFT, bottom - 8, "change of the smoothed loss per tenfold rate (below 0: it falls)"),
        _text(
            (LEFT + WIDTH - RIGHT) / 2,
            HEIGHT - 8,
            "learning rate of the last group (the head); all others keep their ratio to it",
            more='text-anchor="middle"',
        ),
        "</svg>",
    ]
    return "\n".join(parts)


class _Axis:
    """From values to pixels; what lies beyond the ends is drawn at the end."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, max(high, low + 1e-9), start, end

    def __call__(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def _text(x: float, y: float, words: str, *, size: int = 12, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" {more}>{words}</text>'


def _line(x: _Axis, y: _Axis, a: Floats, b: Floats, colour: str) -> str:
    points = " ".join(f"{x(p):.1f},{y(q):.1f}" for p, q in zip(a, b, strict=True))
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'


def _grid(x: _Axis, upper: _Axis, lower: _Axis, bottom: float) -> Iterable[str]:
    """Both frames with ticks: whole decades across, round numbers upwards."""
    for k in range(math.ceil(x.low), math.floor(x.high) + 1):
        at = x(k)
        for y, end in ((TOP, TOP + TALL), (bottom, bottom + LOW)):
            yield f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y}" y2="{end}" stroke="#eee"/>'
        yield _text(at, bottom + LOW + 16, f"1e{k}", more='text-anchor="middle"')
    for axis in (upper, lower):
        for value in _ticks(axis.low, axis.high):
            at = axis(value)
            colour = GREY if value == 0 else "#eee"
            yield (
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" '
                f'stroke="{colour}"/>'
            )
            yield _text(LEFT - 6, at + 4, f"{value:g}", more='text-anchor="end"')


def _ticks(low: float, high: float) -> Sequence[float]:
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next((n for n in (1, 2, 5) if (high - low) / (n * step) <= 5), 10)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(k * step, 10) for k in range(first, last + 1)]


def _marks(test: RangeTest, x: _Axis, bottom: float) -> Iterable[str]:
    """Vertical lines with their names, side by side above the upper panel."""
    marks = [(1.0, f"planned {test.rate:.1e}", RED)]
    marks.append((test.lowest, f"lowest loss {test.rate * test.lowest:.1e}", GREEN))
    for k, (factor, words, colour) in enumerate(marks):
        rate = math.log10(test.rate * factor)
        if x.low - 1e-9 <= rate <= x.high + 1e-9:
            at = x(rate)
            yield (
                f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom + LOW}" '
                f'stroke="{colour}" stroke-dasharray="5 4" stroke-width="1.5"/>'
            )
        else:
            words += " (beyond)"
        place = WIDTH - RIGHT - 350 + 190 * k
        yield _text(place, TOP - 26, words, more=f'style="fill:{colour}"')
