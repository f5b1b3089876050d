"""Building an index, with its recall measured and its search parameters set by that.

| type | when | what a vector costs |
|---|---|---|
| `Flat` | up to 32 million numbers | 4 d bytes; exact |
| `SQfp16` | up to 128 million numbers | 2 d bytes; all of them are read, at half the width |
| `IVF…,PQm x4fs,Refine(SQfp16)` | beyond | 2 d + m/2 + 8 bytes: 4-bit codes find candidates, half
floats rank them |
| the same with `Refine(SQ8)`, or without | where memory is short | d + m/2 + 8 bytes, or m/2 + 8 |

An approximate index is built without some rows. These are the queries on which its recall is
measured against exact search: no query can find itself, and no graph has links that were made for
it. Half of them set the search parameters, the other half give the figure that is reported; then
they are added.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.metrics import Estimate, wilson
from retrieval.index import backend
from retrieval.index.nearest import Index, exact
from retrieval.index.spec import SearchParameters, Spec, choose
from retrieval.index.tuning import cosines, recall_per_query, tune
from retrieval.vectors import Ints, Progress, Rows, check_prepared, slot_order

HELD_OUT = 2000  # rows kept back to be queries, half of them for the search parameters


def build(
    X: Rows,
    *,
    factory: str = "auto",
    recall: float = 0.99,
    k: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> Index:
    """Build an index on `X` `(n, d)` (from `prepare`; may be memory-mapped).

    `factory` is a faiss factory string, or `auto`: see `choose`. An
    approximate index searches harder until recall@k on held-out queries is at least `recall`, or
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
    name = choose(n, d) if factory == "auto" else factory
    backend.set_threads(d, n)
    made = backend.empty(name, n, d, seed)
    if backend.is_flat(made):
        backend.add(made, X, np.arange(n), name, lambda part: tell(part, "adding"))
        return Index(made, Spec(name, n, d, k, recall, 1.0, 1.0), np.empty(0, np.int64))
    random = np.random.default_rng(seed)
    held = np.sort(random.choice(n, min(HELD_OUT, n // 10), replace=False)).astype(np.int64)
    order = slot_order(n, held)
    known = order[: n - len(held)]
    tell(0.0, "training")
    backend.train(made, X, known, name, random)
    backend.add(made, X, known, name, lambda part: tell(0.4 + 0.4 * part, "adding"))
    tell(0.8, "measuring recall")
    spec = Spec(name, n, d, k, recall, note="too few vectors to measure recall")
    if len(held) > 1:
        spec = _measured(made, X, order, held, spec)
    if backend.grows(made):
        backend.add(made, X, order[n - len(held) :], name)
    else:
        made, held = backend.empty(name, n, d, seed), held[:0]
        backend.train(made, X, np.arange(n), name, random)
        backend.add(made, X, np.arange(n), name)
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
        recall_per_query(X, Q, others(index.search(Q, k + 1)[1]), cosines(X, Q, true)[:, -1]).mean()
    )
    return Estimate(value, *wilson(value, len(rows)), len(rows), "wilson")


def _measured(made: Any, X: Rows, order: Ints, held: Ints, spec: Spec) -> Spec:
    """Raise the search parameters on one half of the held-out queries until the target recall
    holds; report it on the other half."""
    layers, knobs = backend.layers_of(made), backend.knobs(made)
    start = {name: low for name, (low, _) in knobs.items()}
    limits = {name: top for name, (_, top) in knobs.items()}
    held = np.random.default_rng(len(held)).permutation(held)
    Q, k = np.ascontiguousarray(X[held]), min(spec.k, spec.n - len(held))
    last = exact(X, Q, k, exclude=held)[0][:, -1]
    halves = np.array_split(np.arange(len(held)), 2)

    def shares(half: Ints, parameters: SearchParameters) -> NDArray[np.float64]:
        slots = backend.search(layers, Q[half], k, parameters, None)[1]
        return recall_per_query(X, Q[half], np.where(slots < 0, -1, order[slots]), last[half])

    first, second = (functools.partial(shares, half) for half in halves)
    parameters, seen = tune(first, second, start, limits, spec.target_recall)
    value, queries = float(seen.mean()), len(seen)
    note = (
        ""
        if value >= spec.target_recall
        else f"it cannot hold the recall of {spec.target_recall:g} that was asked"
    )
    return replace(
        spec,
        k=k,
        recall=value,
        recall_low=wilson(value, queries)[0],
        queries=queries,
        search_parameters=parameters,
        note=note,
    )
