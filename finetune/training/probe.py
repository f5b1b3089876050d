"""The linear probe that a new head starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from finetune.heads import svm
from finetune.heads.crossval import Setting
from finetune.heads.head import Head
from finetune.network import Tap
from finetune.training.config import Training

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

PROBE_C = 0.01  # inverse strength of the probe's L2 penalty, as in scikit-learn

PROBE_FLOAT64 = 20_000_000  # numbers: features up to this many are fitted in float64


def probe(
    features: NDArray[Any],
    y: NDArray[Any],
    classes: int,
    *,
    C: float = PROBE_C,
    class_weights: NDArray[Any] | None = None,
) -> tuple[Floats, Floats]:
    """Multinomial logistic regression on standardised features, folded back to raw ones: `(weight,
    bias)`.

    `features` (n, d), `y` (n,) in 0…classes−1. Minimises C Σ loss + ‖w‖² / 2 with L-BFGS, as
    scikit-learn's `LogisticRegression` does. `weight` is (classes, d) and `bias` (classes,),
    float32: the fold is exact.
    """
    x = torch.as_tensor(
        features, dtype=torch.float32 if features.size > PROBE_FLOAT64 else torch.float64
    )
    mean, std = x.mean(0), x.std(0, correction=0)
    # A feature that hardly varies here would be blown up wherever it does; a floor keeps its weight
    # small.
    scale = 1 / std.clamp(min=max(1e-3 * float(std.mean()), 1e-12))
    x = (x - mean) * scale
    labels = torch.as_tensor(y, dtype=torch.int64)
    per_class = None if class_weights is None else torch.as_tensor(class_weights, dtype=x.dtype)
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=300,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = nn.functional.cross_entropy(
            x @ weight.T + bias, labels, weight=per_class
        ) + weight.square().sum() / (2 * C * len(x))
        loss.backward()
        return loss

    solver.step(closure)
    raw = (weight.detach() * scale).double()
    shift = bias.detach().double() - raw @ mean.double()
    return raw.float().numpy(), shift.float().numpy()


def head_start(
    training: Training,
    blocks: Mapping[Tap, NDArray[Any]],
    labels: Ints,
    names: Sequence[str],
    class_weights: Floats,
) -> tuple[Floats, Floats]:
    """`(weight, bias)` that a head begins with: a logistic regression on what it reads before the
    first step, `(n, width)` a tap, or zeros, as `training.head_init` says. `class_weights` (C,)
    weigh the images of a class."""
    taps = tuple(map(Tap.parse, training.taps))
    if training.head_init != "probe":
        width = sum(blocks[tap].shape[1] for tap in taps)
        return np.zeros((len(names), width), np.float32), np.zeros(len(names), np.float32)
    if not training.normalize:
        return probe(blocks[taps[0]], labels, len(names), class_weights=class_weights)
    # As the SVM beside it reads them; normalising rows of unit length again changes nothing.
    setting, C = Setting(taps, "logistic"), training.head_strength
    head = svm.fit_head(blocks, labels, names, setting, C, class_weights[labels], 1.0)
    assert isinstance(head, Head)
    return head.weight, head.bias
