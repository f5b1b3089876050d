"""Commands on finished runs and recipes: predict, evaluate, diagnose, track, runs, recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from finetune import console, names
from finetune.cli.options import (
    TRACKERS,
    as_json,
    at_fault,
    bad_images,
    columns,
    layout,
    print_json,
    rules,
    running,
    say,
)


@click.command(cls=console.Command)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path())
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="write a CSV table to this file"
)
@click.option(
    "--unsure",
    type=click.FloatRange(0, 1),
    metavar="BELOW",
    help="mark predictions whose probability is below this",
)
@click.option(
    "--unknown",
    type=click.FloatRange(0, 1),
    metavar="ABOVE",
    help="mark images unlike the training images: farther from them than this share of their own "
    "kind, as in 0.99",
)
@running
@bad_images
@as_json
def predict(
    run: Path,
    images: tuple[str, ...],
    output: Path | None,
    unsure: float | None,
    unknown: float | None,
    engine: str | None,
    precision: str | None,
    on_bad_image: str | None,
    json_: bool,
) -> None:
    """Predict classes and calibrated probabilities of images, or of all images in folders.

    One row per image, in the order given, under the name given. The table has the columns path,
    label (empty), prediction, score, second, second_score, unsure (with --unsure), unfamiliar and
    unknown (with --unknown), and p:CLASS for each class, as in predictions.csv of a run.

    \b
    Example:
      finetune predict runs/photos cat.jpg
      finetune predict runs/photos holiday/ -o holiday.csv --unsure 0.6
      finetune predict runs/photos holiday/ --unknown 0.99
    """
    from finetune.evaluation import predict as home

    found = home.predict(
        run,
        images,
        engine_name=engine,
        precision=precision,
        on_bad=on_bad_image or "stop",
        say=say,
        bar=console.progress,
    )
    if unknown is not None:
        home.unfamiliar(run, found)
    if output:
        home.write_csv(output, found, unsure, unknown)
        click.echo(f"{len(found.images)} predictions written to {names.shown(output)}", err=json_)
    if json_:
        print_json(home.rows(found, unsure, unknown))
    elif not output:
        click.echo(home.table(home.rows(found, unsure, unknown)))


@click.command(cls=console.Command)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("data")
@click.option(
    "--seen",
    type=click.Choice(["leave-out", "keep"]),
    default="leave-out",
    help="what to do with images that the run was trained on [leave-out]",
)
@running
@bad_images
@at_fault
@columns
@as_json
def evaluate(
    run: Path,
    data: str,
    seen: str,
    engine: str | None,
    precision: str | None,
    json_: bool,
    **given: Any,
) -> None:
    """Evaluate a finished run on labelled images.

    Uses the test part of DATA, or all images where it has none. Images that the run was trained on
    are recognised by their bytes and left out. Classes are matched by name.

    \b
    Example:
      finetune evaluate runs/photos more-photos/
    """
    from finetune.evaluation import evaluate as home

    result = home.evaluate(
        run,
        data,
        engine_name=engine,
        precision=precision,
        seen=seen,
        layout=layout(given),
        rules=rules(given),
        say=say,
        bar=console.progress,
    )
    if json_:
        print_json(result)
    else:
        click.echo(home.metrics_text(result))


@click.command(cls=console.Command)
@click.argument("run", type=click.Path(path_type=Path))
@as_json
def diagnose(run: Path, json_: bool) -> None:
    """Say in words what the loss curves of a run show, and what to do next.

    One primary finding, with its evidence; what else was seen stands beneath it. Unfinished runs
    are judged by the epochs they have.

    \b
    Example:
      finetune diagnose runs/photos
    """
    from finetune.evaluation import diagnosis

    found = diagnosis.of_run(run)
    if json_:
        print_json([check.to_json() for check in found])
    else:
        click.echo(diagnosis.text(found))


@click.command(cls=console.Command)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "tracker",
    type=click.Choice(TRACKERS),
    required=True,
    help="tool whose logs are written; it must be installed",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="folder of the logs [a folder of the tool's name, beside the run]",
)
def track(run: Path, tracker: str, output: Path | None) -> None:
    """Copy the curves and results of a finished run into another tool's logs.

    Nothing is sent anywhere, and no model is stored again. `fit --track` does the same when a run
    ends.

    \b
    Example:
      finetune track runs/photos --to tensorboard
    """
    from finetune.report import tracking

    click.echo(tracking.track(run, tracker, output))


@click.command(cls=console.Command)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("unlabelled", nargs=-1, required=True, type=click.Path())
@click.option("-n", "--count", type=click.IntRange(min=1), default=50, help="images [50]")
@click.option(
    "--method",
    type=click.Choice(["badge", "margin", "random"]),
    default="badge",
    help="unsure and unlike one another (badge), the least sure alone, or by chance [badge]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="random seed [0]")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="write a CSV table to this file"
)
@bad_images
@as_json
def suggest(
    run: Path,
    unlabelled: tuple[str, ...],
    count: int,
    method: Any,
    seed: int,
    output: Path | None,
    on_bad_image: str | None,
    json_: bool,
) -> None:
    """Suggest which images to label next: those that a run would learn the most from.

    Images that the run was trained on are left out. The table has an empty column `label` to fill
    in.

    \b
    Example:
      finetune suggest runs/photos unlabelled/ -n 50 -o next.csv
    """
    from finetune.evaluation import suggest as home

    found = home.suggest(
        run,
        unlabelled,
        count,
        method=method,
        seed=seed,
        on_bad=on_bad_image or "stop",
        say=say,
        bar=console.progress,
    )
    if output:
        home.write_csv(output, found)
        click.echo(f"{len(found.positions)} images written to {names.shown(output)}", err=json_)
    if json_:
        print_json(found.rows())
    elif not output:
        click.echo(home.to_text(found))


@click.group()
def recipes() -> None:
    """List, show, copy and validate recipes.

    \b
    Example:
      finetune recipes ls
    """


@recipes.command("ls")
def recipes_ls() -> None:
    """List the shipped recipes, one per line.

    \b
    Example:
      finetune recipes ls
    """
    from finetune import recipe

    for name in recipe.shipped():
        click.echo(f"{name:<16} {recipe.describe(name).splitlines()[0]}")


@recipes.command("show")
@click.argument("name")
def recipes_show(name: str) -> None:
    """Show a shipped recipe with its header, and the learning rate that it makes.

    \b
    Example:
      finetune recipes show digits
    """
    from finetune import policy, recipe

    click.echo(recipe.source(name), nl=False)
    say(policy.schedule_line(recipe.load(name).train.model_dump()))


@recipes.command("cp")
@click.argument("name")
@click.argument("target", type=click.Path(path_type=Path))
def recipes_cp(name: str, target: Path) -> None:
    """Copy a shipped recipe, to change it.

    \b
    Example:
      finetune recipes cp digits mine.yaml
    """
    from finetune import files, recipe
    from finetune.errors import UserError

    target = target / f"{name}.yaml" if target.is_dir() else target
    if target.exists():
        raise UserError("there is a file already", where=target, fix="choose another name")
    files.write_text(target, recipe.source(name))
    click.echo(f"copied to {names.shown(target)}")


@recipes.command("validate")
@click.argument("path")
def recipes_validate(path: str) -> None:
    """Read a recipe strictly, and print it with every default written out.

    \b
    Example:
      finetune recipes validate mine.yaml
    """
    from finetune import recipe

    click.echo(recipe.dump(recipe.load(path)), nl=False)


@click.group()
def runs() -> None:
    """List and compare runs.

    \b
    Example:
      finetune runs ls
    """


@runs.command("ls")
@click.argument("folder", default="runs", type=click.Path(path_type=Path))
@as_json
def runs_ls(folder: Path, json_: bool) -> None:
    """List the runs in a folder, one per line, unfinished ones too.

    \b
    Example:
      finetune runs ls
    """
    from finetune.report import runs

    rows = runs.list_runs(folder)
    if json_:
        print_json(rows)
    else:
        click.echo(runs.rows_text(rows))


@runs.command("compare")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@as_json
def runs_compare(paths: tuple[Path, ...], json_: bool) -> None:
    """Compare runs: what they ship, how good they are, and how their recipes differ.

    \b
    Example:
      finetune runs compare runs/a runs/b
    """
    from finetune.report import runs

    rows = runs.compare(list(paths))
    if json_:
        print_json(rows)
    else:
        click.echo(runs.rows_text(rows))
