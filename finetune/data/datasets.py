"""Data sets with names: `sklearn:digits` comes with scikit-learn, `torchvision:<Name>` is
downloaded by torchvision.

They behave like folders of files, but their bytes are made when they are read. scikit-learn and
torchvision are imported when a set is asked for, never before.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune import files
from finetune.errors import UserError

EXAMPLES = (
    "sklearn:digits, torchvision:CIFAR10, torchvision:Flowers102, "
    "torchvision:Food101, torchvision:OxfordIIITPet"
)
# What the parts of a data set are called in torchvision, by the split that they serve here.
PARTS = {"train": ("train", "trainval"), "val": ("val", "valid"), "test": ("test",)}
STORABLE = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # modes that a PNG keeps


@dataclass(frozen=True)
class NamedSet:
    """What a named set holds. `source(path)` gives the bytes of an image file; `split` is None
    where the set has no parts."""

    paths: tuple[str, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    split: NDArray[np.str_] | None
    source: Callable[[str], bytes]


def load(text: str) -> NamedSet:
    """Open the set that `text` names; an unknown name, or a download that fails, is a
    `UserError`."""
    family, _, name = text.partition(":")
    if text == "sklearn:digits":
        return _digits()
    if family == "torchvision":
        return _torchvision(name)
    raise UserError(
        f"no data set is called {text!r}",
        where="DATA",
        fix=f"named sets: {EXAMPLES}; or give a folder or a CSV",
    )


def _digits() -> NamedSet:
    """1,797 handwritten digits, 8 × 8 pixels, as grey PNGs; the values 0–16 become 0–255."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.round(np.asarray(data.images) * (255 / 16)).astype(np.uint8)
    labels = np.asarray(data.target, dtype=np.int64)
    paths = tuple(f"{label}/{i:04d}.png" for i, label in enumerate(labels))
    return NamedSet(
        paths,
        labels,
        tuple(map(str, range(10))),
        None,
        lambda path: _png(Image.fromarray(pixels[int(path[2:6])])),
    )


def _torchvision(name: str) -> NamedSet:
    import torchvision.datasets as home

    kind = getattr(home, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, home.VisionDataset)) or name in (
        "VisionDataset",
        "ImageFolder",
        "DatasetFolder",
    ):
        close = [n for n in home.__all__ if name and name.lower()[:4] in n.lower()]
        fix = f"did you mean {', '.join(close[:4])}?" if close else f"for instance {EXAMPLES}"
        raise UserError(f"torchvision has no data set called {name!r}", where="DATA", fix=fix)
    with contextlib.redirect_stdout(sys.stderr):  # torchvision prints while it downloads
        parts = _open_parts(name, kind)
    labels, paths, split = [], [], []
    for part, dataset in parts.items():
        found = _labels(name, dataset)
        labels.append(found)
        paths += [f"{part}/{i:06d}.png" for i in range(len(found))]
        split += [part] * len(found)
    joined = np.concatenate(labels)
    classes = _class_names(next(iter(parts.values())), int(joined.max(initial=0)) + 1)
    divided = None if "all" in parts else np.array(split, dtype="<U5")
    return NamedSet(tuple(paths), joined, classes, divided, _reader(parts))


def _open_parts(name: str, kind: Callable[..., Any]) -> dict[str, Any]:
    """The data sets behind a class of torchvision, by split; "all" where it is not divided."""
    options = inspect.signature(kind).parameters
    always: dict[str, Any] = {}
    if "root" in options:
        always["root"] = str(files.cache_dir("torchvision"))
    if "download" in options:
        always["download"] = True
    needed = [
        key
        for key, option in options.items()
        if option.default is option.empty
        and option.kind is option.POSITIONAL_OR_KEYWORD
        and key not in (*always, "train", "split")
    ]
    if needed:
        raise UserError(
            f"torchvision's {name} needs {', '.join(needed)}",
            where="DATA",
            fix=f"use one of {EXAMPLES}, or a folder",
        )
    try:
        if "train" in options:
            return {"train": kind(**always, train=True), "test": kind(**always, train=False)}
        if "split" not in options:
            return {"all": kind(**always)}
        return dict(_split_parts(kind, always))
    except ModuleNotFoundError as error:
        raise UserError(
            f"torchvision's {name} needs the package {error.name}",
            where="DATA",
            fix=f"pip install {error.name}",
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"torchvision's {name} could not be fetched: {error}",
            where="DATA",
            fix=f"check the network, or put the files into {files.cache_dir('torchvision')}",
        ) from error


def _split_parts(kind: Callable[..., Any], always: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for part, spellings in PARTS.items():
        for spelling in spellings:
            try:
                yield part, kind(**always, split=spelling)
            except ValueError:  # torchvision checks the spelling before it fetches anything
                if part == "train" and spelling == spellings[-1]:
                    raise
            else:
                break


def _labels(name: str, dataset: Any) -> NDArray[np.int64]:
    """One class number an image, from the list that most data sets keep, else by asking for every
    image."""
    for attribute in ("targets", "_labels", "labels", "y", "_samples", "samples"):
        found = getattr(dataset, attribute, None)
        if found is None or len(found) != len(dataset) or not len(found):
            continue
        if attribute.endswith("samples"):
            found = [entry[1] for entry in found]
        values = np.asarray(found)
        if values.ndim == 1 and values.dtype.kind in "iu" and int(values[0]) == dataset[0][1]:
            return values.astype(np.int64)
    single = [dataset[i][1] for i in range(min(1, len(dataset)))]
    if not single or np.asarray(single[0]).ndim or np.asarray(single[0]).dtype.kind not in "iu":
        raise UserError(
            f"torchvision's {name} does not have one class an image",
            where="DATA",
            fix=f"use one of {EXAMPLES}",
        )
    return np.array([int(dataset[i][1]) for i in range(len(dataset))], dtype=np.int64)


def _class_names(dataset: Any, count: int) -> tuple[str, ...]:
    """The data set's own names where it has one for each class and they differ, else the
    numbers."""
    given: Sequence[Any] = getattr(dataset, "classes", None) or ()
    names = tuple(
        name if isinstance(name, str) else ", ".join(map(str, name))
        for name in given
        if isinstance(name, str | tuple | list)
    )
    return (
        names
        if len(names) >= count and len(set(names)) == len(names)
        else tuple(map(str, range(count)))
    )


def _reader(parts: dict[str, Any]) -> Callable[[str], bytes]:
    # some data sets seek in one open file, or reseed a global generator, for every image
    lock = threading.Lock()

    def read(path: str) -> bytes:
        part, _, number = path.partition("/")
        with lock:
            image = parts[part][int(number.removesuffix(".png"))][0]
        if not isinstance(image, Image.Image):
            raise UserError(
                f"holds {type(image).__name__} where an image is needed",
                where=path,
                fix=f"use one of {EXAMPLES}",
            )
        return _png(image if image.mode in STORABLE else image.convert("RGB"))

    return read


def _png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
