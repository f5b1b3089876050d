"""Whole networks of timm and torchvision, with their classifiers: with weights, or shapes alone."""

from __future__ import annotations

import contextlib
import difflib
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import timm
import timm.data
import torch
import torchvision.models
from torch import nn

from finetune.backbones import weights
from finetune.errors import UserError

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
EVALUATION = {
    "input_size": (3, 224, 224),
    "crop_pct": 224 / 256,
    "interpolation": "bilinear",
    "crop_mode": "center",
}


@dataclass(frozen=True)
class Torchvision:
    """A model that timm does not have: how it is made, where its classifier stands, what its
    published weights expect."""

    make: Callable[[], nn.Module]
    classifier: str
    weights: Any  # torchvision's enum of the published weights
    published: dict[str, tuple[float, float, float]]


TORCHVISION = {
    "alexnet": Torchvision(
        make=torchvision.models.alexnet,
        classifier="classifier.6",
        weights=torchvision.models.AlexNet_Weights,
        published=IMAGENET,
    ),
    "googlenet": Torchvision(
        make=functools.partial(
            torchvision.models.googlenet,
            aux_logits=False,
            init_weights=True,
            transform_input=False,
        ),
        classifier="fc",
        weights=torchvision.models.GoogLeNet_Weights,
        # These weights came from TensorFlow: torchvision's transform_input maps to this.
        published=HALVES,
    ),
}
AUXILIARY = "aux"  # the heads of GoogLeNet that only its first training used


@dataclass(frozen=True)
class Whole:
    """A network with its classifier, the key prefix of that classifier, and whose weights it
    has."""

    name: str
    module: Any  # timm's models carry attributes that nn.Module does not declare
    classifier: str
    source: weights.Source


def known(name: str) -> None:
    """Refuse a name that neither timm nor torchvision has here, with the nearest names."""
    if name in TORCHVISION or timm.is_model(name):
        return
    near = difflib.get_close_matches(name, [*timm.list_models(), *TORCHVISION], n=3)
    raise UserError(
        f"no backbone is called {name!r}",
        where="--backbone",
        fix=f"did you mean {', '.join(near)}?" if near else "see `finetune backbones`",
    )


def create(
    name: str, source: weights.Source, size: int | None = None, *, drop_path: float = 0.0
) -> Whole:
    """Create the model `name` with weights from `source`, its classifier included; in training its
    residual branches are left out with a probability that rises to `drop_path` (stochastic depth,
    Huang et al. 2016)."""
    known(name)
    if name not in TORCHVISION:
        whole = _timm(name, source, size, drop_path)
    elif drop_path:
        raise _no_drop_path(name)
    else:
        whole = _torchvision(name, source)
    _without_inplace(whole.module)
    return whole


def shapes(name: str, size: int | None = None) -> Whole:
    """Create the model `name` without memory for its tensors: it has shapes, and no values."""
    source = weights.Source("random", None, "shapes without values")
    with torch.device("meta"):
        return create(name, source, size)


def strip(whole: Whole) -> None:
    """Take the classifier off: the network then ends with the features that it read."""
    if whole.name not in TORCHVISION:
        whole.module.reset_classifier(0)
        return
    parent, _, child = TORCHVISION[whole.name].classifier.rpartition(".")
    setattr(whole.module.get_submodule(parent), child, nn.Identity())


def input_config(whole: Whole) -> dict[str, Any]:
    """Size, crop, filter, mean and deviation of the inputs that the weights expect."""
    if whole.name not in TORCHVISION:
        return timm.data.resolve_model_data_config(whole.module)
    own = whole.source.kind in ("file", "random")
    return EVALUATION | (IMAGENET if own else TORCHVISION[whole.name].published)


def _without_inplace(module: nn.Module) -> None:
    """An in-place ReLU would rewrite the tensor that a tap before it has read."""
    part: Any
    for part in module.modules():
        if hasattr(part, "inplace"):
            part.inplace = False


def _no_drop_path(name: str) -> UserError:
    return UserError(
        f"{name} has no residual branches that could be left out",
        where="train.drop_path",
        fix="leave train.drop_path out",
    )


def _timm(name: str, source: weights.Source, size: int | None, drop_path: float) -> Whole:
    # Networks with position tables need the size when they are created; the others take any.
    extra: dict[str, Any] = {"img_size": size} if size and takes_img_size(name) else {}
    if drop_path:
        if not _takes_drop_path(name):
            raise _no_drop_path(name)
        extra["drop_path_rate"] = drop_path
    module: Any
    if source.kind in ("hub", "cache"):
        overlay = {"file": str(source.path)} if source.path else None
        try:
            if source.kind == "hub":
                weights.look_up_hub()
            module = timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay=overlay, **extra
            )
        except Exception as error:  # the hub's clients raise their own zoo of types
            raise weights.hub_unreachable(name, error) from error
    else:
        with _same_random_weights():
            module = timm.create_model(name, pretrained=False, **extra)
    classifier = module.pretrained_cfg.get("classifier") or "head"
    prefixes = tuple(
        f"{p}." for p in (classifier if isinstance(classifier, (tuple, list)) else (classifier,))
    )
    if source.path is not None and source.kind == "package":
        weights.load_package(module, name, source.path)
    elif source.path is not None and source.kind == "file":
        source = weights.load_file(module, name, source, prefixes)
    return Whole(name, module, prefixes[0], source)


@functools.cache
def takes_img_size(name: str) -> bool:
    try:
        timm.create_model(name, pretrained=False, img_size=224)
    except TypeError:
        return False
    except Exception:  # a size that does not fit is still a model that takes one
        return True
    return True


@functools.cache
def _takes_drop_path(name: str) -> bool:
    with torch.device("meta"):
        try:
            module = timm.create_model(name, pretrained=False, drop_path_rate=0.5)
        except TypeError:
            return False
    return any(isinstance(part, timm.layers.DropPath) for part in module.modules())


@contextlib.contextmanager
def _same_random_weights() -> Iterator[None]:
    """Random weights are the same at every load, as those of a file are: a run can be made again, a
    network opened twice."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _torchvision(name: str, source: weights.Source) -> Whole:
    model = TORCHVISION[name]
    prefix = f"{model.classifier}."
    with warnings.catch_warnings(), _same_random_weights():
        warnings.simplefilter("ignore")  # GoogLeNet warns about its slow initialisation
        module = model.make()
    if source.kind == "file" and source.path is not None:
        source = weights.load_file(module, name, source, (prefix, AUXILIARY))
    elif source.kind != "random":
        try:
            tensors = model.weights.DEFAULT.get_state_dict(
                progress=False, check_hash=True, weights_only=True
            )
        except Exception as error:
            raise weights.hub_unreachable(name, error) from error
        own = {key: value for key, value in tensors.items() if not key.startswith(AUXILIARY)}
        module.load_state_dict(own)
    return Whole(name, module, prefix, source)
