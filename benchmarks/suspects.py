"""Labels turned at random, found again: precision and recall of `finetune check --labels`.

    python benchmarks/suspects.py CELLS.jsonl NAME=DATA … [--rates 0.02,0.05,0.1] [--seeds 0-2]
    python benchmarks/suspects.py CELLS.jsonl --table

A cell is one set, rate and seed: that share of the training and validation labels becomes another
class, drawn evenly; the SVM is chosen and fitted on these labels as a job would, and the suspects
are listed. Counted are, of the labels turned (n): the precision among the first n suspects (a list
that is shorter counts as wrong beyond its end), precision and recall of the whole list, and how
often the class proposed is the right one. Images whose own label is wrong or in doubt count against
the precision. Cells that CELLS.jsonl holds are not done again: kill it, and go on later.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from finetuning import cells, numbers, processor

from finetune import analysis, options
from finetune.evaluation import fitting, suspects
from finetune.features.store import Store
from finetune.progress import no_bar, quiet

MEASURES = ("at_n", "precision", "recall", "proposed")


def measure(data: str, rate: float, seed: int) -> dict[str, Any]:
    """One cell."""
    settings, _ = options.build(data, None, (), {"strategy": "svm", "seed": seed})
    store = Store()
    try:
        pictures, ids = analysis.scan(settings, store, quiet)
        rng = np.random.default_rng([seed, 77])
        rest = np.flatnonzero(pictures.split != "test")
        count = round(rate * len(rest))
        turned = rng.choice(rest, count, replace=False)
        truth, labels = pictures.labels, pictures.labels.copy()
        steps = rng.integers(1, len(pictures.classes), count)
        labels[turned] = (labels[turned] + steps) % len(pictures.classes)
        pictures = dataclasses.replace(pictures, labels=labels)
        began = time.process_time()
        seen = analysis.take(settings, pictures, ids, store, quiet, no_bar)
        found = suspects.find(seen, fitting.baseline(seen, quiet), near=0).training
        seconds = time.process_time() - began
    finally:
        store.close()
    # a suspect stands for its copies, too: those that were not turned are conflicts, and not here
    hit = np.array([one.index in set(turned.tolist()) for one in found], dtype=bool)
    right = [one.proposed == truth[one.index] for one, h in zip(found, hit, strict=True) if h]
    return {
        "turned": count,
        "images": len(rest),
        "suspects": len(found),
        "at_n": float(hit[:count].sum() / count),
        "precision": float(hit.mean()) if len(hit) else 0.0,
        "recall": float(hit.sum() / count),
        "proposed": float(np.mean(right)) if right else 0.0,
        "cpu_seconds": seconds,
    }


def table(path: Path) -> str:
    groups = defaultdict(list)
    for cell in cells(path):
        groups[cell["set"], cell["rate"]].append(cell)
    lines = [
        "| set | labels turned | first n right | precision of the list | recall | right class | "
        "suspects | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, rate), own in groups.items():
        words = []
        for key in MEASURES:
            values = [100 * cell[key] for cell in own]
            words.append(f"{np.mean(values):.0f} % ({min(values):.0f}–{max(values):.0f})")
        count = f"{own[0]['turned']} of {own[0]['images']} ({rate:.0%})"
        listed = f"{np.mean([cell['suspects'] for cell in own]):.0f}"
        lines.append(f"| {name} | {count} | {' | '.join(words)} | {listed} | {len(own)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", type=Path)
    parser.add_argument("sets", nargs="*", metavar="NAME=DATA")
    parser.add_argument("--rates", default="0.02,0.05,0.1")
    parser.add_argument("--seeds", default="0-2")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    done = {(c["set"], c["rate"], c["seed"]) for c in cells(given.cells)}
    for text in given.sets:
        name, _, data = text.partition("=")
        for rate in map(float, given.rates.split(",")):
            for seed in numbers(given.seeds):
                if (name, rate, seed) in done:
                    continue
                key = {"set": name, "rate": rate, "seed": seed, "cpu": processor()}
                cell = {**key, **measure(data, rate, seed)}
                print(cell, file=sys.stderr, flush=True)
                with given.cells.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(cell) + "\n")
    if given.table or not given.sets:
        print(table(given.cells))


if __name__ == "__main__":
    main()
