"""Checks of the first steps of a training: gradients, the size of its updates, and twenty images
learned by heart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from finetune.check import Check
from finetune.training import optim
from finetune.training.loop import StepStats
from finetune.training.subject import Batch, Subject

STEPS = 3  # of the look at gradients and updates
RATIOS = (1e-4, 1e-2)  # ‖Δw‖ / ‖w‖ of one step: about 1e-3 is healthy
WILD = 0.1  # a step that changes a group by a tenth of itself
LARGE = "steps are large"  # of the verdict on ratios above them
DEAD = 0.5  # share of a layer's units without any gradient
# the same in a pretrained network: what it knows of photographs rests on other images (57 % of a
# layer of EfficientNet-Lite0 on digits of 64 pixels, which it learns well)
IDLE = 0.9

BY_HEART = 20  # images
LEARNED = 0.05  # their loss
LONGEST = 100  # steps of a try


@dataclass
class Reached:
    """Which units of every tensor a gradient has reached: one truth value per row of a matrix or
    filter bank, one per tensor otherwise; None where it is not part of the loss at all."""

    rows: dict[int, Tensor | None] = field(default_factory=dict)

    def look(self, parameters: Sequence[Tensor]) -> None:
        for parameter in parameters:
            if parameter.grad is None:
                self.rows.setdefault(id(parameter), None)
                continue
            size = parameter.grad.detach().abs()
            found = size.flatten(1).amax(1) > 0 if size.ndim > 1 else (size > 0).any()[None]
            before = self.rows.get(id(parameter))
            self.rows[id(parameter)] = found if before is None else before | found

    def none(self, parameter: Tensor) -> bool:
        rows = self.rows.get(id(parameter))
        return rows is None or not bool(rows.any())

    def dead(self, parameter: Tensor) -> float:
        rows = self.rows.get(id(parameter))
        return 1.0 if rows is None else 1 - float(rows.float().mean())


def gradients(
    subject: Subject, *, fitted: Sequence[str] = (), dead: float = DEAD, seed: int = 0
) -> list[Check]:
    """Two checks from `STEPS` steps at the planned rates: gradients that are finite and reach every
    group, and the ratio of update to weight in each (`optim.update_ratios`). Groups that are
    `fitted` already may move as they like, unless a step overthrows them; `dead` is the share of
    units without a gradient from which a layer is warned of."""
    reached, ratios = Reached(), dict[str, float | str]()
    with subject.trial(seed=seed):
        optim.set_rates(subject.optimizer.param_groups, 1.0)
        warming = [str(group["name"]) for group in subject.groups if _all_zero(group["params"])]
        for k in range(STEPS):
            before = optim.copies(subject.groups)
            stats = subject.step(subject.batches[k % len(subject.batches)])
            if not stats.finite:
                return [_not_finite(subject, stats, k), _skipped("update ratio")]
            reached.look([p for group in subject.groups for p in group["params"]])
            ratios = optim.update_ratios(subject.groups, before)
        ratios |= dict.fromkeys(warming, "warming")
        broken = optim.broken_groups(subject.groups, gradients=False)
        if broken:
            what = f"the weights of {', '.join(broken)} are not finite after {STEPS} steps"
            check = Check("gradients", "fail", what, "the training diverges", "lower the rate")
            return [check, _skipped("update ratio")]
    return [_reach(subject, reached, dead), _of_ratios(subject, ratios, fitted)]


def _all_zero(parameters: Sequence[Tensor]) -> bool:
    return not any(bool(parameter.any()) for parameter in parameters)


def _skipped(name: str) -> Check:
    return Check(name, "skip", "not measured", "no step could be made")


def _not_finite(subject: Subject, stats: StepStats, step: int) -> Check:
    weights = optim.broken_groups(subject.groups, gradients=False)
    names = weights or optim.broken_groups(subject.groups, gradients=True)
    kind = "weights" if weights else "gradients"
    where = f"; not finite: {kind} of {', '.join(names)}" if names else ""
    return Check(
        "gradients",
        "fail",
        f"{stats} at step {step + 1}{where}",
        "from here on every weight would be NaN",
        "look for a division by zero, log of zero or overflow there; then lower the learning rate",
    )


def _reach(subject: Subject, reached: Reached, dead: float) -> Check:
    """Whether gradients reach what is to be trained."""
    name, groups = "gradients", subject.groups
    frozen = subject.head is not None and not any(
        parameter.requires_grad for parameter in subject.head.parameters()
    )
    if frozen or not groups:
        what = "the head is frozen" if frozen else "nothing asks for gradients"
        meaning = "what has to learn the new classes does not move"
        return Check(name, "fail", what, meaning, "set requires_grad of its parameters")
    if subject.loose:
        what = f"{_some(subject.loose)}: in no group of the optimiser"
        meaning = "these parameters get gradients, but no step moves them"
        return Check(name, "fail", what, meaning, "give them to the optimiser, or freeze them")
    unreached = [
        str(group["name"]) for group in groups if all(reached.none(p) for p in group["params"])
    ]
    matrices = [
        f"{group['name']} {tuple(p.shape)}"
        for group in groups
        if group["name"] not in unreached
        for p in group["params"]
        if p.ndim > 1 and reached.rows.get(id(p)) is not None and reached.none(p)
    ]
    if unreached or matrices:
        what = f"no gradient reaches {_some([*unreached, *matrices])}"
        meaning = "these weights stay what they are: a layer is dead, detached or unused"
        return Check(
            name, "fail", what, meaning, "look for dead ReLUs, detach() and no_grad() behind them"
        )
    shares = [
        (reached.dead(p), f"{group['name']} {tuple(p.shape)}")
        for group in groups
        for p in group["params"]
        if p.ndim > 1
    ]
    worst, where = max(shares, default=(0.0, ""))
    value = f"finite in {STEPS} steps, and reach all {len(groups)} groups"
    if worst >= dead:
        value += f"; {worst:.0%} of the units of {where} get none"
        meaning = "these units are dead for all the images looked at: they learn nothing"
        return Check(name, "warn", value, meaning, "lower the learning rate, or start them anew")
    return Check(name, "pass", value, "everything that is to be trained can learn")


def _of_ratios(subject: Subject, ratios: dict[str, float | str], fitted: Sequence[str]) -> Check:
    """Judge the groups that hold matrices; biases and scales begin near zero, and are shown
    alone."""
    name = "update ratio"
    shown = ", ".join(
        f"{key} {value:.1e}" if isinstance(value, float) else f"{key} {value}"
        for key, value in ratios.items()
        if not key.endswith("/no-decay")
    )
    judged = {
        str(group["name"]): ratio
        for group in subject.groups
        if any(parameter.ndim > 1 for parameter in group["params"])
        and isinstance(ratio := ratios.get(str(group["name"])), float)
    }
    low, high = RATIOS
    still = [key for key, ratio in judged.items() if ratio == 0]
    wild = [key for key, ratio in judged.items() if ratio > WILD]
    fast = [key for key, ratio in judged.items() if ratio > high and key not in fitted]
    slow = [key for key, ratio in judged.items() if ratio < low and key not in fitted]
    value = f"{shown} of the weights in one step" if shown else "no weights but new ones"
    if wild:
        meaning = f"a step overthrows {_some(wild)}: what was learned before is lost"
        return Check(name, "fail", value, meaning, "divide the learning rate by 10 or more")
    if fast:
        meaning = f"above {high:g} in {_some(fast)}: {LARGE}, training may be unstable"
        return Check(name, "warn", value, meaning, "divide the learning rate by 3 to 10")
    if still:
        meaning = f"{_some(still)} do not move at all"
        return Check(name, "warn", value, meaning, "give them a learning rate, or freeze them")
    if slow:
        meaning = f"below {low:g} in {_some(slow)}: these hardly learn"
        return Check(name, "warn", value, meaning, "multiply the learning rate by 3 to 10")
    return Check(name, "pass", value, f"between {low:g} and {high:g}: about 1e-3 is healthy")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# ------------------------------------------------------------------------------- learned by heart


def by_heart(
    subject: Subject,
    batch: Batch,
    right: Callable[[Tensor, Tensor], Tensor],
    *,
    factors: Sequence[float] = (1.0,),
    scale: float = 1.0,
    seed: int = 0,
) -> Check:
    """Whether a few images can be learned to 100 % and a loss below `LEARNED`, from a zero head.

    The planned rates times `factors` are tried in turn until one succeeds. Augmentation, mixup and
    label smoothing are the caller's to leave out of `batch` and of the subject's loss; dropout and
    weight decay are off here. `right` (scores, labels) says which images are right; `scale` divides
    a loss that is a sum.
    """
    tries: list[Heart] = []
    for factor in factors:
        with subject.trial(seed=seed, still=True):
            subject.clear_head()
            optim.set_rates(subject.optimizer.param_groups, factor)
            tries.append(_learned(subject, batch, right, scale))
        if tries[-1].learned:
            break
    return _of_heart(max(tries, key=lambda one: (one.finite, one.share, -one.loss)), len(batch[1]))


@dataclass(frozen=True)
class Heart:
    """How far a few images were learned: in `steps`, to a `loss` and a `share` that is right."""

    steps: int
    loss: float
    share: float
    finite: bool

    @property
    def learned(self) -> bool:
        return self.finite and self.share == 1 and self.loss < LEARNED


def _learned(
    subject: Subject, batch: Batch, right: Callable[[Tensor, Tensor], Tensor], scale: float
) -> Heart:
    inputs, labels = batch
    loss = math.inf
    for k in range(1, LONGEST + 1):
        stats = subject.step(batch)
        loss = stats.loss / scale
        if not stats.finite:
            return Heart(k, loss, 0.0, finite=False)
        if loss < LEARNED or k == LONGEST:
            share = float(right(subject.scores(inputs), labels).float().mean())
            if share == 1 or k == LONGEST:
                return Heart(k, loss, share, finite=True)
    raise AssertionError  # the last step returns


def _of_heart(found: Heart, count: int) -> Check:
    name, loss, share = "overfit", found.loss, found.share
    value = f"{count} images, {found.steps} steps: {share:.0%} right, loss {loss:.3g}"
    if not found.finite:
        meaning = "the training diverges on a handful of images"
        return Check(name, "fail", value, meaning, "divide the learning rate by 10 or more")
    if found.learned:
        return Check(name, "pass", value, "what is between pixels and loss can learn these classes")
    if share == 1:
        meaning = (
            f"all are right, but the loss stays above {LEARNED}: label smoothing, or a slow start"
        )
        return Check(
            name, "warn", value, meaning, "raise the learning rate, or leave smoothing out"
        )
    meaning = (
        "not even a handful of images is learned by heart: something is cut, or the rate is off"
    )
    return Check(
        name,
        "fail",
        value,
        meaning,
        "look at the other checks first: rate, frozen layers, labels and input",
    )


def head_of(model: nn.Module, x: object) -> nn.Module | None:
    """The last layer with a weight matrix that runs in `model`: a linear classifier, as a rule."""
    last: list[nn.Module] = []

    def remember(part: nn.Module, _inputs: object, _output: object) -> None:
        last[:] = [part]

    hooks = [
        part.register_forward_hook(remember)
        for part in model.modules()
        if not list(part.children()) and any(parameter.ndim > 1 for parameter in part.parameters())
    ]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return last[0] if last else None
