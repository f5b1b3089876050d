"""A gallery as its readers see it: from images to ranked images, as of the moment when it was
opened.

Ids name contents: a file that is renamed keeps its id, and the same bytes at two paths are one
image with two paths. Hits are ranked by exact cosine, also where a search index proposed them.
`retrieval.maintenance` makes and changes galleries.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune.data import images
from finetune.data.images import Fault, ImageSet
from finetune.errors import UserError
from finetune.features import extraction
from finetune.features.engine import Runner
from finetune.names import from_database, shown
from finetune.progress import Progress
from retrieval import database, encode, hits, segments
from retrieval.encoder import (
    Encoder,
    check_manifest,
    frame_words,
    from_manifest,
    run_digest,
)
from retrieval.hits import Answer, Hit
from retrieval.segments import Snapshot, find_root
from retrieval.vectors import Ints, Rows, unit

if TYPE_CHECKING:
    from retrieval.index.nearest import Index

SLACK = (
    8  # candidates beyond those needed: near-ties change places between float32 and exact scores
)
# scores computed at once in exact search, and the rows that these are at least
BLOCK, LEAST_ROWS = (8_000_000, 1024)


NO_IMAGES = "this index holds no images"
FILL = "`retrieve add` puts some in, and `retrieve sync` those that lie in its folders"
ROUNDING = 1e-6  # by which the cosine of a vector with itself may miss 1
# positions, scores, the positions collapsed into each
Ranked = tuple[Ints, NDArray[np.float64], list[list[int]]]


@dataclass(frozen=True)
class Own:
    """What a query is to the gallery: positions `out` of its answer, and positions of its very
    bytes with the paths to show."""

    out: tuple[int, ...] = ()
    same: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


NOTHING = Own()


class Gallery:
    """An open gallery. It shows one moment; `refresh` goes on to the present. Threads may share
    it."""

    def __init__(self, folder: Path) -> None:
        """Open the gallery in `folder`. Raises `UserError` where there is none, and for damaged
        files."""
        self.folder = folder
        self._lock = threading.RLock()
        # its own: what takes seconds must not keep others from the gallery
        self._opening = threading.Lock()
        self._network: tuple[dict[str, Any], Encoder, tuple[Runner, ...]] | None = None
        self._show(*_read(folder))

    def _show(self, now: Snapshot, index: Index | None) -> None:
        self.now, self.index = now, index
        self._covered = int(now.meta["search"]["rows"]) if index is not None else 0
        self._gone = None if index is None else index.exclusion(now.dead[: self._covered])

    def __enter__(self) -> Gallery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.now)

    def close(self) -> None:
        self.now.close()

    def refresh(self) -> bool:
        """Go on to the present state; whether there was anything new."""
        with self._lock:
            before = self.now
            with (
                contextlib.closing(database.open_database(self.folder)) as db,
                database.database_errors(self.folder),
            ):
                # the usual case: no file is looked at
                if database.read_meta(db, self.folder) == before.meta:
                    return False
            fresh, index = _read(self.folder)
            self._show(fresh, index)
            before.close()
            return True

    @property
    def manifest(self) -> dict[str, Any]:
        return dict(self.now.meta["manifest"])

    @property
    def root(self) -> Path:
        """The folder to which paths are relative: where it lies seen from the index, else where it
        was."""
        return find_root(self.now.meta, self.folder)

    # -------------------------------------------------------------------------------- single images

    def ids(self) -> list[int]:
        """The ids of all images, in the order in which they came."""
        with self._lock, database.database_errors(self.folder):
            return [
                number
                for (number,) in self.now.db.execute(
                    "select id from image where alive = 1 order by id"
                )
            ]

    def digest(self, number: int) -> str | None:
        """SHA-256 of the bytes of the image with this id; None where the gallery does not have
        it."""
        with self._lock:
            rows = self.now.select(
                "select digest from image where alive = 1 and id in ({marks})", [number]
            )
            return rows[0][0].hex() if rows else None

    def paths(self, number: int) -> tuple[str, ...]:
        """The paths of the image with this id; none where the gallery does not have it."""
        with self._lock:
            return self.now.paths([number])[number]

    def file(self, number: int) -> Path | None:
        """A file with the bytes of the image with this id, if it still exists. Only paths of the
        registry come out."""
        return next(
            (file for path in self.paths(number) if (file := self.root / path).is_file()), None
        )

    def position(self, number: int) -> int | None:
        """Where the vector of the image with this id is; None where the gallery does not have
        it."""
        with self._lock:
            rows = self.now.select(
                "select segment, row from image where alive = 1 and id in ({marks})", [number]
            )
            start = dict(zip(self.now.segments, self.now.starts.tolist(), strict=True))
            return int(start[rows[0][0]] + rows[0][1]) if rows else None

    # -------------------------------------------------------------------------------------- queries

    def query(
        self,
        source: ImageSet,
        k: int = 10,
        *,
        names: Sequence[str] | None = None,
        together: bool = False,
        keep_self: bool = False,
        on_bad: str = "stop",
        progress: Progress | None = None,
        **how: Any,
    ) -> tuple[list[Answer], tuple[Fault, ...]]:
        """The k most similar images of every image of `source`, or of their mean with `together`.

        A query that is in the gallery is known by its digest: its stored vector is used. Its own
        path is left out of its answer unless `keep_self`; other paths of the same bytes come first.
        `names` are shown instead of the paths; `how` is passed to `search`.
        """
        images.check_on_bad(on_bad)
        names = list(names or source.paths)
        digests = list(images.digest_of(source, range(len(source))))
        known = self.positions(digests)
        vectors, faults = self._query_vectors(source, digests, known, progress)
        if faults and on_bad == "stop":
            extraction.refuse(list(faults.values()), source.name)
        good = [i for i in range(len(source)) if i not in faults]
        own = [
            self.own(
                known.get(digests[i]), None if keep_self or source.in_memory else _file(source, i)
            )
            for i in good
        ]
        vectors, names = vectors[good], [names[i] for i in good]
        parts: list[tuple[str, ...]] = [(name,) for name in names]
        if together and good:
            vectors, parts = unit(vectors.mean(axis=0, keepdims=True)), [tuple(names)]
            own = [both(own)]
        found = self.search(vectors, k, own=own, **how)
        answers = [
            Answer(" + ".join(some), hits, some) for some, hits in zip(parts, found, strict=True)
        ]
        return answers, tuple(faults.values())

    def own(self, position: int | None, file: Path | None) -> Own:
        """What a query is to the gallery that has its bytes at `position` (None: nowhere); `file`
        is left out, where given."""
        if position is None:
            return NOTHING
        with self._lock:
            (number,) = self.now.ids(np.array([position], dtype=np.int64))
            paths = self.now.paths([number])[number]
        shown = paths if file is None else hits.others(paths, self.root, file)
        return Own(same={position: shown}) if shown else Own(out=(position,))

    def vectors(self, source: ImageSet, digests: Sequence[str]) -> Rows:
        """Vectors of images with these digests, `(n, width)`: the stored ones where the gallery has
        them."""
        vectors, faults = self._query_vectors(source, digests, self.positions(digests), None)
        if faults:
            extraction.refuse(list(faults.values()), source.name)
        return vectors

    def positions(self, digests: Sequence[str]) -> dict[str, int]:
        """Positions of the contents that are in the gallery."""
        with self._lock:
            return {
                digest: position
                for digest, (_, position, alive) in self.now.positions(digests).items()
                if alive
            }

    def _query_vectors(
        self,
        source: ImageSet,
        digests: Sequence[str],
        known: dict[str, int],
        progress: Progress | None,
    ) -> tuple[Rows, dict[int, Fault]]:
        vectors = np.zeros((len(source), int(self.manifest["width"])), np.float32)
        stored = [i for i, digest in enumerate(digests) if digest in known]
        fresh = [i for i, digest in enumerate(digests) if digest not in known]
        vectors[stored] = self.now.vectors(
            np.array([known[digests[i]] for i in stored], dtype=np.int64)
        )
        if not fresh:
            return vectors, {}
        made, faults = self.encode(source.subset(fresh), progress)
        vectors[fresh] = made
        return vectors, {fresh[i]: fault for i, fault in faults.items()}

    def encode(
        self, source: ImageSet, progress: Progress | None = None
    ) -> tuple[Rows, dict[int, Fault]]:
        """Vectors of images `(n, width)`, made as the gallery's own, and the faults by position
        (their rows are zero)."""
        encoder, runners = self.network()
        return encode.directly(encoder, source, runners, progress)

    def network(self) -> tuple[Encoder, tuple[Runner, ...]]:
        """The encoder of the gallery and its networks, loaded at the first call."""
        manifest = self.manifest
        with self._opening:
            if self._network is None or self._network[0] != manifest:
                encoder = from_manifest(self.folder, manifest)
                self._network = (manifest, encoder, encode.open_runners(encoder))
            return self._network[1:]

    def search(
        self,
        vectors: Rows,
        k: int = 10,
        *,
        own: Sequence[Own] | None = None,
        threshold: float | None = None,
        collapse: float | None = None,
        expand: int = 0,
        made_by: dict[str, Any] | None = None,
    ) -> list[tuple[Hit, ...]]:
        """The k best images for each of `vectors` `(q, width)`.

        `own[i]` says what is left out of answer i, and what has the query's very bytes: that comes
        first. Only scores of at least `threshold` count. With `collapse`, a hit whose cosine to a
        better one is at least that is put under it. `expand` is average query expansion: search
        again with the mean of the query and its first `expand` hits (Chum et al., ICCV 2007).
        `made_by` describes the vectors (`describe`); what was made otherwise is refused.
        Fewer than k come back only where the gallery has no more.
        """
        if made_by is not None:
            check_manifest(self.manifest["vector"], made_by, self.folder)
        vectors = self._checked(vectors)
        own = own if own is not None else [NOTHING] * len(vectors)
        with self._lock:
            if expand > 0:
                # the query itself is in the mean already
                others = [Own(out=(*one.out, *one.same)) for one in own]
                first = self._ranked(vectors, expand, others, None, None)
                near = [self.now.vectors(ranked[0]) for ranked in first]
                vectors = unit(
                    np.stack(
                        [
                            (v + rows.sum(axis=0)) / (1 + len(rows))
                            for v, rows in zip(vectors, near, strict=True)
                        ]
                    )
                )
            found = self._ranked(vectors, k, own, threshold, collapse)
            return [self._hits(ranked, one.same) for ranked, one in zip(found, own, strict=True)]

    def ranked(self, vectors: Rows, k: int, own: Sequence[Collection[int]]) -> list[Ints]:
        """Positions of the k best images for each of `vectors`, best first, as `search` finds
        them."""
        with self._lock:
            return [
                ranked[0]
                for ranked in self._ranked(
                    self._checked(vectors), k, [Own(tuple(o)) for o in own], None, None
                )
            ]

    def _checked(self, vectors: Rows) -> Rows:
        found = np.ascontiguousarray(vectors, dtype=np.float32)
        width = int(self.manifest["width"])
        if found.ndim != 2 or found.shape[1] != width:
            raise UserError(
                f"queries of shape {found.shape}",
                where=self.folder,
                fix=f"the gallery's vectors have {width} numbers",
            )
        bad = ~np.isfinite(found).all(axis=1) | ~found.any(axis=1)
        if bad.any():
            what = (
                f"query {int(np.flatnonzero(bad)[0])} has no direction: it is zero or not a number"
            )
            raise UserError(what, where=self.folder, fix="leave it out")
        return unit(found)

    def _ranked(
        self,
        vectors: Rows,
        k: int,
        own: Sequence[Own],
        threshold: float | None,
        collapse: float | None,
    ) -> list[Ranked]:
        """What `search` shows of each query; asks for more candidates until k are left."""
        result: dict[int, Ranked] = {}
        todo = list(range(len(vectors)))
        m = k + max((len(one.out) for one in own), default=0) + SLACK + (k if collapse else 0)
        while todo:
            m = min(m, len(self.now))
            for i, candidates in zip(todo, self.nearest(vectors[todo], m), strict=True):
                candidates, scores = self._ordered(vectors[i], candidates, own[i])
                ended = m >= len(self.now) or (
                    threshold is not None and bool(len(scores)) and scores[-1] < threshold
                )
                keep = ~np.isin(candidates, own[i].out)
                if threshold is not None:
                    keep &= scores >= threshold
                candidates, scores = candidates[keep], scores[keep]
                groups = (
                    self._collapsed(candidates, collapse)
                    if collapse
                    else [[j] for j in range(len(candidates))]
                )
                if len(groups) >= k or ended:
                    first = np.array([group[0] for group in groups[:k]], dtype=np.int64)
                    under = [candidates[group[1:]].tolist() for group in groups[:k]]
                    result[i] = (candidates[first], scores[first], under)
            todo = [i for i in todo if i not in result]
            m *= 4
        return [result[i] for i in range(len(vectors))]

    def _ordered(
        self, vector: Rows, candidates: Ints, own: Own
    ) -> tuple[Ints, NDArray[np.float64]]:
        """Candidates and their scores, best first; before them what has the query's bytes, also
        where it was not proposed."""
        same = np.array(list(own.same), dtype=np.int64)
        candidates = np.union1d(candidates, same)
        scores = self.exact_scores(vector, candidates)
        is_same = np.isin(candidates, same)
        scores[is_same & (scores > 1 - ROUNDING)] = 1.0
        order = np.lexsort((candidates, -scores, ~is_same))
        return candidates[order], scores[order]

    def nearest(self, vectors: Rows, m: int) -> list[Ints]:
        """At least the `m` best candidates for each of `vectors`, in no order: positions of images
        that count."""
        found = [np.empty(0, np.int64) for _ in vectors]
        if self.index is not None and m > 0:
            _, proposed = self.index.search(vectors, m, exclude=self._gone)
            found = [row[row >= 0] for row in proposed]
        rest = self.exact(vectors, m, self._covered)
        return [np.concatenate(both) for both in zip(found, rest, strict=True)]

    def exact(self, vectors: Rows, m: int, first: int = 0) -> list[Ints]:
        """The `m` best positions from `first` on for each of `vectors`, by comparing with all of
        them; in no order."""
        best = np.empty((len(vectors), 0), np.float32)
        where = np.empty((len(vectors), 0), np.int64)
        step = max(LEAST_ROWS, BLOCK // max(1, len(vectors)))
        for table, start in zip(self.now.tables, self.now.starts.tolist(), strict=True):
            if start < first:
                continue
            for row in range(0, len(table), step):
                scores = vectors @ table[row : row + step].T
                at = np.arange(start + row, start + row + scores.shape[1])
                alive = ~self.now.dead[at]
                if not alive.all():
                    scores, at = scores[:, alive], at[alive]
                best = np.concatenate([best, scores], axis=1)
                where = np.concatenate([where, np.broadcast_to(at, scores.shape)], axis=1)
                if best.shape[1] > m:
                    top = np.argpartition(-best, m - 1, axis=1)[:, :m]
                    best, where = (
                        np.take_along_axis(best, top, 1),
                        np.take_along_axis(where, top, 1),
                    )
        return list(where)

    def exact_scores(self, vector: Rows, positions: Ints) -> NDArray[np.float64]:
        """Cosines in double precision: the same bits whatever else is asked at the same time."""
        rows = self.now.vectors(positions).astype(np.float64)
        return np.clip(np.einsum("ij,j->i", rows, vector.astype(np.float64)), -1.0, 1.0)

    def _collapsed(self, candidates: Ints, threshold: float) -> list[list[int]]:
        """Groups of near-duplicates, each under its best: indices into `candidates`, which come
        best first."""
        rows = self.now.vectors(candidates)
        groups: list[list[int]] = []
        for j in range(len(candidates)):
            near = rows[[group[0] for group in groups]] @ rows[j] if groups else np.empty(0)
            if len(near) and near.max() >= threshold:
                groups[int(near.argmax())].append(j)
            else:
                groups.append([j])
        return groups

    def _hits(self, ranked: Ranked, same: Mapping[int, tuple[str, ...]]) -> tuple[Hit, ...]:
        positions, scores, under = ranked
        every = np.concatenate(
            [positions, np.array([p for group in under for p in group], dtype=np.int64)]
        )
        ids = dict(zip(every.tolist(), self.now.ids(every), strict=True))
        files, root = self.now.files(list(ids.values())), self.root
        made = []
        for position, score, group in zip(positions.tolist(), scores.tolist(), under, strict=True):
            known = files[ids[position]]
            paths = same.get(position) or tuple(sorted(known))
            similar = {min(files[ids[p]]): files[ids[p]] for p in group}
            looked = {path: known[path] for path in paths} | {
                path: stats[path] for path, stats in similar.items()
            }
            missing, changed = map(tuple, hits.gone(root, looked))
            made.append(
                Hit(
                    ids[position],
                    paths[0],
                    float(score),
                    paths[1:],
                    tuple(similar),
                    position in same,
                    missing,
                    changed,
                )
            )
        return tuple(sorted(made, key=lambda hit: (not hit.same, -hit.score, hit.path)))

    # ---------------------------------------------------------------------------------------- about

    def warnings(self) -> tuple[str, ...]:
        """What a person should know before trusting an answer: that there is no image, a run that
        was trained again."""
        empty = () if len(self) else (f"{NO_IMAGES}: {FILL}",)
        run = self.manifest.get("run")
        path = Path(run["path"]) if run else Path()
        if run and (path / "run.json").is_file() and run_digest(path) != run["digest"]:
            stale = (
                f"stale: the run {shown(path)} was trained again after this "
                f"index was built; build it again with --force"
            )
            return (*empty, stale)
        return empty

    def info(self) -> dict[str, Any]:
        """What the gallery holds and how it was made, as JSON."""
        now, search = self.now, self.now.meta.get("search")
        counts = {
            name: now.db.execute(f"select count(*) from {name}").fetchone()[0]
            for name in ("path", "fault")
        }
        (size,) = now.db.execute("select coalesce(sum(bytes), 0) from file").fetchone()
        about = self.manifest
        return {
            "images": len(now),
            "paths": counts["path"],
            "unreadable": counts["fault"],
            "root": shown(self.root),
            "folders": [
                shown(from_database(path))
                for (path,) in now.db.execute("select path from source order by path")
            ],
            "network": f"{about['networks'][0]['name']}: {about['networks'][0]['source']}",
            "frame": frame_words(about),
            "width": about["width"],
            "vector": about["vector"],
            "run": {**about["run"], "path": shown(about["run"]["path"])}
            if about.get("run")
            else None,
            "search": search["words"] if search else "exact",
            "search rows": search["rows"] if search else None,
            "segments": len(now.segments),
            "removed rows": int(np.count_nonzero(now.dead)),
            "bytes": size,
            "generation": now.generation,
            "created": about["created"],
            "versions": about["versions"],
            "warnings": list(self.warnings()),
        }


def info_text(about: dict[str, Any]) -> str:
    """What `Gallery.info` says, for a person: a few lines."""
    vector, run, versions = about["vector"], about["run"], about["versions"]
    files = f"{about['paths']:,} files" + (
        f", {about['unreadable']:,} unreadable ones left out" * bool(about["unreadable"])
    )
    places = "" if about["folders"] in ([], ["."]) else f": {', '.join(about['folders'])}"
    views = "".join(
        f", {name} {', '.join(map(str, vector[name]))}"
        for name in ("scales", "views")
        if len(vector[name]) > 1
    )
    waste = f" and {about['removed rows']:,} removed rows" * bool(about["removed rows"])
    later = f"; last changed in generation {about['generation']}" * (about["generation"] > 1)
    lines = {
        "images": f"{about['images']:,} in {files}",
        "folder": f"{about['root']}{places}",
        "vectors": f"{about['width']} numbers from "
        f"{' + '.join(vector['taps'])}{views}{', whitened' * bool(vector['whitening'])}",
        "network": f"{about['network']}, by {vector['engine']} in {vector['precision']}",
        "run": run["path"] if run else "",
        "search": about["search"]
        + (
            f" ({about['search rows']:,} rows)"
            if about["search rows"]
            else ": every vector is compared"
        ),
        "size": f"{about['bytes'] / 1e6:,.1f} MB in {about['segments']} "
        f"segment{'s' * (about['segments'] != 1)}{waste}",
        "made": f"{about['created']} by Regraft {versions.get('regraft', '?')}{later}",
    }
    return "\n".join(f"  {key:<9}{value}" for key, value in lines.items() if value)


def _read(folder: Path) -> tuple[Snapshot, Index | None]:
    """A gallery as it is now, with its search index. A writer that sweeps the index away meanwhile
    is no damage."""
    while True:
        now = segments.read(folder)
        search = now.meta.get("search")
        if not search:
            return now, None
        from retrieval.index import nearest

        try:
            return now, nearest.load(folder / search["file"])
        except UserError:
            now.close()
            with contextlib.closing(segments.read(folder)) as later:
                if later.generation == now.generation:
                    raise


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


def _file(source: ImageSet, i: int) -> Path:
    return source.root / source.paths[i]
