"""The faiss library behind functions that know arrays only: an index made, trained, filled,
searched, written and read.

Threads: OpenMP takes all cores that this process may use, or `$OMP_NUM_THREADS`. On macOS two
copies of libomp in one process (torch's and faiss's) can crash: where that happens, set
`OMP_NUM_THREADS=1`.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np

from finetune import files, hardware
from finetune.errors import UserError
from retrieval.index.spec import WHERE, SearchParameters, refuse
from retrieval.vectors import Ints, Mask, Rows, blocks

faiss: Any = _faiss  # its type stubs know a part of it only
VERSION, METRIC = str(faiss.__version__), faiss.METRIC_INNER_PRODUCT

SAMPLE = 100_000  # rows that quantisers are trained on, at least
ROWS_PER_LIST = 40  # rows that k-means sees for each list
ROUNDS = 10  # of k-means
CANDIDATES = 20_000_000  # held at once in one search
# queries: from here on a matrix product beats one scan a query (measured for 64 to 1280 numbers)
BLAS_FROM = 5


# --- making -------------------------------------------------------------------------------------


def empty(name: str, n: int, d: int, seed: int) -> Any:
    """An empty index made by faiss from a factory string; what cannot work on n vectors is refused
    before faiss tries."""
    refuse(name, n)
    try:
        made = faiss.index_factory(d, name, METRIC)
    except (RuntimeError, MemoryError, ValueError, TypeError) as error:
        fix = (
            "write auto, or a factory string such as Flat, SQfp16, HNSW32 or "
            "IVF1024,PQ64x4fs,Refine(SQfp16)"
        )
        raise UserError(
            f"faiss cannot make {name!r} for {d} numbers ({reason(error)})", where=WHERE, fix=fix
        ) from error
    if made.metric_type != METRIC:
        raise UserError(
            f"{name!r} does not rank by inner product", where=WHERE, fix="choose another kind"
        )
    for layer in layers_of(made):
        if isinstance(layer, faiss.IndexIVF):
            layer.cp.niter, layer.cp.seed, layer.cp.min_points_per_centroid = ROUNDS, seed, 1
        if isinstance(getattr(layer, "pq", None), faiss.ProductQuantizer):
            layer.pq.cp.min_points_per_centroid = 1
        if isinstance(layer, faiss.IndexPQ):
            layer.do_polysemous_training = False  # minutes of work for a filter that is not used
    return made


def train(made: Any, X: Rows, rows: Ints, name: str, random: np.random.Generator) -> None:
    lists = max(
        [layer.nlist for layer in layers_of(made) if isinstance(layer, faiss.IndexIVF)], default=0
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


def add(
    made: Any, X: Rows, rows: Ints, name: str, tell: Callable[[float], None] = lambda part: None
) -> None:
    with _refusals(name, X):
        for part in blocks(len(rows)) if grows(made) else blocks(len(rows), len(rows)):
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
            f"{X.shape[1]} numbers ({reason(error)})"
        )
        raise UserError(what, where=WHERE, fix="choose another kind, or auto") from error


# --- searching ----------------------------------------------------------------------------------


def layers_of(made: Any) -> list[Any]:
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


def knobs(made: Any) -> dict[str, tuple[int, int]]:
    """What makes a search of this index more thorough: (lowest value worth trying, highest)."""
    found: dict[str, tuple[int, int]] = {}
    for layer in layers_of(made):
        if isinstance(layer, faiss.IndexIVF):
            found["nprobe"] = max(1, layer.nlist // 512), layer.nlist
        elif isinstance(layer, faiss.IndexHNSW):
            found["ef"] = 16, max(16, layer.ntotal)
        elif isinstance(layer, faiss.IndexRefine):
            found["k_factor"] = 2, 1024
    return found


def is_flat(made: Any) -> bool:
    """Whether every vector is compared as it is: an exact index."""
    return isinstance(faiss.downcast_index(made), faiss.IndexFlat)


def grows(made: Any) -> bool:
    """Whether vectors can be added to it more than once."""
    return not isinstance(layers_of(made)[-1], (faiss.IndexNSG, faiss.IndexNNDescent))


def _parameters(layers: Sequence[Any], parameters: SearchParameters, selector: Any) -> Any:
    """Search parameters for one search, layer by layer from inside: faiss's own fields stay
    untouched, for other threads."""
    inner: Any = None
    chosen = {} if selector is None else {"sel": selector}
    for layer in reversed(layers):
        if isinstance(layer, faiss.IndexIVF):
            inner = faiss.SearchParametersIVF(nprobe=parameters.get("nprobe", 1), **chosen)
        elif isinstance(layer, faiss.IndexHNSW):
            inner = faiss.SearchParametersHNSW(efSearch=parameters.get("ef", 16), **chosen)
        elif isinstance(layer, faiss.IndexRefine):
            inside = {} if inner is None else {"base_index_params": inner}
            inner = faiss.IndexRefineSearchParameters(
                k_factor=float(parameters.get("k_factor", 1)), **inside
            )
        elif isinstance(layer, faiss.IndexPreTransform):
            inner = (
                None if inner is None else faiss.SearchParametersPreTransform(index_params=inner)
            )
        elif chosen:
            inner = faiss.SearchParameters(**chosen)
    return inner


def search(
    layers: Sequence[Any], Q: Rows, k: int, parameters: SearchParameters, selector: Any
) -> tuple[Rows, Ints]:
    """faiss's own answer, (scores, slots), −1 for what it did not find; what needs many candidates
    goes in small batches."""
    if "k_factor" in parameters:
        parameters = {
            **parameters,
            "k_factor": max(1, min(parameters["k_factor"], -(-layers[0].ntotal // k))),
        }
    chosen = _parameters(layers, parameters, selector)
    step = max(1, CANDIDATES // (k * parameters.get("k_factor", 1)))
    parts = [layers[0].search(Q[part], k, params=chosen) for part in blocks(len(Q), step)]
    return np.concatenate([D for D, _ in parts]), np.concatenate([found for _, found in parts])


def selector_of(allowed: Mask) -> Any:
    """The slots that a search may show, as faiss takes them."""
    return faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))


def nearest_rows(queries: Rows, table: Rows, k: int) -> tuple[Rows, Ints]:
    """(scores, rows) of the k best rows of a table for every query, by comparing with all of
    them."""
    return faiss.knn(queries, table, k, metric=METRIC)


def set_threads(d: int, work: int) -> None:
    """Threads for the calling thread, no more than `work` pieces, and from how many queries on a
    scan is a matrix product.

    faiss keeps both in globals of the thread or process, so every search sets them. One query has
    one piece: a second thread would have nothing to do, and where other work keeps a core busy,
    waiting for it costs more than the search.
    """
    if limit := threads():
        faiss.omp_set_num_threads(min(limit, work))
    faiss.cvar.distance_compute_blas_threshold = BLAS_FROM * d


def threads() -> int:
    """Threads for a search; 0 where `$OMP_NUM_THREADS` has decided."""
    return 0 if os.environ.get("OMP_NUM_THREADS") else hardware.threads()


# --- files --------------------------------------------------------------------------------------


def write(made: Any, take: Callable[[bytes], None]) -> None:
    """Hand faiss's serialised form over, piece by piece."""
    faiss.write_index(made, faiss.PyCallbackIOWriter(lambda piece: take(bytes(piece)), 1 << 20))


def read(path: Path, size: int, mmap: bool) -> Any:
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


def reason(error: BaseException) -> str:
    """faiss's message without the place in its source."""
    words = re.sub(r"^Error in .*? at \S+:\d+: ", "", str(error), count=1, flags=re.DOTALL)
    return words.rsplit("Error: ", 1)[-1].strip().replace("\n", " ")[:200] or type(error).__name__
