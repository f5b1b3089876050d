"""From images to their vectors, by way of the feature store or past it.

A vector is the mean over scales and views of the unit-length features (the taps side by side, each
at unit length), at unit length again; with whitening, rotated and rescaled, and once more at unit
length. So the inner product of two vectors is their cosine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune.data.images import Fault, ImageSet
from finetune.features import engine, extraction
from finetune.features.extraction import Features
from finetune.features.store import Store
from finetune.heads.head import side_by_side
from finetune.network import Network
from finetune.progress import Progress
from retrieval.encoder import Encoder
from retrieval.vectors import Rows, unit

ROWS = 4096  # vectors made at once


@dataclass(frozen=True)
class Encoded:
    """Features of images, ready to become vectors block by block. `images` are those that could be
    read, `faults` the others."""

    encoder: Encoder
    images: ImageSet
    faults: tuple[Fault, ...]
    parts: tuple[tuple[Features, NDArray[np.int64]], ...]

    def blocks(self, at: NDArray[np.int64] | None = None) -> Iterator[Rows]:
        """Vectors of the images at positions `at` (all of them), `(m, width)` each, not yet checked
        for length."""
        at = np.arange(len(self.images)) if at is None else at
        for start in range(0, len(at), ROWS):
            rows = at[start : start + ROWS]
            seen = [
                [np.asarray(part.blocks[tap][where[rows]]) for tap in self.encoder.taps]
                for part, where in self.parts
            ]
            yield combine(self.encoder, seen)


def from_store(
    encoder: Encoder,
    source: ImageSet,
    digests: Sequence[str],
    store: Store,
    progress: Progress | None = None,
) -> Encoded:
    """Features of images by way of the store: the network sees unknown content alone. What cannot
    be read is a fault.

    An image whose features are all zero has no direction: it is a fault, too.
    """
    parts = [
        extraction.extract(
            source,
            network,
            encoder.taps,
            load,
            store=store,
            engine_name=encoder.engine,
            precision=encoder.precision,
            view=view,
            on_bad="skip",
            known=digests,
            progress=progress,
        )
        for network, load in zip(encoder.networks, encoder.loads, strict=True)
        for view in encoder.views
    ]
    faults = {fault.path: fault for part in parts for fault in part.faults}
    found = _kept(encoder, source, parts, faults)
    for start in range(0, len(found.images), ROWS):
        rows = np.arange(start, min(start + ROWS, len(found.images)))
        alive = [
            np.any(part.blocks[tap][where[rows]], axis=1)
            for part, where in found.parts
            for tap in encoder.taps
        ]
        for i in rows[~np.logical_or.reduce(alive)].tolist():
            faults[found.images.paths[i]] = _no_direction(found.images.paths[i])
    return _kept(encoder, source, parts, faults)


def _kept(
    encoder: Encoder, source: ImageSet, parts: Sequence[Features], faults: dict[str, Fault]
) -> Encoded:
    good = np.array(
        [i for i, path in enumerate(source.paths) if path not in faults], dtype=np.int64
    )
    kept = source.subset(good)
    where = []
    for part in parts:
        number = {path: i for i, path in enumerate(part.images.paths)}
        where.append((part, np.array([number[path] for path in kept.paths], dtype=np.int64)))
    return Encoded(encoder, kept, tuple(faults.values()), tuple(where))


def _no_direction(path: str) -> Fault:
    return Fault(path, "no features", "the network gives zeros alone")


def open_runners(encoder: Encoder) -> tuple[engine.Runner, ...]:
    """The networks of an encoder, ready to run: one per scale."""
    return tuple(
        engine.open_runner(
            network, encoder.taps, load, engine=encoder.engine, precision=encoder.precision
        )
        for network, load in zip(encoder.networks, encoder.loads, strict=True)
    )


def directly(
    encoder: Encoder,
    source: ImageSet,
    runners: Sequence[engine.Runner],
    progress: Progress | None = None,
) -> tuple[Rows, dict[int, Fault]]:
    """Vectors of images `(n, width)` past the store, and the faults by position; the row of a fault
    is zero."""
    faults: dict[int, Fault] = {}
    seen: list[list[Rows]] = []
    for network, runner in zip(encoder.networks, runners, strict=True):
        seen += [
            _features(source, network, runner, view=view, faults=faults, progress=progress)
            for view in encoder.views
        ]
    plain = combine(dataclasses.replace(encoder, whitening=None), seen)
    for i in np.flatnonzero(~np.any(plain, axis=1)).tolist():
        faults.setdefault(i, _no_direction(source.paths[i]))
    vectors = plain if encoder.whitening is None else unit(encoder.whitening(plain))
    vectors[list(faults)] = 0
    return vectors, faults


def _features(
    images: ImageSet,
    network: Network,
    runner: engine.Runner,
    *,
    view: str,
    faults: dict[int, Fault],
    progress: Progress | None,
) -> list[Rows]:
    """A block of features per tap, `(n, width)`; new faults join the others, the rows of all of
    them are zero."""
    blocks = [np.zeros((len(images), network.width(tap)), np.float32) for tap in runner.taps]
    todo = [i for i in range(len(images)) if i not in faults]
    for batch, outputs in extraction.stream(
        images, todo, network, lambda: runner, faults, view=view, progress=progress
    ):
        for block, output in zip(blocks, outputs, strict=True):
            block[batch] = output
    return blocks


def combine(encoder: Encoder, seen: Sequence[Sequence[Rows]]) -> Rows:
    """Vectors of features: `seen[view][tap]` is `(m, width of the tap)`, a view being one of scales
    × views."""
    total = unit(side_by_side(seen[0], normalize=True))
    for blocks in seen[1:]:
        total += unit(side_by_side(blocks, normalize=True))
    vectors = unit(total) if len(seen) > 1 else total
    return vectors if encoder.whitening is None else unit(encoder.whitening(vectors))
