"""Waiting queries answered together: one thread runs all that wait through the network and the
search at once.

Nobody waits for company: a query that comes alone is answered alone; those that come meanwhile are
the next batch. The thread is also the only one that brings the gallery up to date, so that an
answer is of one moment.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from finetune.data.images import Fault, ImageSet
from finetune.errors import UserError
from retrieval.gallery import Gallery, Own, both
from retrieval.hits import Hit
from retrieval.vectors import Rows, unit

T = TypeVar("T")

BATCH = 32  # queries answered at once


@dataclass(frozen=True)
class Query:
    """What somebody looks for: images like `pictures` (name, bytes; their mean, where they are
    several), or like the image of the gallery with the id `image`, whose first path is left out
    unless `keep_self`. The rest is as in `Gallery.search`."""

    pictures: tuple[tuple[str, bytes], ...] = ()
    image: int | None = None
    k: int = 10
    threshold: float | None = None
    expand: int = 0
    keep_self: bool = False


@dataclass(frozen=True)
class Found:
    """An answer: `known` are the ids of the query's pictures (None: not in the gallery), `images`
    counts the gallery's, and `batch` the queries that were answered together."""

    hits: tuple[Hit, ...]
    known: tuple[int | None, ...]
    images: int
    batch: int


class NoImage(Exception):  # noqa: N818
    """The gallery has no image with this id."""


class BadPictures(Exception):  # noqa: N818
    """Pictures of a query that cannot be read; `kind` is the first one's, as in
    `decode.DecodeError`."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        self.kind = faults[0].kind
        super().__init__("; ".join(fault.to_text() for fault in faults))


@dataclass(frozen=True)
class _Job:
    work: Query | Callable[[Gallery], Any]
    future: Future[Any]


class Desk:
    """Takes queries from any thread until `close`, which answers those that wait."""

    def __init__(self, gallery: Gallery) -> None:
        self.gallery = gallery
        self._waiting: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="search", daemon=True)
        self._thread.start()

    def __enter__(self) -> Desk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, query: Query) -> Future[Found]:
        """The answer to a query. Its errors are `NoImage`, `BadPictures` and `UserError`."""
        return self._put(query)

    def call(self, work: Callable[[Gallery], T]) -> Future[T]:
        """What `work` says of the gallery as it is now, between two batches."""
        return self._put(work)

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._waiting.put(None)
        self._thread.join()

    def _put(self, work: Query | Callable[[Gallery], Any]) -> Future[Any]:
        job = _Job(work, Future())
        with self._lock:
            if self._closed:
                raise UserError(
                    "the search is closing", where=self.gallery.folder, fix="start it again"
                )
            self._waiting.put(job)
        return job.future

    def _run(self) -> None:
        more = True
        while more:
            batch = [self._waiting.get()]
            while batch[-1] is not None and len(batch) < BATCH:
                try:
                    batch.append(self._waiting.get_nowait())
                except queue.Empty:
                    break
            more = batch[-1] is not None
            jobs = [
                job
                for job in batch
                if job is not None and job.future.set_running_or_notify_cancel()
            ]
            if jobs:
                self._answer(jobs)

    def _answer(self, jobs: list[_Job]) -> None:
        """Answer all together; where that fails, each alone, so that what one brings cannot spoil
        the others' answers."""
        try:
            self.gallery.refresh()
            queries = iter(
                answer([job.work for job in jobs if isinstance(job.work, Query)], self.gallery)
            )
            results = [
                next(queries) if isinstance(job.work, Query) else job.work(self.gallery)
                for job in jobs
            ]
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._answer([job])
            else:
                jobs[0].future.set_exception(error)
            return
        for job, result in zip(jobs, results, strict=True):
            if isinstance(result, Exception):
                job.future.set_exception(result)
            else:
                job.future.set_result(result)


def warm(gallery: Gallery) -> None:
    """Load the network, so that the first query need not wait for it. What goes wrong here is said
    to the first who asks."""
    with contextlib.suppress(UserError):
        gallery.network()


def answer(queries: list[Query], gallery: Gallery) -> list[Found | Exception]:
    """Answer queries with one run of the network, and one search for each way of searching among
    them.

    What is wrong with a query is its own answer: `NoImage` or `BadPictures`.
    """
    digests = [
        [hashlib.sha256(data).hexdigest() for _, data in query.pictures] for query in queries
    ]
    names = {
        digest: one
        for query, some in zip(queries, digests, strict=True)
        for one, digest in zip(query.pictures, some, strict=True)
    }
    known = gallery.positions(list(names))
    fresh = [digest for digest in names if digest not in known]
    made, faults = _encoded(gallery, [names[digest][1] for digest in fresh])
    at = {digest: i for i, digest in enumerate(fresh)}
    answers: list[Found | Exception | None] = [None] * len(queries)
    vectors: dict[int, Rows] = {}
    own: dict[int, Own] = {}
    for i, (query, some) in enumerate(zip(queries, digests, strict=True)):
        if query.image is not None:
            position = gallery.position(query.image)
            if position is None:
                answers[i] = NoImage(f"the gallery has no image {query.image}")
                continue
            stored = [position]
            first = gallery.paths(query.image)[0]
            own[i] = gallery.own(position, None if query.keep_self else gallery.root / first)
        else:
            bad = {
                name: faults[at[digest]]
                for (name, _), digest in zip(query.pictures, some, strict=True)
                if at.get(digest) in faults
            }
            if bad:
                answers[i] = BadPictures(
                    tuple(Fault(name, fault.kind, fault.detail) for name, fault in bad.items())
                )
                continue
            stored = [known[digest] for digest in some if digest in known]
            own[i] = both([gallery.own(position, None) for position in stored])
        rows = np.concatenate(
            [
                gallery.now.vectors(np.array(stored, dtype=np.int64)),
                made[[at[d] for d in some if d in at]],
            ]
        )
        mean = unit(rows.mean(axis=0, keepdims=True)) if len(rows) > 1 else rows
        if not mean.any():
            answers[i] = BadPictures(
                (Fault(query.pictures[0][0], "no features", "the pictures cancel each other out"),)
            )
            continue
        vectors[i] = mean[0]
    for group in _alike(queries, list(vectors)):
        how = queries[group[0]]
        stacked = np.stack([vectors[i] for i in group])
        found = gallery.search(
            stacked, how.k, own=[own[i] for i in group], threshold=how.threshold, expand=how.expand
        )  # fmt: skip
        for i, hits in zip(group, found, strict=True):
            answers[i] = Found(
                hits, _ids(gallery, queries[i], digests[i], known), len(gallery), len(queries)
            )
    return [one for one in answers if one is not None]


def _encoded(gallery: Gallery, data: list[bytes]) -> tuple[Rows, dict[int, Fault]]:
    if not data:
        return np.zeros((0, int(gallery.manifest["width"])), np.float32), {}
    paths = tuple(str(i) for i in range(len(data)))
    source = ImageSet(
        "the query",
        Path(),
        paths,
        np.full(len(paths), -1, np.int64),
        (),
        source=lambda path: data[int(path)],
    )
    return gallery.encode(source)


def _alike(queries: list[Query], at: list[int]) -> list[list[int]]:
    """Positions of queries that are searched for in the same way, way by way."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i in at:
        query = queries[i]
        groups.setdefault((query.k, query.threshold, query.expand), []).append(i)
    return list(groups.values())


def _ids(
    gallery: Gallery, query: Query, digests: list[str], known: dict[str, int]
) -> tuple[int | None, ...]:
    if query.image is not None:
        return (query.image,)
    inside = [digest for digest in digests if digest in known]
    ids = dict(
        zip(
            inside,
            gallery.now.ids(np.array([known[digest] for digest in inside], dtype=np.int64)),
            strict=True,
        )
    )
    return tuple(ids.get(digest) for digest in digests)
