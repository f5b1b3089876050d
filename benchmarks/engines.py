"""The way that is taken here against the fastest one, and whole extractions against the machine.

    python benchmarks/engines.py             1,000 JPEGs of 500×375 and of 12 megapixels, 5 rounds
    python benchmarks/engines.py --quick     64 and 16 JPEGs, 1 round; not recorded

Bars: `auto` is at least 0.95 × the fastest of the ways (median of 5; float32 stays where another
one is less than 1.15 × as fast, and the row says so), and is the same where the processor's flag
is faked the other way. Extraction in a process that has the network's converted copy runs at 0.9 ×
min(rate of the model alone, rate of decoding alone) or more, both measured in the same process on
all cores. Beside it stands the ratio to the plain timm loop of peers/timm_loop.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

POOLED = "pooled"


def opened() -> tuple[Any, list[Any]]:
    """The default network and its tap."""
    from finetune.backbones import catalog
    from finetune.network import Tap

    return catalog.open_named(), [Tap(POOLED)]


def ways(rounds: int) -> None:
    """Rates of all ways (a list each), and what `auto` comes to with the flag as it is, and faked:
    one JSON line."""
    from finetune import timings
    from finetune.backbones import device
    from finetune.features import engine

    named, taps = opened()
    if not rounds:  # so that the network is converted
        engine.open_runner(named.network, taps, named.load)
        return
    found: dict[str, list[float]] = {}
    named.load()  # torch is there, so that it is timed, too
    for _ in range(rounds):
        every = [*device.ways("openvino"), *device.ways("torch")]
        for way, rate in engine.rates(named.network, taps, named.load, every[:2]).items():
            found.setdefault(way, []).append(rate)
        for way, rate in engine.rates(named.network, taps, named.load, every[2:]).items():
            found.setdefault(way, []).append(rate)
    taken = []
    flags = {name: device.has_bf16(name) for name in ("openvino", "torch")}
    for faked in (False, True):
        device.has_bf16 = lambda name, faked=faked: flags[name] != faked  # type: ignore
        timings.forget()
        taken.append(str(engine.fastest(named.network, taps, named.load)))
    print(json.dumps({"rates": found, "taken": taken}))


def whole(folder: str) -> None:
    """One extraction into an empty store, and its two limits: one JSON line."""
    import numpy as np

    from finetune.data import images
    from finetune.features import engine, extraction
    from finetune.features.store import Store

    named, taps = opened()
    source = images.load_unlabelled(folder)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(Path(scratch))
        found = extraction.extract(source, named.network, taps, named.load, store=store)
        seconds = time.perf_counter() - began
    runner = engine.open_runner(named.network, taps, named.load)
    side = named.network.preprocess.size
    noise = np.random.default_rng(0).integers(0, 256, (64, side, side, 3), np.uint8)
    runner(noise)
    start = time.perf_counter()
    for _ in range(4):
        runner(noise)
    model = 256 / (time.perf_counter() - start)
    start = time.perf_counter()
    with extraction.decoding(source, range(len(source)), named.network) as pictures:
        decoded = sum(1 for _ in pictures)
    decode = decoded / (time.perf_counter() - start)
    rate = len(found) / seconds
    print(json.dumps({"n": len(found), "rate": rate, "model": model, "decode": decode}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--count", type=int, help="images of each set [1000; 64 and 16 with --quick]"
    )
    parser.add_argument("--ways", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--whole", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ways is not None:
        ways(args.ways)
        return
    if args.whole:
        whole(args.whole)
        return
    harness.use_cache("engines")
    rounds = 1 if args.quick else 5
    own = [sys.executable, __file__]
    harness.side([*own, "--ways", "0"])()
    result = harness.side([*own, "--ways", str(rounds)])()
    middle = {way: statistics.median(rates) for way, rates in result["rates"].items()}
    fastest = max(middle, key=lambda way: middle[way])
    taken, other = result["taken"]
    harness.record(
        "engines: auto",
        "lite0 at 224 px, batches of noise",
        f"the fastest way: {fastest}",
        "≥ 0.95 ×",
        f"{middle[taken] / middle[fastest]:.2f} × by {taken}; with the flag faked: {other}",
        ", ".join(f"{way} {rate:.0f}" for way, rate in middle.items())
        + f" images a second, n = {rounds}",
        quick=args.quick,
    )
    for name, size, quick in (("500×375", (500, 375), 64), ("12 megapixels", (4000, 3000), 16)):
        count = args.count or (quick if args.quick else 1000)
        folder = harness.make_jpegs(harness.SCRATCH / f"{size[0]}x{size[1]}-{count}", count, size)
        mine = [harness.side([*own, "--whole", folder])() for _ in range(rounds)]
        share = [m["rate"] / min(m["model"], m["decode"]) for m in mine]
        words = ", ".join(
            f"{key} {statistics.median(m[key] for m in mine):.0f}"
            for key in ("rate", "model", "decode")
        )
        detail = f"{words} images a second"
        # by the peers' own environment where it was made
        installed = (harness.PEERS / ".installed").exists()
        python = harness.peer_python() if installed else sys.executable
        loop = harness.HERE / "peers" / "timm_loop.py"
        peer = harness.side([python, loop, folder, "tf_efficientnet_lite0"])()
        ratio = statistics.median(m["rate"] for m in mine) * peer["seconds"] / peer["n"]
        detail += f"; {ratio:.1f} × the plain timm loop (n = 1)"
        harness.record(
            f"engines: whole extraction, {name}",
            f"{count} JPEGs to pooled features in a new store, opening included",
            "min(model alone, decoding alone)",
            "≥ 0.9 ×",
            f"{statistics.median(share):.2f} × ({min(share):.2f}–{max(share):.2f}, n = {rounds})",
            detail,
            quick=args.quick,
        )


if __name__ == "__main__":
    main()
