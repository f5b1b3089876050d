"""One epoch of partial fine-tuning: stored activations against a plain torch loop with the same
freezing.

    python benchmarks/partial.py FOLDER [--stages 1 2] [--rounds 3] [--epochs 4] [--views 4]
    [--images N] python benchmarks/partial.py --quick     48 images of the digits, the last stage, 1
    round; not recorded

FOLDER holds one sub-folder a class (benchmarks/data.py makes some). EfficientNet-Lite0 at 224 px,
real weights.

The peer is the ordinary way: `ImageFolder`, timm's training transform, a DataLoader with two
workers that stay alive, the same stages frozen (BatchNorm in eval, no gradients), the same
optimizer, batch size and number of images, float32. Its first epoch warms it up and does not count.
We train for `--epochs` epochs, without validation and checkpoints; an epoch is the median of them,
the one-off pass over the frozen stages is what `fit` takes beyond its epochs. A third column is our
loop with nothing stored, to show what storing alone gives. The three take turns in every round,
each in a process of its own: what ours asks of the allocator (`machine.keep_memory`) is not the
peer's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import harness
import numpy as np
import timm.data
import torch
import torchvision.datasets
from torch import nn
from torch.utils.data import DataLoader, Subset

from finetune.backbones.create import load
from finetune.backbones.stages import freeze, last_stages
from finetune.data import images
from finetune.data.images import ImageSet
from finetune.training import inputs, loop, optim
from finetune.training.config import Training

NAME = "tf_efficientnet_lite0"


SIDES = ("plain", "stored", "unstored")


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    """One side of one round: seconds of an epoch and, for ours, of the pass before the first."""
    data = images.load(options.folder)
    chosen = np.random.default_rng(0).permutation(len(data))[: options.images].tolist()
    training = Training(
        last_stages(load(NAME), options.stages[0]),
        head_init="zero",
        epochs=options.epochs,
        views=options.views,
        patience=0,
        augment="light",
    )
    if side == "plain":
        return plain(options.folder, chosen, training, len(data.classes))
    return ours(data, chosen, training, store=side == "stored")


def plain(folder: Path, chosen: list[int], training: Training, classes: int) -> dict[str, float]:
    """The second epoch of the plain loop; the first warms it up."""
    backbone = load(NAME)
    pre, module = backbone.network.preprocess, backbone.module
    freeze(backbone, training.trainable)
    head = nn.Linear(backbone.network.widths["pooled"], classes)
    optimizer = optim.optimizer(optim.param_groups(backbone, head, training), training)
    transform = timm.data.create_transform(
        (3, pre.size, pre.size),
        is_training=True,
        mean=pre.mean,
        std=pre.std,
        scale=(0.6, 1),
        interpolation=pre.interpolation,
    )
    data = Subset(torchvision.datasets.ImageFolder(str(folder), transform), chosen)
    loader = DataLoader(
        data, training.batch_size, shuffle=True, num_workers=2, persistent_workers=True
    )
    began = 0.0
    for _ in range(2):
        began = time.perf_counter()
        module.train()
        for x, y in loader:
            loss = nn.functional.cross_entropy(head(module(x)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {"epoch": time.perf_counter() - began}


def ours(data: ImageSet, chosen: list[int], training: Training, *, store: bool) -> dict[str, float]:
    """Our loop: the median epoch (of one, where nothing is stored), and what comes before the
    first."""
    if not store:
        inputs.STORE_LIMIT = 0
        training = dataclasses.replace(training, epochs=1)
    backbone = load(NAME)
    began = time.perf_counter()
    result = loop.fit(backbone, data, chosen, None, training, classes=len(data.classes), seed=0)
    total = time.perf_counter() - began
    assert store != any("every epoch" in warning for warning in result.warnings), result.warnings
    seconds = [row["seconds"] for row in result.history]
    return {"epoch": statistics.median(seconds), "once": total - sum(seconds)}


def spread(values: Sequence[float], unit: str) -> str:
    """Minimum, median and maximum."""
    return f"{min(values):.2f} / {statistics.median(values):.2f} / {max(values):.2f} {unit}"


def compare(folder: Path, options: argparse.Namespace, stages: int) -> None:
    data = images.load(folder)
    count = min(options.images or len(data), len(data))
    words = [
        folder,
        "--stages",
        stages,
        "--epochs",
        options.epochs,
        "--views",
        options.views,
        "--images",
        count,
    ]
    sides = [
        harness.side([sys.executable, __file__, *map(str, words), "--side", side]) for side in SIDES
    ]
    rows: list[tuple[float, float, float, float]] = []
    for i in range(options.rounds):
        theirs, stored, unstored = (side() for side in sides)
        rows.append((theirs["epoch"], stored["epoch"], stored["once"], unstored["epoch"]))
        print(f"  round {i + 1}: {rows[-1]}", file=sys.stderr, flush=True)
    theirs_, stored_, once_, unstored_ = zip(*rows, strict=True)
    whole = [options.epochs * t / (options.epochs * s + o) for t, s, o, _ in rows]
    print(
        f"\nlast {stages} stages of {NAME}, {count} images, "
        f"{options.rounds} rounds; min / median / max"
    )
    print(f"  plain torch loop, an epoch        {spread(theirs_, 's')}")
    print(f"  ours, an epoch                    {spread(stored_, 's')}")
    print(f"  ours, one-off pass, {options.views} views       {spread(once_, 's')}")
    print(f"  ours, nothing stored, an epoch    {spread(unstored_, 's')}")
    print(
        f"  ratio of an epoch                 "
        f"{spread([t / s for t, s, _, _ in rows], '×')}   (bar: ≥ 4)"
    )
    print(f"  ratio with nothing stored         {spread([t / u for t, _, _, u in rows], '×')}")
    print(f"  ratio of {options.epochs} epochs and the pass     {spread(whole, '×')}")
    harness.record(
        f"partial, last {stages} stages",
        f"an epoch of {count} images of {folder.name}, {NAME}, stored activations",
        "a plain torch loop with the same freezing, float32",
        "≥ 4×",
        harness.words(harness.ratio(theirs_, stored_)),
        f"{statistics.median(stored_):.1f} against {statistics.median(theirs_):.1f} s; "
        f"one-off pass {statistics.median(once_):.1f} s; {options.epochs} epochs and the pass "
        f"{spread(whole, '×')}",
        quick=options.quick,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", nargs="?")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--stages", type=int, nargs="+", default=[1, 2], help="how many of the last stages move"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="of ours, in a round")
    parser.add_argument("--views", type=int, default=4, help="stored views of an image")
    parser.add_argument(
        "--images", type=int, default=None, help="a seeded draw of so many; all without it"
    )
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options)))
        return
    if options.quick:
        options.folder, options.stages, options.rounds, options.epochs = (
            harness.dataset("digits"),
            [1],
            1,
            2,
        )
        options.images, options.views = 48, 2
    if options.folder is None:
        parser.error("name a FOLDER, or --quick")
    harness.use_cache()
    print(f"{torch.__version__=}, {timm.__version__=}, {torch.get_num_threads()} threads, {NAME}")
    for stages in options.stages:
        compare(options.folder, options, stages)


if __name__ == "__main__":
    main()
