"""How unlike the training images an image is: the distance to its nearest training images, as a
percentile of such distances of training images that were held out.

Features are those that the head reads, normalised tap by tap. Distances are Euclidean after
whitening by the principal components of the training images, shrunk towards one variance for all
directions, and what lies outside of the components counts by that variance: an image may be near to
the others by cosine and yet stand where no training image varies (Mahalanobis distance: Lee et al.
2018; nearest neighbours: Sun et al. 2022; the residual: Wang et al. 2022, "ViM"). Cosine alone was
measured, too: docs/log.md.

The percentile comes from cross-fitting: each fold's training images are measured against components
and neighbours of the other folds, groups (copies, patients) whole. A percentile of 0.99 says: 99 %
of the training images were nearer to others than this image is. It says nothing of the class.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune import files
from finetune.errors import UserError
from finetune.heads.head import side_by_side

Array = NDArray[np.float32]
Half = NDArray[np.float16]
Ints = NDArray[np.int64]
Known = tuple[Array, Array]

FILE = "familiar.safetensors"
LEVEL = 0.99  # the percentile above which an image counts as unlike, where none is said
NEAREST = 1
SHRINKAGE = 0.3  # of the mean variance, added to that of every direction
FOLDS = 5
# training images, at most: a seeded draw of more
MOST_ROWS = 5000  # kept and compared with; and
MOST_FITTED = 600  # from which the components come
MOST_COMPONENTS = 256  # with 5,000 rows of 256 numbers: a few MB
BLOCK = 1024  # rows whose distances are computed at once


@dataclass(frozen=True, eq=False)
class Space:
    """Whitened principal components: `mean` (D,), `components` (r, D) with `scales` (r,), and the
    variance `rest` of every other direction."""

    mean: Array
    components: Half
    scales: Array
    rest: float

    @functools.cached_property
    def _wide(self) -> Array:
        """The components as they are multiplied with: made once, not at every prediction."""
        return np.ascontiguousarray(self.components.T, dtype=np.float32)

    def project(self, x: Array) -> tuple[Array, Array]:
        """Whitened coordinates `(n, r)`, and the squared distance `(n,)` from the components."""
        centred = x - self.mean
        z = centred @ self._wide
        outside = np.einsum("ij,ij->i", centred, centred) - np.einsum("ij,ij->i", z, z)
        return np.asarray(z / self.scales, np.float32), np.maximum(outside, 0) / self.rest


@dataclass(frozen=True, eq=False)
class Familiarity:
    """Training images as whitened rows `(m, r)` of a `space`, and the sorted distances `(c,)` of
    training images that were held out. `normalize` as in the head."""

    space: Space
    rows: Half
    distances: Array
    normalize: bool = True

    def distance(self, blocks: Sequence[NDArray[Any]]) -> Array:
        """Squared distances `(n,)` of images to their nearest training image; `blocks` are their
        features as for the head."""
        return _distances(self.space, self._known, side_by_side(blocks, self.normalize))

    @functools.cached_property
    def _known(self) -> Known:
        return _widened(self.rows)

    def percentile(self, blocks: Sequence[NDArray[Any]]) -> Array:
        """The share of the training images that are nearer to others than each image is to them,
        `(n,)` in [0, 1): the image itself counts among them, as in conformal prediction, so that of
        images of their kind no more than 1 − p are expected above p."""
        below = np.searchsorted(self.distances, self.distance(blocks), side="left")
        return (below / (len(self.distances) + 1)).astype(np.float32)


def fit(
    blocks: Sequence[NDArray[Any]],
    groups: Ints | None = None,
    *,
    normalize: bool = True,
    seed: int = 0,
) -> Familiarity | None:
    """Remember the training images with these features, one `(n, d)` array a tap; None where there
    are too few groups to hold any out."""
    n = len(blocks[0])
    random = np.random.default_rng([seed, 5])
    chosen = np.sort(random.permutation(n)[:MOST_ROWS])
    x = side_by_side([np.asarray(block[chosen]) for block in blocks], normalize)
    group = np.arange(n) if groups is None else groups
    unit = np.unique(group[chosen], return_inverse=True)[1]
    units = int(unit.max()) + 1
    if units < 2:
        return None
    fold = (random.permutation(units) % min(FOLDS, units))[unit]
    held = [_held_out(x, fold == k, random) for k in range(int(fold.max()) + 1)]
    space = _space(x, random)
    rows = _rows(space, x)
    return Familiarity(space, rows, np.sort(np.concatenate(held)), normalize)


def _held_out(x: Array, held: NDArray[np.bool_], random: np.random.Generator) -> Array:
    """Distances of the rows held out to the others, in the space of these."""
    space = _space(x[~held], random)
    return _distances(space, _widened(_rows(space, x[~held])), x[held])


def _space(x: Array, random: np.random.Generator) -> Space:
    """The components of some of the rows."""
    some = x[np.sort(random.permutation(len(x))[:MOST_FITTED])]
    mean = some.mean(axis=0)
    centred = some - mean
    # the smaller of the two products has the same values
    if centred.shape[0] < centred.shape[1]:
        values, vectors = np.linalg.eigh((centred @ centred.T).astype(np.float64))
        scaled = vectors / np.sqrt(np.maximum(values, 1e-12))
        vectors = centred.T @ scaled.astype(np.float32)
    else:
        values, vectors = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    keep = np.flatnonzero(values > values[-1] * 1e-7)[::-1][:MOST_COMPONENTS]
    total = float(np.einsum("ij,ij->", centred, centred)) / len(some)
    rest = max(SHRINKAGE * total / min(centred.shape), 1e-9)
    scales = np.sqrt(values[keep] / len(some) + rest)
    components = vectors[:, keep].T.astype(np.float16)
    return Space(mean.astype(np.float32), components, scales.astype(np.float32), rest)


def _rows(space: Space, x: Array) -> Half:
    return np.concatenate(
        [space.project(x[i : i + BLOCK])[0] for i in range(0, len(x), BLOCK)]
    ).astype(np.float16)


def _widened(rows: Half) -> Known:
    """Rows as they are compared with, and their squared lengths."""
    base = rows.astype(np.float32)
    return base, np.einsum("ij,ij->i", base, base)


def _distances(space: Space, known: Known, x: Array) -> Array:
    """Squared distances `(n,)` of `x` to the `NEAREST`-th of the known rows."""
    base, squares = known
    k = min(NEAREST, len(base))
    found = np.empty(len(x), dtype=np.float32)
    for low in range(0, len(x), BLOCK):
        z, outside = space.project(x[low : low + BLOCK])
        distance = np.einsum("ij,ij->i", z, z)[:, None] + squares - 2 * (z @ base.T)
        nearest = np.partition(distance, k - 1, axis=1)[:, k - 1]
        found[low : low + BLOCK] = np.maximum(nearest, 0) + outside
    return found


# -------------------------------------------------------------------------------------- on the disk


def save(folder: Path, known: Familiarity) -> None:
    """Write `familiar.safetensors`."""
    from safetensors.numpy import save as to_bytes

    about = {"format": "1", "normalize": str(int(known.normalize)), "rest": repr(known.space.rest)}
    arrays: dict[str, NDArray[Any]] = {
        "mean": known.space.mean,
        "components": np.ascontiguousarray(known.space.components),
        "scales": known.space.scales,
        "rows": known.rows,
        "distances": known.distances,
    }
    files.write_bytes(folder / FILE, to_bytes(arrays, about))


def load(folder: Path, width: int) -> Familiarity | None:
    """What `save` wrote for features of this width; None for a run of a version that wrote none."""
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata()
            a = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        r = len(a["scales"])
        shapes = {"mean": (width,), "components": (r, width), "rows": (len(a["rows"]), r)}
        if wrong := [name for name, shape in shapes.items() if a[name].shape != shape]:
            raise ValueError(f"{', '.join(wrong)} of another shape")
        if not len(a["distances"]) or not len(a["rows"]):
            raise ValueError("nothing is in it")
        space = Space(a["mean"], a["components"], a["scales"], float(about["rest"]))
        return Familiarity(space, a["rows"], a["distances"], bool(int(about["normalize"])))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"damaged: no features of training images ({error})",
            where=path,
            fix="fit again with --force",
        ) from error
