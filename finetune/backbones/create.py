"""A backbone from its name: loaded, its stages and taps found and described, saved, and timed."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from finetune import files, hardware
from finetune.backbones import architectures, memory
from finetune.backbones import weights as weights_home
from finetune.backbones.extractor import Reader, _wide_modules
from finetune.backbones.stages import BATCH_NORMS, Backbone, Stage, split
from finetune.network import Network, Preprocess, Tap

PHOTO_TAGS = re.compile(r"in1k|in12k|in21k|in22k")  # timm's tags for ImageNet's photographs


def load(
    name: str, weights: str = "auto", size: int | None = None, *, drop_path: float = 0.0
) -> Backbone:
    """Create the timm or torchvision model `name`, its classifier removed, in eval mode.

    `weights`: see `weights.find`; `size` overrides the input size of the weights (pixels);
    `drop_path`: see `architectures.create`. Raises
    `UserError` for an unknown name, weights that cannot be had and sizes that the model cannot
    take.
    """
    source = weights_home.find(name, weights)
    whole = architectures.create(name, source, size, drop_path=drop_path)
    architectures.strip(whole)
    module, source = whole.module, whole.source
    module.eval()
    config = architectures.input_config(whole)
    side = size or int(config["input_size"][-1])
    try:
        memory.check(module, name, side, memory.LOADED)
        stages = _readable(module, split(module), side)
        network = _describe(name, module, stages, source, config, side)
    except (RuntimeError, AssertionError) as error:
        own = int(config["input_size"][-1])
        raise memory.unfit(module, name, side, own, error) from error
    return Backbone(module, network, stages, whole.classifier)


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
    tag = str(getattr(module, "pretrained_cfg", {}).get("tag") or "in1k")
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
