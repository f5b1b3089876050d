"""Where a training is, on the disk: one file an epoch writes over, and what may go on from it.

A training that was killed goes on from its last epoch, with the bits of one that was not; a checkpoint of anything else is
refused.
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

from finetune import files, optim
from finetune.errors import UserError
from finetune.feed import Job
from finetune.weights import tensor_digest

FORMAT = 1
FILE = "last.safetensors"
PLAIN = ("epoch", "step", "stopped", "start", "history", "warnings")  # what of a `State` is JSON


@dataclass
class State:
    """Where the loop is and what it has seen: what a checkpoint holds beside the live weights and the optimizer's moments.

    Order, augmentation, mixup and dropout follow from (seed, epoch), so that no generator has to be saved. `good` are the
    weights after the last finished epoch, `average` the moving average, `best` the weights of the lowest validation loss
    and `scores` (n_val, C) theirs.
    """

    epoch: int = 0
    step: int = 0
    stopped: str = ""
    start: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    good: optim.Tensors = field(default_factory=dict)
    average: optim.Tensors = field(default_factory=dict)
    best: optim.Tensors = field(default_factory=dict)
    scores: Tensor | None = None

    def val_losses(self) -> list[float]:
        return [row["val/loss"] for row in (self.start, *self.history)]


@torch.no_grad()
def put(target: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write tensors over those of the same name."""
    for key, value in values.items():
        target[key].copy_(value)


def mark_of(job: Job, head_start: tuple[NDArray[Any], NDArray[Any]] | None) -> str:
    """A digest of all that decides the outcome: a checkpoint of anything else is refused."""
    known = {f"start.{key}": tensor for key, tensor in job.backbone.module.state_dict().items()}
    known["class_weights"] = job.class_weights
    known |= {f"head_start.{k}": torch.as_tensor(np.asarray(array)) for k, array in enumerate(head_start or ())}
    about = {
        "format": FORMAT,
        "training": job.training.to_json(),
        "seed": job.seed,
        "device": str(job.device),
        "bf16": job.half,
        "preprocess": job.backbone.network.to_json()["preprocess"],
        "tensors": tensor_digest(known),
        "images": [[(job.images.paths[i], int(job.images.labels[i])) for i in part] for part in (job.train, job.val)],
        "positions": [job.train.tolist(), job.val.tolist()],
    }
    return files.digest_json(about)


def save(job: Job, mark: str, state: State, optimizer: torch.optim.Optimizer) -> None:
    """One safetensors file, its JSON in the header, so that tensors and state are replaced together or not at all."""
    if job.folder is None:
        return
    tensors = {f"{part}/{key}": t for part in ("good", "average", "best") for key, t in getattr(state, part).items()}
    if state.scores is not None:
        tensors["scores"] = state.scores
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for k, parameter in enumerate(parameters):
        tensors |= {f"optimizer/{k}/{name}": value for name, value in optimizer.state[parameter].items() if value is not None}
    plain = {name: getattr(state, name) for name in PLAIN}
    header = {"mark": mark, "state": json.dumps(plain, allow_nan=False)}
    with files.atomic(job.folder / FILE) as temporary:
        try:
            safetensors.torch.save_file(
                {key: t.detach().contiguous().cpu() for key, t in tensors.items()}, temporary, metadata=header
            )
        except safetensors.SafetensorError as error:  # what it raises for a full disk
            fix = "free some space, then run the same command again: it goes on"
            raise UserError(f"the checkpoint cannot be written ({error})", where=job.folder, fix=fix) from error


def load(job: Job, mark: str, moving: optim.Tensors, optimizer: torch.optim.Optimizer) -> State:
    """The state to go on from: that of the checkpoint, put into the model and the optimizer, or a new one."""
    path = None if job.folder is None else job.folder / FILE
    if path is None or not path.exists():
        return State()
    try:
        with files.in_text(path) as plain, safetensors.safe_open(plain, framework="pt") as file:
            header = file.metadata()
            tensors = {key: file.get_tensor(key).to(job.device) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"damaged: {error}", where=path, fix="remove it: the training then starts again") from error
    if not header or header.get("mark") != mark:
        raise UserError("belongs to another training", where=path, fix="remove it, or choose another folder with --out")
    state = State(**json.loads(header["state"]), scores=tensors.pop("scores", None))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in tensors.items():
        part, _, name = key.partition("/")
        if part == "optimizer":
            k, _, name = name.partition("/")
            parameter = parameters[int(k)]
            # In the layout of the parameter, which the fused kernel walks along.
            own = torch.empty_like(parameter) if value.shape == parameter.shape else torch.empty_like(value)
            optimizer.state[parameter][name] = own.detach().copy_(value)
        else:
            getattr(state, part)[name] = torch.empty_like(moving[name]).detach().copy_(value)
    put(moving, state.good)
    return state
