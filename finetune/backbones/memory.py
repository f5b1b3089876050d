"""What a network takes of the memory at an input size, reckoned before it runs: no number that a
user gives ends the process.

A network's need is proportional to what its largest operation reads and writes for one image in
float32, `largest`: layers give their memory on to the next. The factors were measured as peak
memory of processes of their own at 224, 512 and 1024 pixels (docs/log.md, 2026-11-26); they grow
with the pixels, on a straight line.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune import hardware
from finetune.errors import UserError

CONVERTED = 2.1  # an image of the batch that OpenVINO's graph is traced with
RUN = 1.4  # an image of a batch in torch
LOADED = (
    8.4  # a batch converted, the least that comes next; the look at a new network itself takes 2.5
)
MOST = 512  # pixels: no network was seen that needs a larger side


def check(module: nn.Module, name: str, side: int, images: float, what: str = "an input") -> None:
    """Refuse to run `module` on inputs of `side` pixels where `images` times its largest operation
    does not fit here."""
    if not hardware.fits(images * side**2 * hardware.MANY):
        need = images * largest(module, side)
        hardware.afford(
            need,
            f"{name} with {what} of {side} pixels",
            where="input size",
            fix=smaller(need, side),
        )


def smaller(need: float, side: int) -> str:
    """The way on where an input of `side` pixels needs too many bytes: the size that would fit."""
    least = (
        math.floor(side * math.sqrt((hardware.available() or need) * hardware.SHARE / need))
        // 32
        * 32
    )
    size = (
        f"choose at most {least} pixels (--size, or train.input_size of a recipe)"
        if least
        else "choose a smaller network"
    )
    return f"{size}, or run it where more memory is free"


def near(module: Any, side: int) -> str:
    """What can be taken where `side` cannot: the nearest multiple of the patches, or a larger side
    that leaves a map to pool."""
    patch = getattr(getattr(module, "patch_embed", None), "patch_size", None)
    if patch:
        step = int(patch[0])
        return f"; it takes multiples of {step}, such as {max(1, round(side / step)) * step}"
    for larger in range(side // 32 * 32 + 32, MOST, 32):
        with contextlib.suppress(RuntimeError, AssertionError):
            largest(module, larger)
            return f"; {larger} can be taken, too"
    return ""


def unfit(module: Any, name: str, side: int, own: int, error: Exception) -> UserError:
    """The refusal of an input size at which the network failed: its own size, and the nearest that
    it takes."""
    return UserError(
        f"{name} cannot take images of {side} pixels ({str(error)[:100]})",
        where="input size",
        fix=f"its own size is {own}{near(module, side)}",
    )


def largest(module: nn.Module, side: int) -> int:
    """Bytes that the largest operation on one image of `side` pixels reads and writes, without
    doing it."""
    seen = _Largest()
    with torch.inference_mode(), _Attention(), seen:
        on_meta(module, (1, 3, side, side), torch.float32)
    return seen.most


def on_meta(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """What `module` gives for an input of `shape`, as tensors that have a shape and no numbers:
    nothing is computed."""
    given = {
        name: torch.empty_like(value, device="meta") for name, value in tensors_of(module).items()
    }
    x = torch.empty(shape, dtype=dtype, device="meta")
    return torch.func.functional_call(module, given, (x,))


def without_numbers(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """The same, in inference mode; with numbers after all where the module asks for one."""
    with torch.inference_mode():
        try:
            return on_meta(module, shape, dtype)
        except Exception:  # any network may object in any way: its own words come from a real pass
            return module(torch.zeros(shape, dtype=dtype))


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a module, by its key."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


class _Largest(TorchDispatchMode):
    """Watches operations for the largest."""

    most = 0

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
        self.most = max(
            self.most, sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        )
        return result


class _Attention(TorchFunctionMode):
    """Attention as processors do it, without the matrix of all pairs of tokens: only its result is
    made."""

    def __torch_function__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            query, value = args[0], args[2]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return function(*args, **(kwargs or {}))
