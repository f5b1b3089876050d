"""What a run computes, as torch modules: from an input tensor to calibrated probabilities.

The trunk, the taps, the head, its temperature and the average of several members are all inside.
Members that look at an image in the same way are one `Part`, and members on the same trunk share
it. Members that want another size or crop make a part of their own: no graph resizes inputs, since
that would not be what was judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name)

from finetune.backbones.extractor import Reader
from finetune.classifier import Classifier
from finetune.evaluation.ensemble import AnyModel
from finetune.heads.head import AnyHead, KernelHead
from finetune.network import Preprocess, Tap

LEAST = -69.07755  # log(1e-30): what an average takes for the logarithm of a smaller probability


@dataclass(frozen=True)
class Part:
    """Members that look at an image in the same way, as one graph.

    `weight` is their share of the average over all parts. `graph` takes float32 `(N, 3, S, S)`,
    normalised as `preprocess` says, and gives probabilities `(N, C)`.
    """

    name: str
    weight: float
    preprocess: Preprocess
    graph: nn.Module


def parts(model: AnyModel) -> tuple[Part, ...]:
    """The graphs of a run: one, or one for each way in which its members look at an image."""
    named = {"model": model} if isinstance(model, Classifier) else model.members
    weights = {"model": 1.0} if isinstance(model, Classifier) else model.weights
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, member in named.items():
        alike.setdefault(_frame(member.network.preprocess), []).append(name)
    found = []
    for names in alike.values():
        total = sum(weights[name] for name in names)
        inside = [(named[name], weights[name] / total if total else 0.0) for name in names]
        label = "model" if len(alike) == 1 else names[0]
        first = inside[0][0].network.preprocess
        found.append(Part(label, total, first, Graph(inside).eval()))
    return tuple(found)


def _frame(pre: Preprocess) -> tuple[object, ...]:
    """How an image is resized and cut: whatever differs besides can be computed in the graph."""
    return pre.size, pre.resize, pre.interpolation, pre.squash


class Graph(nn.Module):
    """Members and their weights, of the same size and crop; the input is normalised as that of the
    first one."""

    def __init__(self, members: Sequence[tuple[Classifier, float]]) -> None:
        super().__init__()
        self.trunks = nn.ModuleList()
        self.heads = nn.ModuleList()
        self.weights = [weight for _, weight in members]
        self.temperatures = [float(member.head.temperature) for member, _ in members]
        self.reads: list[tuple[int, tuple[int, ...], tuple[str, ...]]] = []
        own = members[0][0].network.preprocess
        at: dict[tuple[object, ...], int] = {}
        taps: list[list[Tap]] = []
        first: list[Classifier] = []
        for member, _ in members:
            pre = member.network.preprocess
            k = at.setdefault((member.network.digest, pre.mean, pre.std), len(taps))
            if k == len(taps):
                taps.append([])
                first.append(member)
            taps[k] += [tap for tap in member.head.taps if tap not in taps[k]]
            places = tuple(taps[k].index(tap) for tap in member.head.taps)
            self.reads.append((k, places, member.views))
            self.heads.append(Scores(member.head))
        for member, wanted in zip(first, taps, strict=True):
            self.trunks.append(Trunk(member, wanted, own))

    def forward(self, image: Tensor) -> Tensor:
        """Probabilities `(N, C)` of `image` `(N, 3, S, S)`."""
        views = sorted({view for _, _, names in self.reads for view in names})
        seen = {view: image.flip(3) if view == "flip" else image for view in views}
        features = {
            (k, view): trunk(seen[view])
            for k, trunk in enumerate(self.trunks)
            for view in views
            if any(k == used and view in names for used, _, names in self.reads)
        }
        logs = []
        for head, temperature, (k, places, names) in zip(
            self.heads, self.temperatures, self.reads, strict=True
        ):
            each = [head([features[k, view][i] for i in places]) for view in names]
            logs.append(F.log_softmax(torch.stack(each).mean(0) / temperature, dim=1))
        if len(logs) == 1:
            return logs[0].exp()
        weighted = [w * log.clamp(min=LEAST) for w, log in zip(self.weights, logs, strict=True)]
        return F.softmax(torch.stack(weighted).sum(0), dim=1)


class Trunk(nn.Module):
    """A frozen network read at `taps`, for inputs that are normalised as `own` says."""

    scale: Tensor
    shift: Tensor

    def __init__(self, member: Classifier, taps: Sequence[Tap], own: Preprocess) -> None:
        super().__init__()
        self.reader = Reader(member.load(), taps)
        pre = member.network.preprocess
        self.same = (pre.mean, pre.std) == (own.mean, own.std)
        mean, std = torch.tensor(pre.mean), torch.tensor(pre.std)
        self.register_buffer("scale", (torch.tensor(own.std) / std)[:, None, None])
        self.register_buffer("shift", ((torch.tensor(own.mean) - mean) / std)[:, None, None])

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x = image if self.same else image * self.scale + self.shift
        return self.reader.read(lambda: self.reader.trunk(x))


class Scores(nn.Module):
    """A head in torch: the decision values that `Head.scores` and `KernelHead.scores` give."""

    weight: Tensor
    bias: Tensor
    support: Tensor
    lengths: Tensor

    def __init__(self, head: AnyHead) -> None:
        super().__init__()
        self.normalize = head.normalize
        self.gamma = float(head.gamma) if isinstance(head, KernelHead) else None
        weight = head.coef if isinstance(head, KernelHead) else head.weight
        self.register_buffer("weight", torch.from_numpy(weight.copy()))
        self.register_buffer("bias", torch.from_numpy(head.bias.copy()))
        if isinstance(head, KernelHead):
            support = torch.from_numpy(head.support.copy())
            self.register_buffer("support", support)
            self.register_buffer("lengths", support.double().square().sum(1).float())

    def forward(self, blocks: Sequence[Tensor]) -> Tensor:
        if self.normalize:
            blocks = [F.normalize(block, dim=1, eps=1e-12) for block in blocks]
        x = torch.cat(list(blocks), 1)
        if self.gamma is not None:
            squared = x.square().sum(1, keepdim=True) + self.lengths - 2 * x @ self.support.T
            x = torch.exp(-self.gamma * squared.clamp(min=0))
        return F.linear(x, self.weight, self.bias)


def program(part: Part) -> torch.export.ExportedProgram:
    """The part as torch.export has it, for batches of any size."""
    side = part.preprocess.size
    example = torch.zeros(2, 3, side, side)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        return torch.export.export(
            part.graph, (example,), dynamic_shapes={"image": {0: batch}}, strict=False
        )
