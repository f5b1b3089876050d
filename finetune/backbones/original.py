"""The classifier that a pretrained network came with: what it knew before it was fine-tuned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from finetune.backbones import architectures, weights

Floats = NDArray[np.float32]

TOLERANCE = 1e-3  # of logits, relative to the largest: where the classifier is one linear layer
SYNSET = re.compile(r"n\d{8}")  # WordNet's names of ImageNet's classes


@dataclass(frozen=True)
class OriginalHead:
    """One linear layer on the pooled features: `weight` (C, width), `bias` (C,)."""

    weight: Floats
    bias: Floats

    def scores(self, pooled: Floats) -> Floats:
        """The logits `(n, C)` of pooled features `(n, width)`."""
        return np.asarray(pooled @ self.weight.T + self.bias, dtype=np.float32)


def original_head(name: str, origin: str, size: int) -> OriginalHead | str:
    """The pretrained classifier of the model `name` with weights from `origin` (see
    `weights.find`), or why there is none to use: random weights, or no single linear layer."""
    source = weights.find(name, origin)
    if source.kind == "random":
        return "its weights were random: it knew nothing before"
    whole = architectures.create(name, source, size)
    module = whole.module.eval()
    layer = dict(module.named_modules()).get(whole.classifier.rstrip("."))
    if not isinstance(layer, nn.Linear):
        return "the classifier that it came with is not one linear layer"
    weight, bias = layer.weight.detach().clone(), layer.bias
    offset = torch.zeros(len(weight)) if bias is None else bias.detach().clone()
    sample = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(sample)
        architectures.strip(whole)
        pooled = module(sample).flatten(1)
        if pooled.shape[1] != weight.shape[1]:
            return "the classifier that it came with does not read the pooled features"
        found = pooled @ weight.T + offset
    if float((found - expected).abs().max()) > TOLERANCE * float(expected.abs().max()):
        return "the classifier that it came with is not one linear layer on the pooled features"
    return OriginalHead(weight.numpy(), offset.numpy())


def class_numbers(names: Sequence[str]) -> list[int] | None:
    """The ImageNet classes, 0 to 999, that WordNet's synsets (n01440764) mean; None where a name
    means none. Plain numbers are not taken: classes of the user's own may be called 0 to 9."""
    if not names or not all(SYNSET.fullmatch(name) for name in names):
        return None
    from timm.data import ImageNetInfo

    known = {synset: i for i, synset in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    return [known[name] for name in names] if set(names) <= set(known) else None
