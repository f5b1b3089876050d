"""Heads on features of a frozen network: linear, or with a Gaussian kernel. numpy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.network import Tap

Array = NDArray[np.float32]

ROWS = 4096  # rows that a head scores at once, at most: keeps the kernel block of an RBF head small


def side_by_side(blocks: Sequence[NDArray[Any]], normalize: bool) -> Array:
    """Join the features of several taps, each row of each tap L2-normalised first where
    `normalize`.

    `blocks` are `(n, d_i)`; the result is `(n, sum d_i)`, float32 and C-contiguous. With k taps a
    normalised row has length √k. A row of zeros stays zero.
    """
    parts = []
    for block in blocks:
        part = np.asarray(block, dtype=np.float32)
        if normalize:
            norm = np.sqrt(np.einsum("ij,ij->i", part, part, dtype=np.float64)).astype(np.float32)[
                :, None
            ]
            part = part / np.maximum(norm, 1e-12)
        parts.append(part)
    return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1))


def softmax(scores: NDArray[Any], temperature: float = 1.0) -> Array:
    """Row-wise softmax of `scores / temperature`, `(n, C)`; one row sums to 1."""
    z = np.asarray(scores, dtype=np.float64) / temperature
    z = np.exp(z - z.max(axis=1, keepdims=True))
    return (z / z.sum(axis=1, keepdims=True)).astype(np.float32)


@dataclass(frozen=True)
class Head:
    """A linear classifier: `scores = side_by_side(x) @ weight.T + bias`.

    `weight` is `(C, D)`, `bias` `(C,)`, D the sum of the widths of `taps`. `kind` names how it was
    made: `svm`, `logistic` or `fine-tuned`.
    """

    taps: tuple[Tap, ...]
    classes: tuple[str, ...]
    weight: Array
    bias: Array
    normalize: bool = True
    temperature: float = 1.0
    kind: str = "svm"

    def scores(self, blocks: Sequence[NDArray[Any]]) -> Array:
        """Decision values `(n, C)` of features given one array a tap, in the order of `taps`."""
        x = side_by_side(blocks, self.normalize)
        return np.concatenate(
            [x[i : i + ROWS] @ self.weight.T + self.bias for i in range(0, max(len(x), 1), ROWS)]
        )

    def arrays(self) -> dict[str, Array]:
        return {"weight": self.weight, "bias": self.bias}


@dataclass(frozen=True)
class KernelHead:
    """An RBF machine, one against the rest: `scores = exp(-gamma ‖x − s‖²) @ coef.T + bias`. `kind`
    is `rbf-svm` or, fitted with squared errors, `rbf-lssvm`.

    `support` is `(m, D)` in the space of `side_by_side`, `coef` `(C, m)`, `bias` `(C,)`. It may
    ship; it cannot start fine-tuning.
    """

    taps: tuple[Tap, ...]
    classes: tuple[str, ...]
    support: Array
    coef: Array
    bias: Array
    gamma: float
    normalize: bool = True
    temperature: float = 1.0
    kind: str = "rbf-svm"

    def scores(self, blocks: Sequence[NDArray[Any]]) -> Array:
        """Decision values `(n, C)` of features given one array a tap, in the order of `taps`."""
        x = side_by_side(blocks, self.normalize)
        return np.concatenate(
            [
                rbf(x[i : i + ROWS], self.support, self.gamma) @ self.coef.T + self.bias
                for i in range(0, max(len(x), 1), ROWS)
            ]
        )

    def arrays(self) -> dict[str, Array]:
        return {"support": self.support, "coef": self.coef, "bias": self.bias}


AnyHead = Head | KernelHead


def rbf(x: Array, y: Array, gamma: float) -> Array:
    """The Gaussian kernel `exp(-gamma ‖x_i − y_j‖²)`, `(len(x), len(y))`."""
    squared = (
        np.einsum("ij,ij->i", x, x)[:, None] + np.einsum("ij,ij->i", y, y)[None] - 2 * (x @ y.T)
    )
    return np.exp(-gamma * np.maximum(squared, 0))
