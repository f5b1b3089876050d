"""A run as a plain folder of timm: `timm.create_model("local-dir:…")` opens it, alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from finetune import files
from finetune.backbones import architectures, create
from finetune.classifier import Classifier
from finetune.errors import UserError
from finetune.evaluation.ensemble import AnyModel
from finetune.export.formats import Ask, Floats
from finetune.heads.head import Head
from finetune.network import Tap


def plain(model: AnyModel, where: Path) -> tuple[Classifier, Head]:
    """The model as timm's own form has room for it: one linear layer on the pooled features.

    Raises `UserError` that says what is in the way, and the formats that hold any run.
    """
    if not isinstance(model, Classifier):
        why = f"is an average of {len(model.members)} models, and timm's form holds one"
    elif model.network.name in architectures.TORCHVISION:
        why = f"has the network {model.network.name}, which timm does not have"
    elif not isinstance(model.head, Head):
        why = f"ends with a kernel machine ({model.head.kind}), and timm's form has a linear layer"
    elif model.head.taps != (Tap("pooled"),):
        taps = " + ".join(map(str, model.head.taps))
        why = f"reads {taps}, and timm's classifier reads the pooled end alone"
    elif model.head.normalize:
        why = "reads features of length 1, and timm's classifier reads them as they are"
    elif model.views != ("",):
        why = "averages an image and its mirror image, and timm's form looks once"
    else:
        return model, model.head
    fix = (
        "--to onnx, openvino or torch-export hold any run; or fit one that timm holds: "
        "--strategy full --set 'train.taps=[pooled]' --set policy.ship=fine-tuned"
    )
    raise UserError(f"the run {why}", where=where, fix=fix)


def write(model: Classifier, head: Head, folder: Path) -> None:
    """Write config.json and model.safetensors. The temperature is in the last layer, so that the
    softmax of what timm gives is calibrated."""
    pair = (head.weight / np.float32(head.temperature), head.bias / np.float32(head.temperature))
    backbone = model.load()
    own: Any = backbone.module  # timm's models carry attributes that nn.Module does not declare
    create.save(backbone, folder / "model.safetensors", pair)
    pre, classes = model.network.preprocess, list(head.classes)
    config: dict[str, Any] = {
        "architecture": model.network.name,
        "num_classes": len(classes),
        "num_features": int(head.weight.shape[1]),
        "label_names": classes,
        "pretrained_cfg": {
            "input_size": [3, pre.size, pre.size],
            "fixed_input_size": False,
            "mean": list(pre.mean),
            "std": list(pre.std),
            "interpolation": pre.interpolation,
            "crop_pct": pre.size / pre.resize,
            "crop_mode": "squash" if pre.squash else "center",
            "num_classes": len(classes),
            "first_conv": own.pretrained_cfg.get("first_conv"),
            "classifier": own.pretrained_cfg.get("classifier"),
        },
    }
    if architectures.takes_img_size(model.network.name):
        config["model_args"] = {"img_size": pre.size}
    files.write_json(folder / "config.json", config)


def opened(folder: Path) -> tuple[str, Ask]:
    """timm, and the model asked through it as its users do."""
    import timm
    import torch

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def ask(x: Floats) -> Floats:
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(x)).softmax(1))

    return "timm", ask
