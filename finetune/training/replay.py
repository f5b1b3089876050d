"""Images that go again and again through a network whose last stages take other and other weights.

What lies before the first stage that moves runs once; its activations are kept in memory, and a
pass through the rest costs a fraction of a whole one. This serves what asks for many weights of one
network and trains none: soups, and the line between old and new weights.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune import hardware
from finetune.backbones.extractor import Reader
from finetune.backbones.stages import BATCH_NORMS, Backbone, freeze, group_of
from finetune.data import augment
from finetune.network import Tap
from finetune.training.inputs import VERIFIED, boundary, even_batches
from finetune.training.partial_forward import CannotStoreError, tail, tail_works, until

if TYPE_CHECKING:
    from finetune.data.images import ImageSet

Floats = NDArray[np.float32]
Tensors = dict[str, Tensor]

BATCH = 32  # images at once


@dataclass(frozen=True)
class Kept:
    """A set of images at the border of what moves: activations (or pixels, uint8 NHWC, where the
    network cannot be started behind a stage), and what the taps before it gave, `(n, width)`
    each."""

    batches: tuple[Tensor, ...]
    fixed: dict[Tap, Floats]


class Moving:
    """A backbone of which the stages `moving` take other weights, read at `taps`.

    `put` gives it weights, `keep` brings images to the border, `read` gives the features of kept
    images with the weights that it has now, `reestimate` the statistics of its BatchNorm.
    """

    def __init__(self, backbone: Backbone, moving: Sequence[str], taps: Sequence[Tap]) -> None:
        hardware.keep_memory()
        freeze(backbone, moving)
        backbone.module.eval()
        self.backbone, self.taps, self._stages = backbone, tuple(taps), frozenset(moving)
        self._live = _tensors(backbone)
        self._end = boundary(backbone)
        self._wide: bool | None = None if self._end is None else False
        self._verified = self._end is None or not self._end
        names = [stage.name for stage in backbone.stages]
        first = next((i for i, name in enumerate(names) if name in self._stages), len(names))
        self._before = frozenset(names[:first])

    @torch.no_grad()
    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the network these weights and statistics, by key; other keys stay."""
        for key, value in tensors.items():
            self._live[key].copy_(value)

    @torch.no_grad()
    def keep(self, images: ImageSet) -> Kept:
        """Run the stages that do not move on every image, unaugmented."""
        plan = even_batches([(i, 0) for i in range(len(images))], BATCH)
        pre = self.backbone.network.preprocess
        reader = Reader(self.backbone, ())
        pixels = augment.batches(images, plan, pre, "none", flip=False, seed=0)
        batches: list[Tensor] = []
        early: list[tuple[Tensor, ...]] = []
        for array in pixels:
            raw = torch.from_numpy(array)
            x = reader.normalise(raw)
            self._verify(x)
            if not self._end:
                batches.append(raw)
                continue
            taken = Reader(self.backbone, [tap for tap in self.taps if self._is_fixed(tap)])
            reached: list[Tensor] = []
            early.append(taken.read(lambda x=x, reached=reached: self._prefix(x, reached)))  # type: ignore[misc]
            batches += reached
        fixed = [tap for tap in self.taps if self._is_fixed(tap)] if self._end else []
        blocks = (torch.cat(parts).numpy() for parts in zip(*early, strict=True))
        return Kept(tuple(batches), dict(zip(fixed, blocks, strict=True)))

    def _prefix(self, x: Tensor, reached: list[Tensor]) -> Tensor:
        assert self._end
        reached.append(until(self.backbone.module, self._end, x))
        return reached[0]

    def _verify(self, x: Tensor) -> None:
        """Whether the network can be started behind the border, tried once on real images."""
        if self._verified:
            return
        self._verified = True
        try:
            assert self._end
            self._wide = tail_works(self.backbone, self._end, x[:VERIFIED])
        except CannotStoreError:
            self._end = None

    def _is_fixed(self, tap: Tap) -> bool:
        return tap.stage in self._before

    @torch.no_grad()
    def read(self, kept: Kept) -> dict[Tap, Floats]:
        """Features of kept images at the taps, `(n, width)` each, not normalised."""
        late = [tap for tap in self.taps if tap not in kept.fixed]
        if not late:
            return dict(kept.fixed)
        reader = Reader(self.backbone, late)
        with self._started() as run:
            parts = [reader.read(lambda x=x: run(x)) for x in kept.batches]  # type: ignore[misc]
        blocks = (torch.cat(block).numpy() for block in zip(*parts, strict=True))
        return dict(kept.fixed) | dict(zip(late, blocks, strict=True))

    def _started(self) -> Any:
        """A function from what is kept to pooled features."""
        if self._end:
            return tail(self.backbone, self._end, bool(self._wide))
        reader = Reader(self.backbone, ())
        return contextlib.nullcontext(lambda raw: self.backbone.module(reader.normalise(raw)))

    @torch.no_grad()
    def reestimate(self, kept: Kept) -> int:
        """Estimate the running statistics of BatchNorm in the moving stages anew, as the mean over
        batches of the kept images (Izmailov et al. 2018, section 3.3); how many layers there are.
        """
        group = group_of(self.backbone)
        norms: list[Any] = [
            part
            for path, part in self.backbone.module.named_modules()
            if isinstance(part, BATCH_NORMS)
            and part.track_running_stats
            and group(f"{path}.weight") in self._stages
        ]
        if not norms or len(kept.batches) < 1:
            return 0
        before = [(part.momentum, part.num_batches_tracked.clone()) for part in norms]
        for part in norms:
            part.reset_running_stats()
            part.momentum, part.training = None, True
        try:
            with self._started() as run:
                for x in kept.batches:
                    if len(x) > 1:
                        run(x)
        finally:
            for part, (momentum, count) in zip(norms, before, strict=True):
                part.momentum, part.training = momentum, False
                part.num_batches_tracked.copy_(count)
        return len(norms)

    def tensors(self) -> Tensors:
        """A copy of everything that the network holds now."""
        return {key: value.clone() for key, value in self._live.items()}


def _tensors(backbone: Backbone) -> Tensors:
    return {
        key: value.detach()
        for key, value in itertools.chain(
            backbone.module.named_parameters(), backbone.module.named_buffers()
        )
    }


def tensors(backbone: Backbone) -> Tensors:
    """A copy of the parameters and buffers of a backbone, by key."""
    return {key: value.clone() for key, value in _tensors(backbone).items()}


def mixed(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Tensors:
    """The weighted mean of tensors of the same keys, in float64 on the way; what is no floating
    number (the counters of BatchNorm) is copied from the state of the largest weight."""
    main = states[int(np.argmax(weights))]
    result: Tensors = {}
    for key, value in main.items():
        if not value.is_floating_point():
            result[key] = value.clone()
            continue
        total = sum(w * state[key].double() for w, state in zip(weights, states, strict=True) if w)
        assert isinstance(total, Tensor)
        result[key] = total.to(value.dtype)
    return result


def moved(backbone: Backbone, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> list[str]:
    """The stages, from stem to end, of which a tensor is not the same to the last bit."""
    group = group_of(backbone)
    changed = {group(key) for key in old if not torch.equal(old[key], new[key])}
    return [stage.name for stage in backbone.stages if stage.name in changed]


def distances(
    backbone: Backbone, old: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> dict[str, float]:
    """‖new − old‖ / ‖old‖ of the floating numbers of every stage."""
    group = group_of(backbone)
    squares: dict[str, list[float]] = {stage.name: [0.0, 0.0] for stage in backbone.stages}
    for key, value in old.items():
        if value.is_floating_point():
            pair = squares[group(key)]
            pair[0] += float((new[key].double() - value.double()).square().sum())
            pair[1] += float(value.double().square().sum())
    return {name: float(np.sqrt(a / b)) if b else 0.0 for name, (a, b) in squares.items()}


def only(tensors: Mapping[str, Tensor], backbone: Backbone, stages: Iterable[str]) -> Tensors:
    """Those of the given stages."""
    group, names = group_of(backbone), set(stages)
    return {key: value for key, value in tensors.items() if group(key) in names}
