"""Features in bfloat16 against float32: is the SVM as good on them?

    python benchmarks/precision.py             digits, stamps and mnist5k; bar: within 0.3 points
    python benchmarks/precision.py --quick     300 of the digits, 2 draws of folds; not recorded

EfficientNet-Lite0, the taps that `finetune fit` compares, the whole image. Taps, kernel and C are
chosen once, on the float32 features (`svm.choose`, without logistic regression); that same machine
is then cross-validated on the features of either precision with the same five folds, on all images
(at most 3,000, a seeded draw), for several draws of folds. The difference is that of the accuracies
out of fold, in points, bf16 − float32; its standard error is the paired one over images. Where the
hardware has no bf16 it is emulated: the numbers are the same, only slower. OpenVINO, where it is
installed.
"""

from __future__ import annotations

import argparse

import harness
import numpy as np


def compare(name: str, draws: int, quick: bool) -> None:
    from finetune import analysis
    from finetune.backbones import catalog
    from finetune.data import images
    from finetune.features import extraction
    from finetune.heads import crossval, svm
    from finetune.network import Tap

    named = catalog.open_named()
    network = catalog.framed(named.network, "whole")
    source = images.load(str(harness.dataset(name)))
    rows = crossval.subset(source.labels, np.arange(len(source)), 300 if quick else svm.ROWS, 0)
    source = source.subset(rows)
    taps = analysis.policy_taps(network)
    blocks = {}
    for bits in ("float32", "bf16"):
        found = extraction.extract(source, network, taps, named.load, precision=bits)
        blocks[bits] = {tap: np.asarray(block) for tap, block in found.blocks.items()}
    kernels = ("linear", "rbf", "lssvm")
    chosen = svm.choose(
        blocks["float32"],
        source.labels,
        source.classes,
        default_taps=(Tap("pooled"),),
        kernels=kernels,
    )
    best = chosen.candidates[0]
    setting = crossval.Setting(best.taps, best.kernel, best.gamma)
    groups = images.group_ids(source, found.digests)
    right: dict[str, list[np.ndarray]] = {"float32": [], "bf16": []}
    for seed in range(draws):
        fold, _ = crossval.assign_folds(source.labels, groups, 5, seed, source.classes)
        for bits, given in blocks.items():
            table = crossval.Rows(given, source.labels, np.arange(len(source)), fold, None)
            right[bits].append(next(table.trials(setting, [best.C])).right)
    by_draw = [
        100 * (b.mean() - f.mean()) for b, f in zip(right["bf16"], right["float32"], strict=True)
    ]
    gain = np.mean(right["bf16"], axis=0) - np.mean(right["float32"], axis=0)
    error = 100 * gain.std() / np.sqrt(len(gain))
    accuracy = {bits: np.mean(values) for bits, values in right.items()}
    harness.record(
        f"precision, {name}",
        f"{len(source):,} images, {' + '.join(map(str, best.taps))}, {best.kernel}, C = "
        f"{best.C:.3g}",
        "the same machine on float32 features",
        "± 0.3 points",
        f"{100 * gain.mean():+.2f} points ± {error:.2f} (draws {min(by_draw):+.2f} to "
        f"{max(by_draw):+.2f}, n = {draws})",
        f"{accuracy['bf16']:.2%} against {accuracy['float32']:.2%} out of fold",
        quick=quick,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    harness.use_cache()
    for name in ("digits",) if options.quick else ("digits", "stamps", "mnist5k"):
        compare(name, 2 if options.quick else 10, options.quick)


if __name__ == "__main__":
    main()
