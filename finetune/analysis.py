"""One look at the images: find them, split them, read their features once, measure similarity, and
make the plan.

Every step says in one line what it does (`say`); `bar` shows progress of the long ones.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune import policy, recipe, similarity
from finetune.backbones import catalog
from finetune.backbones.catalog import Named
from finetune.data import corrections, images, omissions, splits
from finetune.data.faults import some
from finetune.data.images import ImageSet
from finetune.data.splits import MIN_VAL
from finetune.errors import UserError
from finetune.features import extraction
from finetune.features.extraction import Features
from finetune.features.store import Store
from finetune.files import Digests
from finetune.heads import svm
from finetune.heads.crossval import Trial
from finetune.names import shown
from finetune.network import Network, Tap
from finetune.policy import Plan
from finetune.progress import Bar, Say, clock
from finetune.recipe import Recipe
from finetune.similarity import Similarity

BYTES_OF_FEATURES = 4e9  # more than this for all taps together: a subset chooses the taps first
FRAME_SAMPLE = 500  # training images that choose between the centre crop and the whole image
SUBSET = 2000  # images that choose the taps of a large set

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Look:
    """What one look at the images gave: the split set, its features, how similar it is, and the
    plan."""

    recipe: Recipe
    images: ImageSet
    digests: Digests
    groups: Ints
    named: Named
    features: Features
    similarity: Similarity
    plan: Plan
    seconds: dict[str, float] = field(default_factory=dict)

    def part(self, *names: str) -> Ints:
        """Positions of the images in the parts `train`, `val` or `test`."""
        return np.flatnonzero(np.isin(self.split, names))

    @property
    def split(self) -> NDArray[Any]:
        assert self.images.split is not None
        return self.images.split

    @property
    def how(self) -> tuple[str, str]:
        """The engine and the precision that read the features."""
        return self.features.way.engine, self.features.way.precision

    @property
    def default_taps(self) -> tuple[Tap, ...]:
        """The taps of the policy where nothing can be cross-validated: earlier ones where the
        images are unlike photographs."""
        return default_taps(self.named.network, self.similarity.word)

    def blocks(self, index: Ints) -> dict[Tap, Floats]:
        return {tap: np.asarray(block[index]) for tap, block in self.features.blocks.items()}


def scan(settings: Recipe, store: Store, say: Say) -> tuple[ImageSet, Digests]:
    """Find the images, their digests and their parts."""
    about = settings.data
    if about.data is None:
        raise UserError(
            "no data were named",
            where="DATA",
            fix="give a folder, a CSV table or a named set such as sklearn:digits",
        )
    tested = recipe.is_tested(about)
    if about.folds is not None and about.test not in (None, "none"):
        raise UserError(
            "folds judge with every image in turn, and test images would judge, too",
            where="--folds",
            fix="leave --folds or --test out",
        )
    test = about.test if tested else None
    rules = recipe.rules(about)
    found = images.load(about.data, test=test, layout=recipe.layout(about), rules=rules)
    if not tested:
        found = images.all_for_training(found)
    given = set() if found.split is None else set(found.split.tolist())
    found, ids = digests(found, store, about.on_bad_image)
    if about.labels is not None:
        found = corrections.apply(found, ids, about.labels)
    found, ids = omissions.apply(found, ids, rules)
    shares = (about.test_share, about.validation_share) if tested else (0.0, 0.0)
    found = _divided(found, ids, about.seed, shares)
    short: list[str] = []
    if about.shots is not None:
        short = short_classes(about.shots, images.class_counts(found, "train"))
        keep = images.take_shots(found, about.shots, about.seed)
        place = {path: i for i, path in enumerate(found.paths)}
        found, ids = keep, ids.take([place[path] for path in keep.paths])
    assert found.split is not None
    counts = ", ".join(
        f"{int((found.split == name).sum())} {word}"
        for name, word in (("train", "training"), ("val", "validation"), ("test", "test"))
    )
    say(f"images     {len(found)} in {len(found.classes)} classes: {counts}")
    sizes = {name: int((found.split == name).sum()) for name in splits.SPLITS}
    for line in (*short, *of_parts(settings, given, sizes), *of_labels(settings, found)):
        say(line)
    if not tested and about.folds is None:
        say(
            "           no test image is held out: what is said of the accuracy comes from "
            "cross-validation, if from anything"
        )
    if bare := images.untested(found):
        say(
            f"           {len(bare)} class{'es' * (len(bare) > 1)} without test images: "
            f"{some([shown(name) for name in bare])}"
        )
    for line in omissions.told(found):
        say(f"           {line}")
    if seen_before := omissions.leaks(found, ids):
        say(f"           {seen_before}; --on-leak skip leaves the copies out of the training")
    return found, ids


def _divided(found: ImageSet, ids: Digests, seed: int, shares: tuple[float, float]) -> ImageSet:
    """The images with their parts, which corrected labels do not change: nothing that was tested on
    is trained on thereby."""
    by = found
    if found.corrections and not images.two_labels(found, ids):
        by = corrections.as_given(found, ids)
    by = images.make_splits(by, ids, seed=seed, test=shares[0], val=shares[1])
    found = dataclasses.replace(found, split=by.split)
    if found.corrections:
        images.check_parts(found, tested=bool(shares[0]))
    return found


def digests(pictures: ImageSet, store: Store, on_bad: str) -> tuple[ImageSet, Digests]:
    """The digests of the images; files that cannot be read at all are left out where `on_bad` is
    skip."""
    try:
        return pictures, extraction.digests(pictures, store)
    except UserError:
        if on_bad != "skip" or not (gone := images.unreadable(pictures)):
            raise
    pictures, _ = pictures.leave_out(gone)
    return pictures, extraction.digests(pictures, store)


def take(
    settings: Recipe,
    pictures: ImageSet,
    ids: Digests,
    store: Store,
    say: Say,
    bar: Bar,
    pooled_only: bool = False,
) -> Look:
    """Extract features once, measure similarity, decide."""
    seconds: dict[str, float] = {}
    named = open_backbone(settings, say)
    with clock(seconds, "frame"):
        frame = _frame(settings, pictures, ids, named, store, say, bar)
        named = Named(catalog.framed(named.network, frame), named.load)
    with clock(seconds, "features"):
        taps = [Tap("pooled")] if pooled_only else _taps(settings, named.network)
        found = extract(settings, pictures, ids, named, taps, store, say, bar)
    if found.faults:  # what was left out may have been all of a class
        found = _with_whole_classes(found, settings, say)
    pictures, ids = found.images, found.digests
    assert pictures.split is not None
    train = np.flatnonzero(pictures.split == "train")
    with clock(seconds, "similarity"):
        near = similarity.measure(
            pictures.subset(train), named.network.pretraining, store=store, seed=settings.data.seed
        )
        near = similarity.second_opinion(
            near, np.asarray(found.blocks[Tap("pooled")][train]), pictures.labels[train]
        )
    _say_similarity(near, say)
    plan = _plan(settings, pictures, train, near, named, tuple(str(tap) for tap in taps))
    say(f"policy     {plan.because[0].partition(':')[0]}, {plan.column} → {plan.because[-1]}")
    return Look(
        settings, pictures, ids, images.group_ids(pictures, ids), named, found, near, plan, seconds
    )


def _with_whole_classes(found: Features, settings: Recipe, say: Say) -> Features:
    """What is left after bad images went: where they were all of a class, that class goes too, or
    the job stops."""
    if settings.data.on_empty_class == "skip":
        rest, kept = omissions.without_untrained(found.images)
        if len(rest.classes) < len(found.images.classes):
            say(f"           {rest.notes[-1]}")
            blocks = {tap: np.asarray(block[kept]) for tap, block in found.blocks.items()}
            found = dataclasses.replace(
                found, blocks=blocks, images=rest, digests=found.digests.take(kept)
            )
    images.check_parts(found.images, tested=recipe.is_tested(settings.data))
    return found


def open_backbone(settings: Recipe, say: Say) -> Named:
    """The backbone of a recipe, and a line that says where its weights come from."""
    about = settings.backbone
    named = catalog.open_named(about.names[0], about.weights)
    say(f"backbone   {named.network.name}: {named.network.source}")
    return named


def _frame(
    settings: Recipe,
    pictures: ImageSet,
    ids: Digests,
    named: Named,
    store: Store,
    say: Say,
    bar: Bar,
) -> str:
    """Whether the network sees the centre crop of its weights or the whole image: cross-validated
    on training images.

    The whole image is taken unless the crop's log loss is lower by more than one paired standard
    error: a picture's border is lost for good, while a squashed one keeps everything.
    """
    asked = settings.backbone.frame
    if asked != "auto":
        return asked
    assert pictures.split is not None
    rng = np.random.default_rng([settings.data.seed, 7])
    part = np.sort(rng.permutation(np.flatnonzero(pictures.split == "train"))[:FRAME_SAMPLE])
    sample, known = pictures.subset(part), ids.take(part)
    used: str = settings.backbone.engine
    bits: str = settings.backbone.precision
    taps = policy_taps(named.network)
    trials: dict[str, Trial] = {}
    for name in catalog.FRAMES:
        with bar(f"frame: {name}") as progress:
            how: dict[str, Any] = {
                "store": store,
                "engine_name": used,
                "precision": bits,
                "on_bad": "skip",
                "progress": progress,
            }
            found = extraction.extract(
                sample, catalog.framed(named.network, name), taps, named.load, known=known, **how
            )
        used, bits = found.way.engine, found.way.precision  # of both frames alike
        groups = images.group_ids(found.images, found.digests)
        trial = svm.quick(found.blocks, found.images.labels, groups=groups, seed=settings.data.seed)
        if trial is None:
            say("frame      whole: too few images to cross-validate")
            return "whole"
        trials[name] = trial
    gain = trials["whole"].losses - trials["crop"].losses
    chosen = "crop" if gain.mean() > gain.std() / np.sqrt(len(gain)) else "whole"
    numbers = ", ".join(
        f"{name} {trial.accuracy:.1%} (log loss {trial.log_loss:.3f})"
        for name, trial in trials.items()
    )
    say(f"frame      {chosen}: {numbers} out of fold on {len(gain)} training images")
    return chosen


def _taps(settings: Recipe, network: Network) -> list[Tap]:
    """The taps that the SVM may choose from; the pooled end is always read, for the second opinion
    and the baseline."""
    asked = settings.backbone.taps
    if asked != "auto":
        chosen = [Tap.parse(text) for text in asked]
    else:
        chosen = policy_taps(network)
    for tap in chosen:
        network.width(tap)
    return list(dict.fromkeys([Tap("pooled"), *chosen]))


def policy_taps(network: Network) -> list[Tap]:
    """Taps worth comparing: the end, the 4096-d layers before the ReLU's twin, and the later stages
    on both grids.

    The first stages see edges and colours only; of a network with many stages (a ViT's blocks)
    every second is taken.
    """
    stages = [name for name in network.widths if name.startswith("stage") and "/" not in name]
    later = stages[2:] if len(stages) > 4 else stages
    later = later[(len(later) + 1) % 2 :: 2] if len(later) > 8 else later
    wide = [name for name in ("fc6",) if name in network.widths]
    return [
        Tap("pooled"),
        *(Tap(name) for name in wide),
        *(Tap(name, grid=grid) for name in later for grid in (1, 3)),
    ]


def default_taps(network: Network, word: str) -> tuple[Tap, ...]:
    """The pooled end for photographs, the third stage from the end on a 3×3 grid for what is unlike
    them, else both."""
    stages = [name for name in network.widths if name.startswith("stage") and "/" not in name]
    earlier = (Tap(stages[-3] if len(stages) > 3 else stages[0], grid=3),) if stages else ()
    if word == "near" or not earlier:
        return (Tap("pooled"),)
    return earlier if word == "far" else (Tap("pooled"), *earlier)


def extract(
    settings: Recipe,
    pictures: ImageSet,
    ids: Digests,
    named: Named,
    taps: list[Tap],
    store: Store,
    say: Say,
    bar: Bar,
    *,
    choose: bool = True,
) -> Features:
    """Features of all images at the taps; with `choose`, at a few of them only where all would take
    too much room."""
    how: dict[str, Any] = {
        "store": store,
        "engine_name": settings.backbone.engine,
        "precision": settings.backbone.precision,
        "on_bad": settings.data.on_bad_image,
    }
    bytes_of_all = len(pictures) * sum(named.network.width(tap) for tap in taps) * 4
    if choose and bytes_of_all > BYTES_OF_FEATURES and len(taps) > 1:
        taps = _early_look(settings, pictures, ids, named, taps, how, bar)
        say(
            f"taps       {', '.join(map(str, taps))}: chosen on {SUBSET} images, "
            f"since all taps would take {bytes_of_all / 1e9:.0f} GB"
        )
    start = time.monotonic()
    with bar("features") as progress:
        found = extraction.extract(
            pictures, named.network, taps, named.load, known=ids, progress=progress, **how
        )
    widths = sum(named.network.width(tap) for tap in taps)
    say(
        f"features   {len(found)} images × {widths} from {len(taps)} taps by "
        f"{found.way.engine} in {found.way.precision}, {time.monotonic() - start:.1f} s"
    )
    if found.faults:
        say(f"           left out: {images.list_faults(found.faults)}")
    return found


def _early_look(
    settings: Recipe,
    pictures: ImageSet,
    ids: Digests,
    named: Named,
    taps: list[Tap],
    how: dict[str, Any],
    bar: Bar,
) -> list[Tap]:
    """Choose the taps of a set that is too large for all of them on a seeded part of its training
    images."""
    assert pictures.split is not None
    train = np.flatnonzero(pictures.split == "train")
    part = np.sort(np.random.default_rng(settings.data.seed).permutation(train)[:SUBSET])
    with bar("a first look") as progress:
        found = extraction.extract(
            pictures.subset(part),
            named.network,
            taps,
            named.load,
            known=ids.take(part),
            progress=progress,
            **how,
        )
    blocks = {tap: np.asarray(block) for tap, block in found.blocks.items()}
    result = svm.choose(
        blocks,
        found.images.labels,
        pictures.classes,
        seed=settings.data.seed,
        default_taps=(Tap("pooled"),),
        kernels=("linear",),
    )
    return list(dict.fromkeys([Tap("pooled"), *result.head.taps]))


def _plan(
    settings: Recipe,
    pictures: ImageSet,
    train: Ints,
    near: Similarity,
    named: Named,
    taps: tuple[str, ...],
) -> Plan:
    counts = {
        name: int((pictures.labels[train] == i).sum()) for i, name in enumerate(pictures.classes)
    }
    facts = policy.Facts(
        counts=counts,
        similarity=near.word,
        stages=tuple(named.network.stages),
        input_size=named.network.preprocess.size,
        short_side=_short_side(pictures, train),
        flip=not settings.data.no_flip,
    )
    overrides = {
        key: value for key, value in settings.train.model_dump().items() if value is not None
    }
    asked: dict[str, Any] = {
        "strategy": settings.policy.strategy,
        "taps": taps,
        "overrides": overrides,
    }
    plan = policy.decide(facts, **asked)
    if plan.training is None:
        return plan
    from finetune.backbones import create

    cost = create.forward_seconds(named.load())
    return policy.decide(
        dataclasses.replace(facts, trunk_seconds=cost), budget=settings.policy.budget, **asked
    )


def _short_side(pictures: ImageSet, train: Ints) -> int:
    """Median short side, in pixels, of a few of the images."""
    sample = train[:: max(1, len(train) // 32)][:32]
    return int(np.median([images.short_side(pictures, int(i)) for i in sample]))


def _say_similarity(near: Similarity, say: Say) -> None:
    if near.distance is None:
        say(f"similarity {near.word}: {near.notes[0]}")
        return
    knn = (
        f"; {similarity.KNN}-NN on the features is right for {near.knn:.0%}"
        if near.knn is not None
        else ""
    )
    say(
        f"similarity {near.word}: distance {near.distance:.3f} "
        f"({near.low:.3f}–{near.high:.3f}, n = {near.n}) "
        f"to ImageNet's photographs{knn}"
    )
    for note in near.notes:
        say(f"           {note}")


def of_parts(settings: Recipe, given: Collection[str], made: Mapping[str, int]) -> list[str]:
    """Lines about shares that made no part. `given` are the parts that the data came with, `made`
    the sizes of all parts."""
    about, keys = settings.data, recipe.changed(settings)
    lines = []
    if "data.test_share" in keys and "test" in given:
        lines.append("data.test_share: the test images are given")
    if "data.validation_share" in keys:
        if about.shots is not None:
            lines.append("data.validation_share: with data.shots there is no validation part")
        elif "val" in given:
            lines.append("data.validation_share: the validation images are given")
        elif not made.get("val"):
            lines.append(
                f"data.validation_share: it gives fewer than {MIN_VAL} images, "
                f"so that all train and cross-validation selects"
            )
    return [f"not used   {line}" for line in lines]


def of_labels(settings: Recipe, found: ImageSet) -> list[str]:
    """Lines about corrected labels: how many, and in which part."""
    if settings.data.labels is None:
        return []
    counts = corrections.changed(found)
    words = ", ".join(
        f"{counts[part]} {word}"
        for part, word in (("train", "training"), ("val", "validation"), ("test", "test"))
    )
    lines = [f"labels     {sum(counts.values())} corrected by {settings.data.labels}: {words}"]
    if counts["test"]:
        lines.append(
            "           labels of test images are changed, too: the accuracy is told for both"
        )
    return lines


def short_classes(shots: int, counts: Mapping[str, int]) -> list[str]:
    """A line about classes with fewer training images than were asked for."""
    few = [f"{name} ({count})" for name, count in counts.items() if count < shots]
    if not few:
        return []
    words = (
        f"{len(few)} class{'es have' if len(few) > 1 else ' has'} "
        f"fewer than {shots} training images"
    )
    return [
        f"           {words}, and all of them are used: "
        f"{', '.join(few[:5])}{f' and {len(few) - 5} more' * (len(few) > 5)}"
    ]
