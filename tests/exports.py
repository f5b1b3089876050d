"""Small classifiers of every form that an export has to hold, and a process that does not have
Regraft."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from finetune.backbones.stages import Backbone
from finetune.classifier import Classifier
from finetune.evaluation.ensemble import Ensemble
from finetune.heads.head import AnyHead, Head, KernelHead
from finetune.network import Tap

CLASSES = ("Käse & Brot", 'a "b"', "c")
POOLED = (Tap("pooled"),)
SEVERAL = (Tap("pooled"), Tap("stage2", grid=3), Tap("stage3", pool="gem"))
ALONE = 'import sys\nsys.modules["finetune"] = sys.modules["retrieval"] = None\n'


def linear(backbone: Backbone, taps: tuple[Tap, ...] = SEVERAL, **more: Any) -> Head:
    rng = np.random.default_rng(0)
    width = sum(backbone.network.width(tap) for tap in taps)
    weight = rng.normal(size=(3, width)).astype(np.float32)
    bias = rng.normal(size=3).astype(np.float32)
    return Head(taps, CLASSES, weight, bias, **{"temperature": 0.7, **more})


def kernel(backbone: Backbone, taps: tuple[Tap, ...] = SEVERAL) -> KernelHead:
    rng = np.random.default_rng(1)
    width = sum(backbone.network.width(tap) for tap in taps)
    support = rng.normal(size=(9, width)).astype(np.float32)
    support *= np.sqrt(len(taps)) / np.linalg.norm(support, axis=1, keepdims=True)
    coef, bias = rng.normal(size=(3, 9)), rng.normal(size=3)
    arrays = (support, coef.astype(np.float32), bias.astype(np.float32))
    return KernelHead(taps, CLASSES, *arrays, gamma=0.5, temperature=0.3)


def model(backbone: Backbone, head: AnyHead, **looks: Any) -> Classifier:
    """A classifier; `looks` changes how it looks at an image (`size`, `mean`, …), `views` too."""
    views = looks.pop("views", ("",))
    pre = dataclasses.replace(backbone.network.preprocess, **looks)
    own = dataclasses.replace(
        backbone, network=dataclasses.replace(backbone.network, preprocess=pre)
    )
    return Classifier(own.network, head, lambda: own, "torch", "float32", views)


def average(*members: Classifier) -> Ensemble:
    shares = np.arange(1, len(members) + 1) / sum(range(1, len(members) + 1))
    names = [f"m{k}" for k in range(len(members))]
    return Ensemble(
        dict(zip(names, members, strict=True)), dict(zip(names, shares.tolist(), strict=True))
    )


def without_regraft(script: str, folder: Path) -> str:
    """What `script` prints in a process that cannot import Regraft, in `folder`."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE + script],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    return done.stdout.strip()
