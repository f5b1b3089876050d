"""The `finetune` command: declare options, import inside, call one function, print.

Results go to stdout (`--json` for machines), progress and warnings to stderr. Nothing heavy is imported at the top, so
that every `--help` answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from finetune import console, names

F = TypeVar("F", bound=Callable[..., Any])
STRATEGIES = "auto, svm, probe, stages:K, half, full or scratch"


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order in which --help shows them."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


as_json = click.option("--json", "json_", is_flag=True, help="print one JSON value instead of text")
running = options(
    click.option("--engine", type=click.Choice(["auto", "openvino", "torch"]), help="what runs the network [auto]"),
    click.option("--precision", type=click.Choice(["auto", "bf16", "float32"]), help="[auto: bf16 where the hardware has it]"),
)
bad_images = click.option("--on-bad-image", type=click.Choice(["stop", "skip"]), help="what an unreadable image does [stop]")
columns = options(
    click.option("--path-column", metavar="NAME", help="the column of a CSV that holds the paths [found by its name]"),
    click.option("--label-column", metavar="NAME", help="the column that holds the classes [found by its name]"),
    click.option("--split-column", metavar="NAME|none", help="the column that holds train, val and test [found by its name]"),
    click.option("--group-column", metavar="NAME|none", help="the column that holds what must stay together [found by its name]"),
    click.option("--image-root", metavar="DIR", help="the folder that the paths of a CSV start from [that of the CSV]"),
)
network = options(
    click.option("--backbone", metavar="NAME", help="a timm model, alexnet or googlenet [tf_efficientnet_lite0]"),
    click.option("--weights", metavar="auto|PATH|random", help="where the pretrained weights come from [auto]"),
    running,
    bad_images,
    columns,
)
looking = options(
    click.option("--seed", type=click.IntRange(min=0), help="splits and training follow from it [0]"),
    click.option("--shots", type=click.IntRange(min=1), metavar="K", help="use K training images per class"),
    click.option("--test", metavar="DIR|none", help="judge on these images instead of a part of DATA; none: train on all of it"),
    network,
    click.option(
        "--on-conflict",
        type=click.Choice(["stop", "skip", "first"]),
        help="what one image under two labels does: skip leaves all copies out, first keeps the first [stop]",
    ),
    click.option(
        "--on-leak",
        type=click.Choice(["tell", "stop", "skip"]),
        help="what a copy of a test image does: skip leaves it out of the training [tell]",
    ),
    click.option(
        "--on-empty-class",
        type=click.Choice(["stop", "skip"]),
        help="what a class without training images does: skip leaves it out [stop]",
    ),
)
unheard = options(  # taken by `extract` of version 0.1.0 without effect: told or refused now
    click.option("--seed", type=click.IntRange(min=0), hidden=True),
    click.option("--shots", type=click.IntRange(min=1), hidden=True),
    click.option("--test", hidden=True),
)
deciding = options(
    click.option("--strategy", metavar="NAME", help=f"{STRATEGIES} [auto]"),
    click.option("--epochs", type=click.IntRange(min=1), help="of fine-tuning [the policy decides]"),
    click.option(
        "--budget",
        type=click.FloatRange(min=0, min_open=True),
        metavar="MINUTES",
        help="what the job may cost: the plan weighs it",
    ),
    click.option(
        "--no-flip/--flip", "no_flip", default=None, help="a mirrored image belongs to another class (letters, signs) [--flip]"
    ),
    click.option("--recipe", metavar="FILE", help="a recipe file, or the name of a shipped one"),
    click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="one value of the recipe, as in train.lr=1e-3"),
)


waiting = click.option(
    "--wait", type=click.FloatRange(min=0), default=0.0, metavar="SECONDS", help="for another process on the same run [0]"
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="regraft", prog_name="finetune")
def cli() -> None:
    """Turn a folder of images into a judged classifier.

    \b
    Example:
      finetune fit photos/
    """


def _layout(given: dict[str, Any], on_bad: str = "stop") -> Any:
    """What the options of `columns` say of a table."""
    from finetune.columns import Layout

    told = {name.removesuffix("_column").removeprefix("image_"): value for name, value in given.items()}
    return Layout(**told, on_bad=on_bad)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _say(text: str) -> None:
    click.echo(text, err=True)


@cli.command()
@click.argument("data", required=False)
@looking
@deciding
@click.option("--out", metavar="DIR", help="the run's folder; the same one again goes on where it stopped [runs/NAME-DIGEST]")
@click.option("--force", is_flag=True, help="do a finished run again")
@waiting
@as_json
def fit(data: str | None, assignments: tuple[str, ...], force: bool, wait: float, json_: bool, **given: Any) -> None:
    """The main job: look, decide, SVM baseline, fine-tune if it pays, judge, report.

    DATA is a folder with a folder per class, a folder with train/ val/ test/ inside, a CSV table (path,label[,split][,group],
    or columns with other usual names, as filename,class), or a named set: sklearn:digits, torchvision:NAME.

    What is said here replaces what the recipe says; --set and an option that disagree are refused.

    \b
    Example:
      finetune fit photos/ --seed 1 --out runs/photos
    """
    from finetune import job

    outcome = job.fit(data, assignments=assignments, force=force, wait=wait, say=_say, bar=console.progress, **given)
    if json_:
        _print_json(
            {"run": names.shown(outcome.path), "shipped": outcome.shipped, "metrics": outcome.metrics, "verdict": outcome.verdict}
        )
    else:
        report, run = names.shown(outcome.path / "report.html"), names.typed(outcome.path)
        click.echo(f"\n{outcome.verdict}\n\n  report   {report}\n  predict  finetune predict {run} IMAGE…")


@cli.command()
@click.argument("data", required=False)
@looking
@deciding
@as_json
def advise(data: str | None, assignments: tuple[str, ...], json_: bool, **given: Any) -> None:
    """The policy alone: the matrix with the chosen cell marked, the measurements behind it, and advice.

    \b
    Example:
      finetune advise photos/
    """
    from finetune import job, policy

    seen = job.advise(data, assignments=assignments, say=_say, bar=console.progress, **given)
    if json_:
        _print_json({"plan": seen.plan.to_json(), "similarity": seen.similarity.to_json()})
    else:
        click.echo(policy.matrix_text(seen.plan))


@cli.command()
@click.argument("data", required=False)
@looking
@click.option("--taps", metavar="TAP[,TAP]", help="features to compare, as in pooled,stage6/3x3 [auto]")
@click.option("--recipe", metavar="FILE", help="a recipe file, or the name of a shipped one")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="one value of the recipe, as in svm.folds=3")
@click.option("--out", metavar="DIR", help="the run's folder [runs/NAME-DIGEST]")
@click.option("--force", is_flag=True, help="do a finished run again")
@waiting
@as_json
@click.pass_context
def svm(context: click.Context, **given: Any) -> None:
    """The SVM baseline alone: taps, kernel and C chosen inside the training part, judged on the test part.

    \b
    Example:
      finetune svm photos/ --taps pooled,stage6/3x3
    """
    context.invoke(fit, **given, strategy="svm")


@cli.command()
@click.argument("data")
@unheard
@network
@click.option("--taps", default="pooled", show_default=True, metavar="TAP[,TAP]", help="as in pooled,stage6/3x3,fc7")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="an .npz with X, y, paths and classes; or .parquet"
)
def extract(data: str, output: Path, **given: Any) -> None:
    """Features of images, with a manifest of what made them.

    \b
    Example:
      finetune extract photos/ --taps pooled -o features.npz
    """
    from finetune import job

    click.echo(job.extract(data, output, say=_say, bar=console.progress, **given))


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path())
@click.option("-o", "--output", type=click.Path(path_type=Path), help="write a CSV table here")
@click.option("--unsure", type=click.FloatRange(0, 1), metavar="BELOW", help="mark predictions whose probability is below")
@running
@bad_images
@as_json
def predict(
    run: Path, images: tuple[str, ...], output: Path | None, unsure: float | None, engine: str | None, precision: str | None,
    on_bad_image: str | None, json_: bool,
) -> None:  # fmt: skip
    """Classes and calibrated probabilities of images, or of all images in folders.

    A row an image, in the order given, under the name given. The table has the columns path, label (empty), prediction,
    score, second, second_score, unsure (with --unsure), and p:CLASS for each class, as predictions.csv of a run.

    \b
    Example:
      finetune predict runs/photos cat.jpg
      finetune predict runs/photos holiday/ -o holiday.csv --unsure 0.6
    """
    from finetune import predict as home

    found = home.predict(
        run, images, engine_name=engine, precision=precision, on_bad=on_bad_image or "stop", say=_say, bar=console.progress
    )
    if output:
        home.write_csv(output, found, unsure)
        click.echo(f"{len(found.images)} predictions written to {names.shown(output)}", err=json_)
    if json_:
        _print_json(home.rows(found, unsure))
    elif not output:
        click.echo(home.table(home.rows(found, unsure)))


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("data")
@click.option(
    "--seen", type=click.Choice(["leave-out", "keep"]), default="leave-out", help="images that the run was trained on [leave-out]"
)
@running
@bad_images
@columns
@as_json
def evaluate(
    run: Path,
    data: str,
    seen: str,
    engine: str | None,
    precision: str | None,
    on_bad_image: str | None,
    json_: bool,
    **given: Any,
) -> None:
    """Judge a finished run on labelled images.

    All images of DATA are used, or its test part where it has one, but for those that the run was trained on: they are
    known by their bytes. Classes are matched by name.

    \b
    Example:
      finetune evaluate runs/photos more-photos/
    """
    from finetune import judge as home

    on_bad = on_bad_image or "stop"
    how: dict[str, Any] = {"engine_name": engine, "precision": precision, "on_bad": on_bad, "seen": seen}
    how["layout"] = _layout(given, on_bad)
    result = home.evaluate(run, data, **how, say=_say, bar=console.progress)
    if json_:
        _print_json(result)
    else:
        click.echo(home.metrics_text(result))


@cli.command()
@click.argument("data")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="of the split that is checked [0]")
@columns
@as_json
def check(data: str, seed: int, json_: bool, **given: Any) -> None:
    """The images: unreadable files, class counts, exact duplicates, duplicates across splits, two labels for one file.

    \b
    Example:
      finetune check photos/
    """
    from finetune import check as home

    with console.progress("check") as progress:
        found = home.check_data(data, seed=seed, layout=_layout(given), progress=progress)
    if json_:
        _print_json(found.to_json())
    else:
        click.echo(found.to_text())
    if found.faults:
        raise SystemExit(1)


@cli.command()
@as_json
def backbones(json_: bool) -> None:
    """Backbones that load on this machine, with or without the network.

    \b
    Example:
      finetune backbones
    """
    from finetune import catalog

    rows = catalog.here()
    if json_:
        _print_json(rows)
        return
    for row in rows:
        click.echo(f"{'✓' if row['here'] else '·'} {row['name']:<28} {row['weights']}")
    click.echo(f"\n{catalog.others()}")


@cli.group()
def recipes() -> None:
    """Shipped recipes: list, show, copy, validate.

    \b
    Example:
      finetune recipes ls
    """


@recipes.command("ls")
def recipes_ls() -> None:
    """The shipped recipes, a line each.

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
    """A recipe as it is shipped, its header included.

    \b
    Example:
      finetune recipes show digits
    """
    from finetune import recipe

    click.echo(recipe.source(name), nl=False)


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


@cli.group()
def runs() -> None:
    """Finished runs: list, compare.

    \b
    Example:
      finetune runs ls
    """


@runs.command("ls")
@click.argument("folder", default="runs", type=click.Path(path_type=Path))
@as_json
def runs_ls(folder: Path, json_: bool) -> None:
    """The runs in a folder, a line each, the unfinished ones too.

    \b
    Example:
      finetune runs ls
    """
    from finetune import run

    rows = run.list_runs(folder)
    if json_:
        _print_json(rows)
    else:
        click.echo(run.rows_text(rows))


@runs.command("compare")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@as_json
def runs_compare(paths: tuple[Path, ...], json_: bool) -> None:
    """Runs side by side: what they ship, how good they are, and what differs in their recipes.

    \b
    Example:
      finetune runs compare runs/a runs/b
    """
    from finetune import run

    rows = run.compare(list(paths))
    if json_:
        _print_json(rows)
    else:
        click.echo(run.rows_text(rows))


@cli.command()
@click.option("--prune", type=click.FloatRange(min=0), metavar="DAYS", help="delete features that were not used for DAYS days")
@click.option("--clear", is_flag=True, help="delete all of it; everything here can be made again")
@as_json
def cache(prune: float | None, clear: bool, json_: bool) -> None:
    """What the cache holds, and where; prune it.

    \b
    Example:
      finetune cache --prune 30
    """
    from finetune import store

    if clear and prune is not None:
        raise click.UsageError("--clear deletes all of it, --prune a part: give one of them")
    if clear or prune is not None:
        freed = store.clear() if prune is None else store.prune(prune)
        _print_json({"freed": freed}) if json_ else click.echo(f"{freed / 1e6:.0f} MB freed")
    elif json_:
        found = store.overview()
        _print_json({**found, "folder": names.shown(found["folder"])})
    else:
        click.echo(store.overview_text())


def main() -> None:
    """The console script."""
    console.guarded(cli, "finetune")
