"""A profile as text, CSV and JSON. Every total says whether it is multiply-adds or FLOPs."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable
from typing import Any

from finetune.backbones.profile import PASSES, Layer, Profile

BAR = 24  # characters of a bar for the whole
ADAMW = 16  # bytes of a trained parameter: its value, its gradient, and two averages
COUNTED = "convolutions, linear layers and attention products"
MEASURES: tuple[tuple[str, Callable[[Layer], float]], ...] = (
    ("output memory", lambda layer: layer.output_bytes),
    ("parameters", lambda layer: layer.parameters),
    ("multiply-adds", lambda layer: layer.multiply_adds),
    ("milliseconds", lambda layer: layer.milliseconds or 0.0),
)


def to_json(found: Profile) -> dict[str, Any]:
    """Everything in plain data; bytes are for one image in float32."""
    return {
        "model": found.name,
        "input": [3, found.size, found.size],
        "multiply_adds": found.multiply_adds,
        "flops": found.flops,
        "parameters": found.parameters,
        "parameter_bytes": 4 * found.parameters,
        "inference_peak_bytes": found.peak_bytes,
        "inference_peak_at": found.peak_at,
        "training_kept_bytes": found.kept_bytes,
        "milliseconds": found.milliseconds,
        "counted": COUNTED,
        "not_counted": list(found.uncounted),
        "shares": _shares(found),
        "layers": [dataclasses.asdict(layer) for layer in found.layers],
    }


def to_csv(found: Profile) -> str:
    """A row per layer, and one of totals; KiB, parameters and multiply-adds as exact numbers."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    timed = found.milliseconds is not None
    table.writerow(
        (
            *("name", "kind", "stage", "kernel", "stride", "padding", "output", "output_kib"),
            *("parameters", "multiply_adds", "flops"),
            *(("milliseconds",) if timed else ()),
        )
    )
    for one in found.layers:
        table.writerow(
            (
                *(one.name, one.kind, one.stage, one.kernel, one.stride, one.padding),
                *(_shape(one.output), one.output_bytes / 1024),
                *(one.parameters, one.multiply_adds, 2 * one.multiply_adds),
                *((one.milliseconds,) if timed else ()),
            )
        )
    total = sum(one.output_bytes for one in found.layers) / 1024
    table.writerow(
        (
            *("total", "", "", "", "", "", "", total),
            *(found.parameters, found.multiply_adds, found.flops),
            *((found.milliseconds,) if timed else ()),
        )
    )
    return text.getvalue()


def to_text(found: Profile) -> str:
    """The table, its totals, where they concentrate, and what of memory the network takes."""
    head = (
        f"{found.name}: one image of {found.size} × {found.size} pixels, float32 "
        "(4 bytes per number)"
    )
    return "\n\n".join([head, _table(found), _totals(found), _bars(found), _memory(found)])


def _shape(output: tuple[int, ...]) -> str:
    return "×".join(map(str, output))


def _table(found: Profile) -> str:
    timed = found.milliseconds is not None
    head = ["layer", "kind", "kernel", "stride", "pad", "output"]
    head += ["KiB", "parameters", "multiply-adds", *(["ms"] if timed else [])]
    rows = [head]
    for one in found.layers:
        row = [one.name, one.kind, one.kernel, one.stride, one.padding, _shape(one.output)]
        row += [f"{one.output_bytes / 1024:,.1f}", f"{one.parameters:,}", f"{one.multiply_adds:,}"]
        rows.append(row + ([f"{one.milliseconds:.3f}"] if timed else []))
    total = sum(one.output_bytes for one in found.layers) / 1024
    last = ["total", "", "", "", "", "", f"{total:,.1f}", f"{found.parameters:,}"]
    last += [f"{found.multiply_adds:,}", *([f"{found.milliseconds:.3f}"] if timed else [])]
    rows.append(last)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at < 6 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _totals(found: Profile) -> str:
    lines = [
        f"{amount(found.multiply_adds)} multiply-adds = {amount(found.flops)} FLOPs "
        f"(a multiply-add is two operations): {COUNTED}",
        f"not counted: {', '.join(found.uncounted) or 'nothing'}",
    ]
    if found.milliseconds:
        speed = found.flops / found.milliseconds / 1e6
        between = found.milliseconds - sum(one.milliseconds or 0 for one in found.layers)
        lines.append(
            f"{found.milliseconds:.1f} ms per image in torch on this machine (medians of {PASSES} "
            f"passes), {max(between, 0):.1f} of them between the layers: "
            f"{speed:.1f} billion FLOPs per second"
        )
    return "\n".join(lines)


def _shares(found: Profile) -> dict[str, dict[str, float]]:
    """The share of each stage in each total that is not zero."""
    order = list(dict.fromkeys(one.stage for one in sorted(found.layers, key=_rank)))
    shares: dict[str, dict[str, float]] = {}
    for word, value in MEASURES:
        if total := sum(map(value, found.layers)):
            shares[word] = {
                stage: sum(value(one) for one in found.layers if one.stage == stage) / total
                for stage in order
            }
    return shares


def _rank(layer: Layer) -> tuple[int, int]:
    """From stem to classifier."""
    numbered = layer.stage.startswith("stage")
    fixed = {"stem": 0, "neck": 2, "classifier": 3}
    return fixed.get(layer.stage, 1), int(layer.stage.removeprefix("stage")) if numbered else 0


def _bars(found: Profile) -> str:
    blocks = []
    values = dict(MEASURES)
    for word, shares in _shares(found).items():
        most = max(found.layers, key=values[word])
        share = values[word](most) / sum(map(values[word], found.layers))
        lines = [f"{word}: most in {most.name} ({most.kind}), {share:.0%}"]
        lines += [
            f"  {stage:<11}{'█' * round(BAR * part):<{BAR}} {part:6.1%}"
            for stage, part in shares.items()
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _memory(found: Profile) -> str:
    weights = 4 * found.parameters
    return "\n".join(
        [
            f"inference: {_mb(weights)} of parameters, and at most {_mb(found.peak_bytes)} of "
            f"activations per image, in {found.peak_at}",
            f"training all stages: {_mb(ADAMW * found.parameters)} of parameters, gradients and "
            f"AdamW's averages, and {_mb(found.kept_bytes)} of activations kept per image",
        ]
    )


def _mb(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def amount(count: float) -> str:
    """`723.5 million`, `15.47 billion`: the field's M and G."""
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
