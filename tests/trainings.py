"""Small trainings: sixty images of three colours, small networks with seeded weights, and what two
of them must share."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.models.vgg
import torch
from PIL import Image
from torch import nn

from finetune.backbones import create as home
from finetune.backbones import stages
from finetune.backbones.stages import Backbone
from finetune.data.images import ImageSet
from finetune.network import Network, Preprocess
from finetune.training import inputs as feeding
from finetune.training import loop
from finetune.training.config import Training
from finetune.training.loop import TrainResult

SIDE = 64
FAMILIES = ("resnet", "efficientnet", "convnext", "vit", "vgg")
TRAIN, VAL = np.arange(0, 45), np.arange(45, 60)


def colours() -> ImageSet:
    """60 noisy images of 48 × 48 pixels in three colours: the colour is the class."""
    rng = np.random.default_rng(0)
    encoded: dict[str, bytes] = {}
    for i in range(60):
        pixels = rng.integers(0, 160, (48, 48, 3), dtype=np.uint8)
        pixels[:, :, i % 3] += rng.integers(40, 95, dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        encoded[f"{i}.png"] = buffer.getvalue()
    labels = np.arange(60) % 3
    return ImageSet(
        "colours",
        Path("colours"),
        tuple(encoded),
        labels,
        ("red", "green", "blue"),
        source=encoded.__getitem__,
    )


def build(module: nn.Module, name: str = "own", size: int = SIDE) -> Backbone:
    """A backbone of a module that is in no catalogue."""
    module.eval()
    with torch.no_grad():
        width = int(module(torch.zeros(1, 3, size, size)).flatten(1).shape[1])
    pre = Preprocess(size, size, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    network = Network(name, "0", "random", "random", pre, {"pooled": width})
    return Backbone(module, network, stages.split(module), "")


def make(family: str = "efficientnet") -> Backbone:
    """A small network with seeded random weights."""
    torch.manual_seed(0)
    if family == "vgg":
        shape = [8, "M", 12, 12, "M", 16, "M"]
        return build(timm.models.vgg.VGG(shape, num_classes=0, mlp_ratio=0.004))  # type: ignore[arg-type]
    return home.load(f"test_{family}", "random", None if family == "vit" else SIDE)


def plan(backbone: Backbone, **changes: Any) -> Training:
    """The last stage moves, for two quick epochs."""
    values: dict[str, Any] = {
        "trainable": stages.last_stages(backbone, 1),
        "epochs": 2,
        "batch_size": 16,
        "views": 2,
        "lr": 0.01,
    }
    return Training(**{**values, **changes})


def fit(
    backbone: Backbone, data: ImageSet, training: Training | None = None, **changes: Any
) -> TrainResult:
    values = {"train_index": TRAIN, "val_index": VAL, "classes": 3, "seed": 0}
    return loop.fit(backbone, data, training=training or plan(backbone), **{**values, **changes})


def tensors(backbone: Backbone) -> dict[str, torch.Tensor]:
    """Every parameter and every buffer, those that are not saved included."""
    module = backbone.module
    return {
        key: t.detach().clone() for key, t in (*module.named_parameters(), *module.named_buffers())
    }


def keys_of(backbone: Backbone, stages: tuple[str, ...]) -> set[str]:
    return {key for stage in backbone.stages if stage.name in stages for key in stage.keys}


def outcome(backbone: Backbone, result: TrainResult) -> dict[str, Any]:
    """Everything that two equal trainings must have in common, to the bit."""
    history = [
        {key: value for key, value in row.items() if key != "seconds"} for row in result.history
    ]
    plain = {**dataclasses.asdict(result), "history": history}
    digest = home.weights_home.tensor_digest(tensors(backbone))
    return {
        **{key: v.tobytes() if isinstance(v, np.ndarray) else v for key, v in plain.items()},
        "weights": digest,
    }


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no activation be stored."""
    monkeypatch.setattr(feeding, "STORE_LIMIT", 0)
