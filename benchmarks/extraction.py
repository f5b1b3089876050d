"""Files to pooled features: ours against a plain timm loop, and against the machine's own limit.

    python benchmarks/extraction.py [CASE …]    all, or some: lite0 resnet50 large torch
    python benchmarks/extraction.py --quick     64, 32, 16 and 32 images, 1 round; not recorded

Bars: ≥ 10× (lite0), ≥ 4× (resnet50), ≥ 8× (large: 12 megapixels), ≥ 85 % of the limit; ≥ 2× for
`torch`, the way of a machine without OpenVINO and bf16. The images are different crops of two
photographs. Ours is `features.extract` into an empty store, the converted network in the cache. The
peer is the plain timm loop of peers/timm_loop.py, in float32. The limit is what the machine could
do if decoding and the network shared it without loss: 1 / (model-only + decode-only time an image),
each alone on all cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import harness


@dataclass(frozen=True)
class Case:
    """What is extracted, and how; `count` images, `quick` in the quick form; ours has to be `bar`
    times as fast."""

    name: str
    backbone: str
    size: tuple[int, int]
    count: int
    quick: int
    bar: int
    engine: str = "auto"
    precision: str = "auto"


LITE0 = "tf_efficientnet_lite0"
CASES = {
    "lite0": Case("extraction, lite0, 500×375", LITE0, (500, 375), 1000, 64, 10),
    "resnet50": Case("extraction, resnet50, 500×375", "resnet50", (500, 375), 400, 32, 4),
    "large": Case("extraction, lite0, 12 megapixels", LITE0, (4000, 3000), 400, 16, 8),
    "torch": Case(
        "extraction, lite0, 500×375, by torch in float32",
        LITE0,
        (500, 375),
        400,
        32,
        2,
        "torch",
        "float32",
    ),
}


def ours(folder: str, name: str, engine: str, precision: str) -> None:
    """One extraction into a cold store; the converted network is in the cache already (its making
    is not timed)."""
    import numpy as np

    from finetune.backbones import catalog
    from finetune.data import images
    from finetune.features import engine as engines
    from finetune.features import extraction
    from finetune.features.store import Store
    from finetune.network import Tap

    named = catalog.open_named(name, "auto" if "lite" in name else "random")
    source = images.load_unlabelled(folder)
    runner = engines.open_runner(
        named.network, [Tap("pooled")], named.load, engine=engine, precision=precision
    )
    warm = np.zeros((64, *[named.network.preprocess.size] * 2, 3), np.uint8)
    runner(warm)
    start = time.perf_counter()
    runner(np.concatenate([warm] * 4))
    model_only = (time.perf_counter() - start) / 256
    start = time.perf_counter()
    with extraction.decoding(source, range(len(source)), named.network) as pictures:
        for _ in pictures:
            pass
    decode_only = (time.perf_counter() - start) / len(source)
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        found = extraction.extract(
            source,
            named.network,
            [Tap("pooled")],
            named.load,
            store=Store(Path(scratch)),
            engine_name=engine,
            precision=precision,
        )
        seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "n": len(found),
                "seconds": seconds,
                "model_only": model_only,
                "decode_only": decode_only,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--ours", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        ours(*args.ours)
        return
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"no case is called {', '.join(sorted(unknown))}")
    rounds = 1 if args.quick else 3
    harness.use_cache()
    for case in (CASES[name] for name in args.cases or CASES):
        count, name, bar = case.quick if args.quick else case.count, case.name, case.bar
        folder = harness.make_jpegs(
            harness.SCRATCH / f"{case.size[0]}x{case.size[1]}-{count}", count, case.size
        )
        own = harness.side(
            [sys.executable, __file__, "--ours", folder, case.backbone, case.engine, case.precision]
        )
        own()  # converts, and warms the disk
        peer_side = harness.side(
            [harness.peer_python(), harness.HERE / "peers" / "timm_loop.py", folder, case.backbone]
        )
        mine, theirs = harness.rounds(own, peer_side, rounds)
        rate = [m["n"] / m["seconds"] for m in mine]
        peer = [t["n"] / t["seconds"] for t in theirs]
        share = [m["seconds"] / m["n"] for m in mine]
        limit = sorted(
            (m["model_only"] + m["decode_only"]) / s for m, s in zip(mine, share, strict=True)
        )
        harness.record(
            name,
            f"{count} JPEGs to pooled features",
            "timm, float32, DataLoader with 2 workers",
            f"≥ {bar}×",
            harness.words(harness.ratio(rate, peer)),
            f"{statistics.median(rate):.0f} against {statistics.median(peer):.1f} images a second",
            quick=args.quick,
        )
        harness.record(
            f"{name}: limit",
            "the same",
            "1 / (model-only + decode-only time an image), both on all cores",
            "≥ 85 %",
            f"{statistics.median(limit):.0%} ({limit[0]:.0%}–{limit[-1]:.0%}, n = {rounds})",
            quick=args.quick,
        )


if __name__ == "__main__":
    main()
