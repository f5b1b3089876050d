"""A gallery of 20,000 images: adding 100 of them, and finding near-duplicates.

    python benchmarks/gallery.py add            `retrieve add` of 100 images; bar: ≤ 3 % of the time
    of a rebuild python benchmarks/gallery.py duplicates     pairs of cosine ≥ 0.95 among 20,000
    vectors; bar: ≥ 5× faster than imagededup
    --quick                                     400 images, 20 to add; 2,000 vectors; not recorded

`add`: the images are different crops of two photographs, 224×168 JPEGs. The rebuild is `retrieve
build` with an empty feature store and the converted network in the cache; both are whole commands
in processes of their own. Every round adds 100 images that nobody has seen. The detail has a
rebuild with all features in the store, too: what only the index costs.

`duplicates`: 20,000 × 1,280 vectors drawn by synthetic.py, one in ten a slightly changed copy of
another one. Ours is retrieval.vectors.near_duplicates, which `retrieve duplicates` calls, from
float32 rows to pairs, their normalising included. The peer is
`CNN().find_duplicates(encoding_map=…)` of imagededup on the same rows, with its default of a
process a core and with none, and the faster counts. Ours is measured on a quarter, half and all of
the vectors for its memory: what the process holds at most beyond the vectors and the imported
modules.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import harness
import numpy as np

THRESHOLD = 0.95


# ---------------------------------------------------------------------------------------------- add


def build(folder: Path, out: Path, cache: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    return float(
        harness.side(
            [harness.COMMANDS / "retrieve", "build", folder, "-o", out],
            {"REGRAFT_CACHE": str(cache)},
        )()["wall"]
    )


def add(rounds: int, quick: bool) -> None:
    count, few = (400, 20) if quick else (20_000, 100)
    folder = harness.make_jpegs(harness.SCRATCH / f"gallery-{count}", count, (224, 168))
    warm, index = harness.use_cache("gallery-cache"), harness.SCRATCH / "gallery.index"
    shutil.rmtree(warm / "features", ignore_errors=True)
    build(folder, index, warm)
    mine, theirs, stored = [], [], []
    for i in range(rounds):
        more = harness.SCRATCH / "gallery-more"
        shutil.rmtree(more, ignore_errors=True)
        harness.make_jpegs(more, few, (224, 168), seed=1000 + i)
        mine.append(
            harness.side(
                [harness.COMMANDS / "retrieve", "add", index, more], {"REGRAFT_CACHE": str(warm)}
            )()["wall"]
        )
        other = harness.SCRATCH / "gallery-again.index"
        theirs.append(
            build(folder, other, harness.cold_cache(harness.SCRATCH / "gallery-cold", warm))
        )
        stored.append(build(folder, other, warm))
        print(
            f"  round {i + 1}: add {mine[-1]:.2f} s, rebuild "
            f"{theirs[-1]:.1f} s, stored {stored[-1]:.1f} s",
            file=sys.stderr,
        )
    harness.record(
        "gallery, add",
        f"`retrieve add` of {few} images to {count:,}",
        "`retrieve build` from nothing",
        "≤ 3 %",
        harness.spread([100 * a / b for a, b in zip(mine, theirs, strict=True)], "% of its time"),
        f"{statistics.median(mine):.2f} against {statistics.median(theirs):.1f} s; "
        f"rebuild with all features in the store: {statistics.median(stored):.1f} s",
        quick=quick,
    )


# --------------------------------------------------------------------------------------- duplicates


def vectors(path: Path, n: int, d: int) -> Path:
    """Write `(n, d)` features, every tenth row a slightly changed copy of the one before it."""
    import synthetic

    X, _ = synthetic.make(n, d, 10)
    rng = np.random.default_rng(1)
    copies = np.arange(9, n, 10)
    noise = rng.standard_normal((len(copies), d), dtype=np.float32)
    noise *= np.linalg.norm(X[copies - 1], axis=1, keepdims=True) / np.linalg.norm(
        noise, axis=1, keepdims=True
    )
    X[copies] = X[copies - 1] + noise * rng.uniform(0.05, 0.25, (len(copies), 1)).astype(np.float32)
    np.save(path, X)
    return path


def near(path: Path, n: int) -> None:
    """Ours: pairs among `n` rows; memory beyond the rows and the modules."""
    from retrieval.vectors import near_duplicates, prepare

    X = np.load(path)
    assert len(X) == n
    prepare(X[:2]) @ X[:2].T
    before = harness.peak()
    start = time.perf_counter()
    pairs = near_duplicates(prepare(X), THRESHOLD)
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - start,
                "pairs": len(pairs),
                "peak": harness.peak(),
                "before": before,
            }
        )
    )


def duplicates(rounds: int, quick: bool) -> None:
    n, d = (2000, 256) if quick else (20_000, 1280)
    harness.SCRATCH.mkdir(exist_ok=True)
    path = vectors(harness.SCRATCH / f"vectors-{n}.npy", n, d)
    small = {
        part: vectors(harness.SCRATCH / f"vectors-{n // part}.npy", n // part, d) for part in (4, 2)
    }

    def ours() -> harness.Measured:
        return harness.side([sys.executable, __file__, "--near", path, str(n)])()

    def peer() -> harness.Measured:
        script = harness.HERE / "peers" / "imagededup_cnn.py"
        python = harness.peer_python()
        workers = {0, len(os.sched_getaffinity(0))}
        found = [
            harness.side([python, script, path, str(THRESHOLD), str(many)])()
            for many in sorted(workers)
        ]
        return min(found, key=lambda one: one["seconds"])

    mine, theirs = harness.rounds(ours, peer, rounds)
    grown = {
        part: harness.side([sys.executable, __file__, "--near", file, str(n // part)])()
        for part, file in small.items()
    }
    grown[1] = mine[-1]
    memory = {n // part: (one["peak"] - one["before"]) / 1e6 for part, one in grown.items()}
    seconds = [statistics.median(one["seconds"] for one in side) for side in (mine, theirs)]
    words = ", ".join(f"{size:.0f} MB with {count:,}" for count, size in sorted(memory.items()))
    harness.record(
        "gallery, duplicates",
        f"pairs of cosine ≥ {THRESHOLD} among {n:,} × {d:,}",
        "imagededup's CNN method on the same vectors",
        "≥ 5×, memory linear",
        harness.words(harness.ratio([t["seconds"] for t in theirs], [m["seconds"] for m in mine])),
        f"{seconds[0]:.2f} against {seconds[1]:.2f} s; {mine[0]['pairs']:,} and "
        f"{theirs[0]['pairs']:,} pairs; "
        f"beyond the vectors: {words}; the peer in all: "
        f"{max(t['peak'] for t in theirs) / 1e6:.0f} MB",
        quick=quick,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("add", "duplicates"), help="both without it")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, help="[3; 1 with --quick]")
    parser.add_argument("--near", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.near:
        near(Path(options.near[0]), int(options.near[1]))
        return
    for name, work in (("add", add), ("duplicates", duplicates)):
        if options.what in (None, name):
            work(options.rounds or (1 if options.quick else 3), options.quick)


if __name__ == "__main__":
    main()
