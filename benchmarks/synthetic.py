"""Features that are drawn instead of read: as many as wanted, with the statistics of real ones.

    python benchmarks/synthetic.py F.npz     how like real features the drawn ones are (array `X`,
    as `finetune extract` writes)

A feature is the positive part of a Gaussian, as after a ReLU: `max(0, m + class + thing + image)`,
with a number of things in every class. The three parts vary along the same axes, whose variance
falls with a power of the rank, in a random rotation (of reflections and Hadamard transforms, so
that no d × d matrix is formed); the m differ from feature to feature. The numbers below were set so
that a draw of 587 rows in ten classes resembles EfficientNet-Lite0's pooled features of 587
pictures of ten topics (`data.py stamps`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]
Ints = NDArray[np.int64]

FALL = 1.15  # power with which the variance falls along the axes
# of the variance: between classes, between the things of a class
CLASS_SHARE, THING_SHARE = (0.03, 0.58)
PER_THING = 1.8  # images of a thing, on average
LEVEL, SPREAD = -0.9, 0.5  # of m, in standard deviations of a feature
REFLECTIONS = 4


def make(
    n: int,
    d: int,
    classes: int,
    seed: int = 0,
    *,
    draw: int = 0,
    things: int | None = None,
    out: Rows | None = None,
) -> tuple[Rows, Ints]:
    """`(n, d)` float32 features, not normalised, and their labels `(n,)`; classes come in equal
    numbers, in random order.

    Rows of another `draw` are others of the same classes and things: give the same `things`, the
    number in a class (without it, n over the classes and PER_THING). `out` is where to write them,
    a memory map for instance.
    """
    world = np.random.default_rng(seed)
    many = things or max(1, round(n / classes / PER_THING))
    scale = np.arange(1, d + 1, dtype=np.float32) ** np.float32(-FALL / 2)
    scale /= np.sqrt(np.mean(scale**2))
    level = world.normal(LEVEL, SPREAD, d).astype(np.float32)
    mirrors = world.standard_normal((REFLECTIONS, d), dtype=np.float32)
    mirrors /= np.linalg.norm(mirrors, axis=1, keepdims=True)
    signs = world.choice(np.array([-1, 1], np.float32), (REFLECTIONS, d))
    order = [world.permutation(d) for _ in range(REFLECTIONS)]
    centres = world.standard_normal((classes * many, d), dtype=np.float32)
    centres *= scale * np.float32(THING_SHARE**0.5)
    own = (
        world.standard_normal((classes, d), dtype=np.float32) * scale * np.float32(CLASS_SHARE**0.5)
    )
    for c in range(classes):
        centres[c * many : (c + 1) * many] += own[c]
    rng = np.random.default_rng([seed, draw, 1])
    y = rng.permutation(np.arange(n) % classes)
    thing = y * many + rng.integers(0, many, n)
    within = scale * np.float32((1 - CLASS_SHARE - THING_SHARE) ** 0.5)
    X = np.empty((n, d), np.float32) if out is None else out
    for start in range(0, n, 8192):
        part = thing[start : start + 8192]
        z = rng.standard_normal((len(part), d), dtype=np.float32) * within + centres[part]
        for mirror, sign, places in zip(mirrors, signs, order, strict=True):
            z = mixed(z[:, places] * sign)
            z -= 2 * (z @ mirror)[:, None] * mirror
        X[start : start + len(part)] = np.maximum(0, z + level)
    return X, y.astype(np.int64)


def mixed(z: Rows) -> Rows:
    """Rotate pairs, then pairs of pairs, and so on: a Hadamard transform of the largest power of
    two that divides d, else of blocks of it. Every column gets a part of many others."""
    width = z.shape[1]
    block = width & -width
    z = z.reshape(len(z), -1, block)
    step = 1
    while step < block:
        pairs = z.reshape(len(z), -1, 2, step)
        z = np.stack(
            [pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2
        ).reshape(len(z), -1, block)
        step *= 2
    return z.reshape(len(z), width) * np.float32(block**-0.5)


def statistics_of(X: Rows, y: Ints) -> dict[str, float]:
    """What a table of features looks like to a linear machine; rows at unit length, as a machine
    sees them."""
    x = X / np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-12)
    centred = x - x.mean(axis=0)
    values = np.linalg.svd(centred, compute_uv=False) ** 2
    rank = np.arange(1, 151)
    between = sum(
        np.sum(y == c) * np.sum(centred[y == c].mean(axis=0) ** 2) for c in np.unique(y)
    ) / np.sum(centred**2)
    similarity = x @ x.T
    others = similarity[~np.eye(len(x), dtype=bool)]
    np.fill_diagonal(similarity, -1)
    nearest = similarity.argmax(axis=1)
    return {
        "length of the mean": float(np.linalg.norm(x.mean(axis=0))),
        "power of the spectrum": float(np.polyfit(np.log(rank[3:]), np.log(values[3:150]), 1)[0]),
        "largest eigenvalue's share": float(values[0] / values.sum()),
        "variance between classes": float(between),
        "cosine, median": float(np.median(others)),
        "cosine to the nearest, median": float(np.median(similarity.max(axis=1))),
        "nearest is of the class": float(np.mean(y[nearest] == y)),
        "least-squares machine, out of fold": least_squares(x, y),
    }


def least_squares(x: Rows, y: Ints, ridge: float = 0.05) -> float:
    """Accuracy of a ridge machine, five folds."""
    target = np.where(y[:, None] == np.unique(y), 1.0, -1.0)
    K = x.astype(np.float64) @ x.T.astype(np.float64) + 1
    fold = np.random.default_rng(0).permutation(len(y)) % 5
    right = 0
    for k in range(5):
        own, held = fold != k, fold == k
        alpha = np.linalg.solve(K[np.ix_(own, own)] + ridge * np.eye(own.sum()), target[own])
        right += int(
            np.sum(
                (K[np.ix_(held, own)] @ alpha).argmax(axis=1)
                == np.searchsorted(np.unique(y), y[held])
            )
        )
    return right / len(y)


def main() -> None:
    with np.load(Path(sys.argv[1]), allow_pickle=False) as real:
        X, y = real["X"], real["y"].astype(np.int64)
    drawn = [statistics_of(*make(len(X), X.shape[1], len(np.unique(y)), seed)) for seed in range(3)]
    print(f"{X.shape[0]} × {X.shape[1]}: real; drawn, mean and range of 3 seeds")
    for name, value in statistics_of(X, y).items():
        values = [one[name] for one in drawn]
        print(
            f"  {name:36} {value:7.3f}   {np.mean(values):7.3f} "
            f"({min(values):.3f} to {max(values):.3f})"
        )


if __name__ == "__main__":
    main()
