"""A gallery as its users see it: from images to ranked images, as of the moment when it was opened
or last refreshed.

Ids name contents: a file that is renamed keeps its id, and the same bytes at two paths are one
image with two paths.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data import images as image_sets
from finetune.data import loose
from finetune.data.images import Fault, ImageSet, check_on_bad
from finetune.data.loose import Picture
from finetune.errors import UserError
from finetune.features import extraction
from finetune.features.engine import Runner
from finetune.lock import Wait
from finetune.progress import Bar, Progress, Say, no_bar, quiet
from retrieval import encode, info, queries, search
from retrieval.encoder import Encoder, from_manifest
from retrieval.hits import Answer, Hit
from retrieval.queries import NOTHING, Own, PlannedQuery, QueryImages
from retrieval.search import SearchOptions
from retrieval.storage import database
from retrieval.storage.diff import listed
from retrieval.storage.segments import Snapshot, find_root
from retrieval.vectors import Ints, Rows, unit

if TYPE_CHECKING:
    from retrieval.index.nearest import Index
    from retrieval.storage.commit import ChangeSummary


class Gallery:
    """An open gallery. It shows one moment; `refresh` goes on to the present. Threads may share
    it."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Open the gallery in `folder`. Raises `UserError` where there is none, and for damaged
        files."""
        self.folder = Path(folder)
        self._lock = threading.RLock()
        # its own: what takes seconds must not keep others from the gallery
        self._opening = threading.Lock()
        self._network: tuple[dict[str, Any], Encoder, tuple[Runner, ...]] | None = None
        self.corpus = search.read(self.folder)

    def __enter__(self) -> Gallery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.now)

    def close(self) -> None:
        self.now.close()

    def refresh(self) -> bool:
        """Update to the current state; returns whether anything changed."""
        with self._lock:
            before = self.now
            with (
                contextlib.closing(database.open_database(self.folder)) as db,
                database.database_errors(self.folder),
            ):
                # the usual case: no file is looked at
                if database.read_meta(db, self.folder) == before.meta:
                    return False
            self.corpus = search.read(self.folder)
            before.close()
            return True

    @property
    def now(self) -> Snapshot:
        """The gallery as of the moment that it shows."""
        return self.corpus.snapshot

    @property
    def index(self) -> Index | None:
        """The search index over the first rows, where the gallery has one."""
        return self.corpus.index

    @property
    def manifest(self) -> dict[str, Any]:
        return dict(self.now.meta["manifest"])

    @property
    def root(self) -> Path:
        """The folder to which paths are relative: where it lies seen from the gallery, else where
        it was."""
        return find_root(self.now.meta, self.folder)

    # -------------------------------------------------------------------------------------- changes

    def add(
        self,
        images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        on_bad: str = "stop",
        wait: float = 0.0,
        bar: Bar = no_bar,
        say: Say = quiet,
    ) -> ChangeSummary:
        """Add image files, and all images in folders; only contents that are new go through the
        network.

        `on_bad`, `wait` (seconds), `bar` and `say` are those of `retrieval.build`, here as below.
        Returns the counts of what was done, in paths; this gallery shows it from now on. Raises
        `UserError` for what a user can mend: then nothing has changed.
        """
        from retrieval import maintenance

        given = listed(images)
        return self._changed(
            maintenance.add(self.folder, given, on_bad=on_bad, wait=Wait(wait, say), bar=bar)
        )

    def remove(
        self,
        images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        wait: float = 0.0,
        say: Say = quiet,
    ) -> ChangeSummary:
        """Take images out: paths as answers show them, files, or folders. The files themselves
        stay, and a later `sync` brings back what still lies in the gallery's folders."""
        from retrieval import maintenance

        given = listed(images)
        return self._changed(maintenance.remove(self.folder, given, wait=Wait(wait, say)))

    def sync(
        self,
        *,
        root: str | os.PathLike[str] | None = None,
        allow_empty: bool = False,
        on_bad: str = "stop",
        wait: float = 0.0,
        bar: Bar = no_bar,
        say: Say = quiet,
    ) -> ChangeSummary:
        """Follow the folders: files that came, changed, moved and went.

        `root` is the folder of the images, if it was moved. That no image is left is a `UserError`
        (a disk that is not mounted looks the same), unless `allow_empty`.
        """
        from retrieval import maintenance

        return self._changed(
            maintenance.sync(
                self.folder,
                root=None if root is None else Path(root),
                allow_empty=allow_empty,
                on_bad=on_bad,
                wait=Wait(wait, say),
                bar=bar,
            )
        )

    def _changed(self, summary: ChangeSummary) -> ChangeSummary:
        self.refresh()
        return summary

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
        images: ImageSet | Picture | Iterable[Picture],
        k: int = 10,
        *,
        names: Sequence[str] | None = None,
        together: bool = False,
        keep_self: bool = False,
        threshold: float | None = None,
        collapse: float | None = None,
        expand: int = 0,
        on_bad: str = "stop",
        progress: Progress | None = None,
    ) -> tuple[list[Answer], tuple[Fault, ...]]:
        """The k most similar images of every image, or of their mean with `together`; best first,
        scores are cosines from −1 to 1.

        `images` are a set; or one picture or several: paths of files, folders (all images below
        them), the bytes of image files, PIL images, and uint8 arrays H × W, H × W × 3 (RGB) or
        H × W × 4 (RGBA). A query that is in the gallery is known by its digest: its stored vector
        is used. Its own path is left out of its answer unless `keep_self`; other paths of the same
        bytes come first. `names` are shown instead of the paths; `threshold`, `collapse` and
        `expand` are those of `SearchOptions`.

        Returns an answer for each query, in order, and the faults of images that cannot be read.
        Raises `UserError` naming all of these where `on_bad` is stop; `skip` leaves them out.
        """
        check_on_bad(on_bad)
        if not isinstance(images, ImageSet):
            images = loose.load(images, on_bad=on_bad)
        labels = list(names or images.paths)
        found = self.look_up(images, progress=progress)
        if found.faults and on_bad == "stop":
            extraction.refuse(list(found.faults.values()), images.name)
        files = [None if keep_self else queries.file_of(images, i) for i in range(len(images))]
        good = [i for i in range(len(images)) if i not in found.faults]
        groups = [good] if together and good else [[i] for i in good]
        planned = [self.plan(found, group, files, average=together) for group in groups]
        parts = [tuple(labels[i] for i in group) for group in groups]
        answers = self.answer(planned, SearchOptions(k, threshold, collapse, expand))
        return [
            Answer(" + ".join(some), hits, some) for some, hits in zip(parts, answers, strict=True)
        ], tuple(found.faults.values())

    def look_up(
        self,
        images: ImageSet,
        digests: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> QueryImages:
        """Images as queries: those whose digests the gallery has are looked up, the others go
        through the network, which names those that cannot be read. `digests` are made from the
        images where they are not given."""
        if digests is None:
            digests = image_sets.contents(images)
        with self._lock:
            now = self.now
            known = queries.positions(now, digests)
        where = np.array([known.get(digest, -1) for digest in digests], dtype=np.int64)
        return queries.look_up(now, images, where, lambda fresh: self.encode(fresh, progress))

    def plan(
        self,
        found: QueryImages,
        group: Sequence[int],
        files: Sequence[Path | None] = (),
        *,
        average: bool,
    ) -> PlannedQuery:
        """The query that the images `group` of those that were looked up are together: their mean
        with `average`. The paths `files` of the images are left out of the answer."""
        with self._lock:
            own = [
                queries.own_of(
                    self.now, self.root, int(found.positions[i]), files[i] if files else None
                )
                for i in group
            ]
        return queries.plan(found, group, own, average)

    def answer(
        self, planned: Sequence[PlannedQuery], options: SearchOptions
    ) -> list[tuple[Hit, ...]]:
        """The hits of each query, best first: fewer than k only where the gallery has no more."""
        width = int(self.manifest["width"])
        vectors = np.array([query.vector for query in planned], np.float32).reshape(-1, width)
        return self.search(
            vectors,
            options.k,
            own=[query.own for query in planned],
            threshold=options.threshold,
            collapse=options.collapse,
            expand=options.expand,
        )

    def positions(self, digests: Sequence[str]) -> dict[str, int]:
        """Positions of the contents that are in the gallery."""
        with self._lock:
            return queries.positions(self.now, digests)

    def encode(
        self, images: ImageSet, progress: Progress | None = None
    ) -> tuple[Rows, dict[int, Fault]]:
        """Vectors of images `(n, width)`, made as the gallery's own, and the faults by position
        (their rows are zero)."""
        encoder, runners = self.network()
        return encode.directly(encoder, images, runners, progress)

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
    ) -> list[tuple[Hit, ...]]:
        """The k best images for each of `vectors` `(q, width)`, made as by `encode`.

        `own[i]` says what is left out of answer i, and what has the query's very bytes: that comes
        first. `threshold`, `collapse` and `expand` are those of `SearchOptions`. Fewer than k come
        back only where the gallery has no more. Raises `UserError` for vectors of another width,
        and for those without direction: zero, or not finite.
        """
        vectors = self._checked(vectors)
        own = own if own is not None else [NOTHING] * len(vectors)
        options = SearchOptions(k, threshold, collapse, expand)
        with self._lock:
            if expand > 0:
                vectors = search.expanded(self.corpus, vectors, own, expand)
            found = search.rank(self.corpus, vectors, own, options)
            return [
                search.hits_of(self.now, self.root, ranked, one.same)
                for ranked, one in zip(found, own, strict=True)
            ]

    def ranked(self, vectors: Rows, k: int, own: Sequence[Collection[int]]) -> list[Ints]:
        """Positions of the k best images for each of `vectors`, best first, as `search` finds
        them."""
        left_out = [Own(tuple(positions)) for positions in own]
        with self._lock:
            found = search.rank(self.corpus, self._checked(vectors), left_out, SearchOptions(k))
            return [ranked.positions for ranked in found]

    def _checked(self, vectors: Rows) -> Rows:
        given = np.ascontiguousarray(vectors, dtype=np.float32)
        width = int(self.manifest["width"])
        if given.ndim != 2 or given.shape[1] != width:
            raise UserError(
                f"queries of shape {given.shape}",
                where=self.folder,
                fix=f"the gallery's vectors have {width} numbers",
            )
        bad = ~np.isfinite(given).all(axis=1) | ~given.any(axis=1)
        if bad.any():
            what = (
                f"query {int(np.flatnonzero(bad)[0])} has no direction: it is zero or not a number"
            )
            raise UserError(what, where=self.folder, fix="leave it out")
        return unit(given)

    # ---------------------------------------------------------------------------------------- about

    def warnings(self) -> tuple[str, ...]:
        """What a person should know before trusting an answer: that there is no image, a run that
        was trained again."""
        return info.warnings(self.now)

    def info(self) -> dict[str, Any]:
        """What the gallery holds and how it was made, as JSON."""
        return info.about(self.now, self.root)
