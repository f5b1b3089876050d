"""Finished runs as members of an average: opened, checked against one another, and the test images
that they have in common."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune import analysis, files, run
from finetune.classifier import Classifier
from finetune.data import images
from finetune.data.faults import some
from finetune.data.images import ImageSet
from finetune.errors import UserError
from finetune.evaluation import ensemble, evaluate, predictions
from finetune.evaluation.ensemble import Ensemble
from finetune.evaluation.predictions import Predictions
from finetune.features.store import Store
from finetune.files import Digests
from finetune.names import shown
from finetune.progress import Say
from finetune.recipe import Recipe

OTHER_IMAGES = (
    "fit them with the same --seed on the same images; or judge on images that are new to all: "
    "--data FOLDER"
)


@dataclass(frozen=True)
class Leaf:
    """One classifier inside a run: its folder, its share of the run, and what it is, as a digest
    of its head and its trunk."""

    name: str
    folder: Path
    share: float
    digest: str


@dataclass(frozen=True)
class Member:
    """A finished run: what `run.json` says, the classifiers in it, what it said of its test images
    and, before it was fitted on them, of the images that choose; and what it was trained on. None
    where the run does not hold it."""

    name: str
    path: Path
    about: dict[str, Any]
    leaves: tuple[Leaf, ...]
    classes: tuple[str, ...]
    test: Predictions | None
    selection: Predictions | None
    trained: Digests | None

    @property
    def passes(self) -> int:
        """The networks that an image goes through."""
        return len(self.leaves)

    @property
    def recipe(self) -> Recipe:
        """The recipe that the run, or the first run that it is made of, was fitted by."""
        return Recipe.model_validate_json(json.dumps(self.about["recipe"]))

    def open(self) -> ensemble.AnyModel:
        """The model that the run ships."""
        return ensemble.load(self.path)


def open_members(paths: Sequence[Path], fewest: int = 2) -> tuple[Member, ...]:
    """The runs in `paths`, each whole and complete; raises `UserError` where they cannot answer as
    one: fewer than `fewest`, one of them twice, or other classes."""
    if len(paths) < fewest:
        raise UserError(
            "one run alone is no average",
            where=paths[0] if paths else "RUN",
            fix="give two runs or more; one alone answers with `finetune predict RUN IMAGE…`",
        )
    names = _names(paths)
    members = tuple(_open(path, name) for path, name in zip(paths, names, strict=True))
    _refuse_twice(members)
    _refuse_other_classes(members)
    return members


def _names(paths: Sequence[Path]) -> list[str]:
    """A short name for each run, of letters that a folder's name may have, each once."""
    found: list[str] = []
    for path in paths:
        base = re.sub(r"[^\w-]+", "-", shown(path.resolve().name)).strip("-") or "run"
        name, k = base, 2
        while name in found:
            name, k = f"{base}-{k}", k + 1
        found.append(name)
    return found


def _open(path: Path, name: str) -> Member:
    folder = run.finished(path)
    leaves, classes = _leaves(folder)
    return Member(
        name,
        folder,
        files.read_json(folder / run.MANIFEST),
        leaves,
        classes,
        _table(folder / predictions.TEST),
        _table(folder / predictions.SELECTION),
        evaluate.trained_on(folder),
    )


def _table(path: Path) -> Predictions | None:
    return predictions.read_predictions(path) if path.exists() else None


def _leaves(folder: Path) -> tuple[tuple[Leaf, ...], tuple[str, ...]]:
    """The classifiers of a run, each in its own folder, and the classes that they know."""
    model = ensemble.load(folder)
    if not isinstance(model, Ensemble):
        return (Leaf("", folder, 1.0, _identity(model)),), model.classes
    return tuple(
        Leaf(name, folder / ensemble.FOLDER / name, model.weights[name], _identity(one))
        for name, one in model.members.items()
    ), model.classes


def _identity(model: Classifier) -> str:
    """What a classifier computes, as a digest: its trunk, what it reads, and its numbers. Files
    that hold the same may differ in their bytes."""
    head, network = model.head, model.network
    return files.digest(
        network.digest,
        repr(network.preprocess),
        repr((head.kind, head.taps, head.normalize, head.temperature, model.views)),
        *(f"{name} {array.tobytes().hex()}" for name, array in sorted(head.arrays().items())),
    )


def _refuse_twice(members: Sequence[Member]) -> None:
    """The same model twice would count double without saying so."""
    homes: dict[str, Member] = {}
    for member in members:
        for leaf in member.leaves:
            if (other := homes.get(leaf.digest)) is None:
                continue
            if len(member.leaves) == len(other.leaves) == 1:
                what, fix = "is given twice", "give every run once"
            else:
                small, large = sorted((member, other), key=lambda one: len(one.leaves))
                what = f"a model in it is in {shown(other.path)}, too, and would count twice"
                fix = f"leave {small.name} out, as {large.name} holds it"
            raise UserError(what, where=member.path, fix=fix)
        homes |= {leaf.digest: member for leaf in member.leaves}


def _refuse_other_classes(members: Sequence[Member]) -> None:
    first = members[0]
    for member in members[1:]:
        if member.classes == first.classes:
            continue
        more, less = (
            sorted(set(one.classes) - set(other.classes))
            for one, other in ((member, first), (first, member))
        )
        if more or less:
            parts = [f"knows {some(more, 4)}"] if more else []
            parts += [f"does not know {some(less, 4)}"] if less else []
            what = f"{' and '.join(parts)}, other than {shown(first.path)}"
        else:
            what = f"has the classes of {shown(first.path)} in another order"
        raise UserError(
            f"cannot be averaged: it {what}",
            where=member.path,
            fix="fit both on folders, or on a table, of the same classes",
        )


# ------------------------------------------------------------------------- what they are judged on


@dataclass(frozen=True)
class Shared:
    """The test images that all members have, and what each said of them, `(n, C)` each. `training`
    counts the other images of each class."""

    images: ImageSet
    said: tuple[Any, ...]
    training: tuple[int, ...]


def common_test(members: Sequence[Member], say: Say) -> Shared:
    """The members' own test images, as their predictions.csv names them; nothing is predicted
    again.

    Raises `UserError` where the members were judged on other images, where a member was trained on
    some of them, or where the images are no longer where the first run found them.
    """
    tables = _same_tables(members)
    pictures, ids = scanned(members[0])
    place = {path: i for i, path in enumerate(pictures.paths)}
    at = [place[path] for path in tables[0].paths if path in place]
    if len(at) < len(tables[0].paths):
        raise UserError(
            f"{len(tables[0].paths) - len(at)} of the {len(tables[0].paths)} test images of "
            f"{shown(members[0].path)} are no longer there",
            where=pictures.name,
            fix="put them back, or judge on other images: --data FOLDER",
        )
    rest = np.setdiff1d(np.arange(len(pictures)), at)
    _refuse_trained_on(members, set(ids.take(at)) - set(ids.take(rest)), say)
    training = np.bincount(pictures.labels[rest], minlength=len(pictures.classes))
    return Shared(
        pictures.subset(np.array(at, dtype=np.int64)),
        tuple(table.probabilities for table in tables),
        tuple(int(n) for n in training),
    )


def _same_tables(members: Sequence[Member]) -> list[Predictions]:
    tables = []
    for member in members:
        if member.test is None:
            raise UserError(
                "has no test images",
                where=member.path,
                fix="judge on labelled images that are new to all runs: --data FOLDER",
            )
        tables.append(member.test)
    first = dict(zip(tables[0].paths, tables[0].labels, strict=True))
    for member, table in zip(members[1:], tables[1:], strict=True):
        own = dict(zip(table.paths, table.labels, strict=True))
        if own != first:
            same = sum(first.get(path) == label for path, label in own.items())
            raise UserError(
                f"was judged on other test images than {members[0].name}: {same} of its "
                f"{len(own)} are the same",
                where=member.path,
                fix=OTHER_IMAGES,
            )
    return _in_order_of_first(tables)


def scanned(member: Member) -> tuple[ImageSet, Digests]:
    """The images that a run was fitted and judged on, with their digests."""
    store = Store()
    try:
        return analysis.scan(member.recipe, store, lambda text: None)
    except UserError as error:
        raise UserError(
            f"the images of {shown(member.path)} cannot be read again: {error.what}",
            where=member.recipe.data.data or "DATA",
            fix="give the command from the folder in which it was fitted; or judge on other "
            "images: --data FOLDER",
        ) from error
    finally:
        store.close()


def _refuse_trained_on(members: Sequence[Member], test: set[str], say: Say) -> None:
    for member in members:
        if member.trained is None:
            say(
                f"caution    {member.name} does not record which images it was trained on, as its "
                f"version did not: whether test images were among them cannot be known"
            )
        elif known := len(test.intersection(member.trained)):
            raise UserError(
                f"was trained on {known} of the {len(test)} test images of the other runs",
                where=member.path,
                fix=OTHER_IMAGES,
            )


def new_images(members: Sequence[Member], data: str, say: Say) -> tuple[ImageSet, int]:
    """Labelled images of `data` that no member was trained on, and how many others were left out:
    its test part where it has one."""
    source = images.load_to_judge(data, members[0].classes)
    ids = images.contents(source)
    seen: set[str] = set()
    for member in members:
        seen.update(member.trained or ())
    known = np.array([digest in seen for digest in ids], dtype=bool)
    if known.all():
        raise UserError(
            f"the runs were trained on all of these {len(source)} images: no other is left",
            where=data,
            fix="give labelled images that are new to all runs",
        )
    if known.any():
        say(f"left out   {int(known.sum())} of {len(source)} images: a run was trained on them")
    return source.subset(~known), int(known.sum())


def selection_tables(members: Sequence[Member]) -> list[Predictions]:
    """What each member said of the images that choose, before it was fitted on them: the same
    images for all, in the order of the first. Raises `UserError` where they are not the same."""
    way = "fit the runs again with --force and the same --seed, or use --weights equal"
    tables = []
    for member in members:
        if member.selection is None:
            raise UserError(
                "does not hold what it said of the images that choose: its version did not keep "
                "it, or nothing could be held out",
                where=member.path,
                fix=way,
            )
        tables.append(member.selection)
    first = dict(zip(tables[0].paths, tables[0].labels, strict=True))
    for member, table in zip(members[1:], tables[1:], strict=True):
        if dict(zip(table.paths, table.labels, strict=True)) != first:
            raise UserError(
                f"was chosen on other images than {members[0].name}", where=member.path, fix=way
            )
    return _in_order_of_first(tables)


def _in_order_of_first(tables: Sequence[Predictions]) -> list[Predictions]:
    result = []
    for table in tables:
        row = {path: i for i, path in enumerate(table.paths)}
        order = [row[path] for path in tables[0].paths]
        result.append(
            Predictions(
                tables[0].paths, tables[0].labels, table.classes, table.probabilities[order]
            )
        )
    return result
