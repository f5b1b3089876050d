"""The feature store: what known images cost, and what memory an extraction takes.

    python benchmarks/store.py warm       features.extract of 2,000 known images; bar: ≤ 2× the time
    of hashing their bytes python benchmarks/store.py rerun      features.digests of 50,000 known,
    unchanged files; bar: ≥ 10× faster than hashing python benchmarks/store.py memory     extraction
    of 1k, 10k and 50k images; bar: peak memory grows by ≤ 10 %
    --quick                               200; 2,000; 200 and 1,000 images; not recorded

The images are copies of one JPEG (500×375, about 65 KB) with a changing comment, so that every file
has bytes of its own; all of them take 4 GB in the temporary folder. The peer reads and hashes
(SHA-256) every file in as many threads as there are cores, from the page cache. Every measurement
is a new process with its modules imported; `warm` counts the second call in it, in which the engine
is known, and the detail has the first. `memory` is the peak of resident memory of a process that
does one extraction into an empty store with EfficientNet-Lite0; the converted network is in the
cache. (No content comes twice: in a folder with copies the rows do not stand together in the store,
and are gathered in memory, not mapped.)
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import harness

from finetune import hardware


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def hashing(folder: Path) -> None:
    """The peer: all bytes read and hashed."""
    paths = sorted(path for path in folder.rglob("*.jpg"))
    with concurrent.futures.ThreadPoolExecutor(hardware.cores()) as pool:
        took = seconds(
            lambda: list(pool.map(lambda path: hashlib.sha256(path.read_bytes()).digest(), paths))
        )
    print(json.dumps({"seconds": took, "n": len(paths)}))


def known(folder: Path, where: Path) -> None:
    """Features of known images: the first call of a process, and the second."""
    from finetune.backbones import catalog
    from finetune.data import images
    from finetune.features import extraction
    from finetune.features.store import Store
    from finetune.network import Tap

    named, source, store = catalog.open_named(), images.load_unlabelled(folder), Store(where)

    def call() -> None:
        found = extraction.extract(source, named.network, [Tap("pooled")], named.load, store=store)
        assert len(found) == len(source)

    first = seconds(call)
    print(json.dumps({"first": first, "seconds": seconds(call), "n": len(source)}))


def look(folder: Path, where: Path) -> None:
    """Digests of known files."""
    from finetune.data import images
    from finetune.features import extraction
    from finetune.features.store import Store

    source, store = images.load_unlabelled(folder), Store(where)
    print(
        json.dumps(
            {"seconds": seconds(lambda: extraction.digests(source, store)), "n": len(source)}
        )
    )


def extraction(folder: Path) -> None:
    """One extraction into an empty store, and this process's peak memory."""
    from finetune.backbones import catalog
    from finetune.data import images
    from finetune.features import extraction
    from finetune.features.store import Store
    from finetune.network import Tap

    named, source = catalog.open_named(), images.load_unlabelled(folder)
    with tempfile.TemporaryDirectory(dir=harness.SCRATCH) as scratch:
        took = seconds(
            lambda: extraction.extract(
                source,
                named.network,
                [Tap("pooled")],
                named.load,
                store=Store(Path(scratch) / "store"),
            )
        )
    print(json.dumps({"seconds": took, "n": len(source), "peak": harness.peak()}))


def child(*words: str | Path) -> Callable[[], harness.Measured]:
    return harness.side([sys.executable, __file__, *words])


def settle(folder: Path) -> None:
    """Wait until no file is so young that the store would rather read it again (2 seconds)."""
    newest = max(path.stat().st_mtime for path in folder.rglob("*.jpg"))
    time.sleep(max(0.0, newest + 3 - time.time()))


def against_hashing(
    flag: str, count: int, rounds: int
) -> tuple[list[harness.Measured], list[harness.Measured]]:
    """Rounds of `--known` or `--look` on `count` files that the store knows, and of hashing their
    bytes."""
    folder, where = (
        harness.copies(harness.SCRATCH / f"copies-{count}", count),
        harness.SCRATCH / f"store{flag}",
    )
    shutil.rmtree(where, ignore_errors=True)
    settle(folder)
    child(flag, folder, where)()
    return harness.rounds(child(flag, folder, where), child("--hashing", folder), rounds)


def warm(rounds: int, quick: bool) -> None:
    count = 200 if quick else 2000
    mine, theirs = against_hashing("--known", count, rounds)
    shares = [m["seconds"] / t["seconds"] for m, t in zip(mine, theirs, strict=True)]
    first, ours, peer = (
        1000 * statistics.median(m[key] for m in side)
        for side, key in ((mine, "first"), (mine, "seconds"), (theirs, "seconds"))
    )
    detail = (
        f"{ours:.0f} against {peer:.0f} ms; {first:.0f} ms the first "
        f"time in a process, which opens the engine"
    )
    work = f"features.extract of {count:,} known images"
    harness.record(
        "store, warm",
        work,
        "hashing their bytes",
        "≤ 2×",
        harness.spread(shares, "× its time"),
        detail,
        quick=quick,
    )


def rerun(rounds: int, quick: bool) -> None:
    count = 2000 if quick else 50_000
    mine, theirs = against_hashing("--look", count, rounds)
    ours, peer = (statistics.median(one["seconds"] for one in side) for side in (mine, theirs))
    result = harness.words(
        harness.ratio([t["seconds"] for t in theirs], [m["seconds"] for m in mine])
    )
    work = f"features.digests of {count:,} known, unchanged files of 65 KB"
    detail = f"{ours:.2f} against {peer:.2f} s"
    harness.record(
        "store, rerun",
        work,
        "hashing all bytes, from the page cache",
        "≥ 10×",
        result,
        detail,
        quick=quick,
    )


def memory(rounds: int, quick: bool) -> None:
    counts = (200, 1000) if quick else (1000, 10_000, 50_000)
    folders = {
        count: harness.copies(harness.SCRATCH / f"copies-{count}", count) for count in counts
    }
    child("--extraction", folders[counts[0]])()  # converts, and compiles
    found: dict[int, list[harness.Measured]] = {count: [] for count in counts}
    for i in range(rounds):
        for count in counts:
            found[count].append(child("--extraction", folders[count])())
            print(f"  round {i + 1}: {found[count][-1]}", file=sys.stderr, flush=True)
    pairs = zip(found[counts[0]], found[counts[-1]], strict=True)
    growth = [100 * (many["peak"] / few["peak"] - 1) for few, many in pairs]
    peaks = {
        count: statistics.median(one["peak"] for one in each) / 1e6 for count, each in found.items()
    }
    detail = ", ".join(f"{peak:.0f} MB with {count:,}" for count, peak in peaks.items())
    work = f"peak memory of an extraction, {counts[0]:,} to {counts[-1]:,} images"
    result = harness.spread(growth, "% more", 1)
    harness.record(
        "store, memory", work, f"{counts[0]:,} images", "≤ 10 % more", result, detail, quick=quick
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="?", choices=("warm", "rerun", "memory"), help="all of them without it"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, help="[5; memory 3; 1 with --quick]")
    for name, many in (("--hashing", 1), ("--known", 2), ("--look", 2), ("--extraction", 1)):
        parser.add_argument(name, nargs=many, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hashing:
        hashing(Path(options.hashing[0]))
    elif options.known:
        known(*map(Path, options.known))
    elif options.look:
        look(*map(Path, options.look))
    elif options.extraction:
        extraction(Path(options.extraction[0]))
    else:
        harness.use_cache()
        for name, work, usual in (("warm", warm, 5), ("rerun", rerun, 5), ("memory", memory, 3)):
            if options.what in (None, name):
                work(options.rounds or (1 if options.quick else usual), options.quick)


if __name__ == "__main__":
    main()
