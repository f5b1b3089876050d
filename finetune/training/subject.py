"""A training as the checks see it: batches, groups, and one step as one call.

The product's own training (`of_job`) and anybody's torch loop (`of_loop`) look alike from here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.backbones.stages import BATCH_NORMS
from finetune.training import loop, optim
from finetune.training.checkpoints import Trainable
from finetune.training.inputs import Feed, Job
from finetune.training.loop import StepStats
from finetune.training.restore import unchanged

Batch = tuple[Any, Tensor]  # what enters the model, and the labels
Loss = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is checked.

    `modules` hold all that a step may change. `groups` are the layers that verdicts name (`name`,
    `params`), in the order of the network; the `optimizer`'s own groups hold `base_lr`. `step`
    makes one update at the rates that the optimiser holds; `scores` are the model's answers,
    without gradients, in the mode it is in. `train` sets the mode of the training.
    """

    modules: tuple[nn.Module, ...]
    groups: list[optim.Group]
    optimizer: torch.optim.Optimizer
    head: nn.Module | None
    batches: Sequence[Batch]
    step: Callable[[Batch], StepStats]
    scores: Callable[[Any], Tensor]
    train: Callable[[], Any]
    # parameters that ask for gradients and are in no group of the optimiser
    loose: tuple[str, ...] = ()

    @property
    def rate(self) -> float:
        """The learning rate of the last group, which all others keep their ratio to."""
        return float(self.optimizer.param_groups[-1]["base_lr"])

    @contextlib.contextmanager
    def trial(self, *, seed: int = 0, still: bool = False) -> Iterator[None]:
        """Train as one likes: everything is put back at the end. `still`: without dropout and
        weight decay."""
        with unchanged(self.modules, self.optimizer):
            torch.manual_seed(seed)
            self.train()
            if still:
                self._quieten()
            yield

    def _quieten(self) -> None:
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.0
        for module in self.modules:
            for part in module.modules():
                if not isinstance(part, BATCH_NORMS):
                    part.training = False

    def clear_head(self) -> bool:
        """Set the head to zero; whether there is one."""
        if self.head is None:
            return False
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.zero_()
        return True


def of_job(job: Job, feed: Feed, trainable: Trainable, batches: Sequence[Batch]) -> Subject:
    """A training of this product, whose step is that of `loop`; `batches` come from `feed`."""

    def step(batch: Batch) -> StepStats:
        inputs, labels = batch
        targets = nn.functional.one_hot(labels, len(job.class_weights)).float()
        return loop.step(job, feed, trainable, inputs, targets)

    @torch.no_grad()
    def scores(inputs: Any) -> Tensor:
        with job.autocast():
            features = feed.features(inputs)
        found: Tensor = job.head(features.float())
        return found

    return Subject(
        modules=(job.backbone.module, job.head),
        groups=trainable.groups,
        optimizer=trainable.optimizer,
        head=job.head,
        batches=batches,
        step=step,
        scores=scores,
        train=job.backbone.module.train,
    )


def of_loop(
    model: nn.Module,
    batches: Sequence[Batch],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    head: nn.Module | None,
) -> Subject:
    """A torch loop of one's own: forward, `loss(output, y)`, backward, the optimiser's step."""
    parts = [model, *((loss,) if isinstance(loss, nn.Module) else ())]

    def step(batch: Batch) -> StepStats:
        x, y = batch
        zero = head is not None and not any(bool(p.any()) for p in head.parameters())
        optimizer.zero_grad()
        value = loss(model(x), y)
        if value.requires_grad:
            value.backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(found)) if found else 0.0
        stats = StepStats(float(value.detach()), float(value.detach()), zero, norm)
        if stats.finite:
            optimizer.step()
        return stats

    @torch.no_grad()
    def scores(x: Any) -> Tensor:
        found: Tensor = model(x)
        return found

    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    asking = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return Subject(
        modules=tuple(parts),
        groups=_groups(model, optimizer),
        optimizer=optimizer,
        head=head,
        batches=batches,
        step=step,
        scores=scores,
        train=model.train,
        loose=tuple(name for name, p in asking.items() if id(p) not in held),
    )


def _groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[optim.Group]:
    """The parameters that the optimiser moves, by the outermost part of the model they are in."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    outer, prefix = model, ""
    while len(children := list(outer.named_children())) == 1 and not list(
        outer.parameters(recurse=False)
    ):
        prefix, outer = f"{prefix}{children[0][0]}.", children[0][1]
    members: dict[str, list[Tensor]] = {}
    for key, parameter in model.named_parameters():
        if id(parameter) in held and parameter.requires_grad:
            name = prefix + key.removeprefix(prefix).partition(".")[0]
            members.setdefault(name, []).append(parameter)
    return [{"name": name, "params": found} for name, found in members.items()]
