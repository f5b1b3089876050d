"""Commands on networks: backbones, profile."""

from __future__ import annotations

import click

from finetune import console
from finetune.cli.options import as_json, print_json


@click.command(cls=console.Command)
@as_json
def backbones(json_: bool) -> None:
    """List the backbones that load on this machine, with and without the internet.

    \b
    Example:
      finetune backbones
    """
    from finetune.backbones import catalog

    rows = catalog.here()
    if json_:
        print_json(rows)
        return
    for row in rows:
        click.echo(f"{'✓' if row['here'] else '·'} {row['name']:<28} {row['weights']}")
    click.echo(f"\n{catalog.others()}")


@click.command(cls=console.Command)
@click.argument("model")
@click.option(
    "--size",
    type=click.IntRange(min=1),
    metavar="PIXELS",
    help="side of the input [the model's own]",
)
@click.option("--csv", "csv_", is_flag=True, help="print a CSV table instead of text")
@click.option("--time", "time_", is_flag=True, help="measure the milliseconds of each layer, too")
@as_json
def profile(model: str, size: int | None, csv_: bool, time_: bool, json_: bool) -> None:
    """Count what each layer of a model outputs, holds and computes; no weights are needed.

    One row per layer: kernel, output, memory of the output in float32, parameters, multiply-adds.
    Below: totals, in multiply-adds and in FLOPs (twice as many), the share of each stage, and the
    memory of inference and of training.

    \b
    Example:
      finetune profile resnet50
      finetune profile alexnet --size 227 --csv
    """
    from finetune.backbones import profile as home
    from finetune.backbones import profile_table

    if csv_ and json_:
        raise click.UsageError("--csv and --json are two forms of the same: give one of them")
    found = home.profile(model, size, measure=time_)
    if json_:
        print_json(profile_table.to_json(found))
    elif csv_:
        click.echo(profile_table.to_csv(found), nl=False)
    else:
        click.echo(profile_table.to_text(found))
