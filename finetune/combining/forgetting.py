"""`finetune forgetting`: what a fine-tuned network still knows of what it was pretrained for, how
far each stage drifted, and the line between old and new weights.

The tuned trunk keeps the classifier that it came with: where both still say what the original
network says of reference images, nothing was forgotten there. Without reference images the same is
measured on the user's own images, and called what it is: a change of behaviour on these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune import classifier, files, metrics
from finetune.backbones import create, original
from finetune.backbones.original import OriginalHead
from finetune.classifier import Classifier
from finetune.combining import forgetting_told as told
from finetune.combining import members, weight_line
from finetune.combining.forgetting_told import Drift, Study
from finetune.combining.members import Leaf, Member
from finetune.combining.weight_line import Ends, Point
from finetune.data import images as image_sets
from finetune.data.images import ImageSet
from finetune.errors import UserError
from finetune.heads.head import Head
from finetune.metrics import Estimate
from finetune.names import shown
from finetune.network import Tap
from finetune.progress import Bar, Say, no_bar, quiet
from finetune.training import loop, probe, replay
from finetune.training.config import Training
from finetune.training.replay import Kept, Moving

if TYPE_CHECKING:
    from finetune.backbones.stages import Backbone

Ints = NDArray[np.int64]

MOST = 5000  # training images that the starting head and BatchNorm's statistics are taken from


@dataclass(frozen=True)
class _Sets:
    """The images of a study: `labelled` choose the point (`held_out`: the run never saw them),
    `training` are those it was trained on, `others` those on which it is compared with the
    original, with their classes there where these are known."""

    labelled: ImageSet
    held_out: bool
    words: str
    training: ImageSet
    others: ImageSet
    on: str
    truth: Ints | None


def study(
    path: Path,
    *,
    reference: str | None = None,
    data: str | None = None,
    limit: int = 500,
    say: Say = quiet,
    bar: Bar = no_bar,
) -> Study:
    """Compare a run with the pretrained network that it began as.

    `reference` is a folder of images of what the network was pretrained for, with labels where its
    class folders are called as ImageNet's classes (n01440764, or 0 to 999); `data` are labelled
    images that the run never saw, where its own are not there; `limit` is the largest number of
    images of each kind. Raises `UserError` where the images of the run are gone, or its pretrained
    weights cannot be had.
    """
    (member,) = members.open_members([path], fewest=1)
    leaf, model = tuned(member)
    start = _start(member, model)
    if leaf is None or start.network.digest == model.network.digest:
        same = {classifier.load(one.folder).network.digest for one in member.leaves}
        check = told.unmoved(same == {start.network.digest})
        return Study(run=shown(path), checks=(check,))
    say(f"run        {model.head.kind} on {model.network.name}: {model.network.source}")
    sets = _sets(member, reference, data, limit, start, say)
    return _Comparison(member, leaf, model, start, sets, say).study(bar)


# ----------------------------------------------------------------------------- the run, its start


def tuned(member: Member) -> tuple[Leaf | None, Classifier]:
    """The fine-tuned classifier of a run, or the first one where none was fine-tuned."""
    found = [(leaf, classifier.load(leaf.folder)) for leaf in member.leaves]
    tuned = [pair for pair in found if pair[1].head.kind == "fine-tuned"]
    if len(tuned) > 1:
        raise UserError(
            f"holds {len(tuned)} fine-tuned models",
            where=member.path,
            fix="give one of the runs that it was made of",
        )
    return tuned[0] if tuned else (None, found[0][1])


def _start(member: Member, model: Classifier) -> Backbone:
    """The pretrained network, looking at images as the run does."""
    settings, network = member.recipe, model.network
    own = create.load(network.name, settings.backbone.weights, network.preprocess.size)
    return dataclasses.replace(
        own, network=dataclasses.replace(own.network, preprocess=network.preprocess)
    )


def training_of(member: Member, head: Head) -> Training:
    """The settings of the training, from plan.json, with the taps of the head filled in."""
    told = files.read_json(member.path / "plan.json")["plan"]["training"]
    if told is None:
        raise UserError("plan.json tells of no training", where=member.path, fix="fit it again")
    lists = {key: tuple(told[key]) for key in ("trainable",)}
    return Training(**{**told, **lists, "taps": tuple(map(str, head.taps))})


# --------------------------------------------------------------------------------------- the images


def _sets(
    member: Member,
    reference: str | None,
    data: str | None,
    limit: int,
    start: Backbone,
    say: Say,
) -> _Sets:
    pictures, ids = members.scanned(member)
    seen = set(member.trained or ())
    was = np.array([digest in seen for digest in ids], dtype=bool)
    if not was.any():
        raise UserError(
            "none of its training images is there any more: the starting head cannot be made again",
            where=pictures.name,
            fix="put the images back where `finetune fit` found them",
        )
    training = pictures.subset(_some(np.flatnonzero(was), MOST))
    if data is not None:
        labelled, _ = members.new_images([member], data, say)
        labelled, held, words = _few(labelled, limit), True, f"images of {shown(data)}"
    else:
        labelled, held = _selection(member, pictures, was, limit)
        words = "images that chose it" if held else "images that it was fitted on in the end"
    others, on, truth = _others(reference, labelled, words, limit, start)
    return _Sets(labelled, held, words, training, others, on, truth)


def _selection(
    member: Member, pictures: ImageSet, was: NDArray[np.bool_], limit: int
) -> tuple[ImageSet, bool]:
    """The images that chose the run, without those that it was trained on at last; where these are
    all, they themselves."""
    names = set(member.selection.paths) if member.selection else set()
    among = np.array([path in names for path in pictures.paths], dtype=bool)
    if (among & ~was).any():
        return _few(pictures.subset(among & ~was), limit), True
    return _few(pictures.subset(among if among.any() else was), limit), False


def _others(
    reference: str | None, labelled: ImageSet, words: str, limit: int, start: Backbone
) -> tuple[ImageSet, str, Ints | None]:
    """The images on which run and original are compared, and their classes in the original's
    numbers where these are known."""
    if reference is None:
        return labelled, f"of your own {words}", None
    found = image_sets.load_unlabelled(reference)
    found = _few(found, limit)
    names = [path.split("/")[0] if "/" in path else "" for path in found.paths]
    numbers = original.class_numbers(names)
    truth = None if numbers is None else np.array(numbers, dtype=np.int64)
    return found, f"reference images of {shown(reference)}", truth


def _few(images: ImageSet, limit: int) -> ImageSet:
    return images.subset(_some(np.arange(len(images)), limit))


def _some(index: Ints, limit: int) -> Ints:
    """At most `limit` of the positions, spread evenly by chance that is always the same."""
    if len(index) <= limit:
        return index
    return np.sort(np.random.default_rng(0).choice(index, limit, replace=False))


# ----------------------------------------------------------------------------------- the comparison


class _Comparison:
    """One run beside its start: the network that takes both weights, and the images kept at the
    border of what moved."""

    def __init__(
        self, member: Member, leaf: Leaf, model: Classifier, start: Backbone, sets: _Sets, say: Say
    ) -> None:
        assert isinstance(model.head, Head)
        self.member, self.leaf, self.model, self.sets, self.say = member, leaf, model, sets, say
        self.backbone = model.load()
        old, new = replay.tensors(start), replay.tensors(self.backbone)
        self.stages = replay.moved(self.backbone, old, new)
        self.weights = replay.distances(self.backbone, old, new)
        self.head = model.head
        self.read_at = {
            stage.name: Tap(stage.name) for stage in self.backbone.stages if stage.end
        } | {self.backbone.stages[-1].name: Tap("pooled")}
        taps = dict.fromkeys((*self.head.taps, *self.read_at.values(), Tap("pooled")))
        self.moving = Moving(self.backbone, self.stages, tuple(taps))
        self.old, self.new = (
            replay.only(state, self.backbone, self.stages) for state in (old, new)
        )

    def study(self, bar: Bar) -> Study:
        sets, moving = self.sets, self.moving
        self.say(
            f"moved      {', '.join(self.stages)}; kept to the last bit: "
            f"{', '.join(s.name for s in self.backbone.stages if s.name not in self.stages) or '–'}"
        )
        training = moving.keep(sets.training)
        labelled = moving.keep(sets.labelled)
        others = labelled if sets.others is sets.labelled else moving.keep(sets.others)
        known = self._original()
        ends = Ends(self.old, self.new, self._starting_head(training), self.head)
        moving.put(self.old)
        before = moving.read(others)
        said = None
        if isinstance(known, OriginalHead):
            said = known.scores(before[Tap("pooled")]).argmax(1)
        moving.put(self.new)
        after = moving.read(others)

        def retained() -> Estimate | None:
            if said is None or not isinstance(known, OriginalHead):
                return None
            now = known.scores(moving.read(others)[Tap("pooled")]).argmax(1)
            return metrics.accuracy(said if sets.truth is None else sets.truth, now)

        with bar("line") as progress:
            steps = iter(range(1, len(weight_line.ALPHAS) + 1))
            points = weight_line.line(
                moving,
                ends,
                labelled,
                sets.labelled.labels,
                training,
                retained,
                lambda: progress(next(steps), len(weight_line.ALPHAS)),
            )
        return self._told(known, said, before, after, ends, training, points)

    def _original(self) -> OriginalHead | str:
        network = self.model.network
        strategy = self.member.recipe.policy.strategy
        origin = "random" if strategy == "scratch" else self.member.recipe.backbone.weights
        return original.original_head(network.name, origin, network.preprocess.size)

    def _starting_head(self, training: Kept) -> Head:
        """The head that the training began with, fitted again on what it was trained on."""
        settings = training_of(self.member, self.head)
        self.moving.put(self.old)
        blocks = self.moving.read(training)
        labels, names = self.sets.training.labels, self.head.classes
        weights = loop.class_weights_of(labels, len(names), settings).numpy()
        weight, bias = probe.head_start(settings, blocks, labels, names, weights)
        return dataclasses.replace(self.head, weight=weight, bias=bias)

    def _told(
        self,
        known: OriginalHead | str,
        said: Ints | None,
        before: Mapping[Tap, Any],
        after: Mapping[Tap, Any],
        ends: Ends,
        training: Kept,
        points: tuple[Point, ...],
    ) -> Study:
        sets = self.sets
        agreement, source = None, None
        if said is not None and isinstance(known, OriginalHead):
            now = known.scores(after[Tap("pooled")]).argmax(1)
            agreement = metrics.accuracy(said, now)
            if sets.truth is not None:
                source = (metrics.accuracy(sets.truth, said), metrics.accuracy(sets.truth, now))
        drift = self._drift(before, after)
        own = sets.others is sets.labelled
        labels, chosen = sets.labelled.labels, None
        if sets.held_out:
            chosen = weight_line.choose(points, labels, said is not None and not own)
        retained = "agreement with the original" if sets.truth is None else "source accuracy"
        pair = weight_line.against_new(points, chosen, labels) if chosen else None
        return Study(
            run=shown(self.member.path),
            checks=(
                told.of_agreement(
                    known if isinstance(known, str) else "", agreement, source, sets.on, own
                ),
                told.of_drift(drift, f"{len(sets.others)} {sets.on}"),
                told.of_line(points, chosen, pair, f"{len(sets.labelled)} {sets.words}"),
            ),
            drift=drift,
            on=sets.on,
            agreement=agreement,
            source=source,
            line=points,
            retains=f"{retained} on {len(sets.others)} {sets.on}",
            chosen_on=f"{len(sets.labelled)} {sets.words}",
            chosen=chosen,
            labels=labels,
            names=sets.labelled.paths,
            classes=self.head.classes,
            place=lambda point: self._classifier(ends, point, training),
        )

    def _drift(self, before: Mapping[Tap, Any], after: Mapping[Tap, Any]) -> tuple[Drift, ...]:
        rows = []
        for stage in self.backbone.stages:
            tap = self.read_at.get(stage.name)
            went = stage.name in self.stages
            alike = None
            if tap is not None:
                alike = weight_line.linear_cka(before[tap], after[tap]) if went else 1.0
            rows.append(Drift(stage.name, went, self.weights[stage.name], alike))
        return tuple(rows)

    def _classifier(self, ends: Ends, point: Point, training: Kept) -> Classifier:
        """The classifier of a point on the line, calibrated on the images that chose it."""
        weight_line.place(self.moving, ends, point.alpha, point.norms, training)
        words = (
            f"{self.model.network.source}; then {1 - point.alpha:.1f} of the way back to the "
            f"pretrained weights, BatchNorm's statistics {point.norms}"
        )
        placed = create.described(self.backbone, words)
        head = ends.head_at(point.alpha, point.temperature)
        model = self.model
        made = Classifier(placed.network, head, lambda: placed, model.engine, model.precision)
        seed = self.member.recipe.data.seed
        return classifier.remember_all(made, self.sets.training, seed=seed)
