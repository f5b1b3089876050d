"""Commands on images before a run: check, extract, cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from finetune import console, names
from finetune.cli.options import (
    as_json,
    at_fault,
    columns,
    layout,
    network,
    print_json,
    say,
    unheard,
)


@click.command(cls=console.Command)
@click.argument("data")
@unheard
@network
@at_fault
@click.option(
    "--taps",
    default="pooled",
    show_default=True,
    metavar="TAP[,TAP]",
    help="taps to read, as in pooled,stage6/3x3,fc7",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help=".npz file with X, y, paths and classes; or .parquet",
)
def extract(data: str, output: Path, **given: Any) -> None:
    """Extract features of images, with a manifest of what made them.

    \b
    Example:
      finetune extract photos/ --taps pooled -o features.npz
    """
    from finetune import job

    click.echo(job.extract(data, output, say=say, bar=console.progress, **given))


@click.command(cls=console.Command)
@click.argument("data")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    help="random seed of the split that is checked [0]",
)
@click.option(
    "--labels",
    is_flag=True,
    help="list the images whose label a model doubts that had not seen them",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="with --labels: write them to this page, and to a CSV table to correct beside it",
)
@columns
@as_json
def check(
    data: str, seed: int, labels: bool, output: Path | None, json_: bool, **given: Any
) -> None:
    """Check the images for unreadable files, duplicates, leakage and imbalance.

    With --labels, also look for wrong labels: confident learning on out-of-fold probabilities of
    the SVM. Correct the column `corrected` of the table that -o writes beside its page, and give it
    to `finetune fit --labels`.

    \b
    Example:
      finetune check photos/
      finetune check photos/ --labels -o suspects.html
    """
    from finetune.data import checks as home

    if output is not None and not labels:
        raise click.UsageError("-o is for --labels")
    if output is not None and output.suffix.lower() not in (".html", ".htm"):
        raise click.UsageError(f"-o {output}: the page is HTML, as in suspects.html")
    with console.progress("check") as progress:
        found = home.check_data(data, seed=seed, layout=layout(given), progress=progress)
    if not json_:
        click.echo(found.to_text())
    doubts = None
    if labels:
        from finetune.report import suspects

        doubts = suspects.examine(
            data, seed=seed, layout=layout(given), say=say, bar=console.progress
        )
    if json_:
        told = {"labels": suspects.to_json(doubts)} if doubts else {}
        print_json({**found.to_json(), **told})
    elif doubts:
        click.echo(suspects.to_text(doubts))
    if doubts and output:
        for path in suspects.write(doubts, output):
            click.echo(f"written to {names.shown(path)}", err=json_)
    if found.faults:
        raise SystemExit(1)


@click.command(cls=console.Command)
@click.option(
    "--prune",
    type=click.FloatRange(min=0),
    metavar="DAYS",
    help="delete features and networks that were not used for DAYS days",
)
@click.option(
    "--clear", is_flag=True, help="delete the whole cache; everything in it can be made again"
)
@click.option(
    "--forget-timings",
    is_flag=True,
    help="forget which engine and precision is fastest: they are timed again",
)
@as_json
def cache(prune: float | None, clear: bool, forget_timings: bool, json_: bool) -> None:
    """Show what the cache holds, where, and how fast networks run here; prune or clear it.

    \b
    Example:
      finetune cache --prune 30
    """
    from finetune import timings
    from finetune.features import store

    if clear + (prune is not None) + forget_timings > 1:
        raise click.UsageError(
            "--clear deletes all of it, --prune and --forget-timings a part: give one of them"
        )
    if forget_timings:
        count = timings.forget()
        print_json({"forgotten": count}) if json_ else click.echo(f"{count} timings forgotten")
    elif clear or prune is not None:
        freed = store.clear() if prune is None else store.prune(prune)
        print_json({"freed": freed}) if json_ else click.echo(f"{freed / 1e6:.0f} MB freed")
    elif json_:
        found = store.overview()
        print_json({**found, "folder": names.shown(found["folder"])})
    else:
        click.echo(store.overview_text())


@click.command(cls=console.Command)
@click.option("--no-speed", is_flag=True, help="do not run the engines")
@as_json
def doctor(no_speed: bool, json_: bool) -> None:
    """Describe this machine for a bug report: versions, processor, engines and their speed, cache,
    weights.

    \b
    Example:
      finetune doctor
    """
    from finetune.report import doctor as home

    found = home.examine(speed=not no_speed)
    print_json(found) if json_ else click.echo(home.text(found))
