"""How good a gallery's answers are: judged by folder names or by a table of pairs, and its
near-duplicates.

Rankings are exact, so that the figures are those of the features; what a search index loses beside
them is measured apart. A query that is in the gallery is known by its digest and is left out of its
own ranking.
"""

from __future__ import annotations

import csv
import os
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data import images
from finetune.data.images import ImageSet
from finetune.errors import UserError
from finetune.features import extraction
from finetune.names import from_database, meant, written
from retrieval import hits, metrics
from retrieval.frame import first_folder
from retrieval.gallery import Gallery
from retrieval.info import FILL, NO_IMAGES
from retrieval.metrics import Summary
from retrieval.vectors import Ints, Rows, near_duplicates

FULL = 20_000  # images: up to here the whole ranking is judged
DEPTH = 1000  # results judged in larger galleries
SCORES = 20_000_000  # computed at once
KS = (1, 5, 10)


@dataclass(frozen=True)
class Judged:
    """`metrics` by name, each a mean over queries with its interval. `depth` results per query were
    judged.

    `left_out` counts images that could not be queries: without a folder, or in two; `search` says
    how the gallery searches and `search_recall` which share of the exact results that finds (1
    where it is exact).
    """

    queries: int
    images: int
    depth: int
    metrics: dict[str, Summary]
    left_out: int
    search: str
    search_recall: float

    def to_json(self) -> dict[str, Any]:
        values = {
            name: {key: _number(value) for key, value in asdict(one).items()}
            for name, one in self.metrics.items()
        }
        return {**asdict(self), "metrics": values}

    def to_text(self) -> str:
        """The figures, a line each, and what they leave out."""
        lines = [f"{self.queries} queries on {self.images} images, 95 % intervals over queries"]
        lines += [f"  {name:<14} {_words(one)}" for name, one in self.metrics.items()]
        if without := next(iter(self.metrics.values())).left_out:
            lines.append(f"  {without} queries have nothing to find and are left out of the means")
        if self.left_out:
            lines.append(
                f"  left out as queries: {self.left_out} of the images, in no folder or in two"
            )
        lines.append(
            f"search: {self.search}; it finds {self.search_recall:.1%} of what exact search finds"
        )
        return "\n".join(lines)


def _words(one: Summary) -> str:
    if not one.n:
        return "unknown: no query has anything to find"
    return f"{one.value:.3f}  ({one.low:.3f}–{one.high:.3f}, {one.method}, n = {one.n})"


def _number(value: Any) -> Any:
    return None if value != value else value  # NaN: JSON has none


@dataclass(frozen=True)
class _Queries:
    """Vectors `(q, d)`, the positions of the queries themselves (−1: not in the gallery), and for
    each the mask of its positives over the images that count, `(n,)`."""

    vectors: Rows
    own: Ints
    positives: Callable[[int], NDArray[np.bool_]]


def by_folder(
    gallery: Gallery,
    queries: Path | None = None,
    *,
    ks: Sequence[int] = KS,
    limit: int = 2000,
    seed: int = 0,
) -> Judged:
    """Judge with folder names as classes: two images match if the first folders on their ways have
    the same name.

    The queries are the gallery's own images, at most `limit` of them, drawn by `seed`; or the
    images in the folder `queries`, with its own folders as classes.
    """
    _refuse_empty(gallery)
    positions, ids = gallery.now.everything()
    names = _labels(gallery, ids.tolist())
    codes = {
        name: i for i, name in enumerate(dict.fromkeys(name for name in names if name is not None))
    }
    labels = np.array([-1 if name is None else codes[name] for name in names], dtype=np.int64)
    if queries is None:
        able = np.flatnonzero(labels >= 0)
        left_out = len(labels) - len(able)
        if len(able) > limit:
            able = np.sort(np.random.default_rng(seed).permutation(able)[:limit])
        asked, vectors, own = labels[able], gallery.now.vectors(positions[able]), positions[able]
    else:
        source = images.load_unlabelled(queries)
        classes = [path.split("/")[0] if "/" in path else None for path in source.paths]
        able = np.array([i for i, name in enumerate(classes) if name is not None], dtype=np.int64)
        left_out = len(source) - len(able)
        source = source.subset(able)
        vectors, own = _vectors(gallery, source)
        asked = np.array([codes.get(str(classes[i]), -2) for i in able], dtype=np.int64)
    if not len(asked):
        raise UserError(
            "no image lies in a folder, so that none has a class",
            where=queries or gallery.folder,
            fix="say in a table which images match: --labels pairs.csv, "
            "with the columns query,match",
        )
    return _judge(
        gallery, positions, _Queries(vectors, own, lambda i: labels == asked[i]), ks, left_out
    )


def by_pairs(gallery: Gallery, table: Path, *, ks: Sequence[int] = KS) -> Judged:
    """Judge with a CSV of `query,match`: a line per pair, both as paths of the gallery or relative
    to the table's folder.

    A query may be a file that is not in the gallery; a match has to be in it.
    """
    _refuse_empty(gallery)
    wanted = _read_pairs(table)
    positions, ids = gallery.now.everything()
    place = {number: i for i, number in enumerate(ids.tolist())}
    known = {
        from_database(path): place[image]
        for path, image in gallery.now.db.execute("select path, image from path")
    }
    root = gallery.root

    def find(text: str) -> int | None:
        for name in dict.fromkeys((text, meant(text))):
            beside = Path(os.path.relpath(table.absolute().parent / name, root)).as_posix()
            at = known.get(posixpath.normpath(name), known.get(beside))
            if at is not None:
                return at
        return None

    truth: list[NDArray[np.int64]] = []
    for matches in wanted.values():
        found = [(find(text), line) for text, line in matches]
        for (at, line), (text, _) in zip(found, matches, strict=True):
            if at is None:
                raise UserError(
                    f"{text!r} is not in the gallery",
                    where=f"{table}, line {line}",
                    fix="give a path of the gallery",
                )
        truth.append(np.array([at for at, _ in found], dtype=np.int64))
    inside = [find(query) for query in wanted]
    own = np.array([-1 if at is None else positions[at] for at in inside], dtype=np.int64)
    vectors = np.zeros((len(own), int(gallery.manifest["width"])), np.float32)
    vectors[own >= 0] = gallery.now.vectors(own[own >= 0])
    outside = [
        (i, query) for i, (query, at) in enumerate(zip(wanted, inside, strict=True)) if at is None
    ]
    if outside:
        paths = tuple(written(query, table.parent) for _, query in outside)
        source = ImageSet(
            str(table), table.parent, paths, np.full(len(paths), -1, dtype=np.int64), ()
        )
        vectors[[i for i, _ in outside]], own[[i for i, _ in outside]] = _vectors(gallery, source)

    def positives(i: int) -> NDArray[np.bool_]:
        mask = np.zeros(len(positions), np.bool_)
        mask[truth[i]] = True
        return mask

    return _judge(gallery, positions, _Queries(vectors, own, positives), ks, 0)


def _refuse_empty(gallery: Gallery) -> None:
    if not len(gallery):
        raise UserError(NO_IMAGES, where=gallery.folder, fix=FILL)


def _read_pairs(table: Path) -> dict[str, list[tuple[str, int]]]:
    """Query → its matches with their lines."""
    wanted: dict[str, list[tuple[str, int]]] = {}
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip().lower() for name in next(reader, [])]
            if header[:2] != ["query", "match"]:
                raise UserError(
                    f"the first line is {','.join(header)!r}",
                    where=table,
                    fix="it must be: query,match",
                )
            for row in reader:
                if len(row) < 2 or not row[0].strip() or not row[1].strip():
                    raise UserError(
                        "a query or its match is missing", where=f"{table}, line {reader.line_num}"
                    )
                wanted.setdefault(row[0].strip(), []).append((row[1].strip(), reader.line_num))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"cannot be read as a table ({error})",
            where=table,
            fix="give a UTF-8 CSV of query,match",
        ) from error
    if not wanted:
        raise UserError("holds no pairs", where=table, fix="write a line of query,match for each")
    return wanted


def _vectors(gallery: Gallery, source: ImageSet) -> tuple[Rows, Ints]:
    """Vectors of query images, and their own positions in the gallery (−1: not in it)."""
    found = gallery.look_up(source)
    if found.faults:
        extraction.refuse(list(found.faults.values()), source.name)
    return found.vectors, found.positions


def _labels(gallery: Gallery, ids: Sequence[int]) -> list[str | None]:
    """The first folder on the way of each image, seen from the gallery's folder that holds it; None
    for none, or for two."""
    rows = gallery.now.db.execute("select path from source").fetchall()
    sources = sorted((from_database(path) for (path,) in rows), key=len, reverse=True)
    paths = gallery.now.paths(ids)
    found = []
    for number in ids:
        names = {first_folder(path, sources) for path in paths[number]}
        found.append(names.pop() if len(names) == 1 else None)
    return found


def _judge(
    gallery: Gallery, positions: Ints, queries: _Queries, ks: Sequence[int], left_out: int
) -> Judged:
    base = gallery.now.table()
    n, k = len(positions), max(ks)
    depth = n if n <= FULL else min(n, max(DEPTH, k))
    own = np.where(queries.own >= 0, np.searchsorted(positions, queries.own), -1)
    found = np.zeros((len(own), depth), np.bool_)
    totals = np.zeros(len(own), np.int64)
    best: list[Ints] = []
    step = max(1, SCORES // max(n, 1))
    for start in range(0, len(own), step):
        scores = queries.vectors[start : start + step] @ base.T
        for row, i in zip(scores, range(start, start + len(scores)), strict=True):
            mask = queries.positives(i)
            if own[i] >= 0:
                row[own[i]], mask = -np.inf, mask.copy()
                mask[own[i]] = False
            order = _first(row, depth)
            found[i], totals[i] = mask[order], mask.sum()
            best.append(positions[order[: min(k, n - (own[i] >= 0))]])
    names = {
        f"{name}@{at}": measure(found, totals, at)
        for name, measure in _MEASURES.items()
        for at in ks
    }
    end = "" if depth == n else f"@{depth}"
    names |= {
        f"mAP{end}": metrics.average_precision(found, totals),
        f"MRR{end}": metrics.reciprocal_rank(found, totals),
    }
    summaries = {name: metrics.summarise(values) for name, values in names.items()}
    recall = _search_recall(gallery, queries, best, k)
    kind = "exact" if gallery.index is None else gallery.index.spec.factory
    return Judged(len(own), n, depth, summaries, left_out, kind, recall)


_MEASURES = {
    "recall": metrics.recall_at,
    "precision": metrics.precision_at,
    "success": metrics.success_at,
}


def _first(scores: NDArray[np.float32], depth: int) -> Ints:
    """Indices of the `depth` highest scores, best first; ties go to the lower index."""
    if depth < len(scores):
        top = np.sort(np.argpartition(-scores, depth - 1)[:depth])
        return top[np.argsort(-scores[top], kind="stable")]
    return np.argsort(-scores, kind="stable")


def _search_recall(gallery: Gallery, queries: _Queries, best: Sequence[Ints], k: int) -> float:
    """The share of the exact first k results that the gallery's search finds."""
    if gallery.index is None:
        return 1.0
    own = [[int(position)] if position >= 0 else [] for position in queries.own]
    found = gallery.ranked(queries.vectors, k, own)
    shares = [
        len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, best, strict=True) if len(b)
    ]
    return float(np.mean(shares)) if shares else 1.0


# --------------------------------------------------------------------------------------- duplicates


def duplicates(gallery: Gallery, threshold: float) -> list[dict[str, Any]]:
    """Groups of images that are alike, the most alike first: `{"score": …, "paths": […]}`, with
    `missing_paths` and `changed_paths` where files are not what the gallery remembers.

    Two images whose cosine is at least `threshold` are in one group, and so is what is alike to
    either; `score` is the lowest cosine of the pairs that hold a group together. Files of the same
    bytes are a group of score 1.
    """
    _, ids = gallery.now.everything()
    files, root = gallery.now.files(ids.tolist()), gallery.root
    leader = list(range(len(ids)))
    score = [1.0] * len(ids)

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = i = leader[leader[i]]
        return i

    # The best pairs come first, so that the last one that joins two groups is the weakest link.
    for i, j, cosine in near_duplicates(gallery.now.table(), threshold) if len(ids) else ():
        a, b = sorted((find(i), find(j)))
        if a != b:
            leader[b], score[a] = a, cosine
    groups: dict[int, dict[str, tuple[int, int]]] = {}
    for i, number in enumerate(ids.tolist()):
        groups.setdefault(find(i), {}).update(files[number])
    found = [_group(score[first], known, root) for first, known in groups.items() if len(known) > 1]
    return sorted(found, key=lambda group: (-group["score"], group["paths"]))


def _group(score: float, known: hits.Known, root: Path) -> dict[str, Any]:
    missing, changed = hits.gone(root, known)
    marks = {"missing_paths": sorted(missing), "changed_paths": sorted(changed)}
    return {
        "score": score,
        "paths": sorted(known),
        **{name: paths for name, paths in marks.items() if paths},
    }
