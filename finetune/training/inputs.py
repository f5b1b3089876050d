"""What the training loop is fed with: activations stored at the freeze boundary, so that frozen
stages run once, or pixels."""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name)

from finetune import files
from finetune.backbones.extractor import Reader
from finetune.backbones.stages import Backbone, trainable_stages
from finetune.data import augment
from finetune.network import Tap
from finetune.progress import Progress
from finetune.training.partial_forward import CannotStoreError, tail, tail_works, until

if TYPE_CHECKING:
    from finetune.data.images import ImageSet
    from finetune.training.config import Training

Ints = NDArray[np.int64]
Items = list[tuple[int, int]]  # (image, view)
Log = Callable[[dict[str, Any]], None]

# bytes: more stored activations than this, and the frozen stages run in every epoch instead
STORE_LIMIT = 16 * 2**30
STORE_BATCH = 32  # images at once through the frozen stages
FREE_SHARE = 0.8  # of the free disk, the same
VERIFIED = 4  # images on which the tail is compared with the whole network, in float32


@dataclass(frozen=True, kw_only=True)
class Job:
    """What stays the same during one call of `loop.fit`: on what it works, how and where."""

    backbone: Backbone
    images: ImageSet
    train: Ints
    val: Ints
    clean: Ints  # training images that are judged without augmentation after every epoch
    training: Training
    seed: int
    class_weights: Tensor
    head: nn.Linear
    device: torch.device
    half: bool
    folder: Path | None
    log: Log
    progress: Progress

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    def labels(self, items: Items) -> Tensor:
        return torch.from_numpy(self.images.labels[[i for i, _ in items]].astype(np.int64)).to(
            self.device
        )

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The taps that the head reads, in its order."""
        return tuple(map(Tap.parse, self.training.taps))


@dataclass(frozen=True)
class Inputs:
    """A batch on its way: `x` enters the network, or its tail; `fixed` are the taps of frozen
    stages that were read when it was stored, one (n, width) float32 tensor each."""

    x: Tensor
    fixed: tuple[Tensor, ...] = ()

    def mixed(self, share: float, other: Tensor) -> Inputs:
        """Each row blended with the row `other`: `share` of itself."""
        blend = [part * share + part[other] * (1 - share) for part in (self.x, *self.fixed)]
        return Inputs(blend[0], tuple(blend[1:]))


@dataclass(frozen=True)
class Feed:
    """Where the loop's input comes from.

    `batches` gives the input of every batch of (image, view); `features` makes what the head reads
    `(n, width)` of it. `views` is the number of stored views of a training image, 0 where every
    epoch draws a new one. `tick` counts images.
    """

    views: int
    batches: Callable[[Sequence[Items]], Iterator[Inputs]]
    features: Callable[[Inputs], Tensor]
    tick: Callable[[int], None]


def even_batches(items: Items, size: int) -> list[Items]:
    """Batches of nearly equal size: none is dropped, and no single image is left over to upset
    BatchNorm."""
    edges = (
        np.linspace(0, len(items), math.ceil(len(items) / size) + 1).round().astype(int).tolist()
    )
    return [items[low:high] for low, high in itertools.pairwise(edges)]


def side_by_side(parts: Sequence[Tensor], normalize: bool) -> Tensor:
    """What a head reads: taps joined, each row of each L2-normalised where `normalize`; as
    `heads.head.side_by_side`, with gradients."""
    if normalize:
        parts = [F.normalize(part, dim=1) for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


@contextlib.contextmanager
def open_feed(job: Job, warnings: list[str]) -> Iterator[Feed]:
    """The input of the loop: activations at the freeze boundary where they can be stored, else
    pixels; `warnings` gets why."""
    module, count = job.backbone.module, len(job.train) * job.training.epochs
    reader = Reader(job.backbone, job.taps).to(job.device)
    pre, training = job.backbone.network.preprocess, job.training

    def pixels(plan: Sequence[Items]) -> Iterator[Inputs]:
        for array in augment.batches(
            job.images, plan, pre, training.augment, flip=training.flip, seed=job.seed
        ):
            yield Inputs(reader.normalise(torch.from_numpy(array).to(job.device)))

    def features(inputs: Inputs) -> Tensor:
        return side_by_side(reader.read(lambda: module(inputs.x)), training.normalize)

    plain = Feed(0, pixels, features, _ticker(job.progress, count))
    end = boundary(job.backbone)
    if end is None:
        yield plain
        return
    module.eval()
    with contextlib.ExitStack() as stack:
        try:
            feed = _stored(job, plain, end, stack)
        except CannotStoreError as reason:
            feed = plain
            if (warning := f"the frozen stages run in every epoch: {reason}") not in warnings:
                warnings.append(warning)
        yield feed


def boundary(backbone: Backbone) -> str | None:
    """The submodule behind which something moves; "" where nothing does, None where no stage before
    it can be read."""
    names = [stage.name for stage in backbone.stages]
    moving = trainable_stages(backbone)
    if not moving:
        return ""
    return next(
        (stage.end for stage in reversed(backbone.stages[: names.index(moving[0])]) if stage.end),
        None,
    )


def _split(job: Job, end: str) -> tuple[list[Tap], list[Tap]]:
    """The head's taps up to the submodule `end`, which never change, and those behind it."""
    names = [stage.name for stage in job.backbone.stages]
    last = next((i for i, stage in enumerate(job.backbone.stages) if stage.end == end), len(names))
    frozen = set(names[: last + 1])
    fixed = [tap for tap in job.taps if tap.stage in frozen or not end]
    return fixed, [tap for tap in job.taps if tap not in fixed]


@torch.no_grad()
def _stored(job: Job, plain: Feed, end: str, stack: contextlib.ExitStack) -> Feed:
    """Run the frozen stages over every view of every image and keep what comes out, in the type it
    was computed in, and the taps that were passed on the way.

    The file has no name, so that nothing is left of it however the process ends. Raises
    `CannotStoreError` before anything is written, and `UserError` where the disk fills up on the
    way.
    """
    train, val = job.train.tolist(), job.val.tolist()
    views = (
        1
        if job.training.augment == "none"
        else max(1, min(job.training.views, job.training.epochs))
    )
    items = [(i, view) for view in range(views) for i in train] + [(i, 0) for i in val]
    (sample,) = plain.batches([[(i, 0) for i in train[:VERIFIED]]])
    wide = tail_works(job.backbone, end, sample.x) if end else False
    module = job.backbone.module
    fixed, live = _split(job, end)
    early, late = (Reader(job.backbone, taps).to(job.device) for taps in (fixed, live))

    def run(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The activations at the boundary and the taps before it."""
        reached: list[Tensor] = []

        def prefix() -> Tensor:
            reached.append(until(module, end, x) if end else module(x).flatten(1))
            return reached[0]

        with job.autocast():
            taps = early.read(prefix)
        return reached[0], taps

    one, passed = run(sample.x)
    nhwc = one.ndim == 4 and one.is_contiguous(memory_format=torch.channels_last)
    size = one[0].numel() * one.element_size()
    widths = [tap.shape[1] for tap in passed]
    total = size + 4 * sum(widths)
    folder = files.cache_dir("activations") if job.folder is None else job.folder
    with files.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _check_room(len(items) * total, shutil.disk_usage(folder).free)
        file = stack.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
    tick = _ticker(job.progress, len(items) + len(train) * job.training.epochs)
    plan = even_batches(items, STORE_BATCH)
    with files.disk_errors(folder):
        for batch in plain.batches(plan):
            y, taps = run(batch.x)
            rows_ = [_bytes(y.permute(0, 2, 3, 1) if nhwc else y), *map(_bytes, taps)]
            file.write(np.concatenate(rows_, axis=1).tobytes())
            tick(len(y))
        file.flush()
    rows = np.memmap(file, dtype=np.uint8, mode="r", shape=(len(items), total))
    row = {item: k for k, item in enumerate(items)}
    shape = one.permute(0, 2, 3, 1).shape[1:] if nhwc else one.shape[1:]
    edges = [size, *(size + 4 * int(n) for n in np.cumsum(widths))]

    def stored(plan: Sequence[Items]) -> Iterator[Inputs]:
        for batch in plan:
            block = rows[[row[item] for item in batch]]
            x = torch.from_numpy(block[:, :size].copy()).view(one.dtype).view(-1, *shape)
            x = x.to(job.device)
            taps = (
                torch.from_numpy(block[:, low:high].copy()).view(torch.float32).to(job.device)
                for low, high in itertools.pairwise(edges)
            )
            yield Inputs(x.permute(0, 3, 1, 2) if nhwc else x, tuple(taps))

    # From here on the module is no longer whole, until `stack` closes.
    started = stack.enter_context(tail(job.backbone, end, wide)) if end else lambda x: x

    def features(inputs: Inputs) -> Tensor:
        read = late.read(lambda: started(inputs.x)) if live else ()
        parts = dict(zip([*fixed, *live], [*inputs.fixed, *read], strict=True))
        return side_by_side([parts[tap] for tap in job.taps], job.training.normalize)

    return Feed(views, stored, features, tick)


def _bytes(rows: Tensor) -> NDArray[np.uint8]:
    """The bytes of each row, `(n, bytes)`."""
    flat: NDArray[np.uint8] = rows.contiguous().cpu().view(torch.uint8).numpy()
    return flat.reshape(len(rows), -1)


def _check_room(needed: int, free: int) -> None:
    """Refuse to store more than `STORE_LIMIT`, or more than `FREE_SHARE` of what is free on the
    disk."""
    for room, words in (
        (STORE_LIMIT, "that is the limit"),
        (FREE_SHARE * free, "of the disk may be filled"),
    ):
        if needed > room:
            sizes = f"{needed / 2**30:.1f} GiB of activations, where {room / 2**30:.1f} GiB"
            raise CannotStoreError(f"{sizes} {words}")


def _ticker(progress: Progress, total: int) -> Callable[[int], None]:
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return tick
