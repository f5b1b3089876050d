"""Where a training is, on the disk: one file an epoch writes over, and what may go on from it.

A training that was killed goes on from its last epoch, with the bits of one that was not; a
checkpoint of anything else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune import files
from finetune.backbones.stages import trainable_tensors
from finetune.backbones.weights import tensor_digest
from finetune.errors import UserError
from finetune.training import optim
from finetune.training.inputs import Job

FORMAT = 2  # 1: kept the epoch of the lowest loss (0.1.0)
FILE = "last.safetensors"
PLAIN = (
    "epoch",
    "step",
    "best_epoch",
    "stopped",
    "start",
    "history",
    "warnings",
)  # what of a `State` is JSON


@dataclass
class State:
    """Where the loop is and what it has seen: what a checkpoint holds beside the live weights and
    the optimizer's moments.

    Order, augmentation, mixup and dropout follow from (seed, epoch), so that no generator has to be
    saved. `good` are the weights after the last finished epoch, `average` the moving average,
    `best` those of `best_epoch`; `scores` (epochs + 1, n_val, C) are those of every epoch so far.
    """

    epoch: int = 0
    step: int = 0
    best_epoch: int = 0
    stopped: str = ""
    start: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    good: optim.Tensors = field(default_factory=dict)
    average: optim.Tensors = field(default_factory=dict)
    best: optim.Tensors = field(default_factory=dict)
    scores: Tensor | None = None


@dataclass(frozen=True)
class Trainable:
    """What a step changes: the live tensors by name (`trunk.` and `head.`), a copy of them at the
    start, and the optimizer."""

    live: optim.Tensors
    initial: optim.Tensors
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, job: Job) -> Trainable:
        """All that `freeze` left with gradients, and the head."""
        live = {f"trunk.{key}": tensor for key, tensor in trainable_tensors(job.backbone).items()}
        live |= {f"head.{key}": parameter for key, parameter in job.head.named_parameters()}
        groups = optim.param_groups(job.backbone, job.head, job.training)
        return cls(live, copied(live), optim.optimizer(groups, job.training))

    @property
    def groups(self) -> list[optim.Group]:
        return self.optimizer.param_groups

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.groups for parameter in group["params"]]

    def moved(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of a trunk parameter and its start, for L2-SP."""
        pairs = ((key, self.live[key], start) for key, start in self.initial.items())
        return [
            (live, start)
            for key, live, start in pairs
            if key.startswith("trunk.") and live.requires_grad
        ]


def copied(tensors: Mapping[str, Tensor]) -> optim.Tensors:
    """A copy of tensors by name, without their graph."""
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


@torch.no_grad()
def put(target: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write tensors over those of the same name."""
    for key, value in values.items():
        target[key].copy_(value)


def mark_of(job: Job, head_start: tuple[NDArray[Any], NDArray[Any]] | None) -> str:
    """A digest of all that decides the outcome: a checkpoint of anything else is refused."""
    known = {f"start.{key}": tensor for key, tensor in job.backbone.module.state_dict().items()}
    known["class_weights"] = job.class_weights
    known |= {
        f"head_start.{k}": torch.as_tensor(np.asarray(array))
        for k, array in enumerate(head_start or ())
    }
    about = {
        "format": FORMAT,
        "training": job.training.to_json(),
        "seed": job.seed,
        "device": str(job.device),
        "bf16": job.half,
        "preprocess": job.backbone.network.to_json()["preprocess"],
        "tensors": tensor_digest(known),
        "images": [
            [(job.images.paths[i], int(job.images.labels[i])) for i in part]
            for part in (job.train, job.val)
        ],
        "positions": [job.train.tolist(), job.val.tolist()],
    }
    return files.digest_json(about)


def save(job: Job, mark: str, state: State, trainable: Trainable) -> None:
    """One safetensors file, its JSON in the header, so that tensors and state are replaced together
    or not at all."""
    if job.folder is None:
        return
    tensors = {
        f"{part}/{key}": t
        for part in ("good", "average", "best")
        for key, t in getattr(state, part).items()
    }
    if state.scores is not None:
        tensors["scores"] = state.scores
    for k, parameter in enumerate(trainable.parameters):
        moments = trainable.optimizer.state[parameter]
        tensors |= {
            f"optimizer/{k}/{name}": value for name, value in moments.items() if value is not None
        }
    plain = {name: getattr(state, name) for name in PLAIN}
    header = {"format": str(FORMAT), "mark": mark, "state": json.dumps(plain, allow_nan=False)}
    with files.atomic(job.folder / FILE) as temporary:
        try:
            safetensors.torch.save_file(
                {key: t.detach().contiguous().cpu() for key, t in tensors.items()},
                temporary,
                metadata=header,
            )
        except safetensors.SafetensorError as error:  # what it raises for a full disk
            fix = "free some space, then run the same command again: it goes on"
            raise UserError(
                f"the checkpoint cannot be written ({error})", where=job.folder, fix=fix
            ) from error


def load(job: Job, mark: str, trainable: Trainable) -> State:
    """The state to go on from: that of the checkpoint, put into the model and the optimizer, or a
    new one."""
    path = None if job.folder is None else job.folder / FILE
    if path is None or not path.exists():
        return State()
    try:
        with files.in_text(path) as plain, safetensors.safe_open(plain, framework="pt") as file:
            header = file.metadata()
            tensors = {key: file.get_tensor(key).to(job.device) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"damaged: {error}", where=path, fix="remove it: the training then starts again"
        ) from error
    if header and "format" not in header:  # version 0.1.0, whose trainings had other plans
        again = "begun by an earlier version, whose plan differs: the training starts again"
        return State(warnings=[again])
    if not header or header.get("mark") != mark:
        raise UserError(
            "belongs to another training",
            where=path,
            fix="remove it, or choose another folder with --out",
        )
    state = State(**json.loads(header["state"]), scores=tensors.pop("scores", None))
    parameters = trainable.parameters
    for key, value in tensors.items():
        part, _, name = key.partition("/")
        if part == "optimizer":
            k, _, name = name.partition("/")
            parameter = parameters[int(k)]
            # In the layout of the parameter, which the fused kernel walks along.
            own = (
                torch.empty_like(parameter)
                if value.shape == parameter.shape
                else torch.empty_like(value)
            )
            trainable.optimizer.state[parameter][name] = own.detach().copy_(value)
        else:
            getattr(state, part)[name] = (
                torch.empty_like(trainable.live[name]).detach().copy_(value)
            )
    put(trainable.live, state.good)
    return state
