"""The command that gives a run to other programs: export."""

from __future__ import annotations

from pathlib import Path

import click

from finetune import console
from finetune.cli.options import as_json, print_json, say


@click.command(cls=console.Command)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["onnx", "openvino", "timm", "torch-export"]),
    required=True,
    help="format; timm holds one linear layer on pooled features, the others any run",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="folder to write [beside the run: RUN-FORMAT]",
)
@click.option(
    "--data",
    metavar="FOLDER",
    help="compare on the images in this folder instead of the run's own; labels are not needed",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=200,
    metavar="N",
    help="compare on at most N images [200]",
)
@click.option("--force", is_flag=True, help="replace an export that is in DIR")
@as_json
def export(
    run: Path,
    to: str,
    out: Path | None,
    data: str | None,
    limit: int,
    force: bool,
    json_: bool,
) -> None:
    """Write a run for programs that do not have Regraft: ONNX, OpenVINO, timm or torch.export.

    One graph goes from the prepared image to calibrated probabilities: network, taps, head,
    temperature, and the average of several models. Labels and preparation are inside; a README
    tells how good the model is and how to load it. The folder is there once its files were opened
    by their own program and said what the run says of real images.

    \b
    Example:
      finetune export runs/photos --to onnx
    """
    from finetune.export import exported as home

    result = home.export(
        run, to, out, data=data, most=limit, force=force, say=say, bar=console.progress
    )
    if json_:
        print_json(result)
    else:
        click.echo(home.text(result))
