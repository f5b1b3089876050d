"""Commands that make something of finished runs: ensemble, forgetting."""

from __future__ import annotations

from pathlib import Path

import click

from finetune import console
from finetune.cli.options import as_json, print_json, say, waiting


@click.command(cls=console.Command)
@click.argument(
    "runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN RUN…"
)
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
    "--soup",
    is_flag=True,
    help="average the weights of fine-tuned runs into one network, chosen on images that none was "
    "trained on",
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
    soup: bool,
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
    from finetune.report import derived
    from finetune.report import ensembles as home

    result = home.make(
        runs,
        out,
        soup=soup,
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
        click.echo(derived.text(result))


@click.command(cls=console.Command)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--reference",
    metavar="FOLDER",
    help="images of what the network was pretrained for; class folders named as n01440764 are "
    "ImageNet's classes",
)
@click.option(
    "--data",
    metavar="DATA",
    help="labelled images that the run never saw, to choose the point on the line by",
)
@click.option(
    "--limit",
    type=click.IntRange(min=2),
    default=500,
    metavar="N",
    help="use at most N images of each kind [500]",
)
@click.option(
    "--picture", type=click.Path(path_type=Path), metavar="FILE", help="draw the line as SVG"
)
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="write the chosen point on the line as a new run",
)
@click.option("--force", is_flag=True, help="replace the run in DIR")
@as_json
def forgetting(
    run: Path,
    reference: str | None,
    data: str | None,
    limit: int,
    picture: Path | None,
    save: Path | None,
    force: bool,
    json_: bool,
) -> None:
    """Measure what a fine-tuned run forgot of its pretraining.

    Compares the run with the network that it began as: what the old classifier still says, how far
    each stage drifted, and the line between old and new weights.

    \b
    Example:
      finetune forgetting runs/photos --reference imagenet-sample/
    """
    from finetune.report import weight_lines as home

    found = home.forgetting(
        run,
        reference=reference,
        data=data,
        limit=limit,
        picture=picture,
        save=save,
        force=force,
        say=say,
        bar=console.progress,
    )
    if json_:
        print_json(found)
    else:
        click.echo(found["text"])
