"""`Recipe`: everything `finetune fit` can be told, as one frozen, strict value with a default for
each key.

A recipe is YAML 1.2 (`1e-3` is a number, `no` is text, a repeated key is an error). Unknown keys
and wrong values are refused before any work starts, each with its file, its line and what would be
right. `None` (written `null`) in the `train` section means that the policy decides. Paths are
relative to the folder that the command is started in.
"""

from __future__ import annotations

import difflib
import importlib.resources
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from finetune.data.columns import Layout
from finetune.data.faults import Rules
from finetune.errors import UserError
from finetune.files import digest_json

PACKAGE = "finetune.recipes"

# Keys that version 0.1.0 did not know: at their default they are left out of the digest, so that
# its runs keep theirs.
LATER: tuple[str, ...] = (
    *(
        "data.path_column",
        "data.label_column",
        "data.split_column",
        "data.group_column",
        "data.image_root",
    ),
    *("train.taps", "train.flip", "train.decay_norms", "train.drop_path", "policy.ship"),
    *("data.on_conflict", "data.on_leak", "data.on_empty_class"),
    *("data.on_stray", "data.no_header", "data.folds", "data.labels"),
    *("policy.refit",),
)
# where things lie: no part of what is asked for
PLACES = ("data.data", "data.test", "data.image_root", "data.labels", "out")


def _one_or_more(value: object) -> object:
    return (
        (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
    )


def _listed(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _strategy(value: str) -> str:
    if not re.fullmatch(r"auto|svm|probe|half|full|scratch|stages:[1-9]\d*", value):
        raise ValueError
    return value


Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )


class Data(Section):
    """The images, and how they are divided."""

    data: Text | None = Field(
        default=None,
        description="a folder, a CSV table or a named set such as sklearn:digits; "
        "null: named on the command line",
    )
    test: Text | None = Field(
        default=None,
        description="a folder or CSV table of test images, or none: train on "
        "all of them; null: taken from the data",
    )
    test_share: Share = Field(
        default=0.2, description="a share between 0 and 1: the test images where none are given"
    )
    validation_share: Share = Field(
        default=0.15,
        description="a share between 0 and 1: the part of the rest that chooses between models",
    )
    folds: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="2 or more: judge the whole procedure in so many folds of all images, and "
        "train what ships on all of them; null: test images judge",
    )
    shots: Count | None = Field(
        default=None, description="training images per class, 1 or more; null: all"
    )
    seed: int = Field(
        default=0,
        ge=0,
        description="random seed of splits, order and augmentation: a whole number, 0 or more",
    )
    on_bad_image: Literal["stop", "skip"] = Field(
        default="stop", description="stop or skip: what to do with unreadable images"
    )
    on_conflict: Literal["stop", "skip", "first"] = Field(
        default="stop",
        description="stop, skip (leave all out) or first (keep it): what to do with images of the "
        "same content under two labels",
    )
    on_leak: Literal["tell", "stop", "skip"] = Field(
        default="tell",
        description="tell, stop or skip (leave them out of the training): what to do with copies "
        "of test images",
    )
    on_empty_class: Literal["stop", "skip"] = Field(
        default="stop",
        description="stop or skip (leave it out): what to do with a class without training images",
    )
    on_stray: Literal["stop", "skip"] = Field(
        default="stop",
        description="stop or skip (leave them out): what to do with images outside of the class "
        "folders, and folders beside train, val and test",
    )
    no_flip: bool = Field(
        default=False,
        description="true where a mirrored image would belong to another class, else false",
    )
    path_column: Text | None = Field(
        default=None,
        description="the column of a table that holds the paths; null: found by its name",
    )
    label_column: Text | None = Field(
        default=None, description="the column that holds the classes; null: found by its name"
    )
    split_column: Text | None = Field(
        default=None,
        description="the column that holds train, val and test, or none; null: found by its name",
    )
    group_column: Text | None = Field(
        default=None,
        description="the column that holds what must stay together, "
        "or none; null: found by its name",
    )
    image_root: Text | None = Field(
        default=None,
        description="the folder that a table's paths start from; null: that of the table",
    )
    no_header: bool = Field(
        default=False,
        description="true where the first line of a table is a row: its columns are called 1, 2 …",
    )
    labels: Text | None = Field(
        default=None,
        description="a table of corrected labels, path,given,corrected, as `finetune check "
        "--labels` prepares it; null: none",
    )


class Backbone(Section):
    """The pretrained network, and how it is run."""

    names: Annotated[
        tuple[Text, ...], BeforeValidator(_one_or_more), Field(min_length=1, max_length=1)
    ] = Field(
        default=("tf_efficientnet_lite0",),
        description="one name: a timm model, alexnet or googlenet; several are "
        "compared by `finetune compare-backbones`",
    )
    weights: Text = Field(
        default="auto", description="auto, random, or the path of a .safetensors or .pth file"
    )
    engine: Literal["auto", "openvino", "torch"] = Field(
        default="auto", description="auto, openvino or torch"
    )
    precision: Literal["auto", "bf16", "float32"] = Field(
        default="auto", description="auto, bf16 or float32"
    )
    frame: Literal["auto", "crop", "whole"] = Field(
        default="auto",
        description="auto (cross-validated), crop (the weights' own centre "
        "crop) or whole (squashed, nothing cut)",
    )
    taps: (
        Literal["auto"] | Annotated[tuple[Text, ...], BeforeValidator(_listed), Field(min_length=1)]
    ) = Field(default="auto", description="auto, or a list of taps such as [pooled, stage5/3x3]")


class Policy(Section):
    """How much of the backbone is trained."""

    strategy: Annotated[str, AfterValidator(_strategy)] = Field(
        default="auto",
        description="auto, svm, probe, stages:K (the last K stages), half, full or scratch",
    )
    budget: Positive | None = Field(
        default=None, description="minutes that fine-tuning may take, above 0; null: no limit"
    )
    ship: Literal["auto", "svm", "fine-tuned", "average"] = Field(
        default="auto",
        description="auto (the best on images that none was fitted on), svm, fine-tuned or average "
        "(of both)",
    )
    refit: bool = Field(
        default=True,
        description="fit what ships again on training and validation images together; false keeps "
        "the validation images unseen, for soups and for the line between old and new weights",
    )


class Train(Section):
    """Overrides of the policy's plan. null: the policy decides."""

    optimizer: Literal["adamw", "sgd"] | None = Field(
        default=None, description="adamw, sgd or null"
    )
    lr: Positive | None = Field(
        default=None, description="the head's learning rate, above 0, or null"
    )
    trunk_lr_scale: NotNegative | None = Field(
        default=None, description="the trunk's learning rate over the head's, 0 or more, or null"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="factor per stage towards the stem, above 0 and at most 1, or null",
    )
    epochs: Count | None = Field(default=None, description="a whole number, 1 or more, or null")
    batch_size: Count | None = Field(
        default=None, description="images per step, 1 or more, or null"
    )
    schedule: (
        Literal["cosine", "step", "linear", "constant", "rsqrt", "onecycle", "restarts", "plateau"]
        | None
    ) = Field(
        default=None,
        description="cosine, step, linear, constant, rsqrt (inverse square root), onecycle, "
        "restarts (cosine three times over), plateau (a fifth when the validation loss no longer "
        "falls) or null",
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="share of the steps, 0 or more and below 1, or null"
    )
    weight_decay: NotNegative | None = Field(default=None, description="0 or more, or null")
    decay_norms: bool | None = Field(
        default=None,
        description="true, false or null: weight decay on norms, biases and tokens, too",
    )
    drop_path: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None,
        description="probability with which the last residual branch is left out in a step, the "
        "earlier ones less; 0 or more and below 1, or null",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="0 or more and below 1, or null"
    )
    mixup: NotNegative | None = Field(
        default=None, description="alpha of the Beta distribution, 0 (off) or more, or null"
    )
    clip: NotNegative | None = Field(
        default=None, description="largest gradient norm, 0 (off) or more, or null"
    )
    ema: bool | None = Field(
        default=None, description="true, false or null: a moving average of the weights"
    )
    patience: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="epochs without gain before it stops, 0 (never) or more, or null"
    )
    l2_sp: NotNegative | None = Field(
        default=None, description="pull towards the pretrained weights, 0 (off) or more, or null"
    )
    augment: Literal["none", "affine", "photo", "light", "medium", "strong"] | None = Field(
        default=None,
        description="none, affine (turned, shifted, scaled, sheared), photo, light, medium, strong "
        "(crops and colours) or null",
    )
    flip: bool | None = Field(
        default=None,
        description="true or false: half of the views are mirrored; null: unless data.no_flip, or "
        "the images are tiny and unlike photographs",
    )
    taps: Annotated[tuple[Text, ...], BeforeValidator(_listed)] | None = Field(
        default=None,
        description="the taps that the head reads: svm (those of the SVM, and the pooled end), "
        "pooled (then plain timm opens the run), a list, or null",
    )
    input_size: Annotated[int, Field(ge=16)] | None = Field(
        default=None, description="pixels per side, 16 or more, or null"
    )
    class_weight: Literal["auto", "none", "balanced"] = Field(
        default="auto",
        description="auto (weighs the classes of an imbalanced set for the SVM, "
        "not for fine-tuning), none or balanced (both)",
    )


class Svm(Section):
    """The SVM, which always runs beside fine-tuning."""

    kernels: (
        Literal["auto"]
        | Annotated[
            tuple[Literal["linear", "logistic", "rbf", "lssvm"], ...],
            BeforeValidator(_listed),
            Field(min_length=1),
        ]
    ) = Field(default="auto", description="auto, or a list of linear, logistic, rbf and lssvm")
    folds: Annotated[int, Field(ge=2)] = Field(
        default=5, description="folds of the cross-validation, 2 or more"
    )
    C: (
        Literal["auto"]
        | Annotated[tuple[Positive, ...], BeforeValidator(_listed), Field(min_length=1)]
    ) = Field(default="auto", description="auto, or a list of numbers above 0")


class Recipe(Section):
    """The whole job. Give a function below the command line its own section, not this."""

    data: Data = Data()
    backbone: Backbone = Backbone()
    policy: Policy = Policy()
    train: Train = Train()
    svm: Svm = Svm()
    out: Text | None = Field(
        default=None, description="the run's folder; null: runs/<name>-<digest>"
    )


# --- reading ------------------------------------------------------------------------------------


def load(source: str | Path) -> Recipe:
    """Read the recipe file `source`, or the shipped recipe of that name. Raises `UserError` with
    file and line."""
    path = Path(source)
    if path.is_file():
        try:
            return _recipe(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise UserError(
                f"not UTF-8 text (byte {error.start})", where=path, fix="save it as UTF-8"
            ) from error
        except OSError as error:
            raise UserError(
                f"cannot be read ({error.strerror})", where=path, fix="check its permissions"
            ) from error
    return _recipe(_shipped(str(source)).read_text(encoding="utf-8"), f"{source}.yaml")


def override(recipe: Recipe, assignments: Sequence[str]) -> Recipe:
    """Apply `section.key=value` texts, the value read as YAML; of two for one key the last
    holds."""
    return update(recipe, assigned(assignments), where="--set")


def assigned(assignments: Sequence[str]) -> dict[str, object]:
    """The values of `section.key=value` texts by their keys, not yet checked."""
    changes: dict[str, object] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UserError(
                f"{text!r} assigns nothing",
                where="--set",
                fix="write section.key=value, as in train.lr=1e-3",
            )
        changes[key.strip()] = _parse(value, "--set", key.strip())[0]
    return changes


def update(
    recipe: Recipe,
    changes: Mapping[str, object],
    where: str = "recipe",
    given: Mapping[str, str] | None = None,
) -> Recipe:
    """`recipe` with the values of dotted keys replaced, checked like a file.

    Errors name the option that gave a key where `given` has it, else `where`.
    """
    tree, options = recipe.model_dump(), given or {}
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        known = all_keys()
        if key in Recipe.model_fields and key not in known:
            raise UserError(
                f"{key} is a section",
                where=where,
                fix=f"name one of its keys: "
                f"{', '.join(k for k in known if k.startswith(key + '.'))}",
            )
        if key not in known:
            raise UserError(f"no key {key}", where=where, fix=suggestion(key))
        (tree[section] if section else tree)[name] = value
    return _validated(tree, lambda path: options.get(".".join(path), where))


def _recipe(text: str, where: str) -> Recipe:
    tree, lines = _parse(text, where)
    if tree is None:
        return Recipe()
    if not isinstance(tree, dict):
        raise UserError(
            f"expected sections, found {_shown(tree)}",
            where=where,
            fix=f"start with one of: {', '.join(Recipe.model_fields)}",
        )

    def place(path: tuple[str, ...]) -> str:
        while path and path not in lines:
            path = path[:-1]
        return f"{where}:{lines[path]}" if path else where

    return _validated(tree, place)


def _parse(text: str, where: str, key: str = "") -> tuple[Any, dict[tuple[str, ...], int]]:
    """The value of a YAML text, and the line of every key in it."""
    yaml = YAML(typ="safe", pure=True)  # the C parser reads YAML 1.1, where `no` is false
    try:
        value = yaml.load(text)
        root = yaml.compose(io.StringIO(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None and not key else ""
        problem = re.sub(r"\s+", " ", str(error.problem or error.context or "cannot be read"))
        said = re.match(r'found duplicate key "(.*?)"', problem)
        what = (
            f"the key {said[1]} stands twice"
            if said
            else f"not valid YAML: {problem.split(' To suppress')[0]}"
        )
        raise UserError(
            f"{key}: {what}" if key else what,
            where=f"{where}{line}",
            fix="keep one of them" if said else "mend this line",
        ) from error
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(
            f"not valid YAML: {str(error).splitlines()[0]}", where=where, fix="mend the file"
        ) from error
    return value, dict(_lines(root, ()))


def _lines(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    # deeper there are no keys, but perhaps a cycle of aliases
    if len(path) < 2 and node is not None and node.id == "mapping":
        for key, value in node.value:
            here = (*path, str(key.value))
            yield here, key.start_mark.line + 1
            yield from _lines(value, here)


def _validated(tree: dict[Any, Any], place: Any) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        found = {path: _message(path, value, kind) for path, value, kind in _faults(error)}
    (first, (what, fix)), *rest = found.items()
    more = "".join(
        f"\n{place(path)}: {text}" + (f" ({hint})" if hint else "") for path, (text, hint) in rest
    )
    raise UserError(
        what + more if not more else f"{what} ({fix}){more}",
        where=place(first),
        fix=fix if not more else "mend these lines",
    ) from None


def _faults(error: ValidationError) -> Iterator[tuple[tuple[str, ...], object, str]]:
    """Each faulty key once, whatever branch of a union or item of a list the validator complained
    about."""
    for fault in error.errors(include_url=False):
        yield (
            tuple(
                str(part) for part in fault["loc"][: 1 if fault["loc"][0] not in _sections() else 2]
            ),
            fault["input"],
            fault["type"],
        )


def _message(path: tuple[str, ...], value: object, kind: str) -> tuple[str, str]:
    key = ".".join(path)
    if kind in ("extra_forbidden", "invalid_key"):
        return f"no key {key}", suggestion(key)
    section = _sections().get(path[0])
    if section and len(path) == 1:
        return (
            f"{key} is a section, and was given {_shown(value)}",
            f"give it keys: {', '.join(section.model_fields)}",
        )
    description = (section or Recipe).model_fields[path[-1]].description
    return f"{key} cannot be {_shown(value)}", f"it takes {description}"


def _shown(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, TypeError):  # a cycle of aliases, a key that is a list
        text = str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _sections() -> dict[str, type[Section]]:
    return {"data": Data, "backbone": Backbone, "policy": Policy, "train": Train, "svm": Svm}


def all_keys() -> list[str]:
    """All keys of a recipe, dotted."""
    dotted = [
        f"{name}.{key}" for name, section in _sections().items() for key in section.model_fields
    ]
    return [*dotted, *(name for name in Recipe.model_fields if name not in _sections())]


def suggestion(key: str) -> str:
    """What may have been meant by a key that does not exist."""
    known = all_keys()
    tails = {known_key.rpartition(".")[2]: known_key for known_key in reversed(known)}
    section, _, tail = key.rpartition(".")
    short = tails if section else {**tails, **dict.fromkeys(_sections(), "")}
    if tail in tails:  # the right name in the wrong section, or in none
        return f"did you mean {tails[tail]}?"
    near = difflib.get_close_matches(key, known, 1, 0.7) or difflib.get_close_matches(
        tail, list(short), 1, 0.7
    )
    return (
        f"did you mean {short.get(near[0]) or near[0]}?"
        if near
        else f"the keys are: {', '.join(known)}"
    )


# --- writing ------------------------------------------------------------------------------------


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out and every key explained; `load` gives back
    an equal recipe."""
    lines = ["# What this run was told. Feeds back into `finetune fit --recipe`."]
    for name, field in Recipe.model_fields.items():
        value = getattr(recipe, name)
        if isinstance(value, Section):
            lines += ["", f"{name}:  # {(type(value).__doc__ or '').strip()}"]
            lines += [
                f"  {key}: {_scalar(getattr(value, key))}  # {inner.description}"
                for key, inner in type(value).model_fields.items()
            ]
        else:
            lines += ["", f"{name}: {_scalar(value)}  # {field.description}"]
    return "\n".join(lines) + "\n"


def digest(recipe: Recipe) -> str:
    """Digest of what the recipe asks for, wherever the images lie and the run goes: the images have
    their own digest."""
    tree = recipe.model_dump(mode="json")
    for key in PLACES:
        section, _, name = key.rpartition(".")
        (tree[section] if section else tree)[name] = None
    for key in LATER:
        section, _, name = key.rpartition(".")
        if tree[section][name] == _sections()[section].model_fields[name].default:
            del tree[section][name]
    return digest_json(tree)


def changed(recipe: Recipe) -> dict[str, object]:
    """The keys that are not at their default, with their values."""
    default = Recipe()
    return {key: get(recipe, key) for key in all_keys() if get(recipe, key) != get(default, key)}


def get(recipe: Recipe, key: str) -> object:
    """The value of a dotted key."""
    section, _, name = key.rpartition(".")
    return getattr(getattr(recipe, section) if section else recipe, name)


def shown(value: object) -> str:
    """A value as a recipe writes it, on one line and not too long."""
    text = _scalar(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _scalar(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_scalar(item) for item in value)}]"
    if isinstance(value, str):
        return (
            value
            if re.fullmatch(r"[A-Za-z][\w/-]*(:\w+)?", value, re.ASCII)
            and value.lower() not in ("null", "true", "false")
            else _quoted(value)
        )
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)
    return json.dumps(value)


def _quoted(text: str) -> str:
    escape = {'"': '\\"', "\\": "\\\\"}
    return (
        '"'
        + "".join(escape.get(c) or (c if c.isprintable() else f"\\U{ord(c):08x}") for c in text)
        + '"'
    )


# --- recipes that come with the package ---------------------------------------------------------


def shipped() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(
        item.name.removesuffix(".yaml")
        for item in _folder().iterdir()
        if item.name.endswith(".yaml")
    )


def describe(name: str) -> str:
    """The header of a shipped recipe: its command, hardware, time and expected result."""
    lines = []
    for line in _shipped(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
    return "\n".join(lines)


def source(name: str) -> str:
    """The text of a shipped recipe, to be copied and changed."""
    return _shipped(name).read_text(encoding="utf-8")


def _shipped(name: str) -> Traversable:
    names = shipped()
    if name in names:
        return _folder() / f"{name}.yaml"
    near = difflib.get_close_matches(name.removesuffix(".yaml"), names, 1)
    fix = (
        f"did you mean {near[0]}?"
        if near
        else f"give the path of a YAML file, or one of: {', '.join(names)}"
    )
    raise UserError("no such recipe", where=name, fix=fix)


def _folder() -> Traversable:
    try:
        return importlib.resources.files(PACKAGE)
    except (
        ModuleNotFoundError
    ):  # a checkout that is not installed: the folder stands beside the package
        return Path(__file__).resolve().parent.parent / "recipes"


def layout(about: Data) -> Layout:
    """What a recipe says of tables."""
    return Layout(
        about.path_column,
        about.label_column,
        about.split_column,
        about.group_column,
        about.image_root,
        header=not about.no_header,
    )


def is_tested(about: Data) -> bool:
    """Whether test images are held out of what ships."""
    return about.test != "none" and about.folds is None


def rules(about: Data) -> Rules:
    """What a recipe says of images at fault."""
    return Rules(
        about.on_bad_image,
        about.on_conflict,
        about.on_leak,
        about.on_empty_class,
        about.on_stray,
    )
