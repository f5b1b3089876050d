"""Options that several commands share, and how results are printed. Nothing heavy is imported
here."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")
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
    click.option(
        "--engine",
        type=click.Choice(["auto", "openvino", "torch"]),
        help="engine that runs the network [auto: the fastest as timed here; a run's own]",
    ),
    click.option(
        "--precision",
        type=click.Choice(["auto", "bf16", "float32"]),
        help="precision of the network [auto: float32, or bf16 where timed as clearly faster]",
    ),
)
bad_images = click.option(
    "--on-bad-image",
    type=click.Choice(["stop", "skip"]),
    help="what to do with unreadable images [stop]",
)
columns = options(
    click.option(
        "--path-column",
        metavar="NAME",
        help="column of a CSV with the paths [found by its name]",
    ),
    click.option(
        "--label-column",
        metavar="NAME",
        help="column with the classes [found by its name]",
    ),
    click.option(
        "--split-column",
        metavar="NAME|none",
        help="column with train, val and test [found by its name]",
    ),
    click.option(
        "--group-column",
        metavar="NAME|none",
        help="column with groups that must stay together [found by its name]",
    ),
    click.option(
        "--image-root",
        metavar="DIR",
        help="folder that the paths of a CSV start from [that of the CSV]",
    ),
    click.option(
        "--no-header",
        is_flag=True,
        default=None,
        help="read the first line of a CSV as a row: its columns are called 1, 2 and so on",
    ),
)
# what images at fault do, where they are read and not yet divided
at_fault = options(
    click.option(
        "--on-conflict",
        type=click.Choice(["stop", "skip", "first"]),
        help="what to do with an image under two labels: leave all copies out (skip), or keep the "
        "first [stop]",
    ),
    click.option(
        "--on-empty-class",
        type=click.Choice(["stop", "skip"]),
        help="what to do with a class without training images: leave it out (skip) [stop]",
    ),
    click.option(
        "--on-stray",
        type=click.Choice(["stop", "skip"]),
        help="what to do with images outside of the class folders, and folders beside train, val "
        "and test: leave them out (skip) [stop]",
    ),
)
network = options(
    click.option(
        "--backbone",
        metavar="NAME",
        help="timm model, alexnet or googlenet [tf_efficientnet_lite0]",
    ),
    click.option(
        "--weights",
        metavar="auto|PATH|random",
        help="source of the pretrained weights [auto]",
    ),
    running,
    bad_images,
    columns,
)
looking = options(
    click.option(
        "--seed", type=click.IntRange(min=0), help="random seed for splits and training [0]"
    ),
    click.option(
        "--shots",
        type=click.IntRange(min=1),
        metavar="K",
        help="use only K training images per class",
    ),
    click.option(
        "--test",
        metavar="DIR|none",
        help="test on these images instead of a part of DATA; none: train on all of it",
    ),
    click.option(
        "--labels",
        metavar="CSV",
        help="correct labels by this table, which `finetune check --labels` prepares",
    ),
    network,
    at_fault,
    click.option(
        "--on-leak",
        type=click.Choice(["tell", "stop", "skip"]),
        help="what to do with copies of test images: leave them out of the training (skip) [tell]",
    ),
)
folding = click.option(
    "--folds",
    type=click.IntRange(min=2),
    metavar="K",
    help="judge the whole procedure in K folds instead of on test images, and train what ships on "
    "all images; takes K + 1 times as long",
)
unheard = options(  # taken by `extract` of version 0.1.0 without effect: told or refused now
    click.option("--seed", type=click.IntRange(min=0), hidden=True),
    click.option("--shots", type=click.IntRange(min=1), hidden=True),
    click.option("--test", hidden=True),
)
deciding = options(
    click.option("--strategy", metavar="NAME", help=f"what to train: {STRATEGIES} [auto]"),
    click.option(
        "--epochs", type=click.IntRange(min=1), help="fine-tuning epochs [chosen by the policy]"
    ),
    click.option(
        "--budget",
        type=click.FloatRange(min=0, min_open=True),
        metavar="MINUTES",
        help="limit of the time for fine-tuning: choose a cheaper strategy beyond it",
    ),
    click.option(
        "--no-flip/--flip",
        "no_flip",
        default=None,
        help="do not mirror images, where mirrored ones belong to another class (letters, signs) "
        "[--flip]",
    ),
    click.option("--recipe", metavar="FILE", help="recipe file, or name of a shipped recipe"),
    click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="KEY=VALUE",
        help="set one key of the recipe, as in train.lr=1e-3",
    ),
)


waiting = click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="SECONDS",
    help="wait for another process on the same run [0]",
)


def layout(given: dict[str, Any]) -> Any:
    """What the options of `columns` say of a table."""
    from finetune.data.columns import Layout

    told = {
        name.removesuffix("_column").removeprefix("image_"): value
        for name, value in given.items()
        if name.endswith("_column") or name == "image_root"
    }
    return Layout(**told, header=not given["no_header"])


def rules(given: dict[str, Any]) -> Any:
    """What the options of `bad_images` and `at_fault` say."""
    from finetune.data.faults import Rules

    said = {
        name.removesuffix("_image"): value
        for name, value in given.items()
        if name.startswith("on_") and value is not None
    }
    return Rules(**said)


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """`30,8,2` as numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise click.UsageError(f"{option} {text}: give whole numbers, as in 30,8,2")
    return tuple(map(int, parts))


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def say(text: str) -> None:
    click.echo(text, err=True)
