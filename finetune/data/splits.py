"""Who trains, who selects, who judges: class numbers from the training part, and seeded, stratified
splits of whole groups.

Functions on lists and arrays: no file, no image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError

SPLITS = ("train", "val", "test")
LEAVE_CLASSES_OUT = ", or leave them out: --on-empty-class skip"
MIN_VAL = 100  # a smaller validation part decides nothing: cross-validation takes its place


def class_numbers(
    name: str, words: Sequence[str], split: Sequence[str] | None, known: Iterable[str]
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Class numbers of class names, from the training part alone, in the order of their names."""
    if split is not None and "train" not in split:
        raise UserError("has no training images", where=name, fix="name the training part train")
    train = set(known) | {
        word for i, word in enumerate(words) if split is None or split[i] == "train"
    }
    classes = tuple(sorted(train))
    return numbered(name, words, classes, LEAVE_CLASSES_OUT), classes


def numbered(
    name: str, words: Sequence[str], classes: Sequence[str], way: str = ""
) -> NDArray[np.int64]:
    """`(n,)` positions of `words` in `classes`; words that are not among them are a `UserError`
    that names and counts them.

    `way` is what else can be done about them, for the message.
    """
    number = {word: i for i, word in enumerate(classes)}
    unknown = Counter(word for word in words if word not in number)
    if unknown:
        few = ", ".join(
            f"{word!r} ({count} image{'s' * (count > 1)})" for word, count in unknown.most_common(3)
        )
        raise UserError(
            f"{len(unknown)} class{'es' * (len(unknown) > 1)} without training images: {few}",
            where=name,
            fix=f"the training part has "
            f"{', '.join(map(repr, classes[:8]))}{' …' * (len(classes) > 8)}: rename, add or "
            f"remove" + way,
        )
    return np.array([number[word] for word in words], dtype=np.int64)


def components(size: int, *keys: Sequence[str]) -> NDArray[np.int64]:
    """Number the groups of `size` items: two items are together when any of the `keys` gives both
    the same text.

    Each key has one text an item; the empty text joins nothing. Togetherness spreads: a–b by one
    key and b–c by another make one group. Returns `(size,)` numbers from 0.
    """
    parent = list(range(size))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for key in keys:
        first: dict[str, int] = {}
        for i, text in enumerate(key):
            if text and (j := root(first.setdefault(text, i))) != (k := root(i)):
                parent[max(j, k)] = min(j, k)
    return np.unique([root(i) for i in range(size)], return_inverse=True)[1].astype(np.int64)


def alike(digests: Sequence[str]) -> list[list[int]]:
    """Positions that share a digest, where several do, in order; the empty digest stands for no
    content."""
    found: dict[str, list[int]] = {}
    for i, digest in enumerate(digests):
        if digest:
            found.setdefault(digest, []).append(i)
    return [group for group in found.values() if len(group) > 1]


def torn(groups: Sequence[str], split: NDArray[np.str_]) -> dict[str, tuple[int, str]]:
    """Groups that a given split separates: the position of the first member, and the splits in
    words."""
    first: dict[str, int] = {}
    sides: dict[str, set[str]] = {}
    for i, (group, side) in enumerate(zip(groups, split.tolist(), strict=True)):
        if group:
            first.setdefault(group, i)
            sides.setdefault(group, set()).add(side)
    return {
        group: (first[group], ", ".join(sorted(found)))
        for group, found in sides.items()
        if len(found) > 1
    }


def assign(
    labels: NDArray[np.int64],
    groups: NDArray[np.int64],
    given: NDArray[np.str_] | None,
    *,
    seed: int,
    test: float,
    val: float,
) -> NDArray[np.str_]:
    """Give each image its split: `(n,)` of `train`, `val`, `test`.

    What is `given` as val or test stays; a fraction of 0 makes none. Where there is no test part,
    the fraction `test` of the training part becomes one; where there is no val part, the fraction
    `val` of what is left becomes one, unless that is less than `MIN_VAL` images. The test part
    depends on the seed alone, not on `val`.
    """
    split = np.full(len(labels), "train", dtype="<U5") if given is None else given.astype("<U5")
    if not (split == "test").any():
        split[
            _held_out(labels, groups, split == "train", test, np.random.default_rng([seed, 0]))
        ] = "test"
    if not (split == "val").any():
        chosen = _held_out(labels, groups, split == "train", val, np.random.default_rng([seed, 1]))
        if chosen.sum() >= MIN_VAL:
            split[chosen] = "val"
    return split


def shots(
    labels: NDArray[np.int64], split: NDArray[np.str_], count: int, seed: int
) -> NDArray[np.int64]:
    """Indices, ascending, of `count` training images a class (all where a class has fewer) and of
    the whole test part.

    With one seed, the images of a smaller `count` are among those of a larger one.
    """
    rng = np.random.default_rng([seed, 2])
    train = [np.flatnonzero((labels == label) & (split == "train")) for label in np.unique(labels)]
    return np.sort(
        np.concatenate(
            [np.flatnonzero(split == "test"), *(rng.permutation(part)[:count] for part in train)]
        )
    )


def hold_out(
    labels: NDArray[np.int64],
    groups: NDArray[np.int64],
    pool: NDArray[np.int64],
    fraction: float,
    seed: int,
) -> NDArray[np.int64]:
    """About `fraction` of the positions in `pool`, ascending, as `assign` chooses: every class
    keeps an image in the rest."""
    mask = np.zeros(len(labels), dtype=bool)
    mask[pool] = True
    return np.flatnonzero(
        _held_out(labels, groups, mask, fraction, np.random.default_rng([seed, 3]))
    )


def _held_out(
    labels: NDArray[np.int64],
    groups: NDArray[np.int64],
    pool: NDArray[np.bool_],
    fraction: float,
    rng: np.random.Generator,
) -> NDArray[np.bool_]:
    """Take about `fraction` of each class out of the pool, whole groups in random order; every
    class keeps an image."""
    members: dict[int, list[int]] = {}
    for i in np.flatnonzero(pool):
        members.setdefault(int(groups[i]), []).append(int(i))
    left = Counter(labels[pool].tolist())
    wanted = _quota(left, fraction, rng)
    keys = list(members)
    order = [keys[i] for i in rng.permutation(len(keys))]
    chosen = np.zeros(len(labels), dtype=bool)
    # Groups that overshoot what is still wanted by much come second, and only where they bring it
    # nearer.
    for share in (0.5, 0.0):
        for key in order:
            if chosen[members[key][0]]:
                continue
            brings = Counter(labels[members[key]].tolist())
            gain = sum(abs(wanted[c]) - abs(wanted[c] - n) for c, n in brings.items())
            if (
                gain > 0
                and gain >= share * len(members[key])
                and all(left[c] > n for c, n in brings.items())
            ):
                chosen[members[key]] = True
                left.subtract(brings)
                wanted.subtract(brings)
    return chosen


def _quota(counts: Counter[int], fraction: float, rng: np.random.Generator) -> Counter[int]:
    """Whole numbers of images a class that add up to `fraction` of all: largest remainders, ties at
    random.

    Without it, every class of two images would round to none, and many small classes to an empty
    test part.
    """
    quota = Counter({c: int(fraction * n + 1e-9) for c, n in counts.items()})
    short = round(fraction * counts.total()) - quota.total()
    tie = dict(zip(sorted(counts), rng.random(len(counts)), strict=True))
    by_remainder = sorted(
        counts, key=lambda c: (-round(fraction * counts[c] - quota[c], 9), tie[c])
    )
    for c in [c for c in by_remainder if quota[c] + 1 < counts[c]][: max(short, 0)]:
        quota[c] += 1
    return quota
