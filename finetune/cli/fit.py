"""Commands that make a classifier: fit, advise, svm."""

from __future__ import annotations

from typing import Any

import click

from finetune import console, names
from finetune.cli.options import (
    as_json,
    deciding,
    looking,
    print_json,
    say,
    waiting,
)


@click.command()
@click.argument("data", required=False)
@looking
@deciding
@click.option(
    "--out",
    metavar="DIR",
    help="the run's folder; the same one again goes on where it stopped [runs/NAME-DIGEST]",
)
@click.option("--force", is_flag=True, help="do a finished run again")
@waiting
@as_json
def fit(
    data: str | None,
    assignments: tuple[str, ...],
    force: bool,
    wait: float,
    json_: bool,
    **given: Any,
) -> None:
    """The main job: look, decide, SVM baseline, fine-tune if it pays, judge, report.

    DATA is a folder with a folder per class, a folder with train/ val/ test/ inside, a CSV table
    (path,label[,split][,group], or columns with other usual names, as filename,class), or a named
    set: sklearn:digits, torchvision:NAME.

    What is said here replaces what the recipe says; --set and an option that disagree are refused.

    \b
    Example:
      finetune fit photos/ --seed 1 --out runs/photos
    """
    from finetune import job

    outcome = job.fit(
        data,
        assignments=assignments,
        force=force,
        wait=wait,
        say=say,
        bar=console.progress,
        **given,
    )
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


@click.command()
@click.argument("data", required=False)
@looking
@deciding
@as_json
def advise(data: str | None, assignments: tuple[str, ...], json_: bool, **given: Any) -> None:
    """The policy alone: the matrix with the chosen cell marked, the measurements behind it, and
    advice.

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


@click.command()
@click.argument("data", required=False)
@looking
@click.option(
    "--taps", metavar="TAP[,TAP]", help="features to compare, as in pooled,stage6/3x3 [auto]"
)
@click.option("--recipe", metavar="FILE", help="a recipe file, or the name of a shipped one")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="one value of the recipe, as in svm.folds=3",
)
@click.option("--out", metavar="DIR", help="the run's folder [runs/NAME-DIGEST]")
@click.option("--force", is_flag=True, help="do a finished run again")
@waiting
@as_json
@click.pass_context
def svm(context: click.Context, **given: Any) -> None:
    """The SVM baseline alone: taps, kernel and C chosen inside the training part, judged on the
    test part.

    \b
    Example:
      finetune svm photos/ --taps pooled,stage6/3x3
    """
    context.invoke(fit, **given, strategy="svm")
