"""What ships against the SVM alone, on the same test images: one cell per set and seed.

    python benchmarks/finetuning.py CELLS.jsonl NAME=FOLDER … --seeds 0-4 [--shots K] [--set K=V …]
    python benchmarks/finetuning.py CELLS.jsonl --table

Each cell is one `finetune fit` in a process of its own, with an empty run folder and a feature
store that is shared. The average is asked for, so that every contender is fitted on all images;
which one the rule would have shipped follows from contenders.json, which holds the selection
images' figures of all of them. Cells that CELLS.jsonl holds are not done again: kill it, and go on
later. `--table` prints the mean over seeds of each set: the SVM, the fine-tuned model and the
average on test images, what ships and its gain over the SVM in points with the standard error over
seeds, and seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("svm", "fine-tuned", "average")


def numbers(text: str) -> list[int]:
    """`0-4,7` as a list."""
    result: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        result += range(int(low), int(high or low) + 1)
    return result


def cells(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measure(name: str, folder: str, seed: int, more: list[str]) -> dict[str, Any]:
    """One cell: the contenders of a job."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        command = [
            *(sys.executable, "-m", "finetune", "fit", folder, "--seed", str(seed)),
            *("--out", str(run), "--set", "policy.ship=average"),
            *(word for text in more for word in ("--set", text)),
        ]
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name}, seed {seed}: {done.stderr[-2000:]}")
        about = json.loads((run / "run.json").read_text(encoding="utf-8"))
        return {
            "set": name,
            "seed": seed,
            "settings": more,
            "cpu": processor(),
            "wall": time.monotonic() - began,
            "stages": about["stages"],
            "shipped": about["shipped"],
            "metrics": json.loads((run / "metrics.json").read_text(encoding="utf-8")),
            "contenders": json.loads((run / "contenders.json").read_text(encoding="utf-8")),
            "plan": json.loads((run / "plan.json").read_text(encoding="utf-8"))["plan"],
            "rule": rule(json.loads((run / "contenders.json").read_text(encoding="utf-8"))),
        }


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")


def rule(rows: list[dict[str, Any]]) -> str:
    """What would have shipped, had nothing been asked for; the SVM where nothing was trained."""
    return next((row["kind"] for row in rows if row.get("would_ship")), "svm")


def accuracies(cell: dict[str, Any]) -> dict[str, float]:
    """Test accuracy of each contender; where nothing was trained, that of the SVM for all."""
    found = {row["kind"]: row["test"]["accuracy"]["value"] for row in cell["contenders"]}
    alone = cell["metrics"]["test/top1"]["value"]
    return {kind: found.get(kind, alone) for kind in KINDS}


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    """A line per set."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for cell in found:
        groups[cell["set"], " ".join(cell["settings"])].append(cell)
    yield "| set | seeds | SVM | fine-tuned | average | ships (its gain over the SVM) | seconds |"
    yield "|---|---|---|---|---|---|---|"
    for (name, settings), rows in sorted(groups.items()):
        by = [accuracies(row) for row in rows]
        mean = {kind: 100 * float(np.mean([one[kind] for one in by])) for kind in KINDS}
        gains = [100 * (one[row["rule"]] - one["svm"]) for one, row in zip(by, rows, strict=True)]
        error = (
            float(np.std(gains, ddof=1) / np.sqrt(len(gains))) if len(gains) > 1 else float("nan")
        )
        ships = ", ".join(
            f"{kind} {sum(row['rule'] == kind for row in rows)}"
            for kind in KINDS
            if any(row["rule"] == kind for row in rows)
        )
        walls = [row["wall"] for row in rows]
        yield (
            f"| {name} {settings} | {len(rows)} | {mean['svm']:.2f} | {mean['fine-tuned']:.2f} "
            f"| {mean['average']:.2f} | {ships} ({np.mean(gains):+.2f} ± {error:.2f}) "
            f"| {np.median(walls):.0f} ({min(walls):.0f}–{max(walls):.0f}) |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", type=Path, metavar="CELLS.jsonl")
    parser.add_argument("sets", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--seeds", default="0", type=numbers)
    parser.add_argument("--set", dest="more", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--table", action="store_true", help="print what is there")
    options = parser.parse_args()
    known = {(cell["set"], cell["seed"], *cell["settings"]) for cell in cells(options.cells)}
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
    for seed in options.seeds:
        for text in options.sets:
            name, _, folder = text.partition("=")
            if (name, seed, *options.more) in known:
                continue
            cell = measure(name, folder or name, seed, options.more)
            with options.cells.open("a", encoding="utf-8") as file:
                file.write(json.dumps(cell) + "\n")
            print(f"{name}, seed {seed}: {accuracies(cell)}, {cell['wall']:.0f} s", flush=True)
    print("\n".join(table(cells(options.cells))))


if __name__ == "__main__":
    main()
