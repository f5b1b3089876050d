"""Galleries without a network: files are short texts, and a text decides its vector.

`words` are the content of a file: each different word gives another direction, `near:W:x` one that
is close to that of W. A file that says `broken` cannot be decoded, one that says `zero` has
features that are all zero.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.backbones.device import Way
from finetune.data.images import Fault, ImageSet
from finetune.features import engine, extraction
from finetune.features.extraction import Features
from finetune.files import Digests
from finetune.network import Network, Preprocess, Tap
from retrieval.encoder import Encoder

WIDTH = 16
PREPROCESS = Preprocess(32, 32, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
NETWORK = Network(
    "tiny",
    "0" * 64,
    "made for tests",
    "random",
    PREPROCESS,
    {"pooled": WIDTH, "stage1": 8},
    ("stem", "stage1"),
)
POOLED = Tap("pooled")

Rows = NDArray[np.float32]


def no_torch() -> Any:
    raise AssertionError("no torch here")


ENCODER = Encoder((NETWORK,), (no_torch,), (POOLED,), engine="torch", precision="float32")


class Asked:
    """What the network was asked about: the contents, in order, each as often as it was asked."""

    def __init__(self) -> None:
        self.contents: list[str] = []


@functools.cache
def features_of(content: bytes, tap: str = "pooled", view: str = "", width: int = WIDTH) -> Rows:
    """The features of a file with this content; not at unit length."""
    text = content.decode(errors="replace")
    if text == "zero":
        return np.zeros(width, np.float32)
    _, near, rest = text.partition("near:")
    base, _, salt = rest.partition(":") if near else (text, "", "")
    made = _random(f"{base}|{tap}|{view}", width)
    return made + 0.05 * _random(f"{text}|{salt}", width) if near else made


def _random(text: str, width: int) -> Rows:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return 3 * np.random.default_rng(seed).standard_normal(width, dtype=np.float32)


def install(patch: Callable[[Any, str, Any], None]) -> Asked:
    """Put the network that reads texts in the place of the real one; `patch` is
    `monkeypatch.setattr`, or `setattr`."""
    asked = Asked()

    def extract(
        source: ImageSet,
        network: Network,
        taps: Sequence[Tap],
        _load: Any,
        *,
        view: str = "",
        known: Sequence[str],
        **_how: Any,
    ) -> Features:
        data = [source.read(i) for i in range(len(source))]
        bad = tuple(
            Fault(source.paths[i], "damaged", "for the test")
            for i, text in enumerate(data)
            if text == b"broken"
        )
        good = [i for i, text in enumerate(data) if text != b"broken"]
        asked.contents += [data[i].decode(errors="replace") for i in good]
        blocks = {tap: _table([data[i] for i in good], network, tap, view) for tap in taps}
        ids, way = Digests.of(known).take(good), Way("torch", "float32")
        return Features(blocks, source.subset(good), ids, bad, {}, way)

    def stream(
        source: ImageSet,
        positions: Iterable[int],
        network: Network,
        opened: Callable[[], engine.Runner],
        faults: dict[int, Fault],
        *,
        view: str = "",
        **_how: Any,
    ) -> Iterator[tuple[list[int], list[Rows]]]:
        for i in positions:
            data = source.read(i)
            if data == b"broken":
                faults[i] = Fault(source.paths[i], "damaged", "for the test")
                continue
            asked.contents.append(data.decode(errors="replace"))
            yield [i], [_table([data], network, tap, view) for tap in opened().taps]

    def open_runner(
        _network: Network, taps: Sequence[Tap], _load: Any, **_how: Any
    ) -> engine.Runner:
        return engine.Runner(tuple(taps), "torch", "float32", 16, lambda batches: iter(()))

    patch(extraction, "extract", extract)
    patch(extraction, "stream", stream)
    patch(engine, "open_runner", open_runner)
    return asked


def _table(data: Sequence[bytes], network: Network, tap: Tap, view: str) -> Rows:
    width = network.widths[str(tap)]
    rows = [features_of(text, f"{tap}{network.preprocess.size}", view, width) for text in data]
    return np.stack(rows) if rows else np.zeros((0, width), np.float32)


def vector_of(content: str) -> Rows:
    """What the gallery stores of a file with this content, in the plain setting."""
    made = features_of(content.encode(), f"pooled{PREPROCESS.size}").astype(np.float64)
    return (made / np.linalg.norm(made)).astype(np.float32)


def write(root: Path, contents: dict[str, str]) -> Path:
    """Files by path below `root`, with their contents."""
    for path, content in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    return root


def pictures(root: Path, count: int) -> list[Path]:
    """`count` PNG files `0000.png` … of 40 × 30 pixels that all differ, for what has to decode
    them."""
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (40, 30), (i % 256, i // 256, 128)).save(root / f"{i:04d}.png")
    return sorted(root.glob("*.png"))


def words(count: int, start: int = 0) -> dict[str, str]:
    """`count` files that all differ."""
    return {f"{i:04d}.png": f"word {i}" for i in range(start, start + count)}
