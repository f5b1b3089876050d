"""A million vectors: the index that is chosen for them against exact flat search.

    python benchmarks/search.py                 1,000,000 × 256, k = 10, one by one and in batches
    of 256 python benchmarks/search.py --quick         100,000 × 256 with the same kind of index;
    not recorded python benchmarks/search.py --factory HNSW32,SQfp16 --factory IVF4096,SQ8
    other kinds, one after the other python benchmarks/search.py --features F.npz     how like real
    features the vectors are (array `pooled`)

The vectors. Their model has four parts: a mean direction, common to all; 100 topics; things within
a topic, 50 images each on average and some many more (weights 1/√rank); and images of a thing.
Topics and things vary along the same axes with a spectrum that falls with a power of 0.86, images
of a thing with one of 1.2 along axes in an order of its topic's own; the whole is rotated, so that
no axis is special, and scaled to unit length. The shares of variance are .4, .3 and .3. These
numbers were set so that a draw of 587 resembles EfficientNet-Lite0's pooled features of 587
pictures of ten topics (`benchmarks/data.py stamps`), reduced to 256 dimensions by PCA; `--features`
prints both side by side. What makes search hard is the local dimension (Levina & Bickel, 2004, 10
neighbours). Queries are drawn from the same model and are not in the table.

The peer is faiss's IndexFlatIP, 4 bytes a number. Batches of 256 × 256 fall under its threshold for
matrix products, so these are forced, which makes the peer several times faster. It is timed with
one thread and with all, and the faster counts: on a busy machine threads that wait for each other
are slower than one. Both sides take turns, in one process, on the same queries; ours is
`Index.search` as the gallery calls it, with normalising and ordering. Memory is that of a fresh
process that loads the index without mapping it, against the bytes of its codes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import harness
import numpy as np
from numpy.typing import NDArray

from finetune import hardware
from retrieval.index import build, nearest
from retrieval.index.spec import inverted
from retrieval.vectors import Rows, prepare

D, K, BATCH = 256, 10, 256
TOPICS, PER_THING, SHARES = 100, 50, (0.4, 0.3, 0.3)
FALL, FALL_WITHIN, MEAN = 0.86, 1.2, 0.5
JUDGED = 2000  # fresh queries for the recall
THREADS = hardware.cores()

CHILD = """
import sys
from pathlib import Path
import numpy as np
from retrieval.index import nearest

def resident():
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) * 1024

Q = np.load(sys.argv[2])
nearest.exact(Q, Q, 10)
before = resident()
opened = nearest.load(Path(sys.argv[1]), mmap=False)
opened.search(Q, 10)
print(resident() - before)
"""


def make(n: int, d: int = D, seed: int = 0, *, things: int | None = None) -> Rows:
    """`n` unit vectors of the model above."""
    rng = np.random.default_rng(seed)
    common, within = (np.arange(1, d + 1) ** (-fall / 2) for fall in (FALL, FALL_WITHIN))
    common, within = common / np.linalg.norm(common), within / np.linalg.norm(within)
    topic_std, thing_std, image_std = np.sqrt(np.array(SHARES) * (1 - MEAN**2))
    mean = rng.standard_normal(d)
    mean *= MEAN / np.linalg.norm(mean)
    things = things or 1_000_000 // PER_THING
    topic = rng.integers(0, TOPICS, things)
    centres = (topic_std * rng.standard_normal((TOPICS, d)) * common)[
        topic
    ] + thing_std * rng.standard_normal((things, d)) * common
    axes = np.stack([rng.permutation(d) for _ in range(TOPICS)])
    rotation = np.linalg.qr(rng.standard_normal((d, d)))[0].astype(np.float32)
    weight = np.arange(1, things + 1) ** -0.5
    thing = rng.choice(things, n, p=weight / weight.sum())
    X = np.empty((n, d), np.float32)
    for start in range(0, n, 65_536):
        part = thing[start : start + 65_536]
        x = rng.standard_normal((len(part), d), dtype=np.float32) * (
            image_std * within[axes[topic[part]]]
        ).astype(np.float32)
        x = (x + centres[part].astype(np.float32)) @ rotation + mean.astype(np.float32)
        X[start : start + len(part)] = x / np.linalg.norm(x, axis=1, keepdims=True)
    return X


def statistics_of(X: Rows) -> dict[str, float]:
    """What a table of unit vectors looks like to a search; distances are Euclidean ones between
    unit vectors."""
    x = X.astype(np.float64)
    values = np.linalg.eigvalsh(np.cov(x.T))[::-1][:256]
    rank = np.arange(1, 151)
    similarity = x @ x.T
    others = similarity[~np.eye(len(x), dtype=bool)]
    np.fill_diagonal(similarity, -1)
    near = np.sort(similarity, axis=1)[:, ::-1][:, :10]
    distance = np.sqrt(np.maximum(2 - 2 * near, 1e-12))
    local = 1 / np.maximum(np.log(distance[:, 9:] / distance[:, :9]).mean(axis=1), 1e-9)
    return {
        "length of the mean": float(np.linalg.norm(x.mean(axis=0))),
        "power of the spectrum": float(np.polyfit(np.log(rank[3:]), np.log(values[3:150]), 1)[0]),
        "largest eigenvalue's share": float(values[0] / values.sum()),
        "cosine, median": float(np.median(others)),
        "cosine to the nearest, median": float(np.median(near[:, 0])),
        "cosine to the tenth, median": float(np.median(near[:, 9])),
        "local dimension, median": float(np.median(local)),
    }


def compare(path: Path) -> None:
    """Real features beside drawn ones of the same number."""
    real = prepare(np.load(path, allow_pickle=False)["pooled"])
    axes = np.linalg.svd(real, full_matrices=False)[2][:D]
    real = prepare(real @ axes.T)
    drawn = [statistics_of(make(len(real), seed=seed)) for seed in range(5)]
    print(f"{len(real)} vectors: real, reduced to {D}; drawn, mean and range of 5 seeds")
    for name, value in statistics_of(real).items():
        values = [one[name] for one in drawn]
        print(
            f"  {name:30} {value:7.3f}   {np.mean(values):7.3f} "
            f"({min(values):.3f} to {max(values):.3f})"
        )


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def best(call: Callable[[], object]) -> float:
    """Seconds with one thread or with all, whichever is less."""
    times = []
    for threads in {1, THREADS}:
        faiss.omp_set_num_threads(threads)
        times.append(seconds(call))
    return min(times)


def duel(
    built: nearest.Index, flat: faiss.Index, Q: Rows, rounds: int, one_by_one: tuple[int, int]
) -> dict[str, dict[str, float]]:
    """Milliseconds a query and ratios, `rounds` rounds of A B A B …, new queries in each."""
    theirs: dict[str, list[float]] = {"one by one": [], f"batches of {BATCH}": []}
    ours: dict[str, list[float]] = {name: [] for name in theirs}
    mine, peer = one_by_one
    for i in range(rounds):
        batch = Q[(i * BATCH) % (len(Q) - BATCH) :][:BATCH]
        singles = [batch[j : j + 1] for j in range(BATCH)]
        name = "one by one"
        ours[name].append(
            seconds(lambda s=singles: [built.search(q, K) for q in s[:mine]]) / mine * 1e3
        )
        faiss.cvar.distance_compute_blas_threshold = 1 << 30
        theirs[name].append(
            best(lambda s=singles: [flat.search(q, K) for q in s[:peer]]) / peer * 1e3
        )
        name = f"batches of {BATCH}"
        ours[name].append(
            seconds(lambda b=batch: [built.search(b, K) for _ in range(4)]) / BATCH / 4 * 1e3
        )
        faiss.cvar.distance_compute_blas_threshold = 1
        theirs[name].append(best(lambda b=batch: flat.search(b, K)) / BATCH * 1e3)
    result = {}
    for name in theirs:
        r = harness.ratio(theirs[name], ours[name])
        result[name] = {
            **r,
            "ours ms": float(np.median(ours[name])),
            "theirs ms": float(np.median(theirs[name])),
        }
        print(
            f"  {name}: {harness.words(r)}; {result[name]['ours ms']:.3f} against "
            f"{result[name]['theirs ms']:.3f} ms a query",
            flush=True,
        )
    return result


def recall(found: NDArray[np.int64], true: NDArray[np.int64]) -> float:
    """The share of the true ten that are among the ten found; a tie that goes the other way is a
    miss."""
    return float(
        np.mean([len(np.intersect1d(a, b)) for a, b in zip(found, true, strict=True)])
        / true.shape[1]
    )


def memory(built: nearest.Index, Q: Rows) -> tuple[int, int]:
    """(bytes that a fresh process grows by, bytes in the file)."""
    with tempfile.TemporaryDirectory() as folder:
        path, queries = Path(folder) / "index", Path(folder) / "queries.npy"
        built.save(path)
        np.save(queries, Q[:BATCH])
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(path), str(queries)],
            check=True,
            capture_output=True,
            text=True,
        )
        return int(done.stdout), path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="100,000 vectors")
    parser.add_argument(
        "--factory",
        action="append",
        help="a kind of index instead of the chosen one; may be repeated",
    )
    parser.add_argument(
        "--features", type=Path, help="compare the drawn vectors with real features, and end"
    )
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    if given.features:
        compare(given.features)
        return
    n = 100_000 if given.quick else 1_000_000
    print(
        f"{harness.machine()}; {harness.versions()}; {THREADS} threads; n = {n:,} × {D}, k = {K}",
        flush=True,
    )
    table = make(n + JUDGED)
    X, Q = table[:n], table[n:]
    flat = faiss.IndexFlatIP(D)
    flat.add(X)
    true = nearest.exact(X, Q, K)[1]
    for factory in given.factory or [
        "auto" if n * D > 128_000_000 else f"{inverted(n, D)},Refine(SQfp16)"
    ]:
        took = time.perf_counter()
        built = build.build(X, factory=factory)
        took = time.perf_counter() - took
        found = recall(built.search(Q, K)[1], true)
        print(
            f"{built.spec}\n  built in {took:.0f} s; recall@{K} "
            f"on {JUDGED} fresh queries {found:.4f}",
            flush=True,
        )
        seen = duel(built, flat, Q, given.rounds, (BATCH, 8))
        codes = code_bytes(built)
        grown, stored = memory(built, Q)
        sizes = (
            f"codes {codes / 1e6:.0f} MB, file {stored / 1e6:.0f} MB, memory {grown / 1e6:.0f} MB"
        )
        print(f"  {sizes}: {grown / codes:.2f} × the codes", flush=True)
        if not given.factory:
            for name, bar in (("one by one", "≥ 60×"), (f"batches of {BATCH}", "≥ 6×")):
                times = f"{seen[name]['ours ms']:.3f} against {seen[name]['theirs ms']:.2f} ms"
                detail = f"{built.spec.factory}; recall@{K} {found:.4f}; {times}"
                work = f"{n:,} × {D}, k = {K}, {name}"
                peer = "faiss IndexFlatIP, BLAS forced for batches"
                harness.record(
                    f"search, {name}",
                    work,
                    peer,
                    bar,
                    harness.words(seen[name]),
                    detail,
                    quick=given.quick,
                )
            share = f"{grown / codes:.2f} ×"
            peer, size = "the bytes of the stored codes", f"{grown / 1e6:.0f} MB"
            harness.record(
                "search, memory", f"{n:,} × {D}", peer, "≤ 1.3 ×", share, size, quick=given.quick
            )


def code_bytes(built: nearest.Index) -> int:
    """Bytes of the vectors' codes alone, every layer's."""
    total, layer = 0, faiss.downcast_index(built._faiss)
    while True:
        if isinstance(layer, faiss.IndexRefine):
            total += faiss.downcast_index(layer.refine_index).code_size * layer.ntotal
            layer = faiss.downcast_index(layer.base_index)
        elif isinstance(layer, faiss.IndexPreTransform):
            layer = faiss.downcast_index(layer.index)
        elif isinstance(layer, faiss.IndexHNSW):
            layer = faiss.downcast_index(layer.storage)
        else:
            return total + layer.code_size * layer.ntotal


if __name__ == "__main__":
    main()
