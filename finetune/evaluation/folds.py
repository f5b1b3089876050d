"""The whole procedure judged in folds: plan, taps, kernel, training and what ships are chosen anew
without each fold, which then judges; what is used afterwards is fitted on all images.

This is the outer loop of nested cross-validation (Varma and Simon 2006): no image is answered by a
model that it helped to choose or to fit.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune import analysis, files, metrics
from finetune.analysis import Ints, Look
from finetune.classifier import Predictions
from finetune.data import images
from finetune.data.images import ImageSet
from finetune.errors import UserError
from finetune.evaluation.fitting import Fitted, shipped_name
from finetune.evaluation.judgement import Judgement
from finetune.features.store import Store
from finetune.files import Digests
from finetune.heads.crossval import assign_folds
from finetune.progress import Bar, Say, quiet
from finetune.recipe import Recipe
from finetune.run import Part, RunDir

Fit = Callable[[Look, Part], Fitted]


@dataclass(frozen=True, eq=False)
class Repeated:
    """What the folds said. `found` are the predictions of every judged image, each by the model
    that was fitted without its fold; `rows` hold one object per fold: `fold`, `n`, `accuracy`,
    `shipped`, `seconds`."""

    found: Predictions
    rows: tuple[dict[str, Any], ...]

    def judgement(self) -> Judgement:
        """The metrics of all judged images, and how the accuracy differs between folds."""
        about = metrics.judge(
            self.found.images.labels,
            self.found.probabilities,
            self.found.classes,
            self.found.images.groups,
        )
        values = [row["accuracy"] for row in self.rows]
        spread = {"lowest-fold": min(values), "highest-fold": max(values)}
        words = f"images, each in one of {len(self.rows)} folds that nothing was fitted on"
        return Judgement("folds", words, self.found, about | spread)


def judge(
    settings: Recipe,
    pictures: ImageSet,
    ids: Digests,
    folder: RunDir,
    fit: Fit,
    *,
    store: Store,
    say: Say,
    bar: Bar,
) -> Repeated:
    """Repeat the procedure `fit` without each fold of `pictures` in turn.

    A fold that an earlier process finished is read from its checkpoint. Raises `UserError` where no
    image can be held out.
    """
    asked = settings.data.folds
    assert asked is not None
    fold = _assigned(pictures, ids, asked, settings.data.seed, say)
    numbers = [int(k) for k in np.unique(fold) if k >= 0]
    say(f"folds      {len(numbers)} times the whole procedure, and once more on all images")
    done = [
        _one(settings, _held_out(pictures, fold == k), ids, Part(folder, f"fold-{k + 1}"), fit,
             store=store, say=say, bar=bar)
        for k in numbers
    ]  # fmt: skip
    place = {path: i for i, path in enumerate(pictures.paths)}
    at = np.array([place[path] for one in done for path in one["paths"]], np.int64)
    probabilities = np.concatenate([np.asarray(one["probabilities"], np.float32) for one in done])
    order = np.argsort(at)
    rows = [
        {"fold": k + 1, **{key: one[key] for key in ("n", "accuracy", "shipped", "seconds")}}
        for k, one in zip(numbers, done, strict=True)
    ]
    found = Predictions(pictures.subset(at[order]), pictures.classes, probabilities[order], ())
    return Repeated(found, tuple(rows))


def _assigned(pictures: ImageSet, ids: Digests, count: int, seed: int, say: Say) -> Ints:
    """The fold of every image, `(n,)`, copies and groups together; −1 where a class has one image
    or group alone, which always trains."""
    together = images.group_ids(pictures, ids)
    fold, notes = assign_folds(pictures.labels, together, count, seed, pictures.classes)
    if fold is None:
        raise UserError(
            "no fold can be held out: no class has two images",
            where="--folds",
            fix="add images, or leave --folds out and train on all with --test none",
        )
    for note in notes:
        if "folds instead of" in note:
            say(f"           {note}")
    pairs = {(int(c), int(g)) for c, g in zip(pictures.labels, together, strict=True)}
    groups = np.bincount([c for c, _ in pairs], minlength=len(pictures.classes))
    lone = groups[pictures.labels] < 2
    if lone.any():
        say(f"           {lone.sum()} images of classes with one image or group alone only train")
    return np.where(lone, -1, fold)


def _held_out(pictures: ImageSet, held: Sequence[bool]) -> ImageSet:
    return dataclasses.replace(pictures, split=np.where(held, "test", "train"))


def _one(
    settings: Recipe,
    pictures: ImageSet,
    ids: Digests,
    part: Part,
    fit: Fit,
    *,
    store: Store,
    say: Say,
    bar: Bar,
) -> dict[str, Any]:
    """One fold: what was fitted without it, on its images."""
    kept: Path = part.checkpoint("answers.json")
    if kept.exists():
        return dict(files.read_json(kept))
    began = time.monotonic()
    seen = analysis.take(settings, pictures, ids, store, quiet, bar)
    fitted = fit(seen, part)
    found = fitted.model.predict(seen.images.subset(seen.part("test")))
    right = found.best == found.images.labels
    answers = {
        "n": len(right),
        "accuracy": float(right.mean()),
        "shipped": shipped_name(seen, fitted),
        "seconds": time.monotonic() - began,
        "paths": list(found.images.paths),
        "probabilities": found.probabilities.tolist(),
    }
    files.write_json(kept, answers)
    say(
        f"{part.name:<10} {right.mean():.1%} of {len(right)} images, {answers['shipped']} ships, "
        f"{answers['seconds']:.1f} s"
    )
    return answers
