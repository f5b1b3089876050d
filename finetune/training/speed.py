"""How a training computes: precision, layout of the tensors and threads, whichever is fastest here.

A checkpoint's folder keeps the way that its training began with, so that one that goes on ends with
the same bits, whatever is measured meanwhile.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune import files, timings
from finetune.backbones import device as devices
from finetune.backbones.stages import Backbone, freeze, trainable_stages
from finetune.training import checkpoints
from finetune.training.config import Training
from finetune.training.partial_forward import replaced, slow_in_bf16

RECORD = "way.json"
FEW = 500  # images in all epochs together: timing would take longer than it can bring
BATCH = 8  # images a timed step


@dataclass(frozen=True)
class Way:
    """`bf16` (by autocast) or float32; convolutions on `channels_last` tensors or on plain ones; in
    so many `threads` of the processor."""

    bf16: bool
    channels_last: bool
    threads: int

    def __str__(self) -> str:
        words = ("bf16" if self.bf16 else "float32", "channels-last" * self.channels_last)
        return " ".join([*filter(None, words), f"{self.threads} threads"])

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @contextlib.contextmanager
    def in_threads(self) -> Iterator[None]:
        """Compute in the way's number of threads; afterwards in as many as before."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def settle(
    backbone: Backbone,
    training: Training,
    place: torch.device,
    precision: str,
    *,
    count: int,
    folder: Path | None,
) -> Way:
    """The way to train: the one that the checkpoint in `folder` began with, else what is fastest.

    `count` is the number of images in all epochs together.
    """
    ways = _ways(place, precision)
    if folder is not None and (folder / RECORD).exists():
        return Way(**files.read_json(folder / RECORD))
    if folder is not None and (folder / checkpoints.FILE).exists():
        # version 0.1.0 began it, which believed what the processor says of itself
        return dataclasses.replace(ways[0], bf16=ways[-1].bf16 and _said(place, precision))
    freeze(backbone, training.trainable, norm_moves=training.norm_moves)
    chosen = ways[0]
    if count >= FEW and any(p.requires_grad for p in backbone.module.parameters()):
        chosen = _fastest(backbone, place, ways)
    if folder is not None:
        files.write_json(folder / RECORD, dataclasses.asdict(chosen))
    return chosen


def _ways(place: torch.device, precision: str) -> list[Way]:
    """The ways that the words leave open; the first is taken unless another is clearly faster."""
    (first, *_) = devices.ways("torch", precision)
    threads = torch.get_num_threads()
    halves = [first.precision == "bf16"]
    if precision == "auto":
        halves = [False, True]
    if place.type == "mps":
        halves = [False]  # its autocast knows no bf16
    if place.type != "cpu":
        return [Way(half, True, threads) for half in halves]
    counts = [threads, threads // 2] if threads >= 4 else [threads]
    layouts = [(half, last) for last in (True, False) for half in halves]
    return [Way(half, last, number) for number in counts for half, last in layouts]


def _said(place: torch.device, precision: str) -> bool:
    return precision == "bf16" or (place.type != "mps" and devices.has_bf16("torch"))


def _fastest(backbone: Backbone, place: torch.device, ways: list[Way]) -> Way:
    """The way whose steps (there and back through what may move) are fastest, on copies: the
    network itself is left as it is."""
    network = backbone.network
    side = network.preprocess.size
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((BATCH, 3, side, side), generator=generator).to(place)
    named = {str(way): way for way in ways}
    twins: dict[bool, torch.nn.Module] = {}

    def opened(words: str) -> timings.Work:
        way = named[words]
        if way.channels_last not in twins:
            twin = copy.deepcopy(backbone.module)
            twin = twin.to(device=place, memory_format=way.memory_format)  # type: ignore[call-overload]
            twins[way.channels_last] = twin
        module = twins[way.channels_last]
        slow = slow_in_bf16(module) if way.bf16 and place.type == "cpu" else {}
        half = torch.autocast(place.type, torch.bfloat16, enabled=way.bf16)

        def work() -> int:
            with way.in_threads(), replaced(module, slow):
                with half:
                    features = module(x)
                features.float().square().mean().backward()
                module.zero_grad()
                if place.type == "cuda":
                    torch.cuda.synchronize()
            return BATCH

        return work

    detail = f"from {trainable_stages(backbone)[0]} on"
    task = timings.Task("train", network.name, network.digest, side, detail)
    return named[timings.choose(task, list(named), opened)]
