"""Images unlike the training images, told from test images: nearest neighbours, softmax, energy.

    python benchmarks/unfamiliar.py CELLS.jsonl IN=DATA,OUT=DATA … [--seeds 0-2]
    python benchmarks/unfamiliar.py CELLS.jsonl --table

A cell is one pair of sets and one seed. The SVM of a job is fitted on IN; its test images are those
to be kept, at most 1,000 images of OUT (drawn by the seed) those to be flagged. DATA `letters`
draws letters of a font, 8×8 like scikit-learn's digits, without those that look like digits.
Measured are the AUROC of four scores: the distance to training images that `predict --unknown`
reads, one minus the cosine to the nearest of them, one minus the largest probability, and the
energy of the scores (Liu et al. 2020); and, at the level of 0.99, the share of test images that are
flagged (false alarms) and of images of OUT. Cells that CELLS.jsonl holds are not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from finetuning import cells, numbers, processor
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from finetune import analysis, options
from finetune.data import images
from finetune.evaluation import fitting
from finetune.features import extraction, familiarity, knn
from finetune.features.store import Store
from finetune.heads import svm
from finetune.heads.head import AnyHead, side_by_side, softmax
from finetune.progress import no_bar, quiet

MOST = 1000
LETTERS = "ACDEFGHJKLMNPQRTUVWXYabdefhkmnprtuwxy"


def letters(folder: Path, count: int = 40) -> Path:
    """A folder per letter, drawn askew, in the form of scikit-learn's digits: 8×8, 17 greys."""
    rng = np.random.default_rng(0)
    font = ImageFont.load_default(size=26)
    for letter in LETTERS:
        name = letter if letter.isupper() else f"small-{letter}"
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = Image.new("L", (40, 40))
            ImageDraw.Draw(image).text((20, 20), letter, 255, font, anchor="mm", stroke_width=1)
            image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
            left, top, right, bottom = image.getbbox()
            side = max(right - left, bottom - top)
            x, y = (left + right - side) // 2, (top + bottom - side) // 2
            small = image.crop((x, y, x + side, y + side)).resize((8, 8), Image.Resampling.BOX)
            grey = np.rint(np.asarray(small) / 255 * 16) * (255 / 16)
            Image.fromarray(np.rint(grey).astype(np.uint8)).save(folder / name / f"{i:03d}.png")
    return folder


def auroc(known: NDArray[Any], other: NDArray[Any]) -> float:
    """The chance that an image of OUT has the higher score, ties by half."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([known, other]))
    total = ranks[len(known) :].sum() - len(other) * (len(other) + 1) / 2
    return float(total / (len(known) * len(other)))


def _nearest(train: list[Any], x: list[Any]) -> NDArray[Any]:
    """One minus the cosine to the nearest training image."""
    cosines, _ = knn.neighbours(side_by_side(train, True), 1, queries=side_by_side(x, True))
    return 1 - cosines[:, 0]


def energy(head: AnyHead, blocks: list[Any]) -> NDArray[Any]:
    z = head.scores(blocks).astype(np.float64) / head.temperature
    return -(np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) + z.max(1)) * head.temperature


def measure(inside: str, outside: str, seed: int) -> dict[str, Any]:
    """One cell."""
    settings, _ = options.build(inside, None, (), {"strategy": "svm", "seed": seed})
    store = Store()
    try:
        pictures, ids = analysis.scan(settings, store, quiet)
        seen = analysis.take(settings, pictures, ids, store, quiet, no_bar)
        base = fitting.baseline(seen, quiet)
        both, test = seen.part("train", "val"), seen.part("test")
        head = svm.refit(base, seen.blocks(both), seen.images.labels[both])
        own = [np.asarray(seen.features.blocks[tap][test]) for tap in head.taps]
        with tempfile.TemporaryDirectory() as folder:
            text = str(letters(Path(folder) / "letters")) if outside == "letters" else outside
            found = images.load(text)
            chosen = np.random.default_rng(seed).permutation(len(found))[:MOST]
            used, bits = seen.how
            others = extraction.extract(
                found.subset(np.sort(chosen)),
                seen.named.network,
                head.taps,
                seen.named.load,
                store=store,
                engine_name=used,
                precision=bits,
            )
            far = [np.asarray(others.blocks[tap]) for tap in head.taps]
        train = [np.asarray(seen.features.blocks[tap][both]) for tap in head.taps]
        began = time.process_time()
        known = familiarity.fit(train, seen.groups[both], normalize=head.normalize)
        seconds = time.process_time() - began
        assert known is not None
        a, b = known.percentile(own), known.percentile(far)
        da, db = known.distance(own), known.distance(far)
        cosine = [_nearest(train, x) for x in (own, far)]
        pa, pb = (softmax(head.scores(x), head.temperature).max(1) for x in (own, far))
    finally:
        store.close()
    return {
        "test": len(test),
        "out": len(b),
        "rows": len(known.rows),
        "bytes": known.rows.nbytes + known.space.components.nbytes,
        "neighbours": auroc(da, db),
        "cosine": auroc(*cosine),
        "softmax": auroc(1 - pa, 1 - pb),
        "energy": auroc(energy(head, own), energy(head, far)),
        "false_alarms": float((a > familiarity.LEVEL).mean()),
        "found": float((b > familiarity.LEVEL).mean()),
        "accuracy": float((head.scores(own).argmax(1) == seen.images.labels[test]).mean()),
        "cpu_seconds": seconds,
    }


def table(path: Path) -> str:
    groups = defaultdict(list)
    for cell in cells(path):
        groups[cell["inside"], cell["outside"]].append(cell)
    lines = [
        "| trained on | against | AUROC neighbours | by cosine | softmax | energy | "
        "false alarms at 0.99 | found at 0.99 | rows kept | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (inside, outside), own in groups.items():
        words = []
        for key in ("neighbours", "cosine", "softmax", "energy"):
            values = [cell[key] for cell in own]
            words.append(f"{np.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})")
        for key in ("false_alarms", "found"):
            values = [100 * cell[key] for cell in own]
            words.append(f"{np.mean(values):.1f} % ({min(values):.1f}–{max(values):.1f})")
        rows = f"{own[0]['rows']} ({own[0]['bytes'] / 2**20:.0f} MB)"
        counts = f"{inside} (test {own[0]['test']}) | {outside} ({own[0]['out']})"
        lines.append(f"| {counts} | {' | '.join(words)} | {rows} | {len(own)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", type=Path)
    parser.add_argument("pairs", nargs="*", metavar="IN=DATA,OUT=DATA")
    parser.add_argument("--seeds", default="0-2")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    done = {(c["inside"], c["outside"], c["seed"]) for c in cells(given.cells)}
    for text in given.pairs:
        (inside, data), (outside, other) = (part.split("=", 1) for part in text.split(","))
        for seed in numbers(given.seeds):
            if (inside, outside, seed) in done:
                continue
            key = {"inside": inside, "outside": outside, "seed": seed, "cpu": processor()}
            cell = {**key, **measure(data, other, seed)}
            print(cell, file=sys.stderr, flush=True)
            with given.cells.open("a", encoding="utf-8") as file:
                file.write(json.dumps(cell) + "\n")
    if given.table or not given.pairs:
        print(table(given.cells))


if __name__ == "__main__":
    main()
