"""From an image to its vector: which network, read where, seen how, normalised how; and the
manifest that holds it all.

A vector is the mean over scales and views of the unit-length features (the taps side by side, each
at unit length), at unit length again; with whitening, rotated and rescaled, and once more at unit
length. So the inner product of two vectors is their cosine. What made the vectors of a gallery is
in its manifest; a query made in any other way is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune import device, files
from finetune.data import decode
from finetune.data.images import Fault, ImageSet
from finetune.errors import UserError
from finetune.features import conversion, engine, extraction
from finetune.features.extraction import Features
from finetune.features.store import Store
from finetune.heads.head import side_by_side
from finetune.network import Network, Tap
from finetune.progress import Progress
from retrieval.vectors import Rows, Whitening

if TYPE_CHECKING:
    from finetune.backbones.stages import Backbone

ROWS = 4096  # vectors made at once
SIDE = (
    32  # input sizes of other scales are rounded to a multiple of it, the stride of most networks
)
VIEWS = {False: ("",), True: ("", "flip")}

Load = Callable[[], "Backbone"]


@dataclass(frozen=True)
class Encoder:
    """Turns images into vectors. `networks` holds one description a scale, `loads` what gives their
    torch backbones.

    `engine` and `precision` are what is really used. `save_weights` writes the weights as
    safetensors where a query could not find them elsewhere, else it is None. `run` is (path, digest
    of its run.json) where they are a run's.
    """

    networks: tuple[Network, ...]
    loads: tuple[Load, ...]
    taps: tuple[Tap, ...]
    scales: tuple[float, ...] = (1.0,)
    views: tuple[str, ...] = ("",)
    engine: str = "openvino"
    precision: str = "float32"
    whitening: Whitening | None = None
    save_weights: Callable[[Path], None] | None = None
    run: tuple[str, str] | None = None

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        if self.whitening is not None:
            return int(self.whitening.matrix.shape[1])
        return sum(self.networks[0].width(tap) for tap in self.taps)


# ------------------------------------------------------------------------------------------ opening


def open_named(
    name: str | None = None,
    weights: str = "auto",
    *,
    size: int | None = None,
    taps: Sequence[Tap] = (Tap("pooled"),),
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    engine_name: str = "auto",
    precision: str = "auto",
) -> Encoder:
    """The encoder of a network by name. Raises `UserError` for what does not exist or cannot be
    had."""
    from finetune.backbones import catalog
    from finetune.backbones import weights as home

    name = name or catalog.DEFAULT
    base = catalog.open_named(name, weights, size)
    kind = home.find(name, weights).kind
    if kind == "random" and len(scales) > 1:
        raise UserError(
            "random weights cannot be loaded a second time",
            where="--scales",
            fix="save them, and give the file",
        )
    others = {
        s: catalog.open_named(name, weights, _side(base.network, s)) for s in scales if s != 1.0
    }
    opened = [others.get(s, base) for s in scales]
    way = engine.fastest(base.network, taps, base.load, engine_name, precision)

    def save(path: Path) -> None:
        from finetune.backbones import create

        create.save(base.load(), path)

    return _checked(
        Encoder(
            networks=tuple(one.network for one in opened),
            loads=tuple(one.load for one in opened),
            taps=tuple(taps),
            scales=tuple(scales),
            views=VIEWS[flip],
            engine=way.engine,
            precision=way.precision,
            save_weights=save if kind in ("file", "random") else None,
        )
    )


def open_run(
    path: Path,
    *,
    taps: Sequence[Tap] = (),
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    engine_name: str | None = None,
    precision: str | None = None,
) -> Encoder:
    """The encoder of a finished run's network, read where its head reads it unless `taps` are
    given."""
    from finetune import classifier, run
    from finetune.backbones import catalog

    folder = run.finished(path)
    model = classifier.load(folder, engine_name=engine_name, precision=precision)
    weights = folder / "model.safetensors"
    networks, loads = [], []
    for scale in scales:
        network, load = model.network, model.load
        if scale != 1.0:
            load = functools.cache(
                functools.partial(_load_sized, model.network, weights, _side(model.network, scale))
            )
            network = catalog.framed(
                load().network, "whole" if model.network.preprocess.squash else "crop"
            )
        networks.append(network)
        loads.append(load)
    taps = tuple(taps) or model.head.taps
    way = engine.fastest(model.network, taps, model.load, model.engine, model.precision)
    return _checked(
        Encoder(
            networks=tuple(networks),
            loads=tuple(loads),
            taps=taps,
            scales=tuple(scales),
            views=VIEWS[flip],
            engine=way.engine,
            precision=way.precision,
            save_weights=functools.partial(_copy, weights),
            run=(str(folder.resolve()), run_digest(folder)),
        )
    )


def _checked(encoder: Encoder) -> Encoder:
    for network in encoder.networks:
        for tap in encoder.taps:
            network.width(tap)
    return encoder


def _side(network: Network, scale: float) -> int:
    return max(SIDE, round(network.preprocess.size * scale / SIDE) * SIDE)


def _load_sized(network: Network, weights: Path, size: int) -> Backbone:
    from finetune.backbones import create

    own = create.load(network.name, str(weights), size)
    about = dataclasses.replace(own.network, source=network.source, pretraining=network.pretraining)
    return dataclasses.replace(own, network=about)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def run_digest(folder: Path) -> str:
    """What changes when a run is trained again: the digest of its `run.json`."""
    return files.file_digest(folder / "run.json")


# ----------------------------------------------------------------------------------------- manifest


def describe(encoder: Encoder) -> dict[str, Any]:
    """Everything that decides a vector besides the image file, field by field, as JSON."""
    whitening = encoder.whitening
    about = {
        "backbone": encoder.networks[0].name,
        "weights": encoder.networks[0].digest,
        "preprocess": [network.to_json()["preprocess"] for network in encoder.networks],
        "decoder": decode.FORMAT,
        "taps": [str(tap) for tap in encoder.taps],
        "pooling": [tap.pool for tap in encoder.taps],
        "scales": list(encoder.scales),
        "views": list(encoder.views),
        "normalisation": "l2",
        "engine": encoder.engine,
        "precision": encoder.precision,
        "network format": conversion.FORMAT,
        "whitening": None
        if whitening is None
        else files.digest(whitening.mean.tobytes(), whitening.matrix.tobytes()),
    }
    return json.loads(json.dumps(about))


def check_manifest(index: dict[str, Any], other: dict[str, Any], where: object = None) -> None:
    """Refuse to compare vectors that were made in different ways: a `UserError` names the first
    field that differs."""
    for field in dict.fromkeys((*index, *other)):
        a, b = index.get(field), other.get(field)
        if a != b:
            fix = "build the index again, or make the query as the index was made"
            if field == "engine" and a == "openvino":
                fix = "pip install openvino, or build the index again with --engine torch"
            raise UserError(
                f"{field} differs: the index has {_short(a)}, the query {_short(b)}",
                where=where,
                fix=fix,
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]} …"


def from_manifest(folder: Path, manifest: dict[str, Any]) -> Encoder:
    """The encoder that made the vectors of the gallery in `folder`; refused where this machine
    would make other ones.

    No torch is imported before a network has to be converted.
    """
    about = manifest["vector"]
    networks = tuple(Network.from_json(value) for value in manifest["networks"])
    carried = manifest.get("weights file")
    source = str(folder / carried) if carried else "auto"
    used = about["engine"] if about["engine"] != "openvino" or device.has_openvino() else "torch"
    encoder = Encoder(
        networks=networks,
        loads=tuple(
            functools.cache(functools.partial(_load_again, network, source)) for network in networks
        ),
        taps=tuple(Tap.parse(text) for text in about["taps"]),
        scales=tuple(about["scales"]),
        views=tuple(about["views"]),
        engine=used,
        precision=about["precision"],
        whitening=Whitening.load(folder / manifest["whitening file"])
        if manifest.get("whitening file")
        else None,
    )
    check_manifest(about, describe(encoder), folder)
    return encoder


def frame_words(manifest: dict[str, Any]) -> str:
    """The frame of a gallery's pictures, and why it was chosen where that was recorded."""
    if about := manifest.get("frame"):
        return f"{about['name']}: {about['why']}"
    return "squash" if manifest["networks"][0]["preprocess"].get("squash") else "crop"


def _load_again(network: Network, source: str) -> Backbone:
    from finetune.backbones import create

    own = create.load(network.name, source, network.preprocess.size)
    if own.network.digest != network.digest:
        what = (
            f"weights differ: the index has {network.digest[:12]} ({network.source}), "
            f"here are {own.network.digest[:12]}"
        )
        raise UserError(
            what,
            where=network.name,
            fix="install the weights that the index was made with, or build it again",
        )
    return dataclasses.replace(own, network=network)


# ----------------------------------------------------------------------------------------- encoding


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
    """The networks of an encoder, ready to run: one a scale."""
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
            _read(encoder.taps, source, network, runner, view, faults, progress)
            for view in encoder.views
        ]
    plain = combine(dataclasses.replace(encoder, whitening=None), seen)
    for i in np.flatnonzero(~np.any(plain, axis=1)).tolist():
        faults.setdefault(i, _no_direction(source.paths[i]))
    vectors = plain if encoder.whitening is None else unit(encoder.whitening(plain))
    vectors[list(faults)] = 0
    return vectors, faults


def _read(
    taps: Sequence[Tap],
    source: ImageSet,
    network: Network,
    runner: engine.Runner,
    view: str,
    faults: dict[int, Fault],
    progress: Progress | None,
) -> list[Rows]:
    """A block of features a tap, `(n, width)`; new faults join the others, the rows of all of them
    are zero."""
    blocks = [np.zeros((len(source), network.width(tap)), np.float32) for tap in taps]
    todo = [i for i in range(len(source)) if i not in faults]
    for batch, outputs in extraction.stream(
        source, todo, network, lambda: runner, faults, view=view, progress=progress
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


def unit(x: Rows) -> Rows:
    """Rows at unit length; a row of zeros stays zero."""
    norm = np.sqrt(np.einsum("ij,ij->i", x, x, dtype=np.float64)).astype(np.float32)[:, None]
    return x / np.maximum(norm, np.float32(1e-12))
