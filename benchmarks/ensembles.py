"""The average of SVM runs on three backbones against the best of them, on the same test images: one
cell per set and seed.

    python benchmarks/ensembles.py CELLS.jsonl NAME=FOLDER … --seeds 0-4
    python benchmarks/ensembles.py CELLS.jsonl --table

Each cell is three times `finetune fit --strategy svm` and then `finetune ensemble`, in an empty run
folder and with a feature store that is shared. The best run is the one that its own selection
images (out of fold, or validation) call the best, as a user would choose it; the best on test
stands beside it. Prediction is timed on 64 test images, opened beforehand, in CPU time, the faster
of two passes. Cells that CELLS.jsonl holds are not done again: kill it, and go on later. `--table`
prints the mean over seeds of each set, gains in points with their standard error over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from finetuning import cells, numbers, processor

BACKBONES = tuple(f"tf_efficientnet_lite{k}" for k in range(3))

TIMED = 64  # test images


def command(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "finetune", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr[-2000:]}")


def milliseconds(run: Path, folder: Path) -> float:
    """CPU time of one test image, the network opened beforehand."""
    import finetune
    from finetune.evaluation import predictions

    table = predictions.read_predictions(run / "predictions.csv")
    pictures = [str(folder / path) for path in table.paths[:TIMED]]
    with finetune.load(run) as model:
        model.predict(pictures[:2])
        best = np.inf
        for _ in range(2):
            began = time.process_time()
            model.predict(pictures)
            best = min(best, time.process_time() - began)
    return 1000 * float(best) / len(pictures)


def measure(name: str, folder: str, seed: int) -> dict[str, Any]:
    """One cell: three runs and their average."""
    with tempfile.TemporaryDirectory() as scratch:
        runs = [Path(scratch) / backbone for backbone in BACKBONES]
        fitting = []
        for run in runs:
            began = time.monotonic()
            command(
                *("fit", folder, "--backbone", run.name, "--strategy", "svm"),
                *("--seed", str(seed), "--out", str(run)),
            )
            fitting.append(time.monotonic() - began)
        both = Path(scratch) / "average"
        command("ensemble", *map(str, runs), "--out", str(both))
        rows = json.loads((both / "contenders.json").read_text(encoding="utf-8"))
        return {
            "set": name,
            "seed": seed,
            "cpu": processor(),
            "fitting": fitting,
            "contenders": rows,
            "milliseconds": [milliseconds(run, Path(folder)) for run in (both, *runs)],
        }


def figures(cell: dict[str, Any]) -> dict[str, float]:
    """Test accuracy and log loss of the average, of the run that selection calls best, and of the
    best on test; times an image."""
    average, *single = cell["contenders"]

    def worth(row: dict[str, Any]) -> tuple[float, float]:
        return row["selection"]["accuracy"]["value"], -row["selection"]["log_loss"]

    chosen = max(range(len(single)), key=lambda k: worth(single[k]))
    accuracy = [row["test"]["accuracy"]["value"] for row in single]
    return {
        "average": average["test"]["accuracy"]["value"],
        "chosen": accuracy[chosen],
        "best": max(accuracy),
        "loss": average["test"]["log_loss"],
        "chosen_loss": single[chosen]["test"]["log_loss"],
        "ms": cell["milliseconds"][0],
        "chosen_ms": cell["milliseconds"][1 + chosen],
        "n": average["test"]["accuracy"]["n"],
    }


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    """A line per set."""
    groups: dict[str, list[dict[str, float]]] = defaultdict(list)
    for cell in found:
        groups[cell["set"]].append(figures(cell))
    yield (
        "| set | seeds | test images | average | best run by selection | gain, points "
        "| best run on test | log loss | CPU ms an image |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, rows in sorted(groups.items()):
        mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        gains = [100 * (row["average"] - row["chosen"]) for row in rows]
        error = float(np.std(gains, ddof=1) / np.sqrt(len(gains))) if len(gains) > 1 else np.nan
        yield (
            f"| {name} | {len(rows)} | {mean['n']:.0f} | {mean['average']:.1%} "
            f"| {mean['chosen']:.1%} | {np.mean(gains):+.2f} ± {error:.2f} | {mean['best']:.1%} "
            f"| {mean['loss']:.3f} (run {mean['chosen_loss']:.3f}) "
            f"| {mean['ms']:.1f} (run {mean['chosen_ms']:.1f}) |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", type=Path, metavar="CELLS.jsonl")
    parser.add_argument("sets", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--seeds", default="0", type=numbers)
    parser.add_argument("--table", action="store_true", help="print what is there")
    options = parser.parse_args()
    known = {(cell["set"], cell["seed"]) for cell in cells(options.cells)}
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
    for seed in options.seeds:
        for text in options.sets:
            name, _, folder = text.partition("=")
            if (name, seed) in known:
                continue
            cell = measure(name, folder, seed)
            with options.cells.open("a", encoding="utf-8") as file:
                file.write(json.dumps(cell) + "\n")
            print(name, seed, figures(cell), flush=True)
    if options.table or not options.sets:
        print("\n".join(table(cells(options.cells))))


if __name__ == "__main__":
    main()
