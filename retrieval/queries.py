"""What is asked: images looked up in a gallery, and made into queries.

An image whose very bytes the gallery has is known by its digest: its stored vector is used, and its
own path is left out of its answer. The other images go through the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from finetune.data.images import Fault, ImageSet
from retrieval import hits
from retrieval.storage.segments import Snapshot
from retrieval.vectors import Ints, Rows, unit

# vectors of images `(n, width)`, and the faults by position
Encode = Callable[[ImageSet], tuple[Rows, dict[int, Fault]]]


@dataclass(frozen=True)
class Own:
    """What a query is to the gallery: positions `out` of its answer, and positions of its very
    bytes with the paths to show."""

    out: tuple[int, ...] = ()
    same: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


NOTHING = Own()


def both(own: Sequence[Own]) -> Own:
    """What several images that are one query are to the gallery: what is left out of one's answer
    is left out of theirs."""
    out = {position for one in own for position in one.out}
    same: dict[int, tuple[str, ...]] = {}
    for one in own:
        for position, paths in one.same.items():
            same[position] = tuple(path for path in same.get(position, paths) if path in paths)
    out |= {position for position, paths in same.items() if not paths}
    return Own(
        tuple(out), {position: paths for position, paths in same.items() if position not in out}
    )


@dataclass(frozen=True)
class QueryImages:
    """Images that ask, looked up in a gallery: vectors `(n, width)`; their `positions` there
    `(n,)`, −1 for new ones; and the faults by number, whose vectors are zero."""

    vectors: Rows
    positions: Ints
    faults: dict[int, Fault]


@dataclass(frozen=True)
class PlannedQuery:
    """A query ready to be searched for: its vector `(width,)`, and what it is to the gallery."""

    vector: Rows
    own: Own


def look_up(snapshot: Snapshot, images: ImageSet, where: Ints, encode: Encode) -> QueryImages:
    """Images as queries: of those with a position in `where` `(n,)`, −1 for the others, the stored
    vectors are taken, and the others are encoded."""
    stored, fresh = np.flatnonzero(where >= 0), np.flatnonzero(where < 0)
    vectors = np.zeros((len(images), int(snapshot.meta["manifest"]["width"])), np.float32)
    vectors[stored] = snapshot.vectors(where[stored])
    faults: dict[int, Fault] = {}
    if len(fresh):
        made, bad = encode(images.subset(fresh))
        vectors[fresh] = made
        faults = {int(fresh[i]): fault for i, fault in bad.items()}
    return QueryImages(vectors, where, faults)


def positions(snapshot: Snapshot, digests: Sequence[str]) -> dict[str, int]:
    """Positions of the contents that are in the gallery."""
    return {
        digest: position
        for digest, (_, position, alive) in snapshot.positions(digests).items()
        if alive
    }


def plan(
    found: QueryImages, group: Sequence[int], own: Sequence[Own], average: bool
) -> PlannedQuery:
    """The query that the images `group` of those that were looked up are together: their mean with
    `average`, else the one alone; `own` says what each of the group is to the gallery."""
    rows = found.vectors[list(group)]
    vector = unit(rows.mean(axis=0, keepdims=True))[0] if average else rows[0]
    return PlannedQuery(vector, both(own))


def own_of(snapshot: Snapshot, root: Path, position: int, file: Path | None) -> Own:
    """What a query is to the gallery that has its bytes at `position` (−1: nowhere); the path of
    `file` is left out, where given."""
    if position < 0:
        return NOTHING
    (number,) = snapshot.ids(np.array([position], dtype=np.int64))
    paths = snapshot.paths([number])[number]
    others = paths if file is None else hits.others(paths, root, file)
    return Own(same={position: others}) if others else Own(out=(position,))


def file_of(images: ImageSet, i: int) -> Path | None:
    """The file of an image; None where it is none, but a picture in memory."""
    file = images.root / images.paths[i]
    return file if not images.in_memory or file.is_file() else None
