"""How time and memory grow with the number of images, for extraction and for the SVM, and where
they stop being linear.

    python benchmarks/growth.py             1k, 3k, 10k and 30k, 3 rounds; writes
    benchmarks/growth.png python benchmarks/growth.py --quick     100, 300 and 1,000, 1 round; draws
    into the temporary folder, not recorded

Extraction: `features.extract` into an empty store with EfficientNet-Lite0, on copies of one JPEG
whose bytes differ. SVM: `svm.choose` as `finetune fit` calls it (every kernel; 10 classes; one tap
of 1,280 features drawn by synthetic.py, read from a memory map). Every point is a process of its
own; memory is the most that it holds. Between two neighbouring sizes the growth is t₂/t₁ =
(n₂/n₁)^power, of medians; "linear" is a power of at most 1.15.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np

LINEAR = 1.15
Point = dict[str, Any]  # n, and minimum, median and maximum of `seconds` and `peak` (bytes)


def prepare(folder: Path, n: int) -> Path:
    """Drawn features of `n` images, made once."""
    import synthetic

    if not (folder / "y.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        X = np.lib.format.open_memmap(folder / "X.npy", "w+", np.float32, (n, 1280))
        _, y = synthetic.make(n, 1280, 10, out=X)
        X.flush()
        np.save(folder / "y.npy", y)
    return folder


def machine_of(folder: Path) -> None:
    """One choice of the SVM."""
    from finetune.heads import svm
    from finetune.network import Tap

    X, y = np.load(folder / "X.npy", mmap_mode="r"), np.load(folder / "y.npy")
    start = time.perf_counter()
    found = svm.choose(
        {Tap("pooled"): X}, y, [str(c) for c in range(10)], default_taps=(Tap("pooled"),)
    )
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {"seconds": seconds, "n": len(y), "kind": found.head.kind, "peak": harness.peak()}
        )
    )


def power(rows: list[Point], key: str) -> list[float]:
    """The power of growth between neighbours."""
    return [
        math.log(b[key]["median"] / a[key]["median"]) / math.log(b["n"] / a["n"])
        for a, b in itertools.pairwise(rows)
    ]


def verdict(rows: list[Point], key: str) -> str:
    """Up to where the growth is at most linear."""
    for (row, following), p in zip(itertools.pairwise(rows), power(rows, key), strict=True):
        if p > LINEAR:
            return f"linear to {row['n']:,}, then power {p:.2f} to {following['n']:,}"
    return f"linear to {rows[-1]['n']:,}"


def measure(sizes: tuple[int, ...], rounds: int) -> dict[str, list[Point]]:
    """Series → points with minimum, median and maximum of seconds and bytes."""
    images = {n: harness.copies(harness.SCRATCH / f"copies-{n}", n) for n in sizes}
    tables = {n: prepare(harness.SCRATCH / f"growth-{n}", n) for n in sizes}
    store = [sys.executable, harness.HERE / "store.py", "--extraction"]
    harness.side([*store, images[sizes[0]]])()  # converts, and compiles
    found: dict[str, dict[int, list[harness.Measured]]] = {
        name: {n: [] for n in sizes} for name in ("extraction", "SVM")
    }
    for i in range(rounds):
        for n in sizes:
            found["extraction"][n].append(harness.side([*store, images[n]])())
            found["SVM"][n].append(
                harness.side([sys.executable, __file__, "--machine", tables[n]])()
            )
            print(
                f"  round {i + 1}: {found['extraction'][n][-1]}  {found['SVM'][n][-1]}",
                file=sys.stderr,
                flush=True,
            )

    def of(rows: list[harness.Measured], key: str) -> dict[str, float]:
        values = [row[key] for row in rows]
        return {"min": min(values), "median": statistics.median(values), "max": max(values)}

    return {
        name: [
            {"n": n, "seconds": of(rows, "seconds"), "peak": of(rows, "peak")}
            for n, rows in each.items()
        ]
        for name, each in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, help="[3; 1 with --quick]")
    parser.add_argument("--machine", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.machine:
        machine_of(options.machine)
        return
    harness.use_cache()
    sizes = (100, 300, 1000) if options.quick else (1000, 3000, 10_000, 30_000)
    rounds = options.rounds or (1 if options.quick else 3)
    series = measure(sizes, rounds)
    points = harness.SCRATCH / "growth.json"
    points.write_text(json.dumps(series))
    picture = harness.SCRATCH / "growth.png" if options.quick else harness.HERE / "growth.png"
    subprocess.run(
        [harness.peer_python(), harness.HERE / "peers" / "plot_growth.py", points, picture],
        check=True,
    )
    for name, rows in series.items():
        seconds = ", ".join(f"{row['seconds']['median']:.1f} s" for row in rows)
        memory = ", ".join(f"{row['peak']['median'] / 1e6:.0f}" for row in rows)
        harness.record(
            f"growth, {name}",
            f"{', '.join(f'{n:,}' for n in sizes)} images",
            "–",
            "linear",
            f"time: {verdict(rows, 'seconds')}; memory: {verdict(rows, 'peak')} (n = {rounds})",
            f"{seconds}; {memory} MB; {picture.name}",
            quick=options.quick,
        )


if __name__ == "__main__":
    main()
