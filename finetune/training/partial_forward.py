"""A backbone in two parts: up to a submodule, and started behind it on what came out there.

Any network will do, as long as each way of starting it is shown to give what the whole gives
(`tail_works`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finetune.backbones.stages import Backbone

TOLERANCE = 1e-4  # of the comparison with the whole network, relative to the largest feature


class CannotStoreError(Exception):
    """Why activations are not stored; the message completes 'the frozen stages run in every
    epoch:'."""


class _ReachedError(Exception):
    """Ends a pass early, at the module whose output was wanted."""

    def __init__(self, output: Any) -> None:
        self.output = output


def until(module: nn.Module, end: str, x: Tensor) -> Tensor:
    """The output of the submodule `end` for the input `x`; what comes behind it does not run."""

    def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
        raise _ReachedError(output)

    hook = module.get_submodule(end).register_forward_hook(stop)
    try:
        module(x)
    except _ReachedError as reached:
        return reached.output
    finally:
        hook.remove()
    raise CannotStoreError(f"{end} was not reached")


def tail_works(backbone: Backbone, end: str, sample: Tensor) -> bool:
    """Whether `tail` must be wide to give on activations what the whole network gives on images,
    shown on `sample`.

    Raises `CannotStoreError` where it gives something else either way.
    """
    expected = backbone.module(sample).flatten(1)
    activation = until(backbone.module, end, sample)
    if not isinstance(activation, Tensor) or len(activation) != len(sample):
        raise CannotStoreError(f"{end} of {backbone.network.name} does not give one tensor")
    for wide in (False, True):
        # any network may object in any way
        with contextlib.suppress(Exception), tail(backbone, end, wide) as started:
            found = started(activation)
            if found.shape == expected.shape and bool(
                (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
            ):
                return wide
    raise CannotStoreError(
        f"{backbone.network.name} gives something else when it is started behind {end}"
    )


def _skipped(backbone: Backbone, end: str) -> list[str]:
    """The outermost modules that belong to frozen stages up to `end`, without the stem and what
    holds `end`."""
    last = next(i for i, stage in enumerate(backbone.stages) if stage.end == end)
    frozen = {
        key for stage in backbone.stages[: last + 1] if stage.name != "stem" for key in stage.keys
    }
    chosen: list[str] = []
    for path, part in backbone.module.named_modules():
        if (
            not path
            or f"{end}.".startswith(f"{path}.")
            or any(path.startswith(f"{outer}.") for outer in (*chosen, end))
        ):
            continue
        own = [f"{path}.{key}" for key, _ in (*part.named_parameters(), *part.named_buffers())]
        if own and frozen.issuperset(own):
            chosen.append(path)
    return chosen


@contextlib.contextmanager
def tail(backbone: Backbone, end: str, wide: bool) -> Iterator[Callable[[Tensor], Tensor]]:
    """Make the module start behind the submodule `end`: a function from its output to pooled
    features `(n, width)`.

    The network runs on a blank image, of which nothing is left: `end` returns the given activation
    instead of its own, and the frozen modules before it, but for the stem, hand their input on.
    `wide`: the blank batch has as many images as the activation, for networks that remember how
    many came in; else one. Everything is put back at the end.
    """
    module, size = backbone.module, backbone.network.preprocess.size
    held: list[Tensor] = []
    forwards = {end: lambda *_, **__: held[0]} | {
        path: lambda x, *_, **__: x for path in _skipped(backbone, end)
    }
    blank = torch.zeros(1, 3, size, size, device=next(module.parameters()).device)

    def run(activation: Tensor) -> Tensor:
        held[:] = [activation]
        return module(blank.expand(len(activation) if wide else 1, -1, -1, -1)).flatten(1)

    with replaced(module, forwards):
        yield run


@contextlib.contextmanager
def replaced(module: nn.Module, forwards: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
    """Give submodules, by path, another `forward`; an instance's own goes before that of its class.
    Afterwards, none is left."""
    parts = {path: module.get_submodule(path) for path in forwards}
    before = {path: part.__dict__.get("forward") for path, part in parts.items()}
    try:
        for path, part in parts.items():
            part.__dict__["forward"] = forwards[path]
        yield
    finally:
        for path, part in parts.items():
            del part.__dict__["forward"]
            if before[path] is not None:
                part.__dict__["forward"] = before[path]


def slow_in_bf16(module: nn.Module) -> dict[str, Callable[..., Tensor]]:
    """Float32 forms of the trainable convolutions whose bf16 gradients are slow on a CPU.

    oneDNN has no fast bf16 kernel for the gradients of depthwise convolutions with a stride or more
    than 3 × 3 weights: they take several times as long as in float32, where the rest of a network
    takes about half.
    """

    def in_float32(part: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return type(part).forward(part, x.float()).to(x.dtype)

    return {
        path: functools.partial(in_float32, part)
        for path, part in module.named_modules()
        if isinstance(part, nn.Conv2d)
        and part.weight.requires_grad
        and part.groups == part.in_channels > 1
        and (max(part.kernel_size) > 3 or max(part.stride) > 1)
    }
