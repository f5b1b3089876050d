"""Features of a backbone at its taps, from pixels, in torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torchvision.models
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name)
from torch.utils.hooks import RemovableHandle

from finetune.backbones.stages import BATCH_NORMS, Backbone
from finetune.errors import UserError
from finetune.network import Tap


def _wide_modules(module: nn.Module) -> dict[str, str]:
    """Paths of the 4096-d layers of VGG and AlexNet; `-pre` is before the ReLU."""
    known = dict(module.named_modules())
    if "pre_logits.fc2" in known:
        return {
            "fc6": "pre_logits.act1",
            "fc6-pre": "pre_logits.fc1",
            "fc7": "pre_logits.act2",
            "fc7-pre": "pre_logits.fc2",
        }
    if isinstance(module, torchvision.models.AlexNet):
        return {
            "fc6": "classifier.2",
            "fc6-pre": "classifier.1",
            "fc7": "classifier.5",
            "fc7-pre": "classifier.4",
        }
    return {}


class Reader(nn.Module):
    """Reads taps: uint8 pixels `(n, size, size, 3)` in, one float32 array `(n, width)` a tap out.

    Normalisation is part of the graph, so that a converted copy needs nothing from outside. The
    backbone is hooked only while a reader runs: between two calls it is as it was, and training it
    leaves nothing behind here.
    """

    def __init__(self, backbone: Backbone, taps: Sequence[Tap]) -> None:
        super().__init__()
        self.trunk = backbone.module
        self.taps = tuple(taps)
        self._captured: dict[str, Tensor] = {}
        self._moments: list[Tensor] = []
        self._layout = tap_layout(backbone.module)
        paths = {stage.name: stage.end for stage in backbone.stages if stage.end} | _wide_modules(
            backbone.module
        )
        self._ends: dict[str, str] = {}
        for name in sorted({tap.stage for tap in self.taps} - {"pooled", "moments"}):
            if name not in paths:
                raise UserError(
                    f"{backbone.network.name} has no tap {name}",
                    where="tap",
                    fix=f"it has: pooled, {', '.join(map(str, paths))}",
                )
            self._ends[name] = str(paths[name])
        pre = backbone.network.preprocess
        scale = 1 / (255 * torch.tensor(pre.std))
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", -(torch.tensor(pre.mean) * 255 * scale), persistent=False)

    def _hook(self) -> list[RemovableHandle]:
        hooks = [
            self.trunk.get_submodule(path).register_forward_hook(
                functools.partial(self._capture, name)
            )
            for name, path in self._ends.items()
        ]
        if any(tap.stage == "moments" for tap in self.taps):
            norms = [part for part in self.trunk.modules() if isinstance(part, BATCH_NORMS)]
            hooks += [part.register_forward_pre_hook(self._capture_moments) for part in norms]
        return hooks

    def _capture(
        self, name: str, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor
    ) -> None:
        self._captured[name] = output[0] if isinstance(output, (tuple, list)) else output

    def _capture_moments(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        axes = (2, 3) if x.ndim == 4 else (-1,)
        self._moments += [x.mean(axes), x.square().mean(axes)]

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 `(n, H, W, 3)` → float `(n, 3, H, W)`, as the weights expect it."""
        # Transposed last: a converter then leaves it to the first convolution, which wants the
        # channels last anyway.
        return (pixels.float() * self.scale + self.shift).permute(0, 3, 1, 2)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return self.read(lambda: self.trunk(self.normalise(pixels)))

    def read(self, run: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        """The taps while `run` passes something through the trunk, as a whole or in part; it gives
        the pooled end."""
        self._captured.clear()
        self._moments.clear()
        hooks = self._hook()
        try:
            end = run()
        finally:
            for hook in hooks:
                hook.remove()
        outputs = []
        for tap in self.taps:
            if tap.stage == "pooled":
                outputs.append(end.flatten(1).float())
            elif tap.stage == "moments":
                outputs.append(torch.cat(self._moments, 1))
            else:
                outputs.append(pool(self._layout(self._captured[tap.stage]).float(), tap))
        self._captured.clear()
        self._moments.clear()
        return tuple(outputs)


def tap_layout(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function that brings a stage's output to `(n, channels, height, width)`, or leaves vectors
    alone.

    Tokens `(n, tokens, channels)` lose their prefix tokens (class, register); where the rest is no
    square, they become one row.
    """
    channels_last = getattr(module, "output_fmt", "NCHW") == "NHWC"
    prefix = int(getattr(module, "num_prefix_tokens", 0))

    def to_map(x: Tensor) -> Tensor:
        if x.ndim == 4:
            return x.permute(0, 3, 1, 2) if channels_last else x
        if x.ndim == 3:
            tokens = x[:, prefix:]
            side = math.isqrt(tokens.shape[1])
            grid = (side, side) if side * side == tokens.shape[1] else (1, tokens.shape[1])
            return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)
        return x

    return to_map


def pool(x: Tensor, tap: Tap) -> Tensor:
    """Pool a map `(n, c, h, w)` to `(n, width)`: mean on a grid, GeM (p = 3, eps 1e-6) or R-MAC (3
    levels).

    GeM: Radenović et al., 2018 (arXiv 1711.02512). R-MAC: Tolias et al., 2016 (arXiv 1511.05879),
    without whitening.
    """
    if x.ndim == 2:
        return x
    if x.shape[2:] == (1, 1) and tap.stage.startswith("fc"):
        return x.flatten(1)
    if tap.pool == "gem":
        return x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)
    if tap.pool == "rmac":
        return rmac(x)
    if tap.grid == 1:
        return x.mean((2, 3))
    return F.adaptive_avg_pool2d(x, tap.grid).permute(0, 2, 3, 1).flatten(1)


def rmac(x: Tensor, levels: int = 3) -> Tensor:
    """Regional maximum activations of `(n, c, h, w)`: the sum of L2-normalised maxima over
    overlapping squares."""
    height, width = int(x.shape[2]), int(x.shape[3])
    short, long = min(height, width), max(height, width)
    # The number of extra regions along the long side that brings their overlap nearest to 40 % (the
    # paper's choice).
    overlaps = [abs((short**2 - short * (long - short) / n) / short**2 - 0.4) for n in range(1, 7)]
    extra = 0 if height == width else 1 + overlaps.index(min(overlaps))
    total = F.normalize(x.amax((2, 3)), dim=1)
    for level in range(1, levels + 1):
        side = max(1, 2 * short // (level + 1))
        down = level + (extra if height > width else 0)
        across = level + (extra if width > height else 0)
        for top in _starts(height - side, down):
            for left in _starts(width - side, across):
                total = total + F.normalize(
                    x[:, :, top : top + side, left : left + side].amax((2, 3)), dim=1
                )
    return total


def _starts(room: int, count: int) -> list[int]:
    return [0] if count <= 1 else sorted({round(i * room / (count - 1)) for i in range(count)})
