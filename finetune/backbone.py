"""The home of timm's and torchvision's models: create, stages, taps, freezing, and the preprocessing of the weights."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.data
import torch
import torchvision.models
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name)
from torch.utils.hooks import RemovableHandle

from finetune import files, machine, memory
from finetune import weights as weights_home
from finetune.errors import UserError
from finetune.network import Network, Preprocess, Tap

TORCHVISION = {"alexnet": torchvision.models.AlexNet_Weights, "googlenet": torchvision.models.GoogLeNet_Weights}
GOOGLENET_ENDS = ("conv3", "inception3b", "inception4e", "inception5b")
PHOTO_TAGS = re.compile(r"in1k|in12k|in21k|in22k")  # timm's tags for ImageNet's photographs
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Stage:
    """A freeze point: the parameters and buffers `keys`, and the module whose output ends the stage (None: no tap)."""

    name: str
    keys: tuple[str, ...]
    end: str | None


@dataclass(frozen=True)
class Backbone:
    """A torch network without its classifier, and the plain-data `Network` that names it.

    `module(x)` gives the pooled features, `(n, width)`. `stages` run from stem to end and cover every parameter and
    every buffer of `module` exactly once. `classifier` is the prefix of the classifier's keys in timm's own layout.
    """

    module: nn.Module
    network: Network
    stages: tuple[Stage, ...]
    classifier: str


def load(name: str, weights: str = "auto", size: int | None = None) -> Backbone:
    """Create the timm or torchvision model `name`, its classifier removed, in eval mode.

    `weights`: see `weights.find`; `size` overrides the input size of the weights (pixels). Raises `UserError` for an
    unknown name, weights that cannot be had and sizes that the model cannot take.
    """
    if name not in TORCHVISION and not timm.is_model(name):
        import difflib

        near = difflib.get_close_matches(name, [*timm.list_models(), *TORCHVISION], n=3)
        raise UserError(
            f"no backbone is called {name!r}",
            where="--backbone",
            fix=f"did you mean {', '.join(near)}?" if near else "see `finetune backbones`",
        )
    source = weights_home.find(name, weights)
    module, classifier, source = _torchvision_model(name, source) if name in TORCHVISION else _timm_model(name, source, size)
    part: Any  # timm's and torchvision's modules carry attributes that nn.Module does not declare
    for part in module.modules():
        if hasattr(part, "inplace"):
            part.inplace = False  # an in-place ReLU would rewrite the tensor that a tap before it has read
    module.eval()
    config = _input_config(name, module, source)
    side = size or int(config["input_size"][-1])
    try:
        memory.check(module, name, side, memory.LOADED)
        stages = _readable(module, split(module), side)
        network = _describe(name, module, stages, source, config, side)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"{name} cannot take images of {side} pixels ({str(error)[:100]})",
            where="input size",
            fix=f"its own size is {config['input_size'][-1]}{memory.near(module, side)}",
        ) from error
    return Backbone(module, network, stages, classifier)


def _timm_model(name: str, source: weights_home.Source, size: int | None) -> tuple[Any, str, weights_home.Source]:
    # Networks with position tables need the size when they are created; the others take any.
    extra: dict[str, Any] = {"img_size": size} if size and _takes_img_size(name) else {}
    module: Any
    if source.kind in ("hub", "cache"):
        overlay = {"file": str(source.path)} if source.path else None
        try:
            if source.kind == "hub":
                weights_home.look_up_hub()
            module = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **extra)
        except Exception as error:  # the hub's clients raise their own zoo of types
            raise weights_home.hub_unreachable(name, error) from error
    else:
        with _same_random_weights():
            module = timm.create_model(name, pretrained=False, **extra)
    classifier = module.pretrained_cfg.get("classifier") or "head"
    prefixes = tuple(f"{p}." for p in (classifier if isinstance(classifier, (tuple, list)) else (classifier,)))
    if source.path is not None and source.kind == "package":
        weights_home.load_package(module, name, source.path)
    elif source.path is not None and source.kind == "file":
        source = weights_home.load_file(module, name, source, prefixes)
    module.reset_classifier(0)
    return module, prefixes[0], source


@contextlib.contextmanager
def _same_random_weights() -> Iterator[None]:
    """Random weights are the same at every load, as those of a file are: a run can be made again, a network opened twice."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@functools.cache
def _takes_img_size(name: str) -> bool:
    try:
        timm.create_model(name, pretrained=False, img_size=224)
    except TypeError:
        return False
    except Exception:  # a size that does not fit is still a model that takes one
        return True
    return True


def _torchvision_model(name: str, source: weights_home.Source) -> tuple[nn.Module, str, weights_home.Source]:
    with warnings.catch_warnings(), _same_random_weights():
        warnings.simplefilter("ignore")  # GoogLeNet warns about its slow initialisation
        if name == "alexnet":
            module, classifier = torchvision.models.alexnet(weights=None), "classifier.6."
        else:
            module = torchvision.models.googlenet(
                weights=None, aux_logits=False, init_weights=source.kind == "random", transform_input=False
            )
            classifier = "fc."
    if source.kind == "file" and source.path is not None:
        source = weights_home.load_file(module, name, source, (classifier, "aux"))
    elif source.kind != "random":
        try:
            tensors = TORCHVISION[name].DEFAULT.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except Exception as error:
            raise weights_home.hub_unreachable(name, error) from error
        module.load_state_dict({key: value for key, value in tensors.items() if not key.startswith("aux")})
    if name == "alexnet":
        module.classifier[6] = nn.Identity()
    else:
        module.fc = nn.Identity()
    return module, classifier, source


def _input_config(name: str, module: nn.Module, source: weights_home.Source) -> dict[str, Any]:
    if name not in TORCHVISION:
        return timm.data.resolve_model_data_config(module)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    if name == "googlenet" and source.kind not in ("file", "random"):
        mean = std = (0.5, 0.5, 0.5)  # these weights came from TensorFlow: torchvision's transform_input maps to this
    shape = {"input_size": (3, 224, 224), "crop_pct": 224 / 256, "interpolation": "bilinear", "crop_mode": "center"}
    return shape | {"mean": mean, "std": std}


def _readable(module: nn.Module, stages: Sequence[Stage], side: int) -> tuple[Stage, ...]:
    """Stages whose end is really called as a module; the others stay freeze points, without a tap."""
    called: set[str] = set()
    hooks = [
        module.get_submodule(stage.end).register_forward_hook(lambda *_, name=stage.name: called.add(name))
        for stage in stages
        if stage.end
    ]
    with torch.inference_mode():
        module(torch.zeros(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    return tuple(stage if stage.name in called else replace(stage, end=None) for stage in stages)


def _describe(
    name: str, module: Any, stages: tuple[Stage, ...], source: weights_home.Source, config: dict[str, Any], side: int
) -> Network:
    tag = "in1k" if name in TORCHVISION else str(module.pretrained_cfg.get("tag") or "in1k")
    pretraining = {"random": "random", "file": "other"}.get(source.kind) or ("imagenet" if PHOTO_TAGS.search(tag) else "other")
    preprocess = Preprocess(
        size=side,
        resize=math.floor(side / config["crop_pct"]),
        interpolation=str(config["interpolation"]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        squash=config["crop_mode"] == "squash",
    )
    digest = weights_home.tensor_digest(module.state_dict())
    names = tuple(stage.name for stage in stages)
    bare = Network(name, digest, source.words, pretraining, preprocess, {}, names)
    taps = [Tap("pooled"), *(Tap(wide) for wide in _wide_modules(module))]
    taps += [Tap(stage.name, grid=grid) for stage in stages if stage.end for grid in (1, 3)]
    if any(isinstance(part, BATCH_NORMS) for part in module.modules()):
        taps.append(Tap("moments"))
    reader = Reader(Backbone(module, bare, stages, ""), taps)
    with torch.inference_mode():
        outputs = reader(torch.zeros(1, side, side, 3, dtype=torch.uint8))
    return replace(bare, widths={str(tap): int(output.shape[1]) for tap, output in zip(taps, outputs, strict=True)})


def split(module: nn.Module) -> tuple[Stage, ...]:
    """Stages of any timm or torchvision classification network, by the order in which its modules are defined.

    Freeze points are the children of `blocks`, `stages` or `layers`, or `layer1…`, `s1…`, or where a max-pool ends a
    stage of plain convolutions (VGG, AlexNet), or what timm's `feature_info` names. What stands before the first is
    `stem` (tokens and position tables included), what comes after the last is `neck`.
    """
    ends, stage_of = _by_position(module)
    names = ["stem", *(f"stage{i + 1}" for i in range(len(ends))), "neck"]
    # Buffers that are not saved move under training all the same, so the cover takes them from named_buffers.
    keys = [key for key, _ in module.named_parameters()] + [key for key, _ in module.named_buffers()]
    groups: dict[str, list[str]] = {name: [] for name in names}
    for key in keys:
        groups[stage_of(key.rpartition(".")[0])].append(key)
    stages = [Stage(name, tuple(groups[name]), end) for name, end in zip(names, [None, *ends, None], strict=True)]
    return tuple(stage for stage in stages if stage.keys or stage.end)


def _by_position(module: nn.Module) -> tuple[list[str], Callable[[str], str]]:
    """The modules that end the stages, and the name of the stage in which a module of a given path is defined."""
    ends = _stage_ends(module)
    position = {path: i for i, (path, _) in enumerate(module.named_modules(remove_duplicate=False))}
    last = [max(i for path, i in position.items() if path == end or path.startswith(f"{end}.")) for end in ends]
    # A child of `features` ends a stage that began before it; elsewhere the first stage begins with its own module.
    begin = position[ends[0]] if ends and not ends[0].startswith("features.") else -1

    def stage_of(path: str) -> str:
        if position[path] < begin:
            return "stem"
        return next((f"stage{i + 1}" for i, end in enumerate(last) if position[path] <= end), "neck")

    return ends, stage_of


def _stage_ends(module: nn.Module) -> list[str]:
    children = dict(module.named_children())
    for container in ("blocks", "stages", "layers"):
        inside = children.get(container)
        if isinstance(inside, (nn.Sequential, nn.ModuleList)) and len(inside) > 1:
            return [f"{container}.{name}" for name, _ in inside.named_children()]
    for pattern in (r"layer[1-9]", r"s[1-9]"):
        if len(found := [name for name in children if re.fullmatch(pattern, name)]) > 1 and "stage2" not in children:
            return found
    if "inception3a" in children:
        return [name for name in GOOGLENET_ENDS if name in children]
    features = children.get("features")
    if isinstance(features, nn.Sequential):
        pools = [f"features.{name}" for name, part in features.named_children() if isinstance(part, nn.MaxPool2d)]
        if len(pools) > 1:
            return pools
    info = getattr(module, "feature_info", None) or []
    known = dict(module.named_modules())
    return list(dict.fromkeys(entry["module"] for entry in info if entry.get("module") in known))


def _wide_modules(module: nn.Module) -> dict[str, str]:
    """Paths of the 4096-d layers of VGG and AlexNet; `-pre` is before the ReLU."""
    known = dict(module.named_modules())
    if "pre_logits.fc2" in known:
        return {"fc6": "pre_logits.act1", "fc6-pre": "pre_logits.fc1", "fc7": "pre_logits.act2", "fc7-pre": "pre_logits.fc2"}
    if isinstance(module, torchvision.models.AlexNet):
        return {"fc6": "classifier.2", "fc6-pre": "classifier.1", "fc7": "classifier.5", "fc7-pre": "classifier.4"}
    return {}


def save(backbone: Backbone, path: Path, head: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None) -> None:
    """Write the trunk as safetensors, and a linear head `(weight, bias)` under the classifier's own names, as timm expects it."""
    from safetensors.torch import save as to_bytes

    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in backbone.module.state_dict().items()}
    if head is not None:
        tensors[f"{backbone.classifier}weight"] = torch.from_numpy(np.ascontiguousarray(head[0]))
        tensors[f"{backbone.classifier}bias"] = torch.from_numpy(np.ascontiguousarray(head[1]))
    files.write_bytes(path, to_bytes(tensors))


def described(backbone: Backbone, source: str) -> Backbone:
    """The backbone after training: its digest follows its tensors, and its origin says what happened to them."""
    network = replace(backbone.network, digest=weights_home.tensor_digest(backbone.module.state_dict()), source=source)
    return replace(backbone, network=network)


def forward_seconds(backbone: Backbone, batch: int = 8) -> float:
    """Seconds that one image takes forward through the trunk in torch, on this machine now: what a plan's cost is made of."""
    machine.keep_memory()
    side = backbone.network.preprocess.size
    pixels = torch.zeros(batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        backbone.module(pixels)  # the first pass pays for allocations
        start = time.perf_counter()
        backbone.module(pixels)
    return (time.perf_counter() - start) / batch


# ------------------------------------------------------------------------------------------------------------- taps


class Reader(nn.Module):
    """Reads taps: uint8 pixels `(n, size, size, 3)` in, one float32 array `(n, width)` a tap out.

    Normalisation is part of the graph, so that a converted copy needs nothing from outside. The backbone is hooked only
    while a reader runs: between two calls it is as it was, and training it leaves nothing behind here.
    """

    def __init__(self, backbone: Backbone, taps: Sequence[Tap]) -> None:
        super().__init__()
        self.trunk = backbone.module
        self.taps = tuple(taps)
        self._captured: dict[str, Tensor] = {}
        self._moments: list[Tensor] = []
        self._layout = tap_layout(backbone.module)
        paths = {stage.name: stage.end for stage in backbone.stages if stage.end} | _wide_modules(backbone.module)
        self._ends: dict[str, str] = {}
        for name in sorted({tap.stage for tap in self.taps} - {"pooled", "moments"}):
            if name not in paths:
                raise UserError(
                    f"{backbone.network.name} has no tap {name}", where="tap", fix=f"it has: pooled, {', '.join(map(str, paths))}"
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
            self.trunk.get_submodule(path).register_forward_hook(functools.partial(self._capture, name))
            for name, path in self._ends.items()
        ]
        if any(tap.stage == "moments" for tap in self.taps):
            norms = [part for part in self.trunk.modules() if isinstance(part, BATCH_NORMS)]
            hooks += [part.register_forward_pre_hook(self._capture_moments) for part in norms]
        return hooks

    def _capture(self, name: str, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._captured[name] = output[0] if isinstance(output, (tuple, list)) else output

    def _capture_moments(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        axes = (2, 3) if x.ndim == 4 else (-1,)
        self._moments += [x.mean(axes), x.square().mean(axes)]

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 `(n, H, W, 3)` → float `(n, 3, H, W)`, as the weights expect it."""
        # Transposed last: a converter then leaves it to the first convolution, which wants the channels last anyway.
        return (pixels.float() * self.scale + self.shift).permute(0, 3, 1, 2)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        self._captured.clear()
        self._moments.clear()
        hooks = self._hook()
        try:
            end = self.trunk(self.normalise(pixels))
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
    """A function that brings a stage's output to `(n, channels, height, width)`, or leaves vectors alone.

    Tokens `(n, tokens, channels)` lose their prefix tokens (class, register); where the rest is no square, they become
    one row.
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
    """Pool a map `(n, c, h, w)` to `(n, width)`: mean on a grid, GeM (p = 3, eps 1e-6) or R-MAC (3 levels).

    GeM: Radenović et al., 2018 (arXiv 1711.02512). R-MAC: Tolias et al., 2016 (arXiv 1511.05879), without whitening.
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
    """Regional maximum activations of `(n, c, h, w)`: the sum of L2-normalised maxima over overlapping squares."""
    height, width = int(x.shape[2]), int(x.shape[3])
    short, long = min(height, width), max(height, width)
    # The number of extra regions along the long side that brings their overlap nearest to 40 % (the paper's choice).
    overlaps = [abs((short**2 - short * (long - short) / n) / short**2 - 0.4) for n in range(1, 7)]
    extra = 0 if height == width else 1 + overlaps.index(min(overlaps))
    total = F.normalize(x.amax((2, 3)), dim=1)
    for level in range(1, levels + 1):
        side = max(1, 2 * short // (level + 1))
        down = level + (extra if height > width else 0)
        across = level + (extra if width > height else 0)
        for top in _starts(height - side, down):
            for left in _starts(width - side, across):
                total = total + F.normalize(x[:, :, top : top + side, left : left + side].amax((2, 3)), dim=1)
    return total


def _starts(room: int, count: int) -> list[int]:
    return [0] if count <= 1 else sorted({round(i * room / (count - 1)) for i in range(count)})


# ---------------------------------------------------------------------------------------------------------- freezing


def freeze(backbone: Backbone, trainable: Iterable[str], *, norm_moves: bool = False) -> None:
    """Freeze every stage but those named in `trainable`, for good: `module.train()` keeps them deterministic.

    A frozen stage has no gradients, its BatchNorm, dropout and drop-path stay in eval mode. In trainable stages,
    BatchNorm keeps its running statistics unless `norm_moves` (small batches would spoil them).
    """
    names = set(trainable)
    unknown = names - {stage.name for stage in backbone.stages}
    if unknown:
        raise UserError(
            f"no stage {', '.join(sorted(unknown))}",
            where="--strategy",
            fix=f"it has {', '.join(s.name for s in backbone.stages)}",
        )
    moving = {key for stage in backbone.stages if stage.name in names for key in stage.keys}
    for key, parameter in backbone.module.named_parameters():
        parameter.requires_grad_(key in moving)
    still = _still_modules(backbone, names, norm_moves)

    def train(mode: bool = True) -> nn.Module:
        type(backbone.module).train(backbone.module, mode)
        for part in still:
            part.training = False
        return backbone.module

    backbone.module.train = train  # type: ignore[method-assign]
    backbone.module.train(backbone.module.training)


def _still_modules(backbone: Backbone, trainable: set[str], norm_moves: bool) -> list[nn.Module]:
    """Modules that stay in eval mode: those of frozen stages by position, and BatchNorm unless it may move.

    The network itself goes with its last stage: what it does on its own (timm's dropout before the classifier) is there.
    """
    _, stage_of = _by_position(backbone.module)
    still = []
    for path, part in backbone.module.named_modules():
        frozen = (stage_of(path) if path else backbone.stages[-1].name) not in trainable
        if frozen or (isinstance(part, BATCH_NORMS) and not norm_moves):
            still.append(part)
    return still


def group_of(backbone: Backbone) -> Callable[[str], str]:
    """The stage of a parameter or buffer, by its key; one that was added after loading belongs where its module stands."""
    known = {key: stage.name for stage in backbone.stages for key in stage.keys}
    _, stage_of = _by_position(backbone.module)

    def group(key: str) -> str:
        return known.get(key) or stage_of(key.rpartition(".")[0])

    return group


def trainable_stages(backbone: Backbone) -> tuple[str, ...]:
    """Names of the stages that hold a parameter with gradients, from stem to end."""
    group = group_of(backbone)
    moving = {group(key) for key, parameter in backbone.module.named_parameters() if parameter.requires_grad}
    return tuple(stage.name for stage in backbone.stages if stage.name in moving)


def trainable_tensors(backbone: Backbone) -> dict[str, Tensor]:
    """The live tensors that training may change: parameters with gradients, and the buffers of their stages.

    The one answer to what is trainable: optimizer, averages, checkpoints and the activation cache ask this, so that
    whatever sets `requires_grad` (`freeze`) decides alone.
    """
    group, stages = group_of(backbone), set(trainable_stages(backbone))
    parameters = {key: parameter for key, parameter in backbone.module.named_parameters() if parameter.requires_grad}
    return parameters | {key: buffer for key, buffer in backbone.module.named_buffers() if group(key) in stages}


def last_stages(backbone: Backbone, count: int) -> tuple[str, ...]:
    """Names of the last `count` numbered stages, and of the neck behind them."""
    numbered = [stage.name for stage in backbone.stages if stage.name.startswith("stage")]
    keep = set(numbered[len(numbered) - count :] if count else [])
    return tuple(stage.name for stage in backbone.stages if stage.name in keep or stage.name == "neck")
