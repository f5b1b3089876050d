"""scikit-learn's face: `RegraftClassifier` fits and predicts on paths, `RegraftFeatures` transforms
paths to features. Thin: jobs, runs and the feature store are those of `finetune.fit`.

    RegraftClassifier(strategy="svm").fit(paths, labels).predict_proba(others)
    make_pipeline(RegraftFeatures(taps="stage6"), LogisticRegression()).fit(paths, labels)
"""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.exceptions import NotFittedError

from finetune import job
from finetune.backbones import catalog
from finetune.data import loose
from finetune.errors import UserError
from finetune.evaluation import ensemble
from finetune.features import extraction
from finetune.network import Tap

Floats = NDArray[np.float32]
Paths = Iterable[str | Path]


class RegraftClassifier(ClassifierMixin, BaseEstimator):
    """A classifier of image files: `finetune.fit` on paths and labels.

    All images given are for training: an accuracy is what scikit-learn's own splits measure. `out`
    is the run's folder; without it the run lives as long as the estimator does. The other
    parameters are those of `finetune.fit`; `random_state` is its seed.

    After `fit`, `classes_` are the labels, sorted, of their own type; `run_` the folder. Pickled,
    an estimator is its parameters and that folder's path, never weights: give `out` for that.
    """

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        strategy: str = "auto",
        *,
        weights: str = "auto",
        taps: str | Sequence[str] | None = None,
        engine: str = "auto",
        precision: str = "auto",
        assignments: Sequence[str] = (),
        out: str | Path | None = None,
        random_state: int | None = None,
    ) -> None:
        self.backbone = backbone
        self.strategy = strategy
        self.weights = weights
        self.taps = taps
        self.engine = engine
        self.precision = precision
        self.assignments = assignments
        self.out = out
        self.random_state = random_state

    def fit(self, X: Paths, y: ArrayLike) -> RegraftClassifier:
        """Fit on the image files `X` with the labels `y`, one each. Raises `UserError` for what a
        person can mend."""
        paths, labels = _paths(X), np.asarray(y)
        if labels.shape != (len(paths),):
            raise ValueError(f"{len(paths)} paths, and labels of shape {labels.shape}")
        self.classes_, numbers = np.unique(labels, return_inverse=True)
        self._folder = None if self.out else tempfile.TemporaryDirectory(prefix="regraft-")
        run = Path(self.out) if self.out else Path(str(self._folder and self._folder.name)) / "run"
        with tempfile.TemporaryDirectory(prefix="regraft-") as scratch:
            table = Path(scratch) / "images.csv"
            with table.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(("path", "label"))
                writer.writerows(
                    (os.path.abspath(path), f"{number:06d}")
                    for path, number in zip(paths, numbers, strict=True)
                )
            self.run_ = job.fit(
                table,
                out=run,
                force=True,
                test="none",
                backbone=self.backbone,
                strategy=self.strategy,
                weights=self.weights,
                taps=self.taps,
                engine=self.engine,
                precision=self.precision,
                seed=self.random_state,
                assignments=tuple(self.assignments),
            ).path
        return self

    def predict_proba(self, X: Paths) -> Floats:
        """Probabilities `(n, classes)`, in the order of `classes_`, a row for each path."""
        if not hasattr(self, "run_"):
            raise NotFittedError("this RegraftClassifier is not fitted: call fit first")
        with ensemble.open_run(self.run_) as model:
            found = model.predict(_paths(X))
            order = [model.classes.index(f"{k:06d}") for k in range(len(self.classes_))]
        result: Floats = found.probabilities[:, order]
        return result

    def predict(self, X: Paths) -> NDArray[Any]:
        """The most probable label of each path, of the type that `fit` was given."""
        probabilities = self.predict_proba(X)
        result: NDArray[Any] = self.classes_[probabilities.argmax(1)]
        return result

    def __getstate__(self) -> dict[str, Any]:
        if getattr(self, "_folder", None) is not None:
            raise UserError(
                "a fitted RegraftClassifier without `out` cannot be pickled: its run is temporary",
                where="RegraftClassifier",
                fix="give out=FOLDER, which stays, before fit",
            )
        return dict(super().__getstate__())

    def __sklearn_tags__(self) -> Any:
        return _tags(super().__sklearn_tags__())


class RegraftFeatures(TransformerMixin, BaseEstimator):
    """Image files to features `(n, width)` of a frozen backbone, the taps side by side and not
    normalised; through the feature store, so that each file is read once. There is nothing to
    fit."""

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        taps: str | Sequence[str] = "pooled",
        *,
        weights: str = "auto",
        engine: str = "auto",
        precision: str = "auto",
    ) -> None:
        self.backbone = backbone
        self.taps = taps
        self.weights = weights
        self.engine = engine
        self.precision = precision

    def fit(self, X: Paths, y: object = None) -> RegraftFeatures:
        """Nothing is learned."""
        return self

    def transform(self, X: Paths) -> Floats:
        """Features of the image files, float32, a row for each path."""
        texts = self.taps.split(",") if isinstance(self.taps, str) else list(self.taps)
        taps = [Tap.parse(text.strip()) for text in texts]
        named = catalog.open_named(self.backbone, self.weights)
        source = loose.load(_paths(X))
        found = extraction.extract(
            source,
            named.network,
            taps,
            named.load,
            engine_name=self.engine,
            precision=self.precision,
        )
        return np.concatenate([np.asarray(found.blocks[tap]) for tap in taps], axis=1)

    def __sklearn_tags__(self) -> Any:
        tags = _tags(super().__sklearn_tags__())
        tags.requires_fit = False
        tags.no_validation = True
        return tags


def _paths(X: Paths) -> list[str]:
    """Paths as text; a single one is refused, since it would be taken for its letters."""
    if isinstance(X, (str, bytes, Path)):
        raise ValueError("one path where several are expected: give a list of paths")
    paths = [os.fspath(path) for path in X]
    if not all(isinstance(path, str) for path in paths):
        raise ValueError("X holds something else than paths")
    return paths


def _tags(tags: Any) -> Any:
    """What scikit-learn is told of the input: one dimension, of text."""
    tags.input_tags.one_d_array = True
    tags.input_tags.two_d_array = False
    tags.input_tags.string = True
    return tags
