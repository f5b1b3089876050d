"""A greedy soup: one network whose weights are the mean of several fine-tuned ones (Wortsman et al.
2022, "Model soups").

Only runs that began at the same weights, with the same head, on the same images can be mixed. The
ingredients are chosen on images that none of them was trained on, never on test images. The soup is
read with BatchNorm's statistics averaged as the weights are, and estimated anew on the training
images; both are told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune import classifier, metrics
from finetune.backbones import create
from finetune.classifier import Classifier
from finetune.combining import forgetting, members
from finetune.combining.members import Member
from finetune.combining.weight_line import INTERPOLATED, REESTIMATED
from finetune.data.images import ImageSet
from finetune.errors import UserError
from finetune.heads.head import Head, softmax
from finetune.names import shown
from finetune.network import Tap
from finetune.progress import Say
from finetune.training import replay
from finetune.training.replay import Kept, Moving

Ints = NDArray[np.int64]

MOST = 5000  # training images that BatchNorm's statistics are estimated on
ELSE = "leave --soup out: the runs' probabilities can be averaged"


@dataclass(frozen=True)
class Ingredient:
    """A fine-tuned run: its model, and the tensors that it does not share with all others."""

    member: Member
    model: Classifier
    tensors: replay.Tensors

    @property
    def head(self) -> Head:
        assert isinstance(self.model.head, Head)
        return self.model.head


@dataclass(frozen=True)
class Mix:
    """A mean of ingredients, as equals: `norms` says what was done with BatchNorm's statistics;
    `scores` (n, C) are of the images that choose, `temperature` is fitted on them."""

    names: tuple[str, ...]
    norms: str
    scores: Any
    temperature: float
    accuracy: float
    log_loss: float

    @property
    def worth(self) -> tuple[float, float]:
        return self.accuracy, -self.log_loss

    @property
    def probabilities(self) -> Any:
        return softmax(self.scores, self.temperature)


class Kitchen:
    """The runs that can be mixed, and the images that judge the mixes: `images` with their
    `labels`, which no run was trained on."""

    def __init__(self, found: Sequence[Member], say: Say) -> None:
        models = [_tuned(member) for member in found]
        _refuse_other_starts(found, models)
        pictures, ids = members.scanned(found[0])
        self.images = _held_out(found, pictures, ids)
        self.labels: Ints = self.images.labels
        seen = set(found[0].trained or ())
        was = np.flatnonzero([digest in seen for digest in ids])
        self.backbone = models[0].load()
        states = [replay.tensors(self.backbone)]
        states += [replay.tensors(model.load()) for model in models[1:]]
        changed = {
            stage for state in states[1:] for stage in replay.moved(self.backbone, states[0], state)
        }
        self.stages = [s.name for s in self.backbone.stages if s.name in changed]
        self.runs = tuple(
            Ingredient(member, model, replay.only(state, self.backbone, self.stages))
            for member, model, state in zip(found, models, states, strict=True)
        )
        taps: tuple[Tap, ...] = self.runs[0].head.taps
        self.moving = Moving(self.backbone, self.stages, taps)
        self._chooses = self.moving.keep(self.images)
        self._trained = pictures.subset(was[:MOST])
        self._training = self.moving.keep(self._trained)
        say(
            f"soup       {len(found)} runs differ in {', '.join(self.stages)}; "
            f"{len(self.images)} images that no run was trained on choose"
        )

    def head(self, runs: Sequence[Ingredient], temperature: float = 1.0) -> Head:
        """The mean of the heads."""
        weight, bias = (
            np.mean([one.head.arrays()[name] for one in runs], axis=0, dtype=np.float64)
            for name in ("weight", "bias")
        )
        return dataclasses.replace(
            runs[0].head,
            weight=np.asarray(weight, dtype=np.float32),
            bias=np.asarray(bias, dtype=np.float32),
            temperature=temperature,
        )

    def place(self, runs: Sequence[Ingredient], norms: str = INTERPOLATED) -> None:
        """Give the network the mean weights of `runs`."""
        share = 1 / len(runs)
        self.moving.put(replay.mixed([one.tensors for one in runs], [share] * len(runs)))
        if norms == REESTIMATED:
            self.moving.reestimate(self._training)

    def mix(self, runs: Sequence[Ingredient], norms: str = INTERPOLATED) -> Mix:
        """A mean judged on the images that choose."""
        self.place(runs, norms)
        scores = self.scores(runs, self._chooses)
        temperature = metrics.fit_temperature(scores, self.labels)
        return Mix(
            tuple(one.member.name for one in runs),
            norms,
            scores,
            temperature,
            float((scores.argmax(1) == self.labels).mean()),
            float(metrics.log_losses(self.labels, softmax(scores, temperature)).mean()),
        )

    def scores(self, runs: Sequence[Ingredient], kept: Kept) -> Any:
        head, blocks = self.head(runs), self.moving.read(kept)
        return head.scores([blocks[tap] for tap in head.taps])

    def of(self, mix: Mix) -> list[Ingredient]:
        return [one for one in self.runs if one.member.name in mix.names]

    def classifier(self, mix: Mix) -> Classifier:
        """The classifier of a mix, calibrated on the images that chose it."""
        runs = self.of(mix)
        self.place(runs, mix.norms)
        words = f"{self.runs[0].model.network.source}; then the mean of {len(runs)} such networks"
        placed = create.described(self.backbone, words)
        model = self.runs[0].model
        head = self.head(runs, mix.temperature)
        made = Classifier(placed.network, head, lambda: placed, model.engine, model.precision)
        seed = self.runs[0].member.recipe.data.seed
        return classifier.remember_all(made, self._trained, seed=seed)


def singles(kitchen: Kitchen) -> list[Mix]:
    """The runs alone, the best first."""
    return sorted((kitchen.mix([one]) for one in kitchen.runs), key=lambda m: m.worth)[::-1]


def greedy(kitchen: Kitchen, singles: Sequence[Mix]) -> Mix:
    """The greedy soup: run after run joins, the best first, where the accuracy on the images that
    choose does not fall (and, where it stays, the log loss does not rise)."""
    soup, inside = singles[0], kitchen.of(singles[0])
    for single in singles[1:]:
        tried = kitchen.mix([*inside, *kitchen.of(single)])
        if tried.worth >= soup.worth:
            soup, inside = tried, [*inside, *kitchen.of(single)]
    if len(inside) == 1:
        name = inside[0].member
        raise UserError(
            f"no other run makes {name.name} better on the {len(kitchen.images)} images that "
            f"choose: the soup would be this run alone",
            where=name.path,
            fix=f"use it as it is, or {ELSE}",
        )
    return soup


def _tuned(member: Member) -> Classifier:
    leaf, model = forgetting.tuned(member)
    if leaf is None:
        raise UserError(
            "has no weights that moved: nothing was fine-tuned",
            where=member.path,
            fix=f"give fine-tuned runs, or {ELSE}",
        )
    return model


def _refuse_other_starts(found: Sequence[Member], models: Sequence[Classifier]) -> None:
    """Weights can only be averaged where they began as the same ones."""
    first = found[0]
    for member, model in zip(found[1:], models[1:], strict=True):
        for what, one, other in _starts(first, models[0], member, model):
            if one != other:
                raise UserError(
                    f"cannot be mixed with {shown(first.path)}: other {what}",
                    where=member.path,
                    fix=f"fit both with the same {what}, or {ELSE}",
                )


def _starts(
    first: Member, model: Classifier, second: Member, other: Classifier
) -> list[tuple[str, object, object]]:
    """What the start of a training depends on, of two runs."""
    settings = [
        forgetting.training_of(member, one.head)
        for member, one in ((first, model), (second, other))
        if isinstance(one.head, Head)
    ]
    heads = [(s.head_init, s.head_strength, s.class_weight) for s in settings]
    return [
        ("backbone", model.network.name, other.network.name),
        ("weights", first.recipe.backbone.weights, second.recipe.backbone.weights),
        ("taps", tuple(map(str, model.head.taps)), tuple(map(str, other.head.taps))),
        ("input", model.network.preprocess, other.network.preprocess),
        ("training images", set(first.trained or ()), set(second.trained or ())),
        ("starting head", heads[0], heads[1]),
    ]


def _held_out(found: Sequence[Member], pictures: ImageSet, ids: Sequence[str]) -> ImageSet:
    """The images that chose the runs and that none was trained on."""
    seen: set[str] = set()
    for member in found:
        seen.update(member.trained or ())
    names = set.intersection(
        *(set(one.selection.paths) if one.selection else set() for one in found)
    )
    index = [
        i
        for i, (path, digest) in enumerate(zip(pictures.paths, ids, strict=True))
        if path in names and digest not in seen
    ]
    if not index:
        raise UserError(
            "the runs were trained on all the images that could choose the ingredients",
            where="--soup",
            fix="fit them with --set policy.refit=false, which keeps the validation images unseen; "
            f"or {ELSE}",
        )
    return pictures.subset(np.array(index, dtype=np.int64))
