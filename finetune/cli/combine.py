"""Commands that make something of finished runs: ensemble, forgetting."""

from __future__ import annotations

from pathlib import Path

import click

from finetune import console
from finetune.cli.options import as_json, print_json, say, waiting


@click.command(cls=console.Command)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN RUN…")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="folder of the new run",
)
@click.option(
    "--weights",
    type=click.Choice(["equal", "learned", "greedy"]),
    default="equal",
    help="how much each run counts; learned and greedy ask the images that chose the runs, never "
    "test images [equal]",
)
@click.option(
    "--data",
    metavar="DATA",
    help="judge on these labelled images instead of the runs' own test images",
)
@click.option("--force", is_flag=True, help="make it again where it is made already")
@waiting
@as_json
def ensemble(
    runs: tuple[Path, ...],
    out: Path,
    weights: str,
    data: str | None,
    force: bool,
    wait: float,
    json_: bool,
) -> None:
    """Average finished runs into one, and judge it beside each of them.

    The runs may have different backbones, and be SVMs, fine-tuned models or averages; they must
    know the same classes and have the same test images. The new run holds copies of its members and
    is used like any other.

    \b
    Example:
      finetune ensemble runs/photos-lite0 runs/photos-lite2 --out runs/both
    """
    from finetune.lock import Wait
    from finetune.report import ensembles as home

    result = home.average(
        runs,
        out,
        weights=weights,
        data=data,
        force=force,
        wait=Wait(wait, say),
        say=say,
        bar=console.progress,
    )
    if json_:
        print_json(result)
    else:
        click.echo(home.text(result))
