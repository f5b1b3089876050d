"""What to label next against chance: learning curves of the methods of `finetune suggest`.

    python benchmarks/suggest.py CELLS.jsonl NAME=DATA … [--seeds 0-4] [--step 50] [--rounds 3]
    python benchmarks/suggest.py CELLS.jsonl --table

A cell is one set, method and seed. The training and validation images are the pool; two labelled
images a class begin. In each round an SVM (least squares, on the two taps of the two last stages)
is chosen and fitted on what is labelled, judged on the test images, and `step` images of the pool
are labelled as the method says. All methods begin with the same images. The table has the mean
accuracy on test of each round, and the gain over chance in points with its standard error over
seeds, paired. Cells that CELLS.jsonl holds are not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from finetuning import cells, numbers, processor
from numpy.typing import NDArray

from finetune import analysis, options
from finetune.evaluation import suggest
from finetune.features.store import Store
from finetune.heads import svm
from finetune.heads.head import side_by_side, softmax
from finetune.network import Tap
from finetune.progress import no_bar, quiet

START = 2  # labelled images a class
TAPS = [Tap("stage6"), Tap("stage5")]


def look(data: str, seed: int) -> analysis.Look:
    taps = [str(tap) for tap in TAPS]
    settings, _ = options.build(data, None, (), {"strategy": "svm", "seed": seed, "taps": taps})
    store = Store()
    try:
        pictures, ids = analysis.scan(settings, store, quiet)
        return analysis.take(settings, pictures, ids, store, quiet, no_bar)
    finally:
        store.close()


def curve(seen: analysis.Look, method: Any, seed: int, step: int, rounds: int) -> list[float]:
    """Accuracy on the test images after each round."""
    pool, test = seen.part("train", "val"), seen.part("test")
    y, classes = seen.images.labels, seen.images.classes
    random = np.random.default_rng([seed, 41])
    known = [
        int(i) for c in range(len(classes)) for i in random.permutation(pool[y[pool] == c])[:START]
    ]
    found = []
    for k in range(rounds + 1):
        rows = np.array(known)
        fitted = svm.choose(
            {tap: seen.features.blocks[tap][rows] for tap in TAPS},
            y[rows],
            classes,
            default_taps=TAPS,
            seed=seed,
            kernels=("lssvm",),
        )
        head = fitted.head

        def blocks(at: NDArray[Any]) -> list[Any]:
            return [np.asarray(seen.features.blocks[tap][at]) for tap in head.taps]  # noqa: B023

        found.append(float((head.scores(blocks(test)).argmax(1) == y[test]).mean()))
        rest = np.setdiff1d(pool, rows)
        p = softmax(head.scores(blocks(rest)), head.temperature)
        x = side_by_side(blocks(rest), True)
        known += rest[suggest.pick(p, x, step, method=method, seed=seed * 100 + k)].tolist()
    return found


def table(path: Path) -> str:
    groups: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(dict)
    for cell in cells(path):
        groups[cell["set"], cell["method"]][cell["seed"]] = cell["curve"]
    first = cells(path)[0]
    lines, steps = [], range(len(first["curve"]))
    heads = [f"{k} × {first['step']} more" if k else "at first" for k in steps]
    lines += [f"| set | method | {' | '.join(heads)} | seeds |", "|---" * (len(heads) + 3) + "|"]
    for (name, method), own in groups.items():
        base = groups[name, "random"]
        words = []
        for k in steps:
            values = np.array([own[seed][k] for seed in own])
            gain = 100 * np.array([own[s][k] - base[s][k] for s in own if s in base])
            error = gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else float("nan")
            more = f" ({gain.mean():+.1f} ± {error:.1f})" if method != "random" and k else ""
            words.append(f"{100 * values.mean():.1f} %{more}")
        lines.append(f"| {name} | {method} | {' | '.join(words)} | {len(own)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", type=Path)
    parser.add_argument("sets", nargs="*", metavar="NAME=DATA")
    parser.add_argument("--seeds", default="0-4")
    parser.add_argument("--step", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    done = {(c["set"], c["method"], c["seed"], c["step"]) for c in cells(given.cells)}
    for text in given.sets:
        name, _, data = text.partition("=")
        for seed in numbers(given.seeds):
            todo = [m for m in suggest.METHODS if (name, m, seed, given.step) not in done]
            seen = look(data, seed) if todo else None
            for method in todo:
                assert seen is not None
                key = {"set": name, "method": method, "seed": seed, "step": given.step}
                found = curve(seen, method, seed, given.step, given.rounds)
                cell = {**key, "cpu": processor(), "curve": found}
                print(cell, file=sys.stderr, flush=True)
                with given.cells.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(cell) + "\n")
    if given.table or not given.sets:
        print(table(given.cells))


if __name__ == "__main__":
    main()
