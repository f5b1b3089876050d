"""Images whose given label is doubted: confident learning on the probabilities of models that had
not seen them (Northcutt, Jiang and Chuang 2021, "Confident Learning: Estimating Uncertainty in
Dataset Labels", JAIR 70).

A class j has the threshold t_j: the mean probability of j over the images that are labelled j. An
image counts for class j where its probability of j reaches t_j, j being the most probable of the
classes that do. Where that is another class than the given one, the label is suspect (an entry
beside the diagonal of the paper's confident joint). The most doubted come first: those whose given
label is the least probable ("self-confidence", as in Kuan and Mueller 2022).

A suspicion is no error: only somebody who looks at the image can tell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.analysis import Floats, Ints, Look
from finetune.data import splits
from finetune.features.knn import neighbours
from finetune.heads import svm
from finetune.heads.crossval import subset
from finetune.heads.head import AnyHead, side_by_side, softmax
from finetune.heads.svm import SvmResult

NEIGHBOURS = 4  # labelled images that are shown beside a suspect
COMPARED = 10_000  # labelled images among which they are looked for, at most


@dataclass(frozen=True)
class Suspect:
    """An image whose label is doubted, by its position; `given` and `proposed` index the classes,
    with their probabilities. `copies` are the other files of the same bytes; `near` are the nearest
    labelled images on the head's features, each with its cosine, the nearest first."""

    index: int
    given: int
    proposed: int
    own: float  # probability of the given class
    confidence: float  # probability of the proposed one
    copies: tuple[int, ...] = ()
    near: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Suspects:
    """The suspects of training and validation images, and apart from them those of the test part,
    the most doubted first. `looked_at` counts the images of both; `note` says why none could be
    looked at."""

    training: tuple[Suspect, ...]
    test: tuple[Suspect, ...]
    looked_at: tuple[int, int]
    note: str = ""

    @property
    def all(self) -> tuple[Suspect, ...]:
        return self.training + self.test


NOTHING_HELD_OUT = (
    "no label could be looked at: nothing can be held out, with one image (or one group) a class"
)


# ------------------------------------------------------------------------------------- the method


def thresholds(y: Ints, probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """t_j `(C,)`: the mean probability of class j over the images labelled j; of a class without
    images 1, which none reaches but by certainty."""
    found = np.ones(probabilities.shape[1])
    for j in np.unique(y):
        found[j] = probabilities[y == j, j].mean(dtype=np.float64)
    return found


def confident(probabilities: NDArray[Any], bounds: NDArray[np.float64]) -> Ints:
    """The class that every image counts for `(n,)`: the most probable of those that reach their
    threshold; −1 where none does."""
    reached = np.where(probabilities >= bounds, probabilities, -1.0)
    return np.where((reached >= 0).any(axis=1), reached.argmax(axis=1), -1).astype(np.int64)


def doubted(y: Ints, probabilities: NDArray[Any], bounds: NDArray[np.float64]) -> tuple[Ints, Ints]:
    """Positions of the suspects, the most doubted first, and the class proposed for each."""
    proposed = confident(probabilities, bounds)
    rows = np.flatnonzero((proposed >= 0) & (proposed != y))
    order = np.argsort(probabilities[rows, y[rows]], kind="stable")
    return rows[order], proposed[rows[order]]


# ----------------------------------------------------------------------------------- of a whole set


def find(seen: Look, base: SvmResult, *, free: bool = False, near: int = NEIGHBOURS) -> Suspects:
    """The suspects of a set whose SVM is `base`.

    Training images are judged out of fold, validation images by the machine of the training images,
    test images by the one that is fitted on both. The thresholds are those of training and
    validation images. `free` looks only where nothing has to be fitted: not at test images, nor at
    training images outside the subset that chose the SVM. `near` labelled images are found for each
    suspect.
    """
    if not base.candidates:
        return Suspects((), (), (0, 0), NOTHING_HELD_OUT)
    rows, probabilities = _held_out(seen, base, free)
    y = seen.images.labels
    bounds = thresholds(y[rows], probabilities)
    training = _suspects(seen, rows, probabilities, bounds)
    judged, test = tuple[Suspect, ...](), seen.part("test")[: 0 if free else None]
    if len(test):
        both = seen.part("train", "val")
        head = svm.refit(base, seen.blocks(both), y[both])
        judged = _suspects(seen, test, _probabilities(seen, head, test), bounds)
    if near:
        training, judged = _with_neighbours(seen, base.head, (training, judged), near)
    return Suspects(training, judged, (len(rows), len(test)))


def _held_out(seen: Look, base: SvmResult, free: bool) -> tuple[Ints, Floats]:
    """Training and validation images with their probabilities `(n, C)` by a model that had not seen
    them."""
    train, val = seen.part("train"), seen.part("val")
    scores = base.oof_scores
    if not free:
        scores = svm.unseen(base, seen.blocks(train), seen.images.labels[train])
    known = np.flatnonzero(np.isfinite(scores).all(axis=1))
    found = softmax(scores[known], base.head.temperature)
    if not len(val):
        return train[known], found
    return np.concatenate([train[known], val]), np.concatenate(
        [found, _probabilities(seen, base.head, val)]
    )


def _probabilities(seen: Look, head: AnyHead, rows: Ints) -> Floats:
    blocks = [np.asarray(seen.features.blocks[tap][rows]) for tap in head.taps]
    return softmax(head.scores(blocks), head.temperature)


def _suspects(
    seen: Look, rows: Ints, probabilities: Floats, bounds: NDArray[np.float64]
) -> tuple[Suspect, ...]:
    """The suspects among `rows`, each content once."""
    alike = {i: group for group in splits.alike(seen.digests) for i in group}
    found, told = [], set[int]()
    for at, proposed in zip(*doubted(seen.images.labels[rows], probabilities, bounds), strict=True):
        i = int(rows[at])
        if i in told:
            continue
        copies = tuple(k for k in alike.get(i, ()) if k != i)
        told |= {i, *copies}
        given, p = int(seen.images.labels[i]), probabilities[at]
        chance = (float(p[given]), float(p[proposed]))
        found.append(Suspect(i, given, int(proposed), *chance, copies))
    return tuple(found)


def _with_neighbours(
    seen: Look, head: AnyHead, parts: Iterable[Sequence[Suspect]], k: int
) -> list[tuple[Suspect, ...]]:
    """Each suspect with its k nearest images of training and validation part, its own group
    apart."""
    known = seen.part("train", "val")
    known = known[subset(seen.images.labels[known], np.arange(len(known)), COMPARED, 0)]
    base = _features(seen, head, known)
    result = []
    for part in parts:
        at = np.array([one.index for one in part], dtype=np.int64)
        more = k + int(np.bincount(seen.groups[known]).max()) if len(known) else k
        cosines, positions = neighbours(base, more, queries=_features(seen, head, at))
        filled = []
        for one, cosine, position in zip(part, cosines.tolist(), known[positions], strict=True):
            others = [
                (int(i), c)
                for i, c in zip(position, cosine, strict=True)
                if seen.groups[i] != seen.groups[one.index]
            ]
            filled.append(dataclasses.replace(one, near=tuple(others[:k])))
        result.append(tuple(filled))
    return result


def _features(seen: Look, head: AnyHead, rows: Ints) -> Floats:
    return side_by_side(
        [np.asarray(seen.features.blocks[tap][rows]) for tap in head.taps], normalize=True
    )
