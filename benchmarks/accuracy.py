"""What `finetune fit` ships against a fixed baseline, on the same splits: accuracy on test, and the
time of the whole job.

    python benchmarks/accuracy.py stamps --seeds 10-19 --test 0.25
    python benchmarks/accuracy.py digits --seeds 0-2
    python benchmarks/accuracy.py mnist5k --seeds 0-2 --alone
    python benchmarks/accuracy.py --quick             digits, one seed; not recorded

The baseline is the usual one: pooled end of EfficientNet-Lite0 on its own centre crop, L2,
scikit-learn's LinearSVC, C of
0.1 … 100 by 5-fold cross-validation, fitted on all that is not test. Each seed splits,
cross-validates and trains anew. The store is cold in every round; the converted network is in the
cache from the second on (the first also says what it costs). `SVM` is the job's own SVM on the same
test images, which differs from what ships only where fine-tuning does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import harness
import numpy as np

GRID = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]


def fit(data: Path, seed: int, test: float, cache: Path, out: Path) -> dict[str, float]:
    """One whole job in a process of its own; the feature store is emptied first, the converted
    networks stay."""
    shutil.rmtree(cache / "features", ignore_errors=True)
    start = time.perf_counter()
    command = [
        harness.COMMANDS / "finetune",
        "fit",
        data,
        "--seed",
        str(seed),
        "--set",
        f"data.test_share={test}",
        "--out",
        out,
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "REGRAFT_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    seconds = time.perf_counter() - start
    metrics, about = (json.loads((out / name).read_text()) for name in ("metrics.json", "run.json"))
    top1 = metrics["test/top1"]["value"]
    return {
        "shipped": top1,
        "svm": metrics.get("test/svm", metrics["test/top1"])["value"],
        "seconds": seconds,
        "tuned": float("fine-tune" in about["stages"]),
    }


def baseline(data: Path, seed: int, test: float) -> float:
    """Accuracy of the fixed baseline on the test part of the same split."""
    from sklearn.model_selection import GridSearchCV
    from sklearn.preprocessing import normalize
    from sklearn.svm import LinearSVC

    from finetune.backbones import catalog
    from finetune.data import images
    from finetune.features import extraction
    from finetune.features.store import Store
    from finetune.network import Tap

    store, named = Store(), catalog.open_named()
    source = images.load(str(data))
    ids = extraction.digests(source, store)
    split = images.make_splits(source, ids, seed=seed, test=test, val=0.15).split
    assert split is not None
    found = extraction.extract(
        source,
        catalog.framed(named.network, "crop"),
        [Tap("pooled")],
        named.load,
        known=ids,
        store=store,
        precision="float32",
    )
    X, y, held = normalize(np.asarray(found.blocks[Tap("pooled")])), source.labels, split == "test"
    store.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search = GridSearchCV(LinearSVC(max_iter=5000), {"C": GRID}, cv=5).fit(X[~held], y[~held])
    return float(search.score(X[held], y[held]))


def spread(values: list[float], scale: float = 100, unit: str = "%") -> str:
    return (
        f"{scale * np.mean(values):.1f}{unit} "
        f"({scale * min(values):.1f}–{scale * max(values):.1f}, n = {len(values)})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "name", nargs="?", default="digits", choices=["digits", "stamps", "mnist5k"]
    )
    parser.add_argument("--seeds", default="0-2", help="first-last")
    parser.add_argument("--test", type=float, default=0.2, help="share of the images that judge")
    parser.add_argument(
        "--alone",
        action="store_true",
        help="leave out the baseline, which takes longer than the job",
    )
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    first, last = map(int, options.seeds.split("-"))
    seeds = [first] if options.quick else range(first, last + 1)
    data = harness.dataset(options.name)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REGRAFT_CACHE"] = str(Path(folder) / "baseline")
        ours, theirs = [], []
        for seed in seeds:
            ours.append(
                fit(data, seed, options.test, Path(folder) / "cache", Path(folder) / str(seed))
            )
            theirs.append(np.nan if options.alone else baseline(data, seed, options.test))
            print(f"seed {seed}: {ours[-1]}, baseline {theirs[-1]:.4f}", flush=True)
    shipped, svm = [o["shipped"] for o in ours], [o["svm"] for o in ours]
    gains = [100 * (o - t) for o, t in zip(shipped, theirs, strict=True)]
    warm = [o["seconds"] for o in ours[1:]] or [ours[0]["seconds"]]
    harness.record(
        f"accuracy, {options.name}, seeds {options.seeds}",
        f"whole `fit`, {1 - options.test:.0%} / {options.test:.0%}",
        "not measured" if options.alone else f"pooled, L2, LinearSVC: {spread(theirs)}",
        {
            "stamps": "≥ +2 points, ≤ 45 s",
            "digits": "≥ 99 %, ≤ 60 s",
            "mnist5k": "≥ 98.9 %, ≤ 180 s",
        }[options.name],
        spread(shipped)
        + (
            ""
            if options.alone
            else f": {np.mean(gains):+.1f} points ({min(gains):+.1f} to {max(gains):+.1f})"
        ),
        f"{spread(warm, 1, ' s')}, with the conversion {ours[0]['seconds']:.0f} s; "
        f"shipped − SVM on test {100 * (np.mean(shipped) - np.mean(svm)):+.1f} points; "
        f"fine-tuned in {sum(o['tuned'] for o in ours):.0f} of {len(ours)}",
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
