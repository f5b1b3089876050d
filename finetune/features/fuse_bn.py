"""BatchNorm folded into the convolution before it: in eval mode both are linear, so one convolution
does the work of two.

Outside of OpenVINO, which folds by itself, the passes over memory that BatchNorm costs are a good
part of an eager float32 network's time. Folding needs no trace: which BatchNorm reads which
convolution is seen in one pass.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

TOLERANCE = (
    1e-4  # of the comparison with the network as it was, relative to the largest value of an output
)

Module = TypeVar("Module", bound=nn.Module)


def folded(module: Module, example: Tensor) -> Module:
    """A copy of `module`, which is in eval mode, whose BatchNorms are part of the convolutions
    before them.

    The parameters that stay as they are, are shared with `module`, not copied. Where the copy would
    give something else on `example` (a convolution whose output is read elsewhere, too), `module`
    itself is returned. `module` gives a tuple of tensors.
    """
    # inference tensors do not count who writes to them
    with torch.inference_mode(mode=False), torch.no_grad():
        pairs = _pairs(module, example)
        if not pairs:
            return module
        shared: dict[int, Any] = {
            id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())
        }
        twin = copy.deepcopy(module, shared)
        for conv_path, norm_path in pairs.items():
            conv: Any = twin.get_submodule(conv_path)
            norm: Any = twin.get_submodule(norm_path)
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight,
                conv.bias,
                norm.running_mean,
                norm.running_var,
                norm.eps,
                norm.weight,
                norm.bias,
            )
            rest = (
                nn.Sequential(norm.drop, norm.act)
                if isinstance(norm, BatchNormAct2d)
                else nn.Identity()
            )
            twin.set_submodule(norm_path, rest.eval())
        same = all(
            bool((a - b).abs().max() <= TOLERANCE * a.abs().max())
            for a, b in zip(module(example), twin(example), strict=True)
        )
    return twin if same else module


def _pairs(module: nn.Module, example: Tensor) -> dict[str, str]:
    """Paths of the convolutions that hand their output straight to a BatchNorm → its path; each
    runs once in a pass."""
    paths = {part: path for path, part in module.named_modules()}
    outputs: dict[
        int, tuple[nn.Module, Tensor, int]
    ] = {}  # the tensors are held, so that no id is used twice
    found: list[tuple[str, str]] = []
    runs: list[nn.Module] = []

    def after_convolution(part: nn.Module, _inputs: Any, output: Tensor) -> None:
        runs.append(part)
        outputs[id(output)] = part, output, output._version

    def before_norm(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        runs.append(part)
        conv, _, version = outputs.get(id(inputs[0]), (None, None, None))
        # else something has written to it in place
        if conv is not None and version == inputs[0]._version:
            found.append((paths[conv], paths[part]))

    hooks = []
    for part in paths:
        if isinstance(part, nn.Conv2d):
            hooks.append(part.register_forward_hook(after_convolution))
        elif type(part) in (nn.BatchNorm2d, BatchNormAct2d) and part.track_running_stats:
            hooks.append(part.register_forward_pre_hook(before_norm))
    try:
        module(example)
    finally:
        for hook in hooks:
            hook.remove()
    once = {paths[part] for part in paths if runs.count(part) == 1}
    return {conv: norm for conv, norm in found if {conv, norm} <= once}
