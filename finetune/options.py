"""Options and recipe keys: the recipe that they make together, and a line for each that has no
effect on a job."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune import names, recipe
from finetune.backbones import device
from finetune.errors import UserError
from finetune.policy import Plan
from finetune.recipe import Recipe

OPTIONS = {  # options of the commands and of `fit`, and the recipe's keys behind them
    "seed": "data.seed",
    "shots": "data.shots",
    "test": "data.test",
    "folds": "data.folds",
    "on_bad_image": "data.on_bad_image",
    "on_conflict": "data.on_conflict",
    "on_leak": "data.on_leak",
    "on_empty_class": "data.on_empty_class",
    "on_stray": "data.on_stray",
    "no_flip": "data.no_flip",
    "path_column": "data.path_column",
    "label_column": "data.label_column",
    "split_column": "data.split_column",
    "group_column": "data.group_column",
    "image_root": "data.image_root",
    "no_header": "data.no_header",
    "labels": "data.labels",
    "backbone": "backbone.names",
    "weights": "backbone.weights",
    "engine": "backbone.engine",
    "precision": "backbone.precision",
    "taps": "backbone.taps",
    "strategy": "policy.strategy",
    "budget": "policy.budget",
    "epochs": "train.epochs",
    "out": "out",
}
OF_EXTRACT = (
    *("backbone", "weights", "engine", "precision", "taps"),
    *("on_bad_image", "on_conflict", "on_empty_class", "on_stray"),
    *("path_column", "label_column", "split_column", "group_column", "image_root", "no_header"),
)
OTHERS = ("recipe", "assignments", "force", "say", "bar")  # of the functions, beside the options
LISTS = ("backbone", "taps")  # written a,b
# their bytes may be no text: recipes spell them (`names.spelled`)
PATHS = ("test", "weights", "out", "image_root", "labels")

# --------------------------------------------------------------------------------------- the recipe


def build(
    data: str | Path | None,
    source: str | Path | Recipe | None,
    assignments: Sequence[str],
    options: Mapping[str, Any],
    where: str = "fit",
) -> tuple[Recipe, list[str]]:
    """The recipe of a job, and a line about what replaced its own values: a file or shipped recipe,
    then what was said beside it.

    `options` go by the names in `OPTIONS`, None means not given; `assignments` are
    `section.key=value` texts. An option and an assignment that disagree are refused.
    """
    base = (
        source
        if isinstance(source, Recipe)
        else recipe.load(source)
        if source is not None
        else Recipe()
    )
    check_names(options, OPTIONS, where)
    given = {
        OPTIONS[name]: f"--{name.replace('_', '-')}"
        for name, value in options.items()
        if value is not None
    }
    changes = {
        OPTIONS[name]: _value(name, value) for name, value in options.items() if value is not None
    }
    if data is not None:
        changes["data.data"], given["data.data"] = names.spelled(str(data)), "DATA"
    asked = recipe.update(base, changes, given=given)
    texts = (assignments,) if isinstance(assignments, str) else assignments
    settings = recipe.override(asked, texts)
    assigned = recipe.assigned(texts)
    for key in changes:
        if key in assigned and recipe.get(asked, key) != recipe.get(settings, key):
            _refuse_two(key, given[key], recipe.get(asked, key), recipe.get(settings, key))
    told = [
        f"{key} {recipe.shown(recipe.get(settings, key))} (its own: {recipe.shown(own)})"
        for key, own in recipe.changed(base).items()
        if key in {*changes, *assigned} and recipe.get(settings, key) != own
    ]
    return settings, [
        f"recipe     replaced on the command line: {', '.join(told)}"
    ] if told and source is not None else []


def one_recipe(
    recipe: str | Path | Recipe | None, source: str | Path | None
) -> str | Path | Recipe | None:
    """`recipe`, or `source`, as it was called in version 0.1.0."""
    if recipe is not None and source is not None:
        raise UserError(
            "recipe and source are two names of one option", where="recipe", fix="give recipe alone"
        )
    return source if recipe is None else recipe


def check_names(given: Iterable[str], known: Collection[str], where: str) -> None:
    """Refuse an option that does not exist, naming the nearest."""
    unknown = sorted(set(given) - set(known))
    if not unknown:
        return
    near = [
        close[0]
        for name in unknown
        if (close := difflib.get_close_matches(name, [*known, *OTHERS], 1, 0.6))
    ]
    keys = [key for name in unknown for key in recipe.all_keys() if key.rpartition(".")[2] == name]
    if near:
        fix = f"did you mean {', '.join(dict.fromkeys(near))}?"
    elif keys and where in ("fit", "advise", "preflight"):
        fix = f"write a recipe's key as assignments=[{keys[0] + '=…'!r}]"
    else:
        fix = f"choose from {', '.join(known)}"
    raise UserError(f"no option is called {', '.join(unknown)}", where=where, fix=fix)


def listed(value: Any) -> Any:
    """`a,b` as a list; auto, and what is a list already, as it is."""
    return (
        [part.strip() for part in value.split(",")]
        if isinstance(value, str) and value != "auto"
        else value
    )


def _value(name: str, value: Any) -> Any:
    if name in LISTS:
        return listed(value)
    if name in PATHS and value is not None:
        return names.spelled(str(value))
    return str(value) if isinstance(value, Path) else value


def _refuse_two(key: str, option: str, first: object, second: object) -> None:
    what = f"{option} says {recipe.shown(first)}, and --set {key}={recipe.shown(second)}"
    hint = (
        "; `finetune svm` is --strategy svm, `finetune fit` takes any"
        if key == "policy.strategy"
        else ""
    )
    raise UserError(what, where=key, fix=f"leave one of them out{hint}")


# ---------------------------------------------------------------------- what has no effect on a job


def unused(settings: Recipe, plan: Plan) -> list[str]:
    """A line for each group of keys that this plan makes no use of, or not as one may think."""
    about, lines = recipe.changed(settings), list[str]()
    untrained = (
        of_training(settings, f"nothing is fine-tuned ({plan.strategy})")
        if plan.training is None
        else []
    )
    if plan.training is not None:
        if "data.no_flip" in about and plan.training.augment == "none":
            lines.append("data.no_flip: no image is mirrored with train.augment none")
        if settings.backbone.engine == "openvino":
            lines.append(
                "backbone.engine openvino for the training: fine-tuning is always done by torch"
            )
        if plan.strategy == "scratch" and settings.backbone.weights not in ("auto", "random"):
            lines.append(
                "backbone.weights for the training: it starts from "
                "random ones; the SVM beside it reads those"
            )
    if settings.policy.budget is not None:
        if settings.policy.strategy != "auto":
            lines.append(
                f"policy.budget: the strategy {settings.policy.strategy} "
                f"was asked for, whatever it takes"
            )
        elif plan.training is None:
            lines.append("policy.budget: it weighs fine-tuning alone, and nothing is fine-tuned")
    if plan.strategy == "probe" and (
        keys := [key for key in ("backbone.taps", "svm.kernels") if key in about]
    ):
        lines.append(f"{', '.join(keys)}: a probe is a logistic regression on the pooled features")
    return [*untrained, *map(_line, lines), *of_machine(settings)]


def of_training(settings: Recipe, why: str) -> list[str]:
    """The keys that say how to train, in one line with why nothing is trained. (The SVM reads
    train.class_weight, too.)"""
    keys = [
        key
        for key in recipe.changed(settings)
        if key.startswith("train.") and key != "train.class_weight"
    ]
    keys += ["data.no_flip"] * settings.data.no_flip
    return [_line(f"{', '.join(keys)}: {why}")] if keys else []


def of_advice(settings: Recipe) -> list[str]:
    """The keys of which advice knows nothing."""
    keys = [
        key
        for key in recipe.changed(settings)
        if key.startswith("svm.") or key in ("backbone.taps", "out")
    ]
    return [_line(f"{', '.join(keys)}: advice fits no SVM and writes no run")] if keys else []


def of_weights(settings: Recipe, balanced: bool) -> list[str]:
    """A line where the classes are weighed for the SVM (`balanced`) and not for the fine-tuning
    beside it."""
    if not balanced or settings.train.class_weight != "auto":
        return []
    return [
        "           classes are weighed for the SVM, not for fine-tuning; --set "
        "train.class_weight=balanced is for both"
    ]


def of_machine(settings: Recipe) -> list[str]:
    """A line where the machine cannot do what was asked as it was meant."""
    about = settings.backbone
    if about.precision == "bf16" and not device.has_bf16(device.ways(about.engine)[0].engine):
        return [
            "           bf16 is not in this machine's hardware: "
            "it is emulated, slower than --precision float32"
        ]
    return []


def _line(text: str) -> str:
    return f"not used   {text}"
