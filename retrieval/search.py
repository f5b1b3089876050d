"""Search in a gallery as of one moment: candidates, their exact scores, and what is shown of them.

A *position* is a row of the snapshot's vectors. Hits are ranked by exact cosine, also where a
search index proposed them. All functions are pure: no lock, no network.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from retrieval import hits
from retrieval.hits import Hit
from retrieval.queries import Own
from retrieval.storage import segments
from retrieval.storage.segments import Snapshot
from retrieval.vectors import Ints, Rows, unit

if TYPE_CHECKING:
    from retrieval.index.nearest import Exclusion, Index

Floats = NDArray[np.float64]

# candidates beyond those needed: near-ties change places between float32 and exact scores
SLACK = 8
# scores computed at once in exact search, and the rows that these are at least
BLOCK, LEAST_ROWS = (8_000_000, 1024)
ROUNDING = 1e-6  # by which the cosine of a vector with itself may miss 1


@dataclass(frozen=True)
class Corpus:
    """What is searched: a snapshot, and where it is large, an index over its first rows."""

    snapshot: Snapshot
    index: Index | None = None

    @property
    def covered(self) -> int:
        """How many rows the index covers; the others are compared one by one."""
        return 0 if self.index is None else int(self.snapshot.meta["search"]["rows"])

    @functools.cached_property
    def removed(self) -> Exclusion | None:
        """The rows of the index whose images were removed, made ready for many searches."""
        if self.index is None:
            return None
        return self.index.exclusion(self.snapshot.dead[: self.covered])


def read(folder: Path) -> Corpus:
    """A gallery as it is now, with its search index. A writer that sweeps the index away meanwhile
    is no damage."""
    while True:
        now = segments.read(folder)
        index = now.meta.get("search")
        if not index:
            return Corpus(now)
        from retrieval.index import nearest

        try:
            return Corpus(now, nearest.load(folder / index["file"]))
        except UserError:
            now.close()
            with contextlib.closing(segments.read(folder)) as later:
                if later.generation == now.generation:
                    raise


@dataclass(frozen=True)
class SearchOptions:
    """`k` images are shown, those of at least `threshold` alone. With `collapse`, a hit whose
    cosine to a better one is at least that is put under it. `expand` is average query expansion:
    search again with the mean of the query and its first `expand` hits (Chum et al., ICCV 2007)."""

    k: int = 10
    threshold: float | None = None
    collapse: float | None = None
    expand: int = 0


@dataclass(frozen=True)
class Ranked:
    """Positions and exact scores of an answer, best first, and the positions that were collapsed
    into each."""

    positions: Ints
    scores: Floats
    collapsed: list[list[int]]


# ---------------------------------------------------------------------------------------- ranking


def rank(corpus: Corpus, vectors: Rows, own: Sequence[Own], options: SearchOptions) -> list[Ranked]:
    """What is shown for each of `vectors` `(q, width)`, unit rows; `own[i]` says what query i is to
    the gallery. Asks for more candidates until k are left."""
    size, k = len(corpus.snapshot), options.k
    result: dict[int, Ranked] = {}
    todo = list(range(len(vectors)))
    m = k + max((len(one.out) for one in own), default=0) + SLACK + (k if options.collapse else 0)
    while todo:
        m = min(m, size)
        for i, candidates in zip(todo, nearest(corpus, vectors[todo], m), strict=True):
            candidates, scores = _ordered(corpus.snapshot, vectors[i], candidates, own[i])
            shown = _shown(corpus.snapshot, candidates, scores, own[i], options)
            if len(shown.positions) >= k or m >= size or _below(scores, options.threshold):
                result[i] = shown
        todo = [i for i in todo if i not in result]
        m *= 4
    return [result[i] for i in range(len(vectors))]


def expanded(corpus: Corpus, vectors: Rows, own: Sequence[Own], count: int) -> Rows:
    """The mean of each query and its first `count` hits, at unit length; the query itself is in it
    already and is no hit."""
    others = [Own(out=(*one.out, *one.same)) for one in own]
    first = rank(corpus, vectors, others, SearchOptions(count))
    near = [corpus.snapshot.vectors(ranked.positions) for ranked in first]
    means = [
        (vector + rows.sum(axis=0)) / (1 + len(rows))
        for vector, rows in zip(vectors, near, strict=True)
    ]
    return unit(np.stack(means))


def _ordered(snapshot: Snapshot, vector: Rows, candidates: Ints, own: Own) -> tuple[Ints, Floats]:
    """Candidates and their scores, best first; before them what has the query's bytes, also where
    it was not proposed."""
    same = np.array(list(own.same), dtype=np.int64)
    candidates = np.union1d(candidates, same)
    scores = exact_scores(snapshot, vector, candidates)
    is_same = np.isin(candidates, same)
    scores[is_same & (scores > 1 - ROUNDING)] = 1.0
    order = np.lexsort((candidates, -scores, ~is_same))
    return candidates[order], scores[order]


def _below(scores: Floats, threshold: float | None) -> bool:
    """Whether the last of the candidates is below the threshold: no other can reach it."""
    return threshold is not None and bool(len(scores)) and bool(scores[-1] < threshold)


def _shown(
    snapshot: Snapshot, candidates: Ints, scores: Floats, own: Own, options: SearchOptions
) -> Ranked:
    """The first k of the candidates that are not left out, too low, or under a better one."""
    keep = ~np.isin(candidates, own.out)
    if options.threshold is not None:
        keep &= scores >= options.threshold
    candidates, scores = candidates[keep], scores[keep]
    if options.collapse:
        groups = collapsed(snapshot, candidates, options.collapse)
    else:
        groups = [[j] for j in range(len(candidates))]
    groups = groups[: options.k]
    first = np.array([group[0] for group in groups], dtype=np.int64)
    under = [candidates[group[1:]].tolist() for group in groups]
    return Ranked(candidates[first], scores[first], under)


def collapsed(snapshot: Snapshot, candidates: Ints, threshold: float) -> list[list[int]]:
    """Groups of near-duplicates, each under its best: indices into `candidates`, which come best
    first."""
    rows = snapshot.vectors(candidates)
    groups: list[list[int]] = []
    for j in range(len(candidates)):
        near = rows[[group[0] for group in groups]] @ rows[j] if groups else np.empty(0)
        if len(near) and near.max() >= threshold:
            groups[int(near.argmax())].append(j)
        else:
            groups.append([j])
    return groups


# -------------------------------------------------------------------------------------- candidates


def nearest(corpus: Corpus, vectors: Rows, m: int) -> list[Ints]:
    """At least the `m` best candidates for each of `vectors`, in no order: positions of images that
    count."""
    proposed = [np.empty(0, np.int64) for _ in vectors]
    if corpus.index is not None and m > 0:
        _, found = corpus.index.search(vectors, m, exclude=corpus.removed)
        proposed = [row[row >= 0] for row in found]
    rest = exact(corpus.snapshot, vectors, m, corpus.covered)
    return [np.concatenate(pair) for pair in zip(proposed, rest, strict=True)]


def exact(snapshot: Snapshot, vectors: Rows, m: int, first: int = 0) -> list[Ints]:
    """The `m` best positions from `first` on for each of `vectors`, by comparing with all of them;
    in no order."""
    best = np.empty((len(vectors), 0), np.float32)
    where = np.empty((len(vectors), 0), np.int64)
    step = max(LEAST_ROWS, BLOCK // max(1, len(vectors)))
    for table, start in zip(snapshot.tables, snapshot.starts.tolist(), strict=True):
        if start < first:
            continue
        for row in range(0, len(table), step):
            scores = vectors @ table[row : row + step].T
            at = np.arange(start + row, start + row + scores.shape[1])
            alive = ~snapshot.dead[at]
            if not alive.all():
                scores, at = scores[:, alive], at[alive]
            best = np.concatenate([best, scores], axis=1)
            where = np.concatenate([where, np.broadcast_to(at, scores.shape)], axis=1)
            if best.shape[1] > m:
                top = np.argpartition(-best, m - 1, axis=1)[:, :m]
                best = np.take_along_axis(best, top, 1)
                where = np.take_along_axis(where, top, 1)
    return list(where)


def exact_scores(snapshot: Snapshot, vector: Rows, positions: Ints) -> Floats:
    """Cosines in double precision: the same bits whatever else is asked at the same time."""
    rows = snapshot.vectors(positions).astype(np.float64)
    return np.clip(np.einsum("ij,j->i", rows, vector.astype(np.float64)), -1.0, 1.0)


# -------------------------------------------------------------------------------------------- hits


def hits_of(
    snapshot: Snapshot, root: Path, ranked: Ranked, same: Mapping[int, tuple[str, ...]]
) -> tuple[Hit, ...]:
    """What is shown of an answer, best first: paths, scores, and what has become of the files below
    `root`. `same` are the positions of the query's very bytes, with the paths to show."""
    under = [position for group in ranked.collapsed for position in group]
    every = np.concatenate([ranked.positions, np.array(under, dtype=np.int64)])
    ids = dict(zip(every.tolist(), snapshot.ids(every), strict=True))
    files = snapshot.files(list(ids.values()))
    made = []
    for position, score, group in zip(
        ranked.positions.tolist(), ranked.scores.tolist(), ranked.collapsed, strict=True
    ):
        known = files[ids[position]]
        paths = same.get(position) or tuple(sorted(known))
        similar = {min(files[ids[p]]): files[ids[p]] for p in group}
        looked = {path: known[path] for path in paths}
        looked |= {path: stats[path] for path, stats in similar.items()}
        missing, changed = map(tuple, hits.gone(root, looked))
        hit = Hit(
            ids[position],
            paths[0],
            float(score),
            also=paths[1:],
            similar=tuple(similar),
            same=position in same,
            missing=missing,
            changed=changed,
        )
        made.append(hit)
    return tuple(sorted(made, key=lambda hit: (not hit.same, -hit.score, hit.path)))
