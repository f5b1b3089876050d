"""The home of timm's and torchvision's models: create, stages, taps, freezing, and the
preprocessing of the weights."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.data
import torch
import torchvision.models
from numpy.typing import NDArray
from torch import nn

from finetune import files, hardware
from finetune.backbones import memory
from finetune.backbones import weights as weights_home
from finetune.backbones.extractor import Reader, _wide_modules
from finetune.backbones.stages import BATCH_NORMS, Backbone, Stage, split
from finetune.errors import UserError
from finetune.network import Network, Preprocess, Tap

TORCHVISION = {
    "alexnet": torchvision.models.AlexNet_Weights,
    "googlenet": torchvision.models.GoogLeNet_Weights,
}
PHOTO_TAGS = re.compile(r"in1k|in12k|in21k|in22k")  # timm's tags for ImageNet's photographs


def load(name: str, weights: str = "auto", size: int | None = None) -> Backbone:
    """Create the timm or torchvision model `name`, its classifier removed, in eval mode.

    `weights`: see `weights.find`; `size` overrides the input size of the weights (pixels). Raises
    `UserError` for an unknown name, weights that cannot be had and sizes that the model cannot
    take.
    """
    if name not in TORCHVISION and not timm.is_model(name):
        import difflib

        near = difflib.get_close_matches(name, [*timm.list_models(), *TORCHVISION], n=3)
        raise UserError(
            f"no backbone is called {name!r}",
            where="--backbone",
            fix=f"did you mean {', '.join(near)}?" if near else "see `finetune backbones`",
        )
    source = weights_home.find(name, weights)
    module, classifier, source = (
        _torchvision_model(name, source) if name in TORCHVISION else _timm_model(name, source, size)
    )
    part: Any  # timm's and torchvision's modules carry attributes that nn.Module does not declare
    for part in module.modules():
        if hasattr(part, "inplace"):
            part.inplace = (
                False  # an in-place ReLU would rewrite the tensor that a tap before it has read
            )
    module.eval()
    config = _input_config(name, module, source)
    side = size or int(config["input_size"][-1])
    try:
        memory.check(module, name, side, memory.LOADED)
        stages = _readable(module, split(module), side)
        network = _describe(name, module, stages, source, config, side)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"{name} cannot take images of {side} pixels ({str(error)[:100]})",
            where="input size",
            fix=f"its own size is {config['input_size'][-1]}{memory.near(module, side)}",
        ) from error
    return Backbone(module, network, stages, classifier)


def _timm_model(
    name: str, source: weights_home.Source, size: int | None
) -> tuple[Any, str, weights_home.Source]:
    # Networks with position tables need the size when they are created; the others take any.
    extra: dict[str, Any] = {"img_size": size} if size and _takes_img_size(name) else {}
    module: Any
    if source.kind in ("hub", "cache"):
        overlay = {"file": str(source.path)} if source.path else None
        try:
            if source.kind == "hub":
                weights_home.look_up_hub()
            module = timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay=overlay, **extra
            )
        except Exception as error:  # the hub's clients raise their own zoo of types
            raise weights_home.hub_unreachable(name, error) from error
    else:
        with _same_random_weights():
            module = timm.create_model(name, pretrained=False, **extra)
    classifier = module.pretrained_cfg.get("classifier") or "head"
    prefixes = tuple(
        f"{p}." for p in (classifier if isinstance(classifier, (tuple, list)) else (classifier,))
    )
    if source.path is not None and source.kind == "package":
        weights_home.load_package(module, name, source.path)
    elif source.path is not None and source.kind == "file":
        source = weights_home.load_file(module, name, source, prefixes)
    module.reset_classifier(0)
    return module, prefixes[0], source


@contextlib.contextmanager
def _same_random_weights() -> Iterator[None]:
    """Random weights are the same at every load, as those of a file are: a run can be made again, a
    network opened twice."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@functools.cache
def _takes_img_size(name: str) -> bool:
    try:
        timm.create_model(name, pretrained=False, img_size=224)
    except TypeError:
        return False
    except Exception:  # a size that does not fit is still a model that takes one
        return True
    return True


def _torchvision_model(
    name: str, source: weights_home.Source
) -> tuple[nn.Module, str, weights_home.Source]:
    with warnings.catch_warnings(), _same_random_weights():
        warnings.simplefilter("ignore")  # GoogLeNet warns about its slow initialisation
        if name == "alexnet":
            module, classifier = torchvision.models.alexnet(weights=None), "classifier.6."
        else:
            module = torchvision.models.googlenet(
                weights=None,
                aux_logits=False,
                init_weights=source.kind == "random",
                transform_input=False,
            )
            classifier = "fc."
    if source.kind == "file" and source.path is not None:
        source = weights_home.load_file(module, name, source, (classifier, "aux"))
    elif source.kind != "random":
        try:
            tensors = TORCHVISION[name].DEFAULT.get_state_dict(
                progress=False, check_hash=True, weights_only=True
            )
        except Exception as error:
            raise weights_home.hub_unreachable(name, error) from error
        module.load_state_dict(
            {key: value for key, value in tensors.items() if not key.startswith("aux")}
        )
    if name == "alexnet":
        module.classifier[6] = nn.Identity()
    else:
        module.fc = nn.Identity()
    return module, classifier, source


def _input_config(name: str, module: nn.Module, source: weights_home.Source) -> dict[str, Any]:
    if name not in TORCHVISION:
        return timm.data.resolve_model_data_config(module)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    if name == "googlenet" and source.kind not in ("file", "random"):
        # these weights came from TensorFlow: torchvision's transform_input maps to this
        mean = std = (0.5, 0.5, 0.5)
    shape = {
        "input_size": (3, 224, 224),
        "crop_pct": 224 / 256,
        "interpolation": "bilinear",
        "crop_mode": "center",
    }
    return shape | {"mean": mean, "std": std}


def _readable(module: nn.Module, stages: Sequence[Stage], side: int) -> tuple[Stage, ...]:
    """Stages whose end is really called as a module; the others stay freeze points, without a
    tap."""
    called: set[str] = set()
    hooks = [
        module.get_submodule(stage.end).register_forward_hook(
            lambda *_, name=stage.name: called.add(name)
        )
        for stage in stages
        if stage.end
    ]
    try:
        memory.without_numbers(module, (1, 3, side, side), torch.float32)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(stage if stage.name in called else replace(stage, end=None) for stage in stages)


def _describe(
    name: str,
    module: Any,
    stages: tuple[Stage, ...],
    source: weights_home.Source,
    config: dict[str, Any],
    side: int,
) -> Network:
    tag = "in1k" if name in TORCHVISION else str(module.pretrained_cfg.get("tag") or "in1k")
    pretraining = {"random": "random", "file": "other"}.get(source.kind) or (
        "imagenet" if PHOTO_TAGS.search(tag) else "other"
    )
    preprocess = Preprocess(
        size=side,
        resize=math.floor(side / config["crop_pct"]),
        interpolation=str(config["interpolation"]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        squash=config["crop_mode"] == "squash",
    )
    digest = weights_home.tensor_digest(module.state_dict())
    names = tuple(stage.name for stage in stages)
    bare = Network(name, digest, source.words, pretraining, preprocess, {}, names)
    taps = [Tap("pooled"), *(Tap(wide) for wide in _wide_modules(module))]
    taps += [Tap(stage.name, grid=grid) for stage in stages if stage.end for grid in (1, 3)]
    if any(isinstance(part, BATCH_NORMS) for part in module.modules()):
        taps.append(Tap("moments"))
    reader = Reader(Backbone(module, bare, stages, ""), taps)
    outputs = memory.without_numbers(reader, (1, side, side, 3), torch.uint8)
    return replace(
        bare,
        widths={str(tap): int(output.shape[1]) for tap, output in zip(taps, outputs, strict=True)},
    )


def save(
    backbone: Backbone,
    path: Path,
    head: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
) -> None:
    """Write the trunk as safetensors, and a linear head `(weight, bias)` under the classifier's own
    names, as timm expects it."""
    from safetensors.torch import save as to_bytes

    tensors = {
        key: value.detach().cpu().contiguous().clone()
        for key, value in backbone.module.state_dict().items()
    }
    if head is not None:
        tensors[f"{backbone.classifier}weight"] = torch.from_numpy(np.ascontiguousarray(head[0]))
        tensors[f"{backbone.classifier}bias"] = torch.from_numpy(np.ascontiguousarray(head[1]))
    files.write_bytes(path, to_bytes(tensors))


def described(backbone: Backbone, source: str) -> Backbone:
    """The backbone after training: its digest follows its tensors, and its origin says what
    happened to them."""
    network = replace(
        backbone.network,
        digest=weights_home.tensor_digest(backbone.module.state_dict()),
        source=source,
    )
    return replace(backbone, network=network)


def forward_seconds(backbone: Backbone, batch: int = 8) -> float:
    """Seconds that one image takes forward through the trunk in torch, on this machine now: what a
    plan's cost is made of."""
    hardware.keep_memory()
    side = backbone.network.preprocess.size
    pixels = torch.zeros(batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        backbone.module(pixels)  # the first pass pays for allocations
        start = time.perf_counter()
        backbone.module(pixels)
    return (time.perf_counter() - start) / batch


# --------------------------------------------------------------------------------------------- taps


# ----------------------------------------------------------------------------------------- freezing
