"""BatchNorm folded into the convolution before it: in eval mode both are linear, so one convolution
does the work of two.

Outside of OpenVINO, which folds by itself, the passes over memory that BatchNorm costs are a good
part of an eager float32 network's time. Folding needs no trace: which BatchNorm reads which
convolution, and that nothing else reads it, is seen in one pass without numbers.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.backbones import memory

TOLERANCE = (
    1e-4  # of the comparison with the network as it was, relative to the largest value of an output
)

Module = TypeVar("Module", bound=nn.Module)


def folded(module: Module, example: Tensor) -> Module:
    """A copy of `module`, which is in eval mode, whose BatchNorms are part of the convolutions
    before them.

    The parameters that stay as they are, are shared with `module`, not copied. Where the output of
    such a convolution is read elsewhere, too, `module` itself is returned. `module` gives a tuple
    of tensors for `example`; it runs on that only where it cannot run without numbers, and then the
    copy is compared with it.
    """
    # inference tensors do not count who writes to them
    with torch.inference_mode(mode=False), torch.no_grad():
        seen = _Reads()
        try:
            pairs = seen.pairs(
                module, lambda: memory.on_meta(module, tuple(example.shape), example.dtype)
            )
            proven = True
        except Exception:  # any network may object in any way
            seen = _Reads()
            pairs, proven = seen.pairs(module, lambda: module(example)), False
        if not pairs or not seen.alone:
            return module
        twin = _twin(module, pairs)
        if proven:
            return twin
        same = all(
            bool((a - b).abs().max() <= TOLERANCE * a.abs().max())
            for a, b in zip(module(example), twin(example), strict=True)
        )
    return twin if same else module


def _twin(module: Module, pairs: dict[str, str]) -> Module:
    """A copy in which the BatchNorms of `pairs` are folded."""
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
    return twin


class _Reads(TorchDispatchMode):
    """Counts the operations that read each convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        # the tensors are held, so that no id is used twice
        self._outputs: dict[int, tuple[nn.Module, Tensor, int]] = {}
        self._reads: Counter[int] = Counter()
        self._folded: list[int] = []

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # an id that is not held may have been that of another tensor
        self._reads.update(self._outputs.keys() & set(map(id, tree_leaves((args, kwargs)))))
        return function(*args, **(kwargs or {}))

    @property
    def alone(self) -> bool:
        """Whether each convolution of the pairs is read by its BatchNorm alone."""
        return all(self._reads[key] == 1 for key in self._folded)

    def pairs(self, module: nn.Module, run: Callable[[], Any]) -> dict[str, str]:
        """Paths of the convolutions that hand their output straight to a BatchNorm → its path; each
        runs once in a pass."""
        paths = {part: path for path, part in module.named_modules()}
        found: list[tuple[str, str, int]] = []
        runs: list[nn.Module] = []

        def after_convolution(part: nn.Module, _inputs: Any, output: Tensor) -> None:
            runs.append(part)
            self._outputs[id(output)] = part, output, output._version

        def before_norm(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            runs.append(part)
            conv, _, version = self._outputs.get(id(inputs[0]), (None, None, None))
            # else something has written to it in place
            if conv is not None and version == inputs[0]._version:
                found.append((paths[conv], paths[part], id(inputs[0])))

        hooks = []
        for part in paths:
            if isinstance(part, nn.Conv2d):
                hooks.append(part.register_forward_hook(after_convolution))
            elif type(part) in (nn.BatchNorm2d, BatchNormAct2d) and part.track_running_stats:
                hooks.append(part.register_forward_pre_hook(before_norm))
        try:
            with self:
                given = run()
        finally:
            for hook in hooks:
                hook.remove()
        self._reads.update(id(leaf) for leaf in tree_leaves(given))  # whoever called it
        once = {paths[part] for part in paths if runs.count(part) == 1}
        kept = [(conv, norm, key) for conv, norm, key in found if {conv, norm} <= once]
        self._folded = [key for _, _, key in kept]
        return {conv: norm for conv, norm, _ in kept}
