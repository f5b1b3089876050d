"""Nearest vectors by cosine: the kind of index chosen from the size, its recall measured, its
effort set by that.

The only module that imports faiss. It knows arrays only: a *position* is a row of the table that
the index was built on; which image that is, and which rows are removed, the gallery knows. Every
table is one that `vectors.prepare` made.

| kind | when | what a vector costs |
|---|---|---|
| `Flat` | up to 32 million numbers | 4 d bytes; exact |
| `SQfp16` | up to 128 million numbers | 2 d bytes; all of them are read, at half the width |
| `IVF…,PQm x4fs,Refine(SQfp16)` | beyond | 2 d + m/2 + 8 bytes: 4-bit codes find candidates, half
floats rank them |
| the same with `Refine(SQ8)`, or without | where memory is short | d + m/2 + 8 bytes, or m/2 + 8 |

An approximate index is built without some rows. These are the queries on which its recall is
measured against exact search: no query can find itself, and no graph has links that were made for
it. Half of them set the effort, the other half give the figure that is reported; then they are
added.

Threads: OpenMP takes all cores that this process may use, or `$OMP_NUM_THREADS`. On macOS two
copies of libomp in one process (torch's and faiss's) can crash: where that happens, set
`OMP_NUM_THREADS=1`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import ArrayLike, NDArray

from finetune import files
from finetune.errors import UserError
from finetune.metrics import Estimate, wilson
from retrieval import indexfile
from retrieval.spec import (
    WHERE,
    Effort,
    Spec,
    choose,
    cosines,
    doubled,
    refuse,
    shares_found,
    threads,
    tune,
    widened,
)
from retrieval.vectors import (
    Ints,
    Mask,
    Progress,
    Rows,
    blocks,
    check_prepared,
    ordered,
    repeated,
    row_mask,
    slot_order,
    swaps,
    unit_queries,
)

faiss: Any = _faiss  # its type stubs know a part of it only

SAMPLE = 100_000  # rows that quantisers are trained on, at least
ROWS_PER_LIST = 40  # rows that k-means sees for each list
ROUNDS = 10  # of k-means
HELD_OUT = 2000  # rows kept back to be queries, half of them for the effort and half for the figure
CANDIDATES = 20_000_000  # held at once in one search
# queries: from here on a matrix product beats one scan a query (measured for 64 to 1280 numbers)
BLAS_FROM = 5


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
        self._layers = _layers(made)
        self._limits = {name: top for name, (_, top) in _knobs(made).items()}
        self._moved, self._to = swaps(spec.n, held)

    def __len__(self) -> int:
        return self.spec.n

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of the index as it is stored: codes, ids, centroids, links."""
        sizes: list[int] = []
        _write(self._faiss, lambda piece: sizes.append(len(piece)))
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
        _settle(self.spec.d, len(queries))
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
        bits = np.packbits(~mask, bitorder="little")
        return Exclusion(mask, int(np.count_nonzero(~mask)), faiss.IDSelectorBitmap(bits))

    def save(self, path: Path) -> None:
        """Write the index to one file, whole or not at all."""
        description = {
            "spec": asdict(self.spec),
            "held": self._held.tolist(),
            "faiss": faiss.__version__,
        }
        indexfile.write(path, description, functools.partial(_write, self._faiss))

    @functools.cached_property
    def _selects(self) -> bool:
        """Whether this kind can leave rows out while it searches: seen by forbidding it its best
        answer."""
        probe = np.full((1, self.spec.d), self.spec.d**-0.5, np.float32)
        slot = int(_raw(self._layers, probe, 1, self.spec.effort, None)[1][0, 0])
        allowed = np.ones(self.spec.n, np.bool_)
        allowed[slot] = False
        selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        try:
            return slot not in _raw(self._layers, probe, 1, self.spec.effort, selector)[1]
        except RuntimeError:  # faiss's word for "not supported by this kind"
            return False

    def _fetch(self, queries: Rows, k: int, gone: Exclusion | None) -> tuple[Rows, Ints]:
        """(scores, slots) of the k best; lines that are short are searched again with more effort,
        to the limit."""
        if gone is None:
            D, found = _raw(self._layers, queries, k, self.spec.effort, None)
            if found.min() >= 0:
                return D, found
        fetch, n = k, self.spec.n
        effort = (
            self.spec.effort
            if gone is None
            else widened(self.spec.effort, self._limits, n / gone.live)
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
            D, found = _raw(self._layers, queries[short], fetch, effort, selector)
            if gone is not None:
                found[(found >= 0) & gone.slots[found] | repeated(found)] = -1
                first = np.argsort(found < 0, axis=1, kind="stable")[:, :k]
                D, found = np.take_along_axis(D, first, 1), np.take_along_axis(found, first, 1)
            scores[short], slots[short] = np.where(found < 0, np.nan, D), found
            short = short[(found < 0).any(axis=1)]
            if not len(short) or (effort == self._limits and not (beyond and fetch < n)):
                return scores, slots
            effort, fetch = doubled(effort, self._limits), min(2 * fetch, n) if beyond else fetch

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
    _settle(X.shape[1], max(1, len(queries)))
    for part in blocks(len(X)) if width and len(queries) else ():
        rows = (
            np.arange(part.start, part.stop)
            if mask is None
            else part.start + np.flatnonzero(~mask[part])
        )
        if not len(rows):
            continue
        table = np.ascontiguousarray(X[part] if mask is None else X[rows], dtype=np.float32)
        D, found = faiss.knn(
            queries, table, min(width, len(rows)), metric=faiss.METRIC_INNER_PRODUCT
        )
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
    described = indexfile.read(path, verify=verify)
    try:
        spec = Spec(**described["spec"])
        held = np.array(described["held"], np.int64)
        made = _read(path, int(described["payload bytes"]), mmap)
    except (RuntimeError, MemoryError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"damaged: {_reason(error)}", where=path, fix=indexfile.AGAIN) from error
    if (made.ntotal, made.d, spec.metric, made.metric_type) != (
        spec.n,
        spec.d,
        "ip",
        faiss.METRIC_INNER_PRODUCT,
    ):
        raise UserError(
            f"damaged: {made.ntotal} × {made.d} vectors where {spec.n} × {spec.d} are described",
            where=path,
        )
    return Index(made, spec, held)


# --- building -----------------------------------------------------------------------------------


def build(
    X: Rows,
    *,
    factory: str = "auto",
    recall: float = 0.99,
    k: int = 10,
    memory_mb: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Index:
    """Build an index on `X` `(n, d)` (from `prepare`; may be memory-mapped).

    `factory` is a faiss factory string, or `auto`: see `choose`, which `memory_mb` is for. An
    approximate index raises its effort until recall@k on held-out queries is at least `recall`, or
    `Spec.note` says that it cannot. `progress` is called with the share done and what is being
    done. Raises `UserError` for a factory string that faiss does not know, or that these vectors
    are too few for.
    """
    if not 0 < recall <= 1:
        raise UserError(
            f"recall {recall}", where="recall", fix="give a number above 0, at most 1, such as 0.99"
        )
    if k < 1:
        raise UserError(f"k = {k}", where="k", fix="ask for at least 1 neighbour")
    check_prepared(X)
    n, d = X.shape
    tell = progress or (lambda done, what: None)
    name = choose(n, d, memory_mb) if factory == "auto" else factory
    _settle(d, n)
    made = _empty(name, n, d, seed)
    if isinstance(faiss.downcast_index(made), faiss.IndexFlat):
        _add(made, X, np.arange(n), name, lambda part: tell(part, "adding"))
        return Index(made, Spec(name, n, d, k, recall, 1.0, 1.0), np.empty(0, np.int64))
    random = np.random.default_rng(seed)
    held = np.sort(random.choice(n, min(HELD_OUT, n // 10), replace=False)).astype(np.int64)
    order = slot_order(n, held)
    known = order[: n - len(held)]
    tell(0.0, "training")
    _train(made, X, known, name, random)
    _add(made, X, known, name, lambda part: tell(0.4 + 0.4 * part, "adding"))
    tell(0.8, "measuring recall")
    spec = Spec(name, n, d, k, recall, note="too few vectors to measure recall")
    if len(held) > 1:
        spec = _measured(made, X, order, held, spec)
    if _grows(made):
        _add(made, X, order[n - len(held) :], name)
    else:
        made, held = _empty(name, n, d, seed), held[:0]
        _train(made, X, np.arange(n), name, random)
        _add(made, X, np.arange(n), name)
    tell(1.0, "done")
    return Index(made, spec, held)


def measure(index: Index, X: Rows, *, k: int = 10, queries: int = 1000, seed: int = 0) -> Estimate:
    """Recall@k of an index as it is, on rows of its own table `X`, the row itself left out of both
    sides; ties count.

    For inverted lists and codes this is what a new query meets. A graph has links that were made
    for these very rows: there `Spec.recall`, measured on rows that were held out, is the honest
    figure. The interval is Wilson's.
    """
    if len(X) != len(index):
        raise UserError(
            f"a table of {len(X)} rows for an index of {len(index)}",
            fix="give the table that the index was built on",
        )
    rows = np.sort(np.random.default_rng(seed).choice(len(X), min(queries, len(X)), replace=False))
    k = min(k, len(X) - 1)
    if k < 1:
        raise UserError("recall needs at least two vectors", where="recall")

    def others(found: Ints) -> Ints:
        own = found == rows[:, None]
        return np.take_along_axis(found, np.argsort(own, axis=1, kind="stable"), 1)[:, :k]

    Q = np.ascontiguousarray(X[rows])
    true = others(exact(X, Q, k + 1)[1])
    value = float(
        shares_found(X, Q, others(index.search(Q, k + 1)[1]), cosines(X, Q, true)[:, -1]).mean()
    )
    return Estimate(value, *wilson(value, len(rows)), len(rows), "wilson")


def _measured(made: Any, X: Rows, order: Ints, held: Ints, spec: Spec) -> Spec:
    """Raise the effort on one half of the held-out queries until the asked recall holds; report it
    on the other half."""
    layers, start = _layers(made), {name: low for name, (low, _) in _knobs(made).items()}
    limits = {name: top for name, (_, top) in _knobs(made).items()}
    held = np.random.default_rng(len(held)).permutation(held)
    Q, k = np.ascontiguousarray(X[held]), min(spec.k, spec.n - len(held))
    last = exact(X, Q, k, exclude=held)[0][:, -1]
    halves = np.array_split(np.arange(len(held)), 2)

    def shares(half: Ints, effort: Effort) -> NDArray[np.float64]:
        slots = _raw(layers, Q[half], k, effort, None)[1]
        return shares_found(X, Q[half], np.where(slots < 0, -1, order[slots]), last[half])

    first, second = (functools.partial(shares, half) for half in halves)
    effort, seen = tune(first, second, start, limits, spec.asked)
    value, queries = float(seen.mean()), len(seen)
    note = (
        "" if value >= spec.asked else f"it cannot hold the recall of {spec.asked:g} that was asked"
    )
    return replace(
        spec,
        k=k,
        recall=value,
        recall_low=wilson(value, queries)[0],
        queries=queries,
        effort=effort,
        note=note,
    )


def _empty(name: str, n: int, d: int, seed: int) -> Any:
    """An empty index made by faiss from a factory string; what cannot work on n vectors is refused
    before faiss tries."""
    refuse(name, n)
    try:
        made = faiss.index_factory(d, name, faiss.METRIC_INNER_PRODUCT)
    except (RuntimeError, MemoryError, ValueError, TypeError) as error:
        fix = (
            "write auto, or a factory string such as Flat, SQfp16, HNSW32 or "
            "IVF1024,PQ64x4fs,Refine(SQfp16)"
        )
        raise UserError(
            f"faiss cannot make {name!r} for {d} numbers ({_reason(error)})", where=WHERE, fix=fix
        ) from error
    if made.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise UserError(
            f"{name!r} does not rank by inner product", where=WHERE, fix="choose another kind"
        )
    for layer in _layers(made):
        if isinstance(layer, faiss.IndexIVF):
            layer.cp.niter, layer.cp.seed, layer.cp.min_points_per_centroid = ROUNDS, seed, 1
        if isinstance(getattr(layer, "pq", None), faiss.ProductQuantizer):
            layer.pq.cp.min_points_per_centroid = 1
        if isinstance(layer, faiss.IndexPQ):
            layer.do_polysemous_training = False  # minutes of work for a filter that is not used
    return made


def _train(made: Any, X: Rows, rows: Ints, name: str, random: np.random.Generator) -> None:
    lists = max(
        [layer.nlist for layer in _layers(made) if isinstance(layer, faiss.IndexIVF)], default=0
    )
    if lists > len(rows):
        raise UserError(
            f"{name!r}: {lists} lists from {len(rows)} vectors",
            where=WHERE,
            fix=f"use at most {len(rows)} lists",
        )
    size = min(len(rows), max(SAMPLE, ROWS_PER_LIST * lists))
    sample = np.sort(random.choice(rows, size, replace=False))
    with _refusals(name, X):
        made.train(np.ascontiguousarray(X[sample]))


def _add(
    made: Any, X: Rows, rows: Ints, name: str, tell: Callable[[float], None] = lambda part: None
) -> None:
    with _refusals(name, X):
        for part in blocks(len(rows)) if _grows(made) else blocks(len(rows), len(rows)):
            made.add(np.ascontiguousarray(X[rows[part]]))
            tell(part.stop / len(rows))


@contextlib.contextmanager
def _refusals(name: str, X: Rows) -> Iterator[None]:
    """faiss's own refusals while it trains and adds, in the user's terms."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        what = (
            f"faiss cannot build {name!r} on {len(X)} vectors of "
            f"{X.shape[1]} numbers ({_reason(error)})"
        )
        raise UserError(what, where=WHERE, fix="choose another kind, or auto") from error


# --- faiss --------------------------------------------------------------------------------------


def _layers(made: Any) -> list[Any]:
    """An index and what it wraps, from outside to inside."""
    layers = [faiss.downcast_index(made)]
    while True:
        outer = layers[-1]
        if isinstance(outer, faiss.IndexPreTransform):
            layers.append(faiss.downcast_index(outer.index))
        elif isinstance(outer, faiss.IndexRefine):
            layers.append(faiss.downcast_index(outer.base_index))
        else:
            return layers


def _knobs(made: Any) -> dict[str, tuple[int, int]]:
    """What makes a search of this index more thorough: (lowest value worth trying, highest)."""
    found: dict[str, tuple[int, int]] = {}
    for layer in _layers(made):
        if isinstance(layer, faiss.IndexIVF):
            found["nprobe"] = max(1, layer.nlist // 512), layer.nlist
        elif isinstance(layer, faiss.IndexHNSW):
            found["ef"] = 16, max(16, layer.ntotal)
        elif isinstance(layer, faiss.IndexRefine):
            found["k_factor"] = 2, 1024
    return found


def _grows(made: Any) -> bool:
    """Whether vectors can be added to it more than once."""
    return not isinstance(_layers(made)[-1], (faiss.IndexNSG, faiss.IndexNNDescent))


def _parameters(layers: Sequence[Any], effort: Effort, selector: Any) -> Any:
    """Search parameters for one search, layer by layer from inside: faiss's own fields stay
    untouched, for other threads."""
    inner: Any = None
    chosen = {} if selector is None else {"sel": selector}
    for layer in reversed(layers):
        if isinstance(layer, faiss.IndexIVF):
            inner = faiss.SearchParametersIVF(nprobe=effort.get("nprobe", 1), **chosen)
        elif isinstance(layer, faiss.IndexHNSW):
            inner = faiss.SearchParametersHNSW(efSearch=effort.get("ef", 16), **chosen)
        elif isinstance(layer, faiss.IndexRefine):
            inside = {} if inner is None else {"base_index_params": inner}
            inner = faiss.IndexRefineSearchParameters(
                k_factor=float(effort.get("k_factor", 1)), **inside
            )
        elif isinstance(layer, faiss.IndexPreTransform):
            inner = (
                None if inner is None else faiss.SearchParametersPreTransform(index_params=inner)
            )
        elif chosen:
            inner = faiss.SearchParameters(**chosen)
    return inner


def _raw(
    layers: Sequence[Any], Q: Rows, k: int, effort: Effort, selector: Any
) -> tuple[Rows, Ints]:
    """faiss's own answer, (scores, slots), −1 for what it did not find; what needs many candidates
    goes in small batches."""
    if "k_factor" in effort:
        effort = {**effort, "k_factor": max(1, min(effort["k_factor"], -(-layers[0].ntotal // k)))}
    parameters = _parameters(layers, effort, selector)
    step = max(1, CANDIDATES // (k * effort.get("k_factor", 1)))
    parts = [layers[0].search(Q[part], k, params=parameters) for part in blocks(len(Q), step)]
    return np.concatenate([D for D, _ in parts]), np.concatenate([found for _, found in parts])


def _settle(d: int, work: int) -> None:
    """Threads for the calling thread, no more than `work` pieces, and from how many queries on a
    scan is a matrix product.

    faiss keeps both in globals of the thread or process, so every search sets them. One query has
    one piece: a second thread would have nothing to do, and where other work keeps a core busy,
    waiting for it costs more than the search.
    """
    if limit := threads():
        faiss.omp_set_num_threads(min(limit, work))
    faiss.cvar.distance_compute_blas_threshold = BLAS_FROM * d


def _write(made: Any, take: Callable[[bytes], None]) -> None:
    """Hand faiss's serialised form over, piece by piece."""
    faiss.write_index(made, faiss.PyCallbackIOWriter(lambda piece: take(bytes(piece)), 1 << 20))


def _read(path: Path, size: int, mmap: bool) -> Any:
    """Let faiss read the first `size` bytes of a file, none of whose parts may claim to be longer
    than that."""
    with _READING:
        before = (
            faiss.get_deserialization_vector_byte_limit(),
            faiss.get_deserialization_loop_limit(),
        )
        try:
            faiss.set_deserialization_vector_byte_limit(size)
            faiss.set_deserialization_loop_limit(size)
            with files.in_text(path) as plain:
                return faiss.read_index(
                    str(plain), faiss.IO_FLAG_MMAP_IFC if mmap and os.name == "posix" else 0
                )
        finally:
            faiss.set_deserialization_vector_byte_limit(before[0])
            faiss.set_deserialization_loop_limit(before[1])


_READING = threading.Lock()


def _reason(error: BaseException) -> str:
    """faiss's message without the place in its source."""
    words = re.sub(r"^Error in .*? at \S+:\d+: ", "", str(error), count=1, flags=re.DOTALL)
    return words.rsplit("Error: ", 1)[-1].strip().replace("\n", " ")[:200] or type(error).__name__
