"""The linear SVM: a grid of C with cross-validation against scikit-learn, and a large one within
time and memory.

    python benchmarks/svm.py             5,000 × 4,096, 10 classes, 12 values of C, 5 folds; bar: ≥
    5× at equal accuracy python benchmarks/svm.py --large     200,000 × 1,280, 1,000 classes; bar:
    ends within 15 minutes and 8 GB
    --quick                              600 × 512 (4,000 × 256, 100 classes); not recorded

The features are drawn by synthetic.py, which says how and how like real ones they are, and are at
unit length for both.

The peer is `GridSearchCV(LinearSVC)`, all cores, with the same grid and folds; both fit the best C
on all rows at the end. Ours is `crossval.Rows.trials` and `svm.fit_head`: every C, every fold,
every row. (`svm.choose`, which `finetune fit` calls, does less: it compares on at most 3,000 rows,
and takes C by log loss; the detail says its time and accuracy.) The two stop by rules of their own
(ours: a relative duality gap of 1 %, and 0.1 % at the end; liblinear's tol = 1e-4), so that the
accuracy is compared, on 5,000 rows that neither has seen.

`--large` is `svm.choose` on a memory map as `finetune fit` calls it, linear machine only. Its peak
memory counts the resident pages of the map as well. The accuracy is that on 10,000 fresh rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import harness
import numpy as np
import synthetic

GRID = [10.0 ** (e / 2) for e in range(-4, 8)]  # 0.01 … 3162
FOLDS = 5


def prepare(folder: Path, n: int, d: int, classes: int, tests: int) -> None:
    """Write features, labels and folds; with `tests` fresh rows of the same classes."""
    from finetune.heads import crossval

    folder.mkdir(parents=True, exist_ok=True)
    things = max(1, round(n / classes / synthetic.PER_THING))
    for name, rows, draw in (("", n, 0), ("test_", tests, 1)):
        out = np.lib.format.open_memmap(folder / f"{name}X.npy", "w+", np.float32, (rows, d))
        X, y = synthetic.make(rows, d, classes, draw=draw, things=things, out=out)
        for start in range(0, rows, 8192):
            X[start : start + 8192] /= np.linalg.norm(
                X[start : start + 8192], axis=1, keepdims=True
            )
        out.flush()
        np.save(folder / f"{name}y.npy", y)
        if not name:
            fold, _ = crossval.assign_folds(y, None, FOLDS, 0, [str(c) for c in range(classes)])
            np.save(folder / "fold.npy", fold)
    (folder / "grid.json").write_text(json.dumps(GRID))


def load(folder: Path, mmap: bool = False) -> list[np.ndarray]:
    mode = "r" if mmap else None
    return [
        np.load(folder / f"{name}.npy", mmap_mode=mode)
        for name in ("X", "y", "fold", "test_X", "test_y")
    ]


def grid(folder: Path) -> None:
    """Ours, the same work as the peer's."""
    from finetune.heads import crossval, svm
    from finetune.network import Tap

    X, y, fold, test_X, test_y = load(folder)
    tap = Tap("pooled")
    setting = crossval.Setting((tap,), "linear")
    start = time.perf_counter()
    rows = crossval.Rows({tap: X}, y, np.arange(len(y)), fold, None)
    trials = list(rows.trials(setting, GRID))
    best = max(trials, key=lambda trial: trial.accuracy)
    names = [str(c) for c in range(int(y.max()) + 1)]
    head = svm.fit_head({tap: X}, y, names, setting, best.C, None, best.temperature)
    seconds = time.perf_counter() - start
    right = float((head.scores([test_X]).argmax(axis=1) == test_y).mean())
    print(json.dumps({"seconds": seconds, "C": best.C, "cv": best.accuracy, "test": right}))


def choose(folder: Path, given: bool) -> None:
    """Ours as `finetune fit` calls it; with the grid where it is `given`."""
    from finetune.heads import svm
    from finetune.network import Tap

    X, y, _, test_X, test_y = load(folder, mmap=True)
    tap = Tap("pooled")
    names = [str(c) for c in range(int(y.max()) + 1)]
    start = time.perf_counter()
    found = svm.choose(
        {tap: X},
        np.asarray(y),
        names,
        default_taps=(tap,),
        kernels=("linear",),
        folds=FOLDS,
        grid=GRID if given else None,
    )
    seconds, peak = time.perf_counter() - start, harness.peak()
    right = [
        found.head.scores([np.asarray(test_X[i : i + 1024])]).argmax(axis=1) == test_y[i : i + 1024]
        for i in range(0, len(test_y), 1024)
    ]
    C = found.candidates[0].C
    print(
        json.dumps(
            {
                "seconds": seconds,
                "C": C,
                "cv": found.cv_accuracy,
                "test": float(np.concatenate(right).mean()),
                "peak": peak,
            }
        )
    )


def child(*words: str | Path) -> harness.Measured:
    return harness.side([sys.executable, __file__, *words])()


def small(rounds: int, quick: bool) -> None:
    n, d, tests = (600, 512, 600) if quick else (5000, 4096, 5000)
    folder = harness.SCRATCH / f"svm-{n}"
    child("--prepare", folder, str(n), str(d), "10", str(tests))
    from finetune import hardware

    ours = harness.side([sys.executable, __file__, "--grid", folder])
    peer = harness.side(
        [sys.executable, harness.HERE / "peers" / "sklearn_grid.py", folder, str(hardware.cores())]
    )
    mine, theirs = harness.rounds(ours, peer, rounds)
    usual = child("--choose", folder, "grid")
    seconds = [statistics.median(m["seconds"] for m in side) for side in (mine, theirs)]
    difference = 100 * (mine[0]["test"] - theirs[0]["test"])
    detail = (
        f"{seconds[0]:.1f} against {seconds[1]:.1f} s; accuracy on {tests} fresh rows "
        f"{mine[0]['test']:.2%} (C = {mine[0]['C']:.3g}) "
        f"against {theirs[0]['test']:.2%} (C = {theirs[0]['C']:.3g}): {difference:+.2f} "
        f"points; as `fit` calls it: "
        f"{usual['seconds']:.1f} s, {usual['test']:.2%}"
    )
    result = harness.words(
        harness.ratio([t["seconds"] for t in theirs], [m["seconds"] for m in mine])
    )
    work = (
        f"{n:,} × {d:,}, 10 classes, {len(GRID)} values of C, {FOLDS} folds, drawn by synthetic.py"
    )
    peer_words = f"scikit-learn GridSearchCV(LinearSVC), {hardware.cores()} processes"
    harness.record(
        "svm, grid", work, peer_words, "≥ 5×, accuracy ± 0.3 points", result, detail, quick=quick
    )


def large(rounds: int, quick: bool) -> None:
    n, d, classes, tests = (4000, 256, 100, 1000) if quick else (200_000, 1280, 1000, 10_000)
    folder = harness.SCRATCH / f"svm-{n}"
    child("--prepare", folder, str(n), str(d), str(classes), str(tests))
    found = []
    for _ in range(rounds):
        found.append(child("--choose", folder))
        print(f"  {found[-1]}", file=sys.stderr, flush=True)
    minutes = [one["seconds"] / 60 for one in found]
    peak = max(one["peak"] for one in found)
    result = f"{harness.spread(minutes, 'min')}, {peak / 1e9:.1f} GB at most"
    detail = (
        f"accuracy on {tests:,} fresh rows {found[0]['test']:.1%}; the features themselves "
        f"are {n * d * 4 / 1e9:.1f} GB"
    )
    work = f"{n:,} × {d:,}, {classes:,} classes, linear, drawn by synthetic.py"
    harness.record("svm, large", work, "–", "≤ 15 min, ≤ 8 GB", result, detail, quick=quick)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, help="[3; 1 with --quick]")
    for name, many in (("--prepare", 5), ("--grid", 1), ("--choose", "+")):
        parser.add_argument(name, nargs=many, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        folder, *numbers = options.prepare
        prepare(Path(folder), *map(int, numbers))
    elif options.grid:
        grid(Path(options.grid[0]))
    elif options.choose:
        choose(Path(options.choose[0]), len(options.choose) > 1)
    else:
        (large if options.large else small)(
            options.rounds or (1 if options.quick else 3), options.quick
        )


if __name__ == "__main__":
    main()
