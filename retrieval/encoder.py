"""Which network makes the vectors, read where, seen how, normalised how; and the manifest that
holds it all.

What made the vectors of a gallery is in its manifest; a query made in any other way is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import files
from finetune.backbones import device
from finetune.data import decode
from finetune.errors import UserError
from finetune.features import conversion, engine
from finetune.network import Network, Tap
from retrieval.whitening import Whitening

if TYPE_CHECKING:
    from finetune.backbones.stages import Backbone

SIDE = (
    32  # input sizes of other scales are rounded to a multiple of it, the stride of most networks
)
VIEWS = {False: ("",), True: ("", "flip")}

Load = Callable[[], "Backbone"]


@dataclass(frozen=True)
class Encoder:
    """Turns images into vectors. `networks` holds one description per scale, `loads` what gives
    their torch backbones.

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


@dataclass(frozen=True)
class EncoderOptions:
    """How a network makes vectors: read at `taps` (none: where the network or the run says),
    averaged over `scales` of its input, and over the mirror image with `flip`. `engine` and
    `precision` are `auto` or None where nothing is asked for."""

    taps: tuple[Tap, ...] = ()
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    engine: str | None = None
    precision: str | None = None


PLAIN = EncoderOptions()


def open_named(
    name: str | None = None,
    weights: str = "auto",
    *,
    size: int | None = None,
    options: EncoderOptions = PLAIN,
) -> Encoder:
    """The encoder of a network by name, read at `pooled` where no taps are given. Raises
    `UserError` for what does not exist or cannot be had."""
    from finetune.backbones import catalog
    from finetune.backbones import weights as home

    name = name or catalog.DEFAULT
    base = catalog.open_named(name, weights, size)
    kind = home.find(name, weights).kind
    if kind == "random" and len(options.scales) > 1:
        raise UserError(
            "random weights cannot be loaded a second time",
            where="--scales",
            fix="save them, and give the file",
        )
    others = {
        s: catalog.open_named(name, weights, _side(base.network, s))
        for s in options.scales
        if s != 1.0
    }
    opened = [others.get(s, base) for s in options.scales]
    taps = options.taps or (Tap("pooled"),)
    asked = options.engine or "auto", options.precision or "auto"
    way = engine.fastest(base.network, taps, base.load, *asked)

    def save(path: Path) -> None:
        from finetune.backbones import create

        create.save(base.load(), path)

    return _checked(
        Encoder(
            networks=tuple(one.network for one in opened),
            loads=tuple(one.load for one in opened),
            taps=taps,
            scales=options.scales,
            views=VIEWS[options.flip],
            engine=way.engine,
            precision=way.precision,
            save_weights=save if kind in ("file", "random") else None,
        )
    )


def open_run(path: Path, options: EncoderOptions = PLAIN) -> Encoder:
    """The encoder of a finished run's network, read where its head reads it where no taps are
    given. Of an average it is the fine-tuned network."""
    from finetune import classifier, run
    from finetune.backbones import catalog
    from finetune.evaluation import ensemble

    folder = run.finished(path)
    own = ensemble.backbone_folder(folder)
    model = classifier.load(own, engine_name=options.engine, precision=options.precision)
    weights = own / "model.safetensors"
    networks, loads = [], []
    for scale in options.scales:
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
    taps = options.taps or model.head.taps
    way = engine.fastest(model.network, taps, model.load, model.engine, model.precision)
    return _checked(
        Encoder(
            networks=tuple(networks),
            loads=tuple(loads),
            taps=taps,
            scales=options.scales,
            views=VIEWS[options.flip],
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


def check_manifest(gallery: dict[str, Any], other: dict[str, Any], where: object = None) -> None:
    """Refuse to compare vectors that were made in different ways: a `UserError` names the first
    field that differs."""
    for field in dict.fromkeys((*gallery, *other)):
        a, b = gallery.get(field), other.get(field)
        if a != b:
            fix = "build the gallery again, or make the query as the gallery was made"
            if field == "engine" and a == "openvino":
                fix = "pip install openvino, or build the gallery again with --engine torch"
            raise UserError(
                f"{field} differs: the gallery has {_short(a)}, the query {_short(b)}",
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
            f"weights differ: the gallery has {network.digest[:12]} ({network.source}), "
            f"here are {own.network.digest[:12]}"
        )
        raise UserError(
            what,
            where=network.name,
            fix="install the weights that the gallery was made with, or build it again",
        )
    return dataclasses.replace(own, network=network)
