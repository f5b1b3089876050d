"""The stages of a backbone, from stem to end, and which of them training may change."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from finetune.errors import UserError
from finetune.network import Network

GOOGLENET_ENDS = ("conv3", "inception3b", "inception4e", "inception5b")

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Stage:
    """A freeze point: the parameters and buffers `keys`, and the module whose output ends the stage
    (None: no tap)."""

    name: str
    keys: tuple[str, ...]
    end: str | None


@dataclass(frozen=True)
class Backbone:
    """A torch network without its classifier, and the plain-data `Network` that names it.

    `module(x)` gives the pooled features, `(n, width)`. `stages` run from stem to end and cover
    every parameter and every buffer of `module` exactly once. `classifier` is the prefix of the
    classifier's keys in timm's own layout.
    """

    module: nn.Module
    network: Network
    stages: tuple[Stage, ...]
    classifier: str


def split(module: nn.Module) -> tuple[Stage, ...]:
    """Stages of any timm or torchvision classification network, by the order in which its modules
    are defined.

    Freeze points are the children of `blocks`, `stages` or `layers`, or `layer1…`, `s1…`, or where
    a max-pool ends a stage of plain convolutions (VGG, AlexNet), or what timm's `feature_info`
    names. What stands before the first is `stem` (tokens and position tables included), what comes
    after the last is `neck`.
    """
    ends, stage_of = _by_position(module)
    names = ["stem", *(f"stage{i + 1}" for i in range(len(ends))), "neck"]
    # Buffers that are not saved move under training all the same, so the cover takes them from
    # named_buffers.
    keys = [key for key, _ in module.named_parameters()] + [
        key for key, _ in module.named_buffers()
    ]
    groups: dict[str, list[str]] = {name: [] for name in names}
    for key in keys:
        groups[stage_of(key.rpartition(".")[0])].append(key)
    stages = [
        Stage(name, tuple(groups[name]), end)
        for name, end in zip(names, [None, *ends, None], strict=True)
    ]
    return tuple(stage for stage in stages if stage.keys or stage.end)


def _by_position(module: nn.Module) -> tuple[list[str], Callable[[str], str]]:
    """The modules that end the stages, and the name of the stage in which a module of a given path
    is defined."""
    ends = _stage_ends(module)
    position = {path: i for i, (path, _) in enumerate(module.named_modules(remove_duplicate=False))}
    last = [
        max(i for path, i in position.items() if path == end or path.startswith(f"{end}."))
        for end in ends
    ]
    # A child of `features` ends a stage that began before it; elsewhere the first stage begins with
    # its own module.
    begin = position[ends[0]] if ends and not ends[0].startswith("features.") else -1

    def stage_of(path: str) -> str:
        if position[path] < begin:
            return "stem"
        return next(
            (f"stage{i + 1}" for i, end in enumerate(last) if position[path] <= end), "neck"
        )

    return ends, stage_of


def _stage_ends(module: nn.Module) -> list[str]:
    children = dict(module.named_children())
    for container in ("blocks", "stages", "layers"):
        inside = children.get(container)
        if isinstance(inside, (nn.Sequential, nn.ModuleList)) and len(inside) > 1:
            return [f"{container}.{name}" for name, _ in inside.named_children()]
    for pattern in (r"layer[1-9]", r"s[1-9]"):
        if (
            len(found := [name for name in children if re.fullmatch(pattern, name)]) > 1
            and "stage2" not in children
        ):
            return found
    if "inception3a" in children:
        return [name for name in GOOGLENET_ENDS if name in children]
    features = children.get("features")
    if isinstance(features, nn.Sequential):
        pools = [
            f"features.{name}"
            for name, part in features.named_children()
            if isinstance(part, nn.MaxPool2d)
        ]
        if len(pools) > 1:
            return pools
    info = getattr(module, "feature_info", None) or []
    known = dict(module.named_modules())
    return list(dict.fromkeys(entry["module"] for entry in info if entry.get("module") in known))


def freeze(backbone: Backbone, trainable: Iterable[str], *, norm_moves: bool = False) -> None:
    """Freeze every stage but those named in `trainable`, for good: `module.train()` keeps them
    deterministic.

    A frozen stage has no gradients, its BatchNorm, dropout and drop-path stay in eval mode. In
    trainable stages, BatchNorm keeps its running statistics unless `norm_moves` (small batches
    would spoil them).
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
    """Modules that stay in eval mode: those of frozen stages by position, and BatchNorm unless it
    may move.

    The network itself goes with its last stage: what it does on its own (timm's dropout before the
    classifier) is there.
    """
    _, stage_of = _by_position(backbone.module)
    still = []
    for path, part in backbone.module.named_modules():
        frozen = (stage_of(path) if path else backbone.stages[-1].name) not in trainable
        if frozen or (isinstance(part, BATCH_NORMS) and not norm_moves):
            still.append(part)
    return still


def position_of(module: nn.Module) -> Callable[[str], str]:
    """The stage in which a module stands, by its path; the classifier counts to the last."""
    return _by_position(module)[1]


def group_of(backbone: Backbone) -> Callable[[str], str]:
    """The stage of a parameter or buffer, by its key; one that was added after loading belongs
    where its module stands."""
    known = {key: stage.name for stage in backbone.stages for key in stage.keys}
    _, stage_of = _by_position(backbone.module)

    def group(key: str) -> str:
        return known.get(key) or stage_of(key.rpartition(".")[0])

    return group


def trainable_stages(backbone: Backbone) -> tuple[str, ...]:
    """Names of the stages that hold a parameter with gradients, from stem to end."""
    group = group_of(backbone)
    moving = {
        group(key)
        for key, parameter in backbone.module.named_parameters()
        if parameter.requires_grad
    }
    return tuple(stage.name for stage in backbone.stages if stage.name in moving)


def trainable_tensors(backbone: Backbone) -> dict[str, Tensor]:
    """The live tensors that training may change: parameters with gradients, and the buffers of
    their stages.

    The one answer to what is trainable: optimizer, averages, checkpoints and the activation cache
    ask this, so that whatever sets `requires_grad` (`freeze`) decides alone.
    """
    group, stages = group_of(backbone), set(trainable_stages(backbone))
    parameters = {
        key: parameter
        for key, parameter in backbone.module.named_parameters()
        if parameter.requires_grad
    }
    return parameters | {
        key: buffer for key, buffer in backbone.module.named_buffers() if group(key) in stages
    }


def last_stages(backbone: Backbone, count: int) -> tuple[str, ...]:
    """Names of the last `count` numbered stages, and of the neck behind them."""
    numbered = [stage.name for stage in backbone.stages if stage.name.startswith("stage")]
    keep = set(numbered[len(numbered) - count :] if count else [])
    return tuple(
        stage.name for stage in backbone.stages if stage.name in keep or stage.name == "neck"
    )
