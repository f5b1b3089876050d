"""What a run ships: a head on the taps of a frozen network. numpy alone; the network runs through
`engine`.

A head reads one tap or several side by side. `scores` are decision values, `probabilities` the
softmax of the scores over a temperature that was fitted on scores of images that the head had not
seen (Guo et al. 2017).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune import files
from finetune.backbones import device
from finetune.data import loose
from finetune.data.images import Fault, ImageSet, check_on_bad, group_ids
from finetune.data.loose import Picture
from finetune.errors import UserError
from finetune.features import engine, extraction, familiarity
from finetune.features.engine import Runner
from finetune.features.familiarity import Familiarity
from finetune.heads.head import AnyHead, Array, Head, KernelHead, softmax
from finetune.names import shown
from finetune.network import Network, Tap
from finetune.progress import Progress

if TYPE_CHECKING:
    from finetune.backbones.stages import Backbone

SCORED = 8  # rows that a prediction scores at once: BLAS treats so few alike wherever they stand


@dataclass(frozen=True)
class Predictions:
    """`probabilities` is `(n, C)`, row i of `images.paths[i]`: the inputs in their order, a row
    each.

    `faults` are the images that could not be read and were skipped, by the same names: rows and
    faults together are as many as the images that were asked for. `unfamiliar` `(n,)` in [0, 1]
    says how unlike the training images each one is: above 0.99, say, are images farther from them
    than 99 % of their own kind (`familiarity`); None where the run does not know.
    """

    images: ImageSet
    classes: tuple[str, ...]
    probabilities: Array
    faults: tuple[Fault, ...]
    unfamiliar: Array | None = None

    @property
    def best(self) -> NDArray[np.int64]:
        """The index of the most probable class of every image."""
        return self.probabilities.argmax(axis=1)


@dataclass(frozen=True)
class Classifier:
    """A frozen network and the head that reads it. `load` gives the torch backbone where it must be
    converted.

    `views` are averaged: the scores of an image are the mean over them. `known` tells how unlike
    the training images an image is.

    The network is opened by the first prediction and held for the next ones. `close` lets it go,
    and so does the end of `with finetune.load(run) as model:`; a later prediction opens it again.
    Predictions may be asked for from several threads: they are made one after the other, each with
    all cores.
    """

    network: Network
    head: AnyHead
    load: Callable[[], Backbone]
    engine: str = "auto"
    precision: str = "auto"
    views: tuple[str, ...] = ("",)
    known: Familiarity | None = dataclasses.field(default=None, repr=False, compare=False)
    _runners: list[Runner] = dataclasses.field(
        default_factory=list, init=False, repr=False, compare=False
    )
    _lock: Any = dataclasses.field(
        default_factory=threading.RLock, init=False, repr=False, compare=False
    )

    def __enter__(self) -> Classifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the opened network go, with its memory and its files, once no prediction needs it."""
        with self._lock:
            self._runners.clear()

    @property
    def classes(self) -> tuple[str, ...]:
        return self.head.classes

    def predict(
        self,
        images: ImageSet | Picture | Iterable[Picture],
        *,
        on_bad: str = "stop",
        progress: Progress | None = None,
    ) -> Predictions:
        """Probabilities of every image, past the feature store: the one path of `predict`,
        `evaluate` and predictions.csv.

        `images` are a set; or one picture or several, a row each, in their order: paths of files,
        folders (all images below them), the bytes of image files, PIL images, and uint8 arrays H ×
        W, H × W × 3 (RGB) or H × W × 4 (RGBA). They are called as in `loose.load`. A PIL image or
        an array gets what its file would get, if it were saved without loss. An image gets the same
        bits alone and beside others, as far as `engine.Runner` promises.

        Raises `UserError` naming all unreadable images where `on_bad` is stop; `skip` leaves them
        to `faults`.
        """
        check_on_bad(on_bad)
        if not isinstance(images, ImageSet):
            images = loose.load(images, on_bad=on_bad)
        first: dict[
            str, int
        ] = {}  # where each path stands first: a file that is there again is not looked at again
        same = np.array(
            [first.setdefault(path, i) for i, path in enumerate(images.paths)], dtype=np.int64
        )
        todo = list(first.values())
        faults: dict[int, Fault] = {}
        total = np.zeros((len(images), len(self.classes)), dtype=np.float32)
        strange = np.zeros((len(images), 1), dtype=np.float32)
        with self._lock:
            for view in self.views:
                stream = extraction.stream(
                    images, todo, self.network, self._opened, faults, view=view, progress=progress
                )
                with contextlib.closing(stream):  # an error below ends the decoding, too
                    for positions, blocks in _gathered(stream, SCORED):
                        total[positions] += _alike(self.head.scores, blocks)
                        if self.known is not None and view == self.views[0]:
                            strange[positions] = _alike(self._strangeness, blocks)
        if faults and on_bad == "stop":
            extraction.refuse(list(faults.values()), images.name)
        keep = np.array([i for i, at in enumerate(same) if int(at) not in faults], dtype=np.int64)
        kept = images if len(keep) == len(images) else images.subset(keep)
        probabilities = softmax(total[same[keep]] / len(self.views), self.head.temperature)
        return Predictions(
            kept,
            self.classes,
            probabilities,
            tuple(faults[int(at)] for at in same if int(at) in faults),
            None if self.known is None else strange[same[keep], 0],
        )

    def _opened(self) -> Runner:
        """The network, opened unless it is already."""
        if not self._runners:
            how = {"engine": self.engine, "precision": self.precision}
            self._runners.append(engine.open_runner(self.network, self.head.taps, self.load, **how))
        return self._runners[0]

    def _strangeness(self, blocks: Sequence[Array]) -> Array:
        assert self.known is not None
        return self.known.percentile(blocks)[:, None]


def _alike(judge: Callable[[Sequence[Array]], Array], blocks: Sequence[Array]) -> Array:
    """What `judge` says of the rows of `blocks`, always of as many at once: BLAS may sum in another
    order for another number of them, and one image alone must get the same bits as in a batch."""
    count = len(blocks[0])
    full = [
        np.concatenate([block, np.repeat(block[-1:], -count % SCORED, axis=0)]) for block in blocks
    ]
    parts = [judge([block[i : i + SCORED] for block in full]) for i in range(0, count, SCORED)]
    return np.concatenate(parts)[:count]


def remember(
    model: Classifier, images: ImageSet, groups: NDArray[np.int64], *, seed: int, most: int = 1000
) -> Classifier:
    """The classifier with `known` filled in from at most `most` of its training `images`, which are
    read through its own network."""
    chosen = np.sort(np.random.default_rng([seed, 5]).permutation(len(images))[:most])
    faults: dict[int, Fault] = {}
    stream = extraction.stream(images, chosen, model.network, model._opened, faults)
    with contextlib.closing(stream):
        positions, blocks = extraction.joined(list(stream))
    known = familiarity.fit(blocks, groups[positions], normalize=model.head.normalize, seed=seed)
    model.close()
    return dataclasses.replace(model, known=known)


def remember_all(model: Classifier, images: ImageSet, *, seed: int) -> Classifier:
    """`remember` from training images whose digests are not at hand: each is its own, but for
    groups that are named."""
    own = group_ids(images, [str(i) for i in range(len(images))])
    return remember(model, images, own, seed=seed)


def _gathered(stream: Iterable[extraction.Batch], rows: int) -> Iterator[extraction.Batch]:
    """The batches of `stream` joined to at least `rows` images; the last may have fewer."""
    waiting: list[extraction.Batch] = []
    for batch in stream:
        waiting.append(batch)
        if sum(len(positions) for positions, _ in waiting) >= rows:
            yield extraction.joined(waiting)
            waiting.clear()
    if waiting:
        yield extraction.joined(waiting)


# -------------------------------------------------------------------------------------- on the disk

FORMAT = 1


def save(folder: Path, classifier: Classifier, extra: dict[str, Any] | None = None) -> None:
    """Write `head.safetensors` and `config.json`; `model.safetensors` (the trunk) is written by
    `backbone.save`.

    config.json follows timm's local layout (architecture, num_classes, pretrained_cfg,
    label_names), so that `timm.create_model("local-dir:…")` opens a run whose head is one linear
    layer on the pooled features.
    """
    from safetensors.numpy import save as to_bytes

    head = classifier.head
    about = {
        "format": str(FORMAT),
        "kind": head.kind,
        "taps": json.dumps([str(tap) for tap in head.taps]),
        "classes": json.dumps(list(head.classes), ensure_ascii=False),
        "normalize": json.dumps(head.normalize),
        "temperature": repr(float(head.temperature)),
    }
    if isinstance(head, KernelHead):
        about["gamma"] = repr(float(head.gamma))
    arrays = {
        name: np.ascontiguousarray(array, dtype=np.float32) for name, array in head.arrays().items()
    }
    files.write_bytes(folder / "head.safetensors", to_bytes(arrays, about))
    if classifier.known is not None:
        familiarity.save(folder, classifier.known)
    pre = classifier.network.preprocess
    files.write_json(
        folder / "config.json",
        {
            "architecture": classifier.network.name,
            "num_classes": len(head.classes),
            "label_names": list(head.classes),
            "pretrained_cfg": {
                "input_size": [3, pre.size, pre.size],
                "mean": list(pre.mean),
                "std": list(pre.std),
                "interpolation": pre.interpolation,
                "crop_pct": pre.size / pre.resize,
                "crop_mode": "squash" if pre.squash else "center",
                "num_classes": len(head.classes),
                **(extra or {}),
            },
            "regraft": {
                "format": FORMAT,
                "network": classifier.network.to_json(),
                "engine": classifier.engine,
                "precision": classifier.precision,
                "views": list(classifier.views),
            },
        },
    )


def load(
    folder: Path, *, engine_name: str | None = None, precision: str | None = None
) -> Classifier:
    """Open what `save` wrote; the engine and precision of the run are used unless others are given
    (`auto` is none).

    Where the run's engine is not installed here, the other one is used, and a line says so: scores
    then agree within a small tolerance.
    """
    engine_name = None if engine_name == "auto" else engine_name
    precision = None if precision == "auto" else precision
    config = files.read_json(folder / "config.json")
    try:
        about = config["regraft"]
        if about["format"] != FORMAT:
            what = f"was written in format {about['format']}; this version reads {FORMAT}"
            raise UserError(what, where=folder, fix="fit again with --force")
        network, views = Network.from_json(about["network"]), tuple(about["views"])
        used, bits = engine_name or about["engine"], precision or about["precision"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"damaged: {error} is missing",
            where=folder / "config.json",
            fix="fit again with --force",
        ) from error
    head = _read_head(folder / "head.safetensors")
    width = sum(network.width(tap) for tap in head.taps)
    _check(head, width, folder / "head.safetensors")
    known = familiarity.load(folder, width)
    if engine_name is None and used == "openvino" and not device.has_openvino():
        files.note(
            f"{shown(folder)}: was made with openvino, which is not installed here; torch runs it "
            f"in {bits}: scores may differ in their last digits, and it takes longer"
        )
        used = "torch"

    def load_backbone() -> Backbone:
        from finetune.backbones import create

        own = create.load(network.name, str(folder / "model.safetensors"), network.preprocess.size)
        if own.network.digest != network.digest:
            raise UserError(
                "the weights are not those of this run",
                where=folder / "model.safetensors",
                fix="fit again with --force",
            )
        return dataclasses.replace(own, network=network)

    return Classifier(network, head, load_backbone, used, bits, views, known)


def _read_head(path: Path) -> AnyHead:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        common: dict[str, Any] = {
            "taps": tuple(Tap.parse(text) for text in json.loads(about["taps"])),
            "classes": tuple(json.loads(about["classes"])),
            "normalize": bool(json.loads(about["normalize"])),
            "temperature": float(about["temperature"]),
            "kind": about["kind"],
        }
        if "support" in arrays:
            return KernelHead(**common, **arrays, gamma=float(about["gamma"]))
        return Head(**common, **arrays)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"damaged: not a head ({error})", where=path, fix="fit again with --force"
        ) from error


def _check(head: AnyHead, width: int, path: Path) -> None:
    """Refuse a head whose arrays do not fit its classes and the `width` features that its taps
    give, or hold no numbers."""
    count = len(head.classes)
    if isinstance(head, KernelHead):
        expected = {
            "support": (len(head.support), width),
            "coef": (count, len(head.support)),
            "bias": (count,),
        }
    else:
        expected = {"weight": (count, width), "bias": (count,)}
    wrong = [
        f"{name} {array.shape} where {expected[name]} finite numbers are expected"
        for name, array in head.arrays().items()
        if array.shape != expected[name] or not np.isfinite(array).all()
    ]
    if not head.temperature > 0:
        wrong.append(f"a temperature of {head.temperature}")
    if wrong:
        raise UserError(f"damaged: {'; '.join(wrong)}", where=path, fix="fit again with --force")
