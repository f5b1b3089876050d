"""scikit-learn's contract on paths: parameters, labels of any type, cross-validation, pipelines."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline

from finetune.errors import UserError
from finetune.estimators import RegraftClassifier, RegraftFeatures

TINY = {"backbone": "test_efficientnet", "weights": "random", "engine": "torch"}
FIXED = {**TINY, "precision": "float32"}


@pytest.fixture
def pictures(shapes: Path) -> tuple[list[str], np.ndarray]:
    """Twelve circles and squares, and what they are."""
    paths = [p for kind in ("circle", "square") for p in sorted((shapes / kind).iterdir())[:12]]
    return [str(path) for path in paths], np.array([path.parent.name for path in paths])


def test_parameters_are_stored_and_cloned() -> None:
    """`__init__` stores what it was given under its own name and does nothing else."""
    made = RegraftClassifier("alexnet", strategy="nonsense", random_state=3)

    assert made.get_params() == clone(made).get_params()
    assert ("alexnet", "nonsense", 3) == (made.backbone, made.strategy, made.random_state)
    assert not [name for name in vars(made) if name.endswith("_")]
    with pytest.raises(NotFittedError):
        made.predict(["a.png"])


def test_labels_of_any_type_come_back(pictures: tuple[list[str], np.ndarray]) -> None:
    """Numbers stay numbers, `classes_` is sorted, rows of probabilities sum to 1, and the score is
    the accuracy."""
    paths, names = pictures
    y = np.where(names == "circle", 7, -2)
    made = RegraftClassifier(strategy="svm", **FIXED).fit(np.array(paths, dtype=object), y)
    rows = made.predict_proba([Path(path) for path in paths])

    assert [-2, 7] == made.classes_.tolist()
    assert rows.sum(1) == pytest.approx(np.ones(len(paths)), abs=1e-5)
    assert set(made.predict(paths)) <= {-2, 7}
    assert float((made.predict(paths) == y).mean()) == made.score(paths, y)


def test_features_work_in_a_pipeline(pictures: tuple[list[str], np.ndarray]) -> None:
    """Any classifier of scikit-learn goes behind them, in cross-validation and grid search."""
    paths, y = pictures
    pipe = make_pipeline(RegraftFeatures(**FIXED), LogisticRegression(max_iter=500))
    grid = {"regraftfeatures__taps": ["pooled", "stage2,pooled"]}
    search = GridSearchCV(pipe, grid, cv=2, error_score="raise").fit(paths, y)

    assert (3,) == cross_val_score(pipe, paths, y, cv=3, error_score="raise").shape
    assert search.best_params_["regraftfeatures__taps"] in grid["regraftfeatures__taps"]
    assert np.float32 == RegraftFeatures(**FIXED).transform(paths[:2]).dtype


@pytest.mark.slow
def test_the_classifier_can_be_cross_validated(pictures: tuple[list[str], np.ndarray]) -> None:
    """Clones are fitted on folds, and a grid over strategies runs."""
    paths, y = pictures
    made = RegraftClassifier(strategy="svm", **FIXED)

    assert (2,) == cross_val_score(made, paths, y, cv=2, error_score="raise").shape
    GridSearchCV(made, {"strategy": ["svm", "probe"]}, cv=2, error_score="raise").fit(paths, y)


def test_weights_are_never_pickled(pictures: tuple[list[str], np.ndarray], tmp_path: Path) -> None:
    """Its state is parameters and the path of its run; a run that ends with it says what to do."""
    paths, y = pictures
    kept = RegraftClassifier(strategy="svm", out=tmp_path / "run", **FIXED).fit(paths, y)
    again = copy.copy(kept)

    assert (kept.predict(paths) == again.predict(paths)).all()
    assert not [v for v in kept.__getstate__().values() if isinstance(v, bytes)]
    fleeting = RegraftClassifier(strategy="svm", **FIXED)
    fleeting._folder = object()
    with pytest.raises(UserError, match="out=FOLDER"):
        fleeting.__getstate__()


@pytest.mark.parametrize("wrong", ["one.png", [1, 2], None])
def test_what_is_not_paths_is_refused(wrong: object) -> None:
    """A single path is not taken for its letters."""
    with pytest.raises((ValueError, TypeError)):
        RegraftClassifier().fit(wrong, ["a", "b"])  # type: ignore[arg-type]
