"""Commands on networks: backbones, compare-backbones, profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from finetune import console, names
from finetune.cli.options import as_json, at_fault, bad_images, columns, print_json, running, say


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


@click.command(cls=console.Command)
@click.argument("data")
@click.option(
    "--backbones",
    metavar="NAME[,NAME]",
    help="networks to compare [all whose weights are on this machine]",
)
@click.option(
    "--max-ms",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MS",
    help="take none that needs more milliseconds an image here",
)
@click.option(
    "--max-params",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MILLIONS",
    help="take none with more parameters",
)
@click.option(
    "-o",
    "--out",
    metavar="DIR|FILE.html",
    help="write a page with the picture of accuracy against cost, and the figures as JSON",
)
@click.option("--seed", type=click.IntRange(min=0), help="random seed for splits and folds [0]")
@click.option(
    "--test", metavar="DIR|none", help="test on these images instead of a part of DATA; none: on no"
)
@click.option(
    "--weights",
    metavar="auto|PATH|random",
    help="source of the weights; random ones are marked [auto]",
)
@running
@bad_images
@columns
@at_fault
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="set one key of the recipe, as in svm.folds=3",
)
@as_json
def compare_backbones(
    data: str, out: str | None, assignments: tuple[str, ...], json_: bool, **given: Any
) -> None:
    """Compare backbones on your images: accuracy out of fold, speed, size; say which one to take.

    An SVM on the features of each is cross-validated on the training images. Taken is the cheapest
    one within one paired standard error of the best; it alone is judged on the test images.

    \b
    Example:
      finetune compare-backbones photos/ --max-ms 20 -o backbones.html
    """
    from finetune.evaluation import backbone_comparison as home
    from finetune.report import backbones_page, backbones_told

    if out is not None:
        backbones_page.places(out)
    found = home.compare(data, assignments=assignments, say=say, bar=console.progress, **given)
    page = (
        backbones_page.write(found, out, names.shown(Path(data).name)) if out is not None else None
    )
    if json_:
        print_json(backbones_told.to_json(found))
        return
    click.echo(backbones_told.to_text(found))
    if page is not None:
        click.echo(f"\n  page     {names.shown(page)}")
