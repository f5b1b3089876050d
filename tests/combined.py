"""Small finished runs on the same drawn shapes, which several test files combine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from finetune import job

COMMON: dict[str, Any] = {
    "weights": "random",
    "engine": "torch",
    "precision": "float32",
    "taps": ["pooled"],
}
QUICK = ("svm.kernels=[linear]", "svm.folds=3")
UNSEEN = ("policy.ship=fine-tuned", "policy.refit=false")


class Runs(NamedTuple):
    """Finished runs: SVMs on two networks, one of another seed, and fine-tuned ones that began at
    the same weights."""

    first: Path
    second: Path
    other: Path  # another seed: other test images
    tuned: Path
    sharper: Path  # a larger learning rate
    refitted: Path  # on the images that chose it, too


def make(images: Path, home: Path) -> Runs:
    return Runs(
        svm(images, home / "first"),
        svm(images, home / "second", "test_resnet"),
        svm(images, home / "other", seed=1),
        tuned(images, home / "tuned", "train.lr=0.001"),
        tuned(images, home / "sharper", "train.lr=0.01"),
        tuned(images, home / "refitted", "policy.refit=true"),
    )


def svm(images: Path, out: Path, backbone: str = "test_efficientnet", seed: int = 0) -> Path:
    """An SVM on a small network of random weights."""
    return _fit(images, out, "svm", backbone, seed, QUICK)


def tuned(images: Path, out: Path, *more: str) -> Path:
    """A fine-tuned last stage; the images that chose it stay unseen unless `more` says so."""
    return _fit(images, out, "stages:1", "test_efficientnet", 0, (*QUICK, *UNSEEN, *more))


def _fit(
    images: Path, out: Path, strategy: str, backbone: str, seed: int, assignments: tuple[str, ...]
) -> Path:
    return job.fit(
        images,
        out=out,
        strategy=strategy,
        backbone=[backbone],
        seed=seed,
        epochs=None if strategy == "svm" else 2,
        assignments=assignments,
        **COMMON,
    ).path
