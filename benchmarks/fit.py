"""From a folder of images to a judged classifier: `finetune fit` against fastai's fine_tune.

    python benchmarks/fit.py small       stamps, fastai's fine_tune(5); bar: ≥ 8× less time at ≥ its
    accuracy python benchmarks/fit.py medium      mnist5k, fastai with the fewest epochs that reach
    our accuracy; bar: ≥ 3× less time python benchmarks/fit.py SET --quick       1 round on 150
    digits, fastai with 1 epoch; not recorded

Both have EfficientNet-Lite0 with the same ImageNet weights, the same test images, and 224 px. Ours
is the whole command `finetune fit` in a process of its own, from an empty feature store; the
converted network is in the cache, and one more run with an empty cache says what converting it
costs. The peer gets our training and validation images together to train on, does not validate
after its epochs, and judges the test images once (peers/fastai_fit.py); its time, too, is that of
the whole process. On digits both are told that mirrored images are no images of the class.

In `medium` the peer's number of epochs is searched once, upward through 1, 2, 3, 5, 7, 10: each a
whole training of its own. The least that reaches our accuracy counts, 10 where none does. That
takes hours: `--epochs N …` tries these alone, and where the last falls short of our accuracy the
ratio is recorded as a lower bound. The peer's seed changes with the rounds; ours, which makes the
split, stays. Image sets: $REGRAFT_BENCH_DATA/NAME, else made by data.py in the temporary folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import harness
import numpy as np

SETS = {  # name → image set, whether mirrored images are of the class, epochs of the peer, bar
    "small": ("stamps", True, (5,), 8),
    "medium": ("mnist5k", False, (1, 2, 3, 5, 7, 10), 3),
}


def sample(source: Path, target: Path, count: int) -> Path:
    """A folder per class with `count` of the images of `source`, an even draw."""
    shutil.rmtree(target, ignore_errors=True)
    files = sorted(source.glob("*/*"))
    for i in np.random.default_rng(0).permutation(len(files))[:count]:
        place = target / files[i].parent.name / files[i].name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files[i], place)
    return target


def ours(folder: Path, flip: bool, networks_from: Path | None) -> harness.Measured:
    """One `finetune fit`: its seconds, its test accuracy, what it ships."""
    with tempfile.TemporaryDirectory() as scratch:
        cache = harness.cold_cache(Path(scratch) / "cache", networks_from)
        command = [
            harness.COMMANDS / "finetune",
            "fit",
            folder,
            "--out",
            Path(scratch) / "run",
            *([] if flip else ["--no-flip"]),
        ]
        done = harness.side(command, {"REGRAFT_CACHE": str(cache)})()
        top1 = json.loads((Path(scratch) / "run" / "metrics.json").read_text())["test/top1"]
        about = json.loads((Path(scratch) / "run" / "run.json").read_text())
        if networks_from is None:
            return {
                "seconds": done["wall"],
                "cache": shutil.copytree(cache, harness.SCRATCH / "fit-cache", dirs_exist_ok=True),
            }
    return {
        "seconds": done["wall"],
        "accuracy": top1["value"],
        "n": top1["n"],
        "shipped": about["shipped"],
    }


def split_file(folder: Path, target: Path) -> Path:
    """The parts that `finetune fit` makes of these images, for the peer."""
    from finetune.data import images

    found = images.load(str(folder))
    found = images.make_splits(found, images.digests(found), seed=0)
    rows = [
        (path, found.classes[label]) for path, label in zip(found.paths, found.labels, strict=True)
    ]
    assert found.split is not None
    parts = {"train": [], "test": []}
    for row, part in zip(rows, found.split, strict=True):
        parts["test" if part == "test" else "train"].append(row)
    target.write_text(json.dumps({"root": str(folder.absolute()), **parts}))
    return target


def compare(name: str, rounds: int, quick: bool, tried: Sequence[int] | None) -> None:
    dataset, flip, epochs, bar = SETS[name]
    most, epochs = epochs[-1], tuple(tried or epochs)
    folder = harness.dataset(dataset if not quick else "digits")
    if quick:
        folder, flip, most, epochs = (
            sample(folder, harness.SCRATCH / "fit-quick", 150),
            False,
            1,
            (1,),
        )
    split = split_file(folder, harness.SCRATCH / f"split-{name}.json")
    first = ours(folder, flip, None)
    mine: list[harness.Measured] = []
    theirs: list[harness.Measured] = []

    def peer(count: int, seed: int) -> harness.Measured:
        script = harness.HERE / "peers" / "fastai_fit.py"
        return harness.side(
            [harness.peer_python(), script, split, str(count), str(int(flip)), str(seed)]
        )()

    harness.peer_python()
    chosen = epochs[0]
    for i in range(rounds):
        mine.append(ours(folder, flip, Path(first["cache"])))
        for count in epochs if i == 0 else (chosen,):
            last, chosen = peer(count, i), count
            print(f"  round {i + 1}: ours {mine[-1]}  theirs {last}", flush=True)
            if last["accuracy"] >= mine[-1]["accuracy"]:
                break
        theirs.append(last)
    assert mine[0]["n"] == theirs[0]["n"], "the two were judged on different images"
    right = [statistics.median(m["accuracy"] for m in side) for side in (mine, theirs)]
    seconds = [
        statistics.median(m[key] for m in side)
        for side, key in ((mine, "seconds"), (theirs, "wall"))
    ]
    result = harness.words(harness.ratio([t["wall"] for t in theirs], [m["seconds"] for m in mine]))
    if right[1] < right[0] and chosen < most:
        result = f"at least {result}: the peer needs more epochs for our accuracy"
    detail = (
        f"{seconds[0]:.1f} against {seconds[1]:.1f} s ({first['seconds']:.1f} s with an empty "
        f"cache, n = 1); "
        f"accuracy {right[0]:.1%} against {right[1]:.1%} on {mine[0]['n']} test images; "
        f"shipped: {mine[-1]['shipped']}"
    )
    harness.record(
        f"fit, {name}",
        f"{dataset if not quick else 'digits'}, whole `finetune fit`, empty feature store",
        f"fastai vision_learner(tf_efficientnet_lite0).fine_tune({chosen}), 224 px",
        f"≥ {bar}×, accuracy ≥",
        result,
        detail,
        quick=quick,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=SETS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, nargs="+", help="of the peer, in place of the search")
    options = parser.parse_args()
    harness.use_cache()
    harness.SCRATCH.mkdir(exist_ok=True)
    compare(options.name, 1 if options.quick else options.rounds, options.quick, options.epochs)


if __name__ == "__main__":
    main()
