"""Commands that make a classifier: fit, advise, preflight, svm, search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from finetune import console, names
from finetune.cli.options import (
    TRACKERS,
    as_json,
    deciding,
    folding,
    looking,
    print_json,
    say,
    waiting,
    whole_numbers,
)


@click.command(cls=console.Command)
@click.argument("data", required=False)
@looking
@folding
@deciding
@click.option(
    "--out",
    metavar="DIR",
    help="folder of the run; an unfinished one is continued [runs/NAME-DIGEST]",
)
@click.option("--force", is_flag=True, help="repeat a finished run")
@click.option(
    "--track",
    "trackers",
    multiple=True,
    type=click.Choice(TRACKERS),
    help="copy curves and results into another tool's logs, beside the run; nothing is sent",
)
@waiting
@as_json
def fit(
    data: str | None,
    assignments: tuple[str, ...],
    force: bool,
    trackers: tuple[str, ...],
    wait: float,
    json_: bool,
    **given: Any,
) -> None:
    """Fit a classifier: analyse the data, choose a strategy, train, evaluate and report.

    DATA is a folder with a folder per class, a folder with train/ val/ test/ inside, a CSV table
    (path,label[,split][,group], or columns with other usual names, as filename,class), or a named
    set: sklearn:digits, torchvision:NAME.

    Options replace values of the recipe; an option and a --set that disagree are refused.

    \b
    Example:
      finetune fit photos/ --seed 1 --out runs/photos
    """
    from finetune import job
    from finetune.report import tracking

    for name in trackers:
        tracking.check(name)
    outcome = job.fit(
        data,
        assignments=assignments,
        force=force,
        wait=wait,
        say=say,
        bar=console.progress,
        **given,
    )
    for name in trackers:
        say(tracking.track(outcome.path, name))
    if json_:
        print_json(
            {
                "run": names.shown(outcome.path),
                "shipped": outcome.shipped,
                "metrics": outcome.metrics,
                "verdict": outcome.verdict,
            }
        )
    else:
        report, run = names.shown(outcome.path / "report.html"), names.typed(outcome.path)
        click.echo(
            f"\n{outcome.verdict}\n\n  report   {report}\n  predict  finetune predict {run} IMAGE…"
        )


@click.command(cls=console.Command)
@click.argument("data", required=False)
@looking
@deciding
@as_json
def advise(data: str | None, assignments: tuple[str, ...], json_: bool, **given: Any) -> None:
    """Print the plan of the policy, without training: the matrix, the measurements and advice.

    \b
    Example:
      finetune advise photos/
    """
    from finetune import job, policy

    seen = job.advise(data, assignments=assignments, say=say, bar=console.progress, **given)
    if json_:
        print_json({"plan": seen.plan.to_json(), "similarity": seen.similarity.to_json()})
    else:
        click.echo(policy.matrix_text(seen.plan))


@click.command(cls=console.Command)
@click.argument("data", required=False)
@looking
@deciding
@click.option(
    "--picture",
    metavar="FILE",
    help="write the learning-rate range test as a picture: .svg, or .html to open in a browser",
)
@as_json
def preflight(
    data: str | None, assignments: tuple[str, ...], picture: str | None, json_: bool, **given: Any
) -> None:
    """Check what fit would do, in seconds: labels, first loss, gradients, updates, learning rate.

    The planned training is tried out on a sample of the training images. Each check passes, warns
    or fails, with its number, what it means and what to do. The exit code is 1 if any fails.

    \b
    Example:
      finetune preflight photos/ --picture rates.html
    """
    from finetune import job
    from finetune.report import pictures

    pictures.check(picture)
    found = job.preflight(data, assignments=assignments, say=say, bar=console.progress, **given)
    if picture is not None:
        say(pictures.range_test(found.range_test, picture, data or "the recipe's data"))
    if json_:
        print_json(found.to_json())
    else:
        click.echo(found.to_text())
    if found.status == "fail":
        raise SystemExit(1)


@click.command(cls=console.Command)
@click.argument("data", required=False)
@looking
@folding
@click.option("--taps", metavar="TAP[,TAP]", help="taps to compare, as in pooled,stage6/3x3 [auto]")
@click.option("--recipe", metavar="FILE", help="recipe file, or name of a shipped recipe")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="set one key of the recipe, as in svm.folds=3",
)
@click.option("--out", metavar="DIR", help="folder of the run [runs/NAME-DIGEST]")
@click.option("--force", is_flag=True, help="repeat a finished run")
@waiting
@as_json
@click.pass_context
def svm(context: click.Context, **given: Any) -> None:
    """Fit the SVM alone: choose taps, kernel and C in the training part, evaluate on the test part.

    \b
    Example:
      finetune svm photos/ --taps pooled,stage6/3x3
    """
    context.invoke(fit, **given, strategy="svm")


@click.command(cls=console.Command)
@click.argument("data", required=False)
@looking
@deciding
@click.option(
    "--range",
    "ranges",
    multiple=True,
    metavar="NAME=LOW..HIGH",
    help="values to search, by their logarithm [lr=1e-5..1e-1, weight_decay=1e-6..1e-1]",
)
@click.option(
    "--trials",
    metavar="N[,N[,N]]",
    default="30,8,2",
    help="trials of the coarse, the fine and the long round; 0: no such round [30,8,2]",
)
@click.option(
    "--sampler",
    type=click.Choice(["random", "tpe"]),
    default="random",
    help="draw values at random, or by TPE, where earlier trials did well [random]",
)
@click.option(
    "--no-prune/--prune",
    "no_prune",
    default=False,
    help="carry every trial to its end; else one below the median is given up early [--prune]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="folder of the search; an unfinished one is continued",
)
@as_json
def search(
    data: str | None,
    ranges: tuple[str, ...],
    trials: str,
    sampler: str,
    no_prune: bool,
    out: Path,
    assignments: tuple[str, ...],
    json_: bool,
    **given: Any,
) -> None:
    """Search ranges of training values at random: coarse, then fine, then long.

    Trials are compared on validation images; the test part is not touched. DIR gets search.html,
    search.json and best.yaml, the recipe with which `fit` trains the winner and judges it once.
    Several processes may work in one DIR.

    \b
    Example:
      finetune search photos/ --out runs/search
      finetune fit photos/ --recipe runs/search/best.yaml
    """
    from finetune import job

    found = job.search(
        data,
        out=out,
        ranges=ranges,
        trials=whole_numbers(trials, "--trials"),
        sampler=sampler,
        prune=not no_prune,
        assignments=assignments,
        say=say,
        bar=console.progress,
        **given,
    )
    if json_:
        print_json(found.to_json())
        return
    click.echo("\n".join(check.to_text() for check in found.checks()))
    page, best = names.shown(out / "search.html"), names.typed(out / "best.yaml")
    what = names.typed(data) if data else "DATA"
    click.echo(f"\n  page     {page}\n  fit      finetune fit {what} --recipe {best}")
