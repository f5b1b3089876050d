"""Before a training: is there anything that would spoil it? For a torch loop of one's own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.check import Check, Status, worst
from finetune.errors import UserError
from finetune.training import first_loss, range_test, step_checks
from finetune.training.range_test import RangeTest
from finetune.training.restore import unchanged
from finetune.training.step_checks import BY_HEART
from finetune.training.subject import Batch, Loss, Subject, of_loop

BATCHES = 6  # looked at, at most
RATE = 1e-3  # of AdamW, where no optimiser is given
WORSE = 1.1  # times the loss of guessing: a start that is worse than that
RAW = 10.0  # a mean or spread of the input beyond: it is not normalised


@dataclass(frozen=True)
class Preflight:
    """Verdicts, in the order in which they should be read, and the learning-rate range test where
    there was one (`range_picture.svg` draws it)."""

    checks: tuple[Check, ...]
    range_test: RangeTest | None = None

    @property
    def status(self) -> Status:
        """The gravest verdict."""
        return worst(self.checks)

    def to_json(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "checks": [check.to_json() for check in self.checks],
            "range_test": self.range_test.to_json() if self.range_test else None,
        }

    def to_text(self) -> str:
        return "\n".join(check.to_text() for check in self.checks)

    def __str__(self) -> str:
        return self.to_text()


def preflight(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    loss: Loss,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    head: nn.Module | None = None,
    seed: int = 0,
) -> Preflight:
    """Check a torch training before it begins; nothing of it is changed.

    `model(x)` gives scores `(n, C)`, or `(n,)` or `(n, 1)` for one binary output; `batches` gives
    pairs `(x, y)`, as a `DataLoader` does, of which the first few are taken; `loss(output, y)`
    gives one number: a mean over the images. `optimizer` is the one of the training, with its
    learning rates; without it AdamW at 1e-3 moves what asks for gradients. `head` is the last
    layer, found by running the model where it is not given.

    The checks, after Karpathy's recipe (2019) and the notes of Stanford's CS231n: the input is
    normalised; scores of zero cost what they must (`first_loss.expected`), and the model as it is
    not more; gradients are finite and reach every layer; a step changes weights by about a
    thousandth; 20 images can be learned by heart from a zero head, without dropout and weight
    decay; the learning rate lies where the loss falls. Weights, buffers, optimiser, modes and the
    global random numbers come out bit by bit as they went in.

    Raises `UserError` where `batches` gives nothing. What `model` and `loss` raise comes through.
    """
    with unchanged([model], optimizer):
        taken = _taken(model, batches)
        torch.manual_seed(seed)
        model.train()
        with unchanged([model]), torch.no_grad():
            output = model(taken[0][0])
        found = _input(model, taken)
        shape = _outputs(output, taken)
        if shape.status == "fail":
            return Preflight((found, shape))
        if head is None:
            with unchanged([model]):
                head = step_checks.head_of(model, taken[0][0])
        initial = _initial(output, taken[0][1], loss)
        start = found, *([shape] if shape.status == "warn" else []), initial
        moves = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not moves and optimizer is None:
            what = "nothing of the model asks for gradients"
            return Preflight((*start, Check("gradients", "fail", what, "it cannot learn")))
        optimizer = optimizer or torch.optim.AdamW(moves, lr=RATE)
        with unchanged([], optimizer):
            for k, group in enumerate(optimizer.param_groups):
                group["base_lr"] = float(group["lr"])
                group.setdefault("name", f"group {k}")
            subject = of_loop(model, taken, loss, optimizer, head)
            later, test = _of_steps(subject, loss, output, seed)
    return Preflight((*start, *later), test)


def _taken(model: nn.Module, batches: Iterable[tuple[Any, Tensor]]) -> list[Batch]:
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    taken = [
        (x.to(place) if isinstance(x, Tensor) else x, torch.as_tensor(y).to(place))
        for x, y in itertools.islice(batches, BATCHES)
    ]
    if not taken or not len(taken[0][1]):
        raise UserError(
            "there is no batch", where="batches", fix="give a list of (x, y), or a DataLoader"
        )
    return taken


def _of_steps(
    subject: Subject, loss: Loss, output: Tensor, seed: int
) -> tuple[list[Check], RangeTest | None]:
    """The checks that make steps; the costly ones only where gradients are sound."""
    found = step_checks.gradients(subject, seed=seed)
    if found[0].status == "fail":
        skipped = [Check(name, "skip", "not tried", "no step could be made") for name in LATER]
        return [*found, *skipped], None
    plain = first_loss.unsmoothed(loss)
    optimizer, head = subject.optimizer, subject.head
    calm = of_loop(subject.modules[0], subject.batches, plain, optimizer, head)
    batch = _few(subject.batches)
    test = range_test.run(subject, seed=seed, classes=_classes(output))
    rates = range_test.judged(test)
    scale = _scale(plain, output, batch[1])
    heart = step_checks.by_heart(calm, batch, _right, factors=test.brisk, scale=scale, seed=seed)
    return [found[0], _tempered(found[1], rates), rates, heart], test


def _tempered(ratio: Check, rates: Check) -> Check:
    """Large first steps are no fault where the range test shows that they lower the loss: new
    layers are small, and Adam's first steps are the longest."""
    if ratio.status != "warn" or rates.status != "pass" or step_checks.LARGE not in ratio.meaning:
        return ratio
    meaning = f"{ratio.meaning.partition(':')[0]}, as first steps may be: they lower the loss"
    return Check(ratio.name, "pass", ratio.value, meaning)


def _classes(output: Tensor) -> int:
    """The number of classes that scores tell apart: one output alone says yes or no."""
    return output.shape[1] if output.ndim > 1 and output.shape[1] > 1 else 2


LATER = ("learning rate", "overfit")


def _scale(loss: Loss, output: Tensor, y: Tensor) -> float:
    """By what a loss that is a sum has to be divided."""
    zeros = output.new_zeros(len(y), *output.shape[1:])
    value = first_loss.of_zeros(loss, zeros, y)
    return float(len(y)) if first_loss.summed(value, _classes(output), len(y)) else 1.0


def _few(batches: Sequence[Batch]) -> Batch:
    """`BY_HEART` images of the batches, of as many classes as they hold in turn; the first batch
    where inputs are no tensors."""
    if (
        not all(isinstance(x, Tensor) for x, _ in batches)
        or len({x.shape[1:] for x, _ in batches}) > 1
    ):
        return batches[0]
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    labels = (y.argmax(1) if y.ndim > 1 and y.shape[1] > 1 else y.flatten()).tolist()
    seen: dict[float, int] = {}
    turns = []
    for k, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        turns.append((seen[label], k))
    chosen = sorted(k for _, k in sorted(turns)[:BY_HEART])
    return x[chosen], y[chosen]


def _right(scores: Tensor, y: Tensor) -> Tensor:
    """Which images are right: the best class, or every binary output on its side of 0."""
    one_class = scores.ndim > 1 and scores.shape[1] > 1 and (y.ndim == 1 or not _many(y))
    if one_class:
        return scores.argmax(1) == (y if y.ndim == 1 else y.argmax(1))
    rows = (len(y), -1)
    return ((scores.reshape(rows) > 0) == (y.reshape(rows) > 0.5)).all(1)


def _many(y: Tensor) -> bool:
    """Whether rows of targets are several yes or no answers, not one distribution."""
    return bool((y.sum(1) - 1).abs().max() > 1e-4)


def _input(model: nn.Module, batches: Sequence[Batch]) -> Check:
    """Finite, and normalised as the weights want it, as far as that can be known."""
    name = "input"
    tensors = [x.float() for x, _ in batches if isinstance(x, Tensor)]
    if not tensors:
        return Check(name, "skip", "no tensor", "only the input of images is looked at")
    joined = torch.cat([x.flatten() for x in tensors])
    if not bool(torch.isfinite(joined).all()):
        what = f"{int((~torch.isfinite(joined)).sum())} numbers are NaN or infinite"
        return Check(name, "fail", what, "every weight would become NaN", "look at the images")
    low, high = float(joined.min()), float(joined.max())
    mean, spread = float(joined.mean()), float(joined.std())
    value = f"mean {mean:.3g}, spread {spread:.3g}, from {low:.3g} to {high:.3g}"
    wanted: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    means, stds = wanted.get("mean"), wanted.get("std")
    if max(abs(mean), spread) > RAW:
        meaning = "these look like raw pixel values: the network was made for small numbers"
        fix = (
            f"subtract {means} and divide by {stds}"
            if means
            else "subtract the mean, divide by the spread"
        )
        return Check(name, "fail" if means else "warn", value, meaning, fix)
    if means and stds and all(means) and low >= 0:
        meaning = f"no number is below 0: the weights' mean {means} was not subtracted"
        return Check(name, "fail", value, meaning, f"subtract it and divide by {stds}")
    return Check(name, "pass", value, "finite, and of the size that networks are made for")


def _outputs(output: Any, batches: Sequence[Batch]) -> Check:
    """Whether the labels are among the outputs."""
    name = "classes"
    if not isinstance(output, Tensor):
        what = f"the model gives {type(output).__name__}"
        return Check(name, "fail", what, "scores are expected", "return one tensor (n, C)")
    y = batches[0][1]
    if output.ndim < 2 or output.shape[1] == 1 or y.is_floating_point() or y.ndim > 1:
        value = f"outputs {tuple(output.shape)}, targets {tuple(y.shape)}"
        return Check(name, "pass", value, "targets are not class numbers: the loss compares them")
    labels, width = torch.cat([y for _, y in batches]), output.shape[1]
    low, high, seen = int(labels.min()), int(labels.max()), len(labels.unique())
    value = f"{width} outputs, labels from {low} to {high} ({seen} different ones in {len(labels)})"
    if low < 0 or high >= width:
        meaning = f"label {low if low < 0 else high} is none of the {width} outputs"
        return Check(name, "fail", value, meaning, "give the last layer one output a class")
    if seen == 1:
        meaning = "the first batches hold one class alone"
        return Check(name, "fail", value, meaning, "shuffle the images, or give a second class")
    rows = output.float().sum(1)
    if bool(((rows - 1).abs() < 1e-3).all()) and bool((output >= 0).all()):
        meaning = "the outputs are probabilities already, and the loss wants scores"
        return Check(name, "warn", value, meaning, "leave the softmax out of the model")
    if high + 1 == seen < width and len(labels) >= 10 * seen:
        meaning = f"{width - seen} outputs stand for no class that was seen"
        return Check(name, "warn", value, meaning, "give the last layer one output a class")
    return Check(name, "pass", value, "every label has its output")


def _initial(output: Tensor, y: Tensor, loss: Loss) -> Check:
    """What scores of zero cost, and what the model costs as it is."""
    name = "initial loss"
    classes = _classes(output)
    zero = first_loss.of_zeros(loss, output, y)
    with torch.no_grad():
        own = float(loss(output, y))
    kind = first_loss.recognised(zero, classes)
    guess = math.log(classes)
    value = (
        f"scores of zero cost {zero:.4f} (ln {classes} = {guess:.4f}), the model as it is {own:.4f}"
    )
    if not math.isfinite(own) or not math.isfinite(zero):
        return Check(name, "fail", value, "the loss is not finite", "look at the last layer")
    if kind is None and first_loss.summed(zero, classes, len(y)):
        meaning = "the loss is a sum over the images: steps grow with the batch"
        return Check(name, "fail", value, meaning, "take the mean")
    if kind is None:
        meaning = "neither ln C, nor ln 2 of binary outputs, nor the focal loss's (1 − 1/C)² ln C"
        return Check(name, "warn", value, meaning, "check the loss, unless it is one of your own")
    if own > WORSE * zero:
        meaning = "the model begins worse than by guessing: the first steps undo that"
        return Check(name, "warn", value, meaning, "start the last layer at zero")
    return Check(name, "pass", value, f"that of {kind.replace('binary', 'binary cross-entropy')}")
