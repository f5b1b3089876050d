"""Whether an export says what its run says: both are asked about real images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.check import Check
from finetune.data import decode
from finetune.data.images import ImageSet
from finetune.export.formats import Ask, Floats
from finetune.network import Preprocess
from finetune.progress import Progress

BATCH = 8
LABELS, LABELS_BF16 = 0.999, 0.995  # least share of equal labels
LARGEST = 1e-3  # largest difference of a probability, in float32


@dataclass(frozen=True)
class Asked:
    """An exported file: who answers, its share of the average, and the input that it needs."""

    preprocess: Preprocess
    weight: float
    ask: Ask


@dataclass(frozen=True)
class Agreement:
    """Two answers on the same `n` images: the share of equal labels, and the largest difference of
    a probability. `precision` is that of the run."""

    precision: str
    n: int
    labels: float
    largest: float

    def check(self) -> Check:
        """In float32 the numbers have to be the same; in bf16 the run itself is rounded."""
        exact = self.precision == "float32"
        bar = LABELS if exact else LABELS_BF16
        good = self.labels >= bar and (not exact or self.largest <= LARGEST)
        value = (
            f"{self.labels:.1%} of {self.n} labels are equal, probabilities differ by at most "
            f"{self.largest:.1e}"
        )
        words = f"what the run says in {self.precision}"
        return Check(
            f"against the run in {self.precision}",
            "pass" if good else "fail" if exact else "warn",
            value,
            f"the file says {words}" if good else f"the file does not say {words}",
            ""
            if good or exact
            else "the run was judged in bf16, the file computes in float32: "
            "evaluate the run with --precision float32",
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            "n": self.n,
            "labels_equal": self.labels,
            "largest_difference": self.largest,
        }


def compare(said: NDArray[Any], own: NDArray[Any], precision: str) -> Agreement:
    """Probabilities of the run, `(n, C)`, with those of its export."""
    return Agreement(
        precision,
        len(said),
        float((said.argmax(1) == own.argmax(1)).mean()),
        float(np.abs(said - own).max()),
    )


def answers(images: ImageSet, parts: Sequence[Asked], progress: Progress) -> NDArray[np.float64]:
    """What the files say of `images`, `(n, C)`: one file's answer, or the geometric mean of
    several."""
    rows = []
    for start in range(0, len(images), BATCH):
        data = [images.read(i) for i in range(start, min(start + BATCH, len(images)))]
        logs: Any = 0.0
        for part in parts:
            inputs = np.stack([prepared(one, part.preprocess) for one in data])
            logs = logs + part.weight * np.log(np.maximum(part.ask(inputs), 1e-30))
        mean = np.exp(np.asarray(logs, dtype=np.float64))
        rows.append(mean / mean.sum(1, keepdims=True))
        progress(start + len(data), len(images))
    return np.concatenate(rows)


def prepared(data: bytes, pre: Preprocess) -> Floats:
    """An image file as the input of an export: `(3, size, size)`, normalised."""
    pixels = decode.to_input(data, pre).astype(np.float32) / 255
    normal = (pixels - np.asarray(pre.mean, np.float32)) / np.asarray(pre.std, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1), dtype=np.float32)
