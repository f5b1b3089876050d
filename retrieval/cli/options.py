"""Options that several commands share, and how results are printed. Nothing heavy is imported
here."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune.names import shown

if TYPE_CHECKING:
    from finetune.data.images import Fault
    from finetune.lock import Wait
    from retrieval.storage.commit import ChangeSummary

SHOWN = 20  # lines about unreadable files: a screen is not filled with ten thousand


def _wait(seconds: float) -> Wait:
    from finetune.lock import Wait

    return Wait(seconds, functools.partial(click.echo, err=True))


a_path = click.Path(path_type=Path)
a_gallery = click.argument("folder", metavar="GALLERY", type=a_path)
as_json = click.option("--json", "json_", is_flag=True, help="print one JSON value instead of text")
bad_images = click.option(
    "--on-bad-image",
    "on_bad",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    help="what to do with unreadable images [stop]",
)
waiting = click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="SECONDS",
    help="wait for another process that changes the gallery [0]",
    callback=lambda _context, _option, seconds: _wait(seconds),
)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def warn(warnings: Sequence[str]) -> None:
    for text in warnings:
        click.echo(f"warning: {text}", err=True)


def say_faults(faults: Sequence[Fault]) -> None:
    for fault in faults:
        click.echo(f"left out: {fault.to_text()}", err=True)


def print_change(change: ChangeSummary, folder: Path, json_: bool) -> None:
    say_faults(change.faults[:SHOWN])
    if len(change.faults) > SHOWN:
        click.echo(f"left out: {len(change.faults) - SHOWN} more; --json lists them all", err=True)
    warn(change.notes)
    if json_:
        print_json(change.to_json())
        return
    click.echo(f"{shown(folder)}: {change.to_text()}")
