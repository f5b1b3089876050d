"""Training-time transforms: bytes of an image to varied network input, decided by (seed, view,
image) alone; and mixup.

Every random choice comes from a generator of its own, so that neither the order of the images nor
the number of threads changes a pixel. View 0 of an image is the evaluation transform.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from finetune import hardware
from finetune.data import decode
from finetune.errors import UserError
from finetune.network import Preprocess

if TYPE_CHECKING:
    from finetune.data.images import ImageSet

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels

RATIO = (3 / 4, 4 / 3)  # width over height of a random crop
TRIES = 10  # crops drawn before the largest centred one of an allowed shape is taken
AHEAD = 3  # batches decoded ahead of the network


@dataclass(frozen=True)
class Strength:
    """`area` is the smallest share of the image that a crop keeps, `jitter` the largest change of
    brightness, contrast and saturation, `trivial` adds one TrivialAugment operation, `affine`
    turns, shifts, scales and shears the whole image in place of a crop."""

    area: float = 1.0
    jitter: float = 0.0
    trivial: bool = False
    affine: bool = False


STRENGTHS: dict[str, Strength | None] = {
    "none": None,
    "affine": Strength(affine=True),
    "photo": Strength(area=0.5, trivial=True),
    "light": Strength(area=0.6),
    "medium": Strength(area=0.35, jitter=0.2),
    "strong": Strength(area=0.25, trivial=True),
}


def augmented(
    data: bytes, pre: Preprocess, strength: str, rng: np.random.Generator, *, flip: bool = True
) -> Pixels:
    """One varied view of an image file, `(size, size, 3)` uint8: a random resized crop (Szegedy et
    al. 2015), mirrored half of the time where `flip`, then what `strength` adds.

    `none` is the evaluation transform. Raises `DecodeError`, and `UserError` for an unknown
    strength.
    """
    if strength not in STRENGTHS:
        raise UserError(
            f"no augmentation is called {strength!r}",
            where="train.augment",
            fix=f"use {', '.join(STRENGTHS)}",
        )
    how = STRENGTHS[strength]
    if how is None:
        return decode.to_input(data, pre)
    if how.affine:
        image = moved(Image.fromarray(decode.to_input(data, pre)), rng)
        if rng.random() < 0.5 and flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.array(image)
    # A crop is enlarged by up to 1 / sqrt(area): a reduced-scale JPEG must hold that many more
    # pixels.
    image = decode.decode(data, short_side=math.ceil(pre.resize / math.sqrt(how.area)))
    box = crop_box(image.size, how.area, rng)
    image = image.resize((pre.size, pre.size), decode.FILTERS[pre.interpolation], box=box)
    # Drawn even without flips, so that forbidding them leaves every other choice as it was.
    if rng.random() < 0.5 and flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if how.jitter:
        image = jittered(image, how.jitter, rng)
    if how.trivial:
        image = trivial(image, rng, tuple(round(255 * value) for value in pre.mean))
    return np.array(image)


# degrees, a share of the side, factors, degrees: what a small picture bears without changing class
ANGLE, SHIFT, SCALE, SHEAR = 12.0, 0.1, (0.85, 1.15), 8.0


def moved(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image turned, shifted, scaled and sheared a little; the colour of its border, the median
    of its outermost pixels, fills the corners that open up."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transforms

    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    side = max(image.size)
    result: Image.Image = transforms.affine(
        image,
        angle=float(rng.uniform(-ANGLE, ANGLE)),
        translate=[round(float(rng.uniform(-SHIFT, SHIFT)) * side) for _ in range(2)],
        scale=float(rng.uniform(*SCALE)),
        shear=[float(rng.uniform(-SHEAR, SHEAR)), 0.0],
        interpolation=InterpolationMode.BILINEAR,
        fill=[float(value) for value in np.median(border, axis=0)],
    )
    return result


def crop_box(size: tuple[int, int], area: float, rng: np.random.Generator) -> Box:
    """A random crop of an image of `size` (width, height): at least `area` of it, its shape within
    `RATIO`."""
    width, height = size
    for _ in range(TRIES):
        pixels = width * height * rng.uniform(area, 1)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = (
        min(width, max(1, round(height * RATIO[1]))),
        min(height, max(1, round(width / RATIO[0]))),
    )
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def jittered(image: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation, in a random order, each scaled by a factor within 1 ±
    `amount`."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = rng.uniform(1 - amount, 1 + amount, len(enhancers))
    for k in rng.permutation(len(enhancers)):
        image = enhancers[k](image).enhance(factors[k])
    return image


# ----------------------------------------------------------------------------------- TrivialAugment

Fill = tuple[int, ...]
Operation = Callable[[Image.Image, float, Fill], Image.Image]


def _affine(
    image: Image.Image, matrix: tuple[float, float, float, float, float, float], fill: Fill
) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill
    )


# `m` lies within ±1; operations that know no sign take its size.
OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, m, fill: image,
    "shear-x": lambda image, m, fill: _affine(
        image, (1, 0.3 * m, -0.15 * m * image.height, 0, 1, 0), fill
    ),
    "shear-y": lambda image, m, fill: _affine(
        image, (1, 0, 0, 0.3 * m, 1, -0.15 * m * image.width), fill
    ),
    "shift-x": lambda image, m, fill: _affine(image, (1, 0, 0.2 * m * image.width, 0, 1, 0), fill),
    "shift-y": lambda image, m, fill: _affine(image, (1, 0, 0, 0, 1, 0.2 * m * image.height), fill),
    "rotate": lambda image, m, fill: image.rotate(
        30 * m, Image.Resampling.BILINEAR, fillcolor=fill
    ),
    "brightness": lambda image, m, fill: ImageEnhance.Brightness(image).enhance(1 + 0.9 * m),
    "colour": lambda image, m, fill: ImageEnhance.Color(image).enhance(1 + 0.9 * m),
    "contrast": lambda image, m, fill: ImageEnhance.Contrast(image).enhance(1 + 0.9 * m),
    "sharpness": lambda image, m, fill: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * m),
    "posterize": lambda image, m, fill: ImageOps.posterize(image, 8 - round(4 * abs(m))),
    "solarize": lambda image, m, fill: ImageOps.solarize(image, round(256 * (1 - abs(m)))),
    "autocontrast": lambda image, m, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, m, fill: ImageOps.equalize(image),
}


def trivial(image: Image.Image, rng: np.random.Generator, fill: Fill) -> Image.Image:
    """TrivialAugment (Müller & Hutter 2021): one operation, drawn evenly, with one even strength.

    Rotation stays within 30°, not the 135° of the paper's wide space, in which a 6 would become a
    9. `fill` is the colour of the corners that open up.
    """
    name = list(OPERATIONS)[int(rng.integers(len(OPERATIONS)))]
    return OPERATIONS[name](image, float(rng.uniform(-1, 1)), fill)


# ------------------------------------------------------------------------------------------ batches


def batches(
    images: ImageSet,
    plan: Iterable[Sequence[tuple[int, int]]],
    pre: Preprocess,
    strength: str,
    *,
    flip: bool,
    seed: int,
) -> Iterator[Pixels]:
    """Pixels `(n, size, size, 3)` uint8 of every batch of (image, view) in `plan`, decoded ahead in
    threads.

    An image that cannot be read or decoded is a `UserError` that names it.
    """

    def one(i: int, view: int) -> Pixels:
        try:
            rng = np.random.default_rng([seed, view, i])
            return augmented(images.read(i), pre, strength if view else "none", rng, flip=flip)
        except decode.DecodeError as error:
            raise UserError(
                f"{error.kind}: {error.detail}",
                where=images.root / images.paths[i],
                fix="mend or remove it; `finetune check` lists all such files",
            ) from error

    with ThreadPoolExecutor(hardware.cores()) as pool:
        waiting: deque[list[Future[Pixels]]] = deque()
        try:
            for batch in plan:
                waiting.append([pool.submit(one, i, view) for i, view in batch])
                if len(waiting) > AHEAD:
                    yield np.stack([future.result() for future in waiting.popleft()])
            while waiting:
                yield np.stack([future.result() for future in waiting.popleft()])
        finally:
            for futures in waiting:
                for future in futures:
                    future.cancel()


def mixing(count: int, alpha: float, rng: np.random.Generator) -> tuple[float, Tensor]:
    """How mixup (Zhang et al. 2018) blends a batch of `count` rows: λ ~ Beta(alpha, alpha), the
    share that each row keeps, and the other row of each.

    With stored activations the blend is made at the freeze boundary (manifold mixup, Verma et al.
    2019).
    """
    return float(rng.beta(alpha, alpha)), torch.from_numpy(rng.permutation(count))
