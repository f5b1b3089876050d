"""Confident learning by hand, and on features in which some labels were turned."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from finetune.evaluation import suspects
from finetune.evaluation.suspects import Suspects
from finetune.heads import svm
from finetune.network import Tap

POOLED = Tap("pooled")
CLASSES = ("a", "b", "c")
TURNED = {3: 1, 10: 2, 70: 0, 125: 0}  # position: the label that it is given; 125 is of the test


def test_thresholds_and_the_classes_that_reach_them_by_hand() -> None:
    """t_j is the mean of p_j over the images labelled j; of the classes whose t_j is reached, the
    most probable counts."""
    y = np.array([0, 0, 1, 1])
    p = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.55, 0.45]])
    bounds = suspects.thresholds(y, p)

    assert bounds == pytest.approx([0.65, 0.575])
    assert [0, 1, 1, -1] == suspects.confident(p, bounds).tolist()
    rows, proposed = suspects.doubted(y, p, bounds)
    assert ([1], [1]) == (rows.tolist(), proposed.tolist())


def test_the_least_probable_label_is_doubted_first() -> None:
    """Suspects are in the order of the probability of their given label."""
    y = np.array([0, 0, 0, 0, 1, 1])
    p = np.array([[0.9, 0.1], [0.3, 0.7], [0.1, 0.9], [0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
    rows, _ = suspects.doubted(y, p, np.array([0.5, 0.5]))

    assert [2, 1] == rows.tolist()


def test_a_class_without_images_is_proposed_only_when_certain() -> None:
    """Its threshold is 1: no mean is known."""
    assert [0.5, 1.0] == suspects.thresholds(np.array([0]), np.array([[0.5, 0.5]])).tolist()


@dataclasses.dataclass
class Seen:
    """What `find` reads of a look: 120 images of three well separated classes train or validate, 30
    are the test; image 11 is a copy of image 10."""

    y: Any
    x: Any

    def __post_init__(self) -> None:
        self.images = SimpleNamespace(labels=self.y, classes=CLASSES)
        self.features = SimpleNamespace(blocks={POOLED: self.x})
        self.digests = [f"{i:064x}" for i in range(150)]
        self.digests[11] = self.digests[10]
        self.groups = np.arange(150)
        self.groups[11] = 10

    def part(self, *names: str) -> Any:
        parts = {"train": range(90), "val": range(90, 120), "test": range(120, 150)}
        return np.concatenate([np.array(parts[name]) for name in names])

    def blocks(self, rows: Any) -> Any:
        return {POOLED: self.x[rows]}


@pytest.fixture(scope="module")
def seen() -> Seen:
    rng = np.random.default_rng(0)
    truth = np.arange(150) % 3
    x = (np.eye(8)[truth] * 4 + rng.normal(size=(150, 8))).astype(np.float32)
    truth[11], x[11] = truth[10], x[10]
    y = truth.copy()
    for i, label in TURNED.items():
        y[i] = label
    y[11] = y[10]
    return Seen(y, x)


@pytest.fixture(scope="module")
def base(seen: Seen) -> svm.SvmResult:
    rows = seen.part("train")
    return svm.choose(
        seen.blocks(rows),
        seen.y[rows],
        CLASSES,
        default_taps=[POOLED],
        groups=seen.groups[rows],
        kernels=("lssvm",),
    )


@pytest.fixture(scope="module")
def found(seen: Any, base: svm.SvmResult) -> Suspects:
    return suspects.find(seen, base)


def test_turned_labels_are_found_with_their_right_class(found: Suspects) -> None:
    """All labels that were turned are suspects, the proposal is what they were, and those of the
    test part are apart."""
    told = {one.index: (one.given, one.proposed) for one in found.training}

    assert {3: (1, 0), 10: (2, 1), 70: (0, 1)}.items() <= told.items()
    assert [(125, 0, 2)] == [(one.index, one.given, one.proposed) for one in found.test]
    assert (120, 30) == found.looked_at
    assert all(one.own < one.confidence for one in found.all)


def test_a_copy_is_no_second_suspect_and_no_proof(found: Suspects) -> None:
    """Files of the same bytes are one suspect that names the others, and not its own neighbours;
    neighbours are never of the test part."""
    (one,) = [one for one in found.training if one.index in (10, 11)]

    assert {10, 11} == {one.index, *one.copies}
    for suspect in found.all:
        near = [i for i, _ in suspect.near]
        assert suspects.NEIGHBOURS == len(near)
        assert not {suspect.index, *suspect.copies} & set(near)
        assert max(near) < 120


def test_a_free_look_fits_nothing(
    seen: Any, base: svm.SvmResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report's look has the same training suspects, no test part, and no machine is fitted."""
    whole = suspects.find(seen, base, near=0)
    monkeypatch.setattr(svm, "fit_head", None)
    free = suspects.find(seen, base, free=True, near=0)

    assert [one.index for one in whole.training] == [one.index for one in free.training]
    assert () == free.test


def test_where_nothing_is_held_out_nothing_is_doubted(seen: Any) -> None:
    """One image a class: no suspects, and the reason."""
    one = svm.choose(
        {POOLED: seen.x[:3]}, np.arange(3), CLASSES, default_taps=[POOLED], kernels=("lssvm",)
    )

    assert "held out" in suspects.find(seen, one).note
