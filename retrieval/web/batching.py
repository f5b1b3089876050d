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
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from finetune.data.images import Fault, ImageSet
from finetune.errors import UserError
from retrieval.gallery import Gallery
from retrieval.hits import Hit
from retrieval.queries import PlannedQuery, QueryImages
from retrieval.search import SearchOptions

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
class SearchResult:
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


class QueryBatcher:
    """Takes queries from any thread until `close`, which answers those that wait."""

    def __init__(self, gallery: Gallery) -> None:
        self.gallery = gallery
        self._waiting: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="search", daemon=True)
        self._thread.start()

    def __enter__(self) -> QueryBatcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, query: Query) -> Future[SearchResult]:
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


def answer(queries: list[Query], gallery: Gallery) -> list[SearchResult | Exception]:
    """Answer queries with one run of the network, and one search for each way of searching among
    them.

    What is wrong with a query is its own answer: `NoImage` or `BadPictures`.
    """
    pictures = _Pictures.of(queries)
    found = gallery.look_up(pictures.images(), pictures.digests)
    answers: dict[int, SearchResult | Exception] = {}
    planned: dict[int, PlannedQuery] = {}
    for i, query in enumerate(queries):
        try:
            if query.image is not None:
                planned[i] = _stored(query.image, gallery, query.keep_self)
            else:
                planned[i] = _averaged(query, gallery, found, pictures.numbers[i])
        except (NoImage, BadPictures) as error:
            answers[i] = error
    for options, group in _alike(queries, list(planned)).items():
        results = gallery.answer([planned[i] for i in group], options)
        for i, hits in zip(group, results, strict=True):
            known = _ids(gallery, queries[i], found, pictures.numbers[i])
            answers[i] = SearchResult(hits, known, len(gallery), len(queries))
    return [answers[i] for i in range(len(queries))]


@dataclass(frozen=True)
class _Pictures:
    """The pictures of several queries, each content once: `data` and `digests` of the contents, and
    for each query the numbers of its contents."""

    data: tuple[bytes, ...]
    digests: tuple[str, ...]
    numbers: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, queries: Sequence[Query]) -> _Pictures:
        contents: dict[str, bytes] = {}
        digests = []
        for query in queries:
            own = [hashlib.sha256(data).hexdigest() for _, data in query.pictures]
            contents |= zip(own, (data for _, data in query.pictures), strict=True)
            digests.append(own)
        number = {digest: i for i, digest in enumerate(contents)}
        numbers = tuple(tuple(number[digest] for digest in own) for own in digests)
        return cls(tuple(contents.values()), tuple(contents), numbers)

    def images(self) -> ImageSet:
        paths = tuple(str(i) for i in range(len(self.data)))
        labels = np.full(len(paths), -1, np.int64)
        return ImageSet(
            "the query", Path(), paths, labels, (), source=lambda path: self.data[int(path)]
        )


def _stored(number: int, gallery: Gallery, keep_self: bool) -> PlannedQuery:
    """The query for images like one of the gallery's."""
    position = gallery.position(number)
    if position is None:
        raise NoImage(f"the gallery has no image {number}")
    at = np.array([position], dtype=np.int64)
    file = None if keep_self else gallery.root / gallery.paths(number)[0]
    return gallery.plan(QueryImages(gallery.now.vectors(at), at, {}), [0], [file], average=False)


def _averaged(
    query: Query, gallery: Gallery, found: QueryImages, numbers: Sequence[int]
) -> PlannedQuery:
    """The query for images like the mean of pictures that are sent."""
    bad = {
        name: found.faults[number]
        for (name, _), number in zip(query.pictures, numbers, strict=True)
        if number in found.faults
    }
    if bad:
        faults = [Fault(name, fault.kind, fault.detail) for name, fault in bad.items()]
        raise BadPictures(tuple(faults))
    # contents that the gallery has come first: the last bits of a mean depend on the order
    group = sorted(numbers, key=lambda number: found.positions[number] < 0)
    planned = gallery.plan(found, group, average=len(group) > 1)
    if not planned.vector.any():
        what = "the pictures cancel each other out"
        raise BadPictures((Fault(query.pictures[0][0], "no features", what),))
    return planned


def _alike(queries: Sequence[Query], numbers: Sequence[int]) -> dict[SearchOptions, list[int]]:
    """The numbers of queries that are searched for in the same way, way by way."""
    groups: dict[SearchOptions, list[int]] = {}
    for i in numbers:
        query = queries[i]
        options = SearchOptions(query.k, query.threshold, expand=query.expand)
        groups.setdefault(options, []).append(i)
    return groups


def _ids(
    gallery: Gallery, query: Query, found: QueryImages, numbers: Sequence[int]
) -> tuple[int | None, ...]:
    """The ids of a query's pictures in the gallery."""
    if query.image is not None:
        return (query.image,)
    positions = found.positions[list(numbers)]
    inside = positions[positions >= 0]
    ids = dict(zip(inside.tolist(), gallery.now.ids(inside), strict=True))
    return tuple(ids.get(position) for position in positions.tolist())
