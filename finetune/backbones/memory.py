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
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune import hardware
from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.backbones.stages import Backbone

CONVERTED = 2.1  # an image of the batch that OpenVINO's graph is traced with
RUN = 1.4  # an image of a batch in torch
LOADED = (
    8.4  # a batch converted, the least that comes next; the look at a new network itself takes 2.5
)
KEPT_IN_BF16 = 0.6  # of what autograd keeps for the backward pass in float32
COPIES = 8  # of the weights that move: gradients, two of the optimizer, those of the loop
BATCH_SEEN = 2  # images on which a training is reckoned: some networks take no single one
MOST = 512  # pixels: no network was seen that needs a larger side


def check(module: nn.Module, name: str, side: int, images: float, what: str = "an input") -> None:
    """Refuse to run `module` on inputs of `side` pixels where `images` times its largest operation
    does not fit here."""
    if not hardware.fits(images * side**2 * hardware.MANY):
        weights = sum(map(_bytes, tensors_of(module).values()))
        need = images * largest(module, side) + weights
        hardware.afford(
            need,
            f"{name} with {what} of {side} pixels",
            where="input size",
            fix=smaller(need, side, weights),
        )


def check_training(
    backbone: Backbone, stages: Collection[str], images: int, *, half: bool = False
) -> None:
    """Refuse to train these `stages` on batches of so many images, in bf16 where `half`, where that
    does not fit here."""
    network = backbone.network
    side = network.preprocess.size
    need = of_training(backbone, stages, images, half=half)
    hardware.afford(
        need,
        f"training {network.name} on batches of {images} images of {side} pixels",
        where="batch size",
        fix=_less(need, images),
    )


def _less(need: float, images: int) -> str:
    fewer = math.floor(images * (hardware.available() or need) * hardware.SHARE / need)
    size = f"at most {fewer} images (train.batch_size), " if fewer else ""
    return (
        f"choose {size}a smaller input (train.input_size), fewer stages (--strategy), or none: "
        f"finetune svm"
    )


def of_training(
    backbone: Backbone, stages: Collection[str], images: int, *, half: bool = False
) -> float:
    """Bytes that a training of these `stages` takes with batches of so many images: what the
    backward pass needs of each operation behind the freeze boundary, the largest operation, and the
    copies of the weights that move (gradients, the optimizer's state, the best epoch's and
    others)."""
    module, side = backbone.module, backbone.network.preprocess.size
    moving = {key for stage in backbone.stages if stage.name in stages for key in stage.keys}
    given = {
        name: torch.empty_like(value, device="meta").requires_grad_(
            name in moving and value.is_floating_point() and isinstance(value, nn.Parameter)
        )
        for name, value in tensors_of(module).items()
    }
    weights = _storages(given)
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no number is used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    largest_of_all = _Largest(weights)
    x = torch.empty(BATCH_SEEN, 3, side, side, device="meta")
    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with _Attention(), largest_of_all, saved:
        torch.func.functional_call(module, given, (x,))
    activations = sum(storage.nbytes() for storage in kept.values()) / BATCH_SEEN
    an_image = activations * (KEPT_IN_BF16 if half else 1) + RUN * largest_of_all.most / BATCH_SEEN
    copied = sum(_bytes(value) for value in given.values() if value.requires_grad)
    return images * an_image + COPIES * copied


def smaller(need: float, side: int, weights: float = 0) -> str:
    """The way on where an input of `side` pixels needs too many bytes, of which `weights` do not
    shrink with it: the size that would fit."""
    room = (hardware.available() or need) * hardware.SHARE - weights
    share = max(0.0, room) / max(1.0, need - weights)
    least = math.floor(side * math.sqrt(share)) // 32 * 32
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
    doing it. The weights are not counted: a batch reads them once."""
    given = _meta(module)
    seen = _Largest(_storages(given))
    with torch.inference_mode(), _Attention(), seen:
        torch.func.functional_call(module, given, (torch.empty(1, 3, side, side, device="meta"),))
    return seen.most


def on_meta(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """What `module` gives for an input of `shape`, as tensors that have a shape and no numbers:
    nothing is computed."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    return torch.func.functional_call(module, _meta(module), (x,))


def without_numbers(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """The same, in inference mode; with numbers after all where the module asks for one."""
    with torch.inference_mode():
        try:
            return on_meta(module, shape, dtype)
        except Exception:  # any network may object in any way: its own words come from a real pass
            return module(torch.zeros(shape, dtype=dtype))


def _meta(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a module as a tensor without numbers."""
    return {
        name: torch.empty_like(value, device="meta") for name, value in tensors_of(module).items()
    }


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a module, by its key."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _storages(tensors: Mapping[str, Tensor]) -> set[int]:
    """What tells tensors that share memory from others."""
    return {tensor.untyped_storage()._cdata for tensor in tensors.values()}


class _Largest(TorchDispatchMode):
    """Watches operations for the largest, without what they read of these `weights`."""

    def __init__(self, weights: Collection[int]) -> None:
        super().__init__()
        self.weights, self.most = weights, 0

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
        own = (t for t in tensors if t.untyped_storage()._cdata not in self.weights)
        self.most = max(self.most, sum(map(_bytes, own)))
        return result


class _Attention(TorchFunctionMode):
    """Attention as processors do it, without the matrix of all pairs of tokens: only its result is
    made, in a way that keeps for a backward pass what attention keeps."""

    def __torch_function__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = args[:3]
            if query.requires_grad and query.shape == key.shape == value.shape:
                return query * key * value
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return function(*args, **(kwargs or {}))
