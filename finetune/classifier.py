"""What a run ships: a head on the taps of a frozen network. numpy alone; the network runs through `engine`.

A head reads one tap or several side by side. `scores` are decision values, `probabilities` the softmax of the scores
over a temperature that was fitted on scores of images that the head had not seen (Guo et al. 2017).
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

from finetune import engine, features, files, loose
from finetune.engine import Runner
from finetune.errors import UserError
from finetune.images import Fault, ImageSet, check_on_bad
from finetune.loose import Picture
from finetune.network import Network, Tap

if TYPE_CHECKING:
    from finetune.backbone import Backbone

Array = NDArray[np.float32]
SCORED = 16  # rows that a prediction scores at once: few, so that one image alone is fast
ROWS = 4096  # rows that a head scores at once, at most: keeps the kernel block of an RBF head small


def side_by_side(blocks: Sequence[NDArray[Any]], normalize: bool) -> Array:
    """Join the features of several taps, each row of each tap L2-normalised first where `normalize`.

    `blocks` are `(n, d_i)`; the result is `(n, sum d_i)`, float32 and C-contiguous. With k taps a normalised row has
    length √k. A row of zeros stays zero.
    """
    parts = []
    for block in blocks:
        part = np.asarray(block, dtype=np.float32)
        if normalize:
            norm = np.sqrt(np.einsum("ij,ij->i", part, part, dtype=np.float64)).astype(np.float32)[:, None]
            part = part / np.maximum(norm, 1e-12)
        parts.append(part)
    return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1))


def softmax(scores: NDArray[Any], temperature: float = 1.0) -> Array:
    """Row-wise softmax of `scores / temperature`, `(n, C)`; one row sums to 1."""
    z = np.asarray(scores, dtype=np.float64) / temperature
    z = np.exp(z - z.max(axis=1, keepdims=True))
    return (z / z.sum(axis=1, keepdims=True)).astype(np.float32)


@dataclass(frozen=True)
class Head:
    """A linear classifier: `scores = side_by_side(x) @ weight.T + bias`.

    `weight` is `(C, D)`, `bias` `(C,)`, D the sum of the widths of `taps`. `kind` names how it was made:
    `svm`, `logistic` or `fine-tuned`.
    """

    taps: tuple[Tap, ...]
    classes: tuple[str, ...]
    weight: Array
    bias: Array
    normalize: bool = True
    temperature: float = 1.0
    kind: str = "svm"

    def scores(self, blocks: Sequence[NDArray[Any]]) -> Array:
        """Decision values `(n, C)` of features given one array a tap, in the order of `taps`."""
        x = side_by_side(blocks, self.normalize)
        return np.concatenate([x[i : i + ROWS] @ self.weight.T + self.bias for i in range(0, max(len(x), 1), ROWS)])

    def arrays(self) -> dict[str, Array]:
        return {"weight": self.weight, "bias": self.bias}


@dataclass(frozen=True)
class KernelHead:
    """An RBF machine, one against the rest: `scores = exp(-gamma ‖x − s‖²) @ coef.T + bias`. `kind` is `rbf-svm`
    or, fitted with squared errors, `rbf-lssvm`.

    `support` is `(m, D)` in the space of `side_by_side`, `coef` `(C, m)`, `bias` `(C,)`. It may ship; it cannot start
    fine-tuning.
    """

    taps: tuple[Tap, ...]
    classes: tuple[str, ...]
    support: Array
    coef: Array
    bias: Array
    gamma: float
    normalize: bool = True
    temperature: float = 1.0
    kind: str = "rbf-svm"

    def scores(self, blocks: Sequence[NDArray[Any]]) -> Array:
        """Decision values `(n, C)` of features given one array a tap, in the order of `taps`."""
        x = side_by_side(blocks, self.normalize)
        return np.concatenate(
            [rbf(x[i : i + ROWS], self.support, self.gamma) @ self.coef.T + self.bias for i in range(0, max(len(x), 1), ROWS)]
        )

    def arrays(self) -> dict[str, Array]:
        return {"support": self.support, "coef": self.coef, "bias": self.bias}


AnyHead = Head | KernelHead


def rbf(x: Array, y: Array, gamma: float) -> Array:
    """The Gaussian kernel `exp(-gamma ‖x_i − y_j‖²)`, `(len(x), len(y))`."""
    squared = np.einsum("ij,ij->i", x, x)[:, None] + np.einsum("ij,ij->i", y, y)[None] - 2 * (x @ y.T)
    return np.exp(-gamma * np.maximum(squared, 0))


@dataclass(frozen=True)
class Predictions:
    """`probabilities` is `(n, C)`, row i of `images.paths[i]`: the inputs in their order, a row each.

    `faults` are the images that could not be read and were skipped, by the same names: rows and faults together are as
    many as the images that were asked for.
    """

    images: ImageSet
    classes: tuple[str, ...]
    probabilities: Array
    faults: tuple[Fault, ...]

    @property
    def best(self) -> NDArray[np.int64]:
        """The index of the most probable class of every image."""
        return self.probabilities.argmax(axis=1)


@dataclass(frozen=True)
class Classifier:
    """A frozen network and the head that reads it. `load` gives the torch backbone where it must be converted.

    `views` are averaged: the scores of an image are the mean over them.

    The network is opened by the first prediction and held for the next ones. `close` lets it go, and so does the end of
    `with finetune.load(run) as model:`; a later prediction opens it again. Predictions may be asked for from several
    threads: they are made one after the other, each with all cores.
    """

    network: Network
    head: AnyHead
    load: Callable[[], Backbone]
    engine: str = "auto"
    precision: str = "auto"
    views: tuple[str, ...] = ("",)
    _runners: list[Runner] = dataclasses.field(default_factory=list, init=False, repr=False, compare=False)
    _lock: Any = dataclasses.field(default_factory=threading.RLock, init=False, repr=False, compare=False)

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
        progress: features.Progress | None = None,
    ) -> Predictions:
        """Probabilities of every image, past the feature store: the one path of `predict`, `evaluate` and predictions.csv.

        `images` are a set; or one picture or several, a row each, in their order: paths of files, folders (all images
        below them), the bytes of image files, PIL images, and uint8 arrays H × W, H × W × 3 (RGB) or H × W × 4 (RGBA).
        They are called as in `loose.load`. A PIL image or an array gets what its file would get, if it were saved without
        loss. An image gets the same bits alone and beside others, as far as `engine.Runner` promises.

        Raises `UserError` naming all unreadable images where `on_bad` is stop; `skip` leaves them to `faults`.
        """
        check_on_bad(on_bad)
        if not isinstance(images, ImageSet):
            images = loose.load(images, on_bad=on_bad)
        first: dict[str, int] = {}  # where each path stands first: a file that is there again is not looked at again
        same = np.array([first.setdefault(path, i) for i, path in enumerate(images.paths)], dtype=np.int64)
        todo = list(first.values())
        faults: dict[int, Fault] = {}
        total = np.zeros((len(images), len(self.classes)), dtype=np.float32)
        with self._lock:
            for view in self.views:
                stream = features.stream(images, todo, self.network, self._opened, faults, view=view, progress=progress)
                with contextlib.closing(stream):  # an error below ends the decoding, too
                    for positions, blocks in _gathered(stream, SCORED):
                        total[positions] += self._scores(blocks)
        if faults and on_bad == "stop":
            features.refuse(list(faults.values()), images.name)
        keep = np.array([i for i, at in enumerate(same) if int(at) not in faults], dtype=np.int64)
        kept = images if len(keep) == len(images) else images.subset(keep)
        probabilities = softmax(total[same[keep]] / len(self.views), self.head.temperature)
        return Predictions(kept, self.classes, probabilities, tuple(faults[int(at)] for at in same if int(at) in faults))

    def _opened(self) -> Runner:
        """The network, opened unless it is already."""
        if not self._runners:
            how = {"engine": self.engine, "precision": self.precision}
            self._runners.append(engine.open_runner(self.network, self.head.taps, self.load, **how))
        return self._runners[0]

    def _scores(self, blocks: Sequence[Array]) -> Array:
        # Always as many rows: BLAS may sum in another order for another number of them, and one image alone must get the
        # same bits as in a batch.
        count = len(blocks[0])
        full = [np.concatenate([block, np.repeat(block[-1:], -count % SCORED, axis=0)]) for block in blocks]
        parts = [self.head.scores([block[i : i + SCORED] for block in full]) for i in range(0, count, SCORED)]
        return np.concatenate(parts)[:count]


def _gathered(stream: Iterable[features.Batch], rows: int) -> Iterator[features.Batch]:
    """The batches of `stream` joined to at least `rows` images; the last may have fewer."""
    waiting: list[features.Batch] = []
    for batch in stream:
        waiting.append(batch)
        if sum(len(positions) for positions, _ in waiting) >= rows:
            yield features.joined(waiting)
            waiting.clear()
    if waiting:
        yield features.joined(waiting)


# ------------------------------------------------------------------------------------------------------ on the disk

FORMAT = 1


def save(folder: Path, classifier: Classifier, extra: dict[str, Any] | None = None) -> None:
    """Write `head.safetensors` and `config.json`; `model.safetensors` (the trunk) is written by `backbone.save`.

    config.json follows timm's local layout (architecture, num_classes, pretrained_cfg, label_names), so that
    `timm.create_model("local-dir:…")` opens a run whose head is one linear layer on the pooled features.
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
    arrays = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in head.arrays().items()}
    files.write_bytes(folder / "head.safetensors", to_bytes(arrays, about))
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


def load(folder: Path, *, engine_name: str | None = None, precision: str | None = None) -> Classifier:
    """Open what `save` wrote; the engine and precision of the run are used unless others are given.

    Where the run's engine is not installed here, the other one is used: scores then agree within a small tolerance.
    """
    config = files.read_json(folder / "config.json")
    try:
        about = config["regraft"]
        if about["format"] != FORMAT:
            what = f"was written in format {about['format']}; this version reads {FORMAT}"
            raise UserError(what, where=folder, fix="fit again with --force")
        network, views = Network.from_json(about["network"]), tuple(about["views"])
        used, bits = engine_name or about["engine"], precision or about["precision"]
    except (KeyError, TypeError) as error:
        raise UserError(f"damaged: {error} is missing", where=folder / "config.json", fix="fit again with --force") from error
    head = _read_head(folder / "head.safetensors")
    _check(head, sum(network.width(tap) for tap in head.taps), folder / "head.safetensors")
    if engine_name is None and used == "openvino" and not engine.has_openvino():
        used = "torch"

    def load_backbone() -> Backbone:
        from finetune import backbone

        own = backbone.load(network.name, str(folder / "model.safetensors"), network.preprocess.size)
        if own.network.digest != network.digest:
            raise UserError(
                "the weights are not those of this run", where=folder / "model.safetensors", fix="fit again with --force"
            )
        return dataclasses.replace(own, network=network)

    return Classifier(network, head, load_backbone, used, bits, views)


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
        raise UserError(f"damaged: not a head ({error})", where=path, fix="fit again with --force") from error


def _check(head: AnyHead, width: int, path: Path) -> None:
    """Refuse a head whose arrays do not fit its classes and the `width` features that its taps give, or hold no numbers."""
    count = len(head.classes)
    if isinstance(head, KernelHead):
        expected = {"support": (len(head.support), width), "coef": (count, len(head.support)), "bias": (count,)}
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
