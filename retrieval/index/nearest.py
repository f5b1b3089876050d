"""Nearest vectors by cosine: an index, searched, saved and opened, and exact search beside it.

It knows arrays only: a *position* is a row of the table that the index was built on; which image
that is, and which rows are removed, the gallery knows. Every table is one that `vectors.prepare`
made.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from finetune.errors import UserError
from retrieval.index import backend, file
from retrieval.index.spec import Spec
from retrieval.index.tuning import doubled, widened
from retrieval.vectors import (
    Ints,
    Mask,
    Rows,
    blocks,
    ordered,
    repeated,
    row_mask,
    swaps,
    unit_queries,
)


@dataclass(frozen=True)
class Exclusion:
    """Rows that a search must not show, made ready for one index by `Index.exclusion`: to be kept
    for many queries."""

    slots: Mask
    live: int
    selector: Any


class Index:
    """A searchable index. Threads may share it: no search changes it."""

    def __init__(self, made: Any, spec: Spec, held: Ints) -> None:
        """`made` is faiss's index; its slots are the rows of the table but for `held`, which
        changed places with the last."""
        self._faiss, self.spec, self._held = made, spec, held
        self._layers = backend.layers_of(made)
        self._limits = {name: top for name, (_, top) in backend.knobs(made).items()}
        self._moved, self._to = swaps(spec.n, held)

    def __len__(self) -> int:
        return self.spec.n

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of the index as it is stored: codes, ids, centroids, links."""
        sizes: list[int] = []
        backend.write(self._faiss, lambda piece: sizes.append(len(piece)))
        return sum(sizes)

    def search(
        self, Q: ArrayLike, k: int, *, exclude: ArrayLike | Exclusion | None = None
    ) -> tuple[Rows, Ints]:
        """The k nearest rows of every query in `Q` `(q, d)`: (scores, positions), both `(q, min(k,
        rows left))`, best first.

        Queries are copied to unit length (`BadRows` for NaN and zeros). `exclude` are rows never to
        show: bool `(n,)`, positions, or an `Exclusion`; the search widens until k others are found.
        Scores are cosines in [−1, 1], as near as the codes of the index hold them; equal ones go by
        position. Only where a graph does not lead to enough rows at all does a line end early: its
        last places are score NaN, position −1.
        """
        queries = unit_queries(Q, k, self.spec.d)
        gone = exclude if isinstance(exclude, Exclusion) else self.exclusion(exclude)
        width = min(k, self.spec.n if gone is None else gone.live)
        if not width or not len(queries):
            return np.empty((len(queries), width), np.float32), np.empty(
                (len(queries), width), np.int64
            )
        backend.set_threads(self.spec.d, len(queries))
        scores, slots = self._fetch(queries, width, gone)
        return ordered(scores, self._rows(slots))

    def exclusion(self, exclude: ArrayLike | None) -> Exclusion | None:
        """Rows to leave out, given as bool `(n,)` or as positions, made ready for many searches;
        None where none are."""
        mask = row_mask(exclude, self.spec.n)
        if mask is None:
            return None
        mask = mask.copy()
        mask[self._moved] = mask[self._to]
        return Exclusion(mask, int(np.count_nonzero(~mask)), backend.selector_of(~mask))

    def save(self, path: Path) -> None:
        """Write the index to one file, whole or not at all."""
        description = {
            "spec": self.spec.to_json(),
            "held": self._held.tolist(),
            "faiss": backend.VERSION,
        }
        file.write(path, description, functools.partial(backend.write, self._faiss))

    @functools.cached_property
    def _selects(self) -> bool:
        """Whether this kind can leave rows out while it searches: seen by forbidding it its best
        answer."""
        probe = np.full((1, self.spec.d), self.spec.d**-0.5, np.float32)
        slot = int(
            backend.search(self._layers, probe, 1, self.spec.search_parameters, None)[1][0, 0]
        )
        allowed = np.ones(self.spec.n, np.bool_)
        allowed[slot] = False
        selector = backend.selector_of(allowed)
        try:
            return (
                slot
                not in backend.search(
                    self._layers, probe, 1, self.spec.search_parameters, selector
                )[1]
            )
        except RuntimeError:  # faiss's word for "not supported by this kind"
            return False

    def _fetch(self, queries: Rows, k: int, gone: Exclusion | None) -> tuple[Rows, Ints]:
        """(scores, slots) of the k best; lines that are short are searched again, harder,
        to the limit."""
        if gone is None:
            D, found = backend.search(self._layers, queries, k, self.spec.search_parameters, None)
            if found.min() >= 0:
                return D, found
        fetch, n = k, self.spec.n
        parameters = (
            self.spec.search_parameters
            if gone is None
            else widened(self.spec.search_parameters, self._limits, n / gone.live)
        )
        selector = gone.selector if gone is not None and self._selects else None
        beyond = gone is not None and selector is None
        if gone is not None and beyond:
            fetch = min(n, k + int(1.1 * k * (n - gone.live) / gone.live) + 8)
        scores, slots = (
            np.full((len(queries), k), np.nan, np.float32),
            np.full((len(queries), k), -1, np.int64),
        )
        short = np.arange(len(queries))
        while True:
            D, found = backend.search(self._layers, queries[short], fetch, parameters, selector)
            if gone is not None:
                found[(found >= 0) & gone.slots[found] | repeated(found)] = -1
                first = np.argsort(found < 0, axis=1, kind="stable")[:, :k]
                D, found = np.take_along_axis(D, first, 1), np.take_along_axis(found, first, 1)
            scores[short], slots[short] = np.where(found < 0, np.nan, D), found
            short = short[(found < 0).any(axis=1)]
            if not len(short) or (parameters == self._limits and not (beyond and fetch < n)):
                return scores, slots
            parameters, fetch = (
                doubled(parameters, self._limits),
                min(2 * fetch, n) if beyond else fetch,
            )

    def _rows(self, slots: Ints) -> Ints:
        """Positions of slots: the same but for the rows that changed places."""
        if not len(self._moved):
            return slots
        at = np.minimum(np.searchsorted(self._moved, slots), len(self._moved) - 1)
        return np.where(self._moved[at] == slots, self._to[at], slots)


def exact(X: Rows, Q: ArrayLike, k: int, *, exclude: ArrayLike | None = None) -> tuple[Rows, Ints]:
    """What `Index.search` gives, by comparing every row of `X` (from `prepare`; may be
    memory-mapped), block by block.

    Up to four queries scan the table one by one, more are one matrix product a block.
    """
    queries = unit_queries(Q, k, X.shape[1])
    mask = row_mask(exclude, len(X))
    width = min(k, len(X) if mask is None else int(np.count_nonzero(~mask)))
    scores, positions = (
        np.empty((len(queries), 0), np.float32),
        np.empty((len(queries), 0), np.int64),
    )
    backend.set_threads(X.shape[1], max(1, len(queries)))
    for part in blocks(len(X)) if width and len(queries) else ():
        rows = (
            np.arange(part.start, part.stop)
            if mask is None
            else part.start + np.flatnonzero(~mask[part])
        )
        if not len(rows):
            continue
        table = np.ascontiguousarray(X[part] if mask is None else X[rows], dtype=np.float32)
        D, found = backend.nearest_rows(queries, table, min(width, len(rows)))
        scores, positions = ordered(
            np.concatenate([scores, D], axis=1), np.concatenate([positions, rows[found]], axis=1)
        )
        scores, positions = scores[:, :width], positions[:, :width]
    return scores, positions


def load(path: Path, *, mmap: bool = True, verify: bool = True) -> Index:
    """Open an index file. `mmap` leaves the codes on the disk until they are read; `verify` first
    checks its digest.

    Raises `UserError` for a missing, damaged or foreign file: nothing is interpreted before it has
    been checked.
    """
    described = file.read(path, verify=verify)
    try:
        spec = Spec.from_json(described["spec"])
        held = np.array(described["held"], np.int64)
        made = backend.read(path, int(described["payload bytes"]), mmap)
    except (RuntimeError, MemoryError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"damaged: {backend.reason(error)}", where=path, fix=file.AGAIN) from error
    if (made.ntotal, made.d, spec.metric, made.metric_type) != (
        spec.n,
        spec.d,
        "ip",
        backend.METRIC,
    ):
        raise UserError(
            f"damaged: {made.ntotal} × {made.d} vectors where {spec.n} × {spec.d} are described",
            where=path,
        )
    return Index(made, spec, held)
