"""PCA-whitening: fitted on a sample with shrinkage, kept in a file, applied to vectors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finetune import files
from finetune.errors import UserError
from retrieval.vectors import Rows


@dataclass(frozen=True)
class Whitening:
    """PCA-whitening, `x → (x - mean) @ matrix`: `mean` `(d,)`, `matrix` `(d, dim)`, both float32.

    What comes out is not at unit length: `prepare` it. `shrinkage` is how far the covariance was
    drawn to a sphere.
    """

    mean: Rows
    matrix: Rows
    shrinkage: float

    def __call__(self, X: Rows) -> Rows:
        """`X` `(n, d)` whitened, `(n, dim)`."""
        if X.ndim != 2 or X.shape[1] != len(self.mean):
            raise UserError(
                f"vectors of shape {X.shape}",
                where="whitening",
                fix=f"it was fitted on vectors of {len(self.mean)} numbers",
            )
        return np.ascontiguousarray((X - self.mean) @ self.matrix, dtype=np.float32)

    def save(self, path: Path) -> None:
        """Write it as safetensors, whole or not at all."""
        from safetensors.numpy import save

        arrays = {"mean": self.mean, "matrix": self.matrix, "shrinkage": np.array([self.shrinkage])}
        files.write_bytes(path, save(arrays))

    @classmethod
    def load(cls, path: Path) -> Whitening:
        """Read what `save` wrote; a missing or damaged file is a `UserError`."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            arrays = load(path.read_bytes())
            made = cls(arrays["mean"], arrays["matrix"], float(arrays["shrinkage"][0]))
        except (OSError, SafetensorError, KeyError, ValueError, IndexError) as error:
            raise UserError(
                f"no whitening can be read ({error})", where=path, fix="fit it again"
            ) from error
        right = (
            made.matrix.ndim == 2
            and made.mean.shape == made.matrix.shape[:1]
            and np.isfinite(made.matrix).all()
        )
        if not (right and made.mean.dtype == made.matrix.dtype == np.float32):
            raise UserError(
                f"damaged: mean {made.mean.shape}, matrix {made.matrix.shape}",
                where=path,
                fix="fit it again",
            )
        return made


def whiten(X: ArrayLike, dim: int, shrinkage: float | None = None) -> Whitening:
    """Fit PCA-whitening to `dim` dimensions on `X` `(n, d)`.

    The covariance is `(1 - s) S + s tr(S)/d I` before its eigenvectors are scaled: without s, the
    directions that few samples say little about are blown up. `shrinkage` None takes the s of
    Ledoit & Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004.
    Where n < d the n × n Gram matrix is decomposed instead. Raises `UserError` where the sample has
    fewer than `dim` directions.
    """
    data = np.asarray(X, dtype=np.float64)
    if data.ndim != 2 or len(data) < 2 or not np.isfinite(data).all():
        raise UserError(
            f"whitening needs at least two finite vectors, not shape {data.shape}",
            where="whitening",
        )
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise UserError(
            f"shrinkage {shrinkage}", where="whitening", fix="give a number from 0 to 1"
        )
    n, d = data.shape
    mean = data.mean(axis=0)
    data = data - mean
    few = n < d
    small = (data @ data.T if few else data.T @ data) / n
    values, vectors = np.linalg.eigh(small)
    values, vectors = values[::-1], vectors[:, ::-1]
    directions = int(np.count_nonzero(values > values[0] * 1e-9)) if values[0] > 0 else 0
    if not 1 <= dim <= directions:
        fix = (
            f"ask for 1 to {directions}, or fit on more images"
            if directions
            else "these vectors are all equal"
        )
        raise UserError(
            f"{dim} dimensions from {n} vectors that span {directions}", where="whitening", fix=fix
        )
    s = _ledoit_wolf(data, values, d) if shrinkage is None else shrinkage
    if few:
        vectors = data.T @ vectors[:, :dim] / np.sqrt(n * values[:dim])
    scale = np.sqrt((1 - s) * values[:dim] + s * values.sum() / d)
    return Whitening(
        mean.astype(np.float32), (vectors[:, :dim] / scale).astype(np.float32), float(s)
    )


def _ledoit_wolf(centred: NDArray[np.float64], values: NDArray[np.float64], d: int) -> float:
    """The shrinkage of Ledoit & Wolf (2004), from the eigenvalues of S: no d × d matrix a sample is
    formed."""
    n = len(centred)
    squares = float((values**2).sum())
    distance = squares - float(values.sum()) ** 2 / d
    noise = (float((np.einsum("ij,ij->i", centred, centred) ** 2).sum()) / n - squares) / n
    return float(np.clip(noise / distance, 0, 1)) if distance > 0 else 1.0
