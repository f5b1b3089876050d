"""Training-time transforms: seeded views, what each strength may change, batches in threads, and
mixup."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.data import augment, decode
from finetune.data.images import ImageSet
from finetune.errors import UserError
from finetune.network import Preprocess

PRE = Preprocess(32, 36, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
VARIED = [name for name in augment.STRENGTHS if name != "none"]


def picture(width: int = 60, height: int = 48, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def image_set(count: int, bad: int | None = None) -> ImageSet:
    files = {f"{i}.png": encoded(picture(seed=i)) for i in range(count)}
    if bad is not None:
        files[f"{bad}.png"] = files[f"{bad}.png"][:200]
    return ImageSet(
        "x",
        Path("pictures"),
        tuple(files),
        np.zeros(count, np.int64),
        ("a",),
        source=files.__getitem__,
    )


def view(strength: str, seed: int = 0, *, flip: bool = True) -> np.ndarray:
    return augment.augmented(
        encoded(picture()), PRE, strength, np.random.default_rng(seed), flip=flip
    )


def test_none_is_the_evaluation_transform() -> None:
    """Without augmentation the pixels are those that evaluation sees, whatever the generator."""
    data = encoded(picture())

    assert np.array_equal(
        decode.to_input(data, PRE), augment.augmented(data, PRE, "none", np.random.default_rng(3))
    )


@pytest.mark.parametrize("strength", VARIED)
def test_views_follow_their_seed(strength: str) -> None:
    """The same generator state gives the same pixels, another one gives others; shape and type are
    the network's."""
    first, again, other = view(strength, 1), view(strength, 1), view(strength, 2)

    assert (32, 32, 3) == first.shape
    assert np.uint8 == first.dtype
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("strength", VARIED)
def test_flips_can_be_forbidden(strength: str) -> None:
    """Half of the views are mirrored; with flips forbidden none is, and every other choice stays as
    it was."""
    mirrored = 0
    for seed in range(40):
        free, fixed = view(strength, seed), view(strength, seed, flip=False)
        # A mirror followed by colours is a mirror of the colours, but for the geometric operations
        # of `strong` and `photo`.
        mirrored += not np.array_equal(free, fixed)
        if strength not in ("strong", "photo") and not np.array_equal(free, fixed):
            assert np.array_equal(free[:, ::-1], fixed)

    assert 10 <= mirrored <= 30


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.floats(0.05, 1), st.integers(0, 2**32))
def test_crops_lie_inside_the_image(width: int, height: int, area: float, seed: int) -> None:
    """A crop is never empty and never leaves the image, down to a single pixel."""
    left, top, right, bottom = augment.crop_box((width, height), area, np.random.default_rng(seed))

    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_crops_keep_the_promised_area_and_shape() -> None:
    """On an image of ordinary shape, area and ratio stay within their bounds (up to rounding) and
    use them."""
    rng = np.random.default_rng(0)
    boxes = np.array([augment.crop_box((400, 300), 0.35, rng) for _ in range(300)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas, ratios = width * height / (400 * 300), width / height

    assert 0.34 <= areas.min() <= 0.4
    assert 0.74 <= ratios.min() <= 0.8
    assert 1.25 <= ratios.max() <= 1.35


def test_a_very_long_image_is_cropped_at_its_centre() -> None:
    """Where no allowed shape fits, the largest centred one is taken."""
    assert (480, 0, 520, 30) == augment.crop_box((1000, 30), 0.99, np.random.default_rng(0))


def test_jitter_is_the_colour_change_of_torchvision() -> None:
    """Brightness, contrast and saturation agree with torchvision's functions for the same factors
    and order."""
    image = picture()
    rng = np.random.default_rng(5)
    factors, order = rng.uniform(0.8, 1.2, 3), rng.permutation(3)
    functions = (
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
    )
    expected = image
    for k in order:
        expected = functions[k](expected, factors[k])

    assert np.array_equal(
        np.array(expected), np.array(augment.jittered(image, 0.2, np.random.default_rng(5)))
    )


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_operations_keep_size_and_mode(name: str) -> None:
    """Every TrivialAugment operation works at both ends of its range and gives an RGB image of the
    same size."""
    image = picture()
    for strength in (-1.0, 0.0, 1.0):
        result = augment.OPERATIONS[name](image, strength, (124, 116, 104))

        assert (image.size, "RGB") == (result.size, result.mode)


@pytest.mark.parametrize(
    "name",
    [
        "identity",
        "shear-x",
        "shear-y",
        "shift-x",
        "shift-y",
        "rotate",
        "brightness",
        "colour",
        "contrast",
    ],
)
def test_operations_of_no_strength_change_nothing(name: str) -> None:
    """At strength 0 an operation with a sign is the identity."""
    image = picture()

    assert np.array_equal(
        np.array(image), np.array(augment.OPERATIONS[name](image, 0.0, (0, 0, 0)))
    )


def test_shears_and_rotations_turn_about_the_centre() -> None:
    """A dot in the middle stays where it is, and opened corners show the fill colour."""
    image = Image.new("RGB", (41, 41))
    image.paste((255, 255, 255), (18, 18, 23, 23))
    for name in ("shear-x", "shear-y", "rotate"):
        result = np.array(augment.OPERATIONS[name](image, 1.0, (9, 8, 7)))

        assert 255 == result[20, 20, 0], name
        assert (result == (9, 8, 7)).all(2).any(), name


def test_trivial_uses_every_operation() -> None:
    """Over many draws each of the operations comes up: results differ in more ways than one."""
    rng = np.random.default_rng(0)
    results = {augment.trivial(picture(), rng, (0, 0, 0)).tobytes() for _ in range(100)}

    assert len(results) > 60


def test_large_jpegs_keep_the_pixels_that_a_small_crop_needs() -> None:
    """The reduced-scale decoding leaves the short side long enough for the smallest crop."""
    data = encoded(picture(800, 640), "JPEG")
    seen: list[int | None] = []
    original = decode.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            decode,
            "decode",
            lambda data, *, short_side=None: seen.append(short_side) or original(data),
        )
        augment.augmented(data, PRE, "strong", np.random.default_rng(0))

    assert [72] == seen  # 36 / sqrt(0.25)


def test_an_unknown_strength_is_named() -> None:
    """A misspelt strength is refused with the ones that exist."""
    with pytest.raises(UserError, match=r"(?s)'mild'.*none, affine, photo, light, medium, strong"):
        view("mild")


def test_batches_do_not_depend_on_order_or_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A view of an image is the same in any batch, at any place, with one thread or many."""
    images = image_set(6)
    (together,) = augment.batches(
        images, [[(i, 1) for i in range(6)]], PRE, "medium", flip=True, seed=7
    )
    monkeypatch.setattr(augment.hardware, "cores", lambda: 1)
    plan = [[(5, 1), (3, 1)], [(1, 1)], [(0, 1), (2, 1), (4, 1)]]
    apart = list(augment.batches(images, plan, PRE, "medium", flip=True, seed=7))

    assert [2, 1, 3] == [len(batch) for batch in apart]
    assert np.array_equal(together[[5, 3, 1, 0, 2, 4]], np.concatenate(apart))


def test_batches_differ_by_view_and_seed_and_view_0_is_clean() -> None:
    """Another view or seed gives other pixels; view 0 is the evaluation transform."""
    images = image_set(1)
    plan = [[(0, 0)], [(0, 1)], [(0, 2)]]
    clean, first, second = augment.batches(images, plan, PRE, "light", flip=True, seed=0)
    (reseeded,) = augment.batches(images, [[(0, 1)]], PRE, "light", flip=True, seed=1)

    assert np.array_equal(decode.to_input(images.read(0), PRE), clean[0])
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, reseeded)


def test_equal_files_get_views_of_their_own() -> None:
    """Two images with the same bytes are cropped differently: the position in the set is part of
    the seed."""
    images = image_set(1)
    twice = images.subset([0, 0])
    first, second = next(
        augment.batches(twice, [[(0, 1), (1, 1)]], PRE, "light", flip=True, seed=0)
    )

    assert not np.array_equal(first, second)


def test_a_bad_image_is_named() -> None:
    """A truncated file stops the batch with its path, and nothing is skipped."""
    images = image_set(3, bad=1)

    with pytest.raises(UserError, match=r"pictures/1\.png.*truncated"):
        list(
            augment.batches(images, [[(0, 1)], [(1, 1)], [(2, 1)]], PRE, "light", flip=True, seed=0)
        )


def test_batches_can_be_left_early() -> None:
    """Closing the generator ends its threads without decoding the rest."""
    images = image_set(4)
    running = augment.batches(
        images, ([(i % 4, 1)] for i in range(10_000)), PRE, "light", flip=True, seed=0
    )
    next(running)
    running.close()


def test_mixup_draws_a_share_and_a_partner_for_each_row() -> None:
    """The share lies between 0 and 1, the partners are a permutation, and the same generator state
    gives the same."""
    share, other = augment.mixing(6, 0.4, np.random.default_rng(0))
    again = augment.mixing(6, 0.4, np.random.default_rng(0))

    assert 0 <= share <= 1
    assert list(range(6)) == sorted(other.tolist())
    assert share == again[0]
    assert torch.equal(other, again[1])


def test_an_affine_view_keeps_the_whole_picture() -> None:
    """A drawing on white stays on white, and most of its ink is still there: nothing is cut off by
    a crop."""
    image = Image.new("RGB", (40, 40), "white")
    image.paste("black", (12, 12, 28, 28))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    views = [
        augment.augmented(buffer.getvalue(), PRE, "affine", np.random.default_rng(seed))
        for seed in range(20)
    ]
    clean = decode.to_input(buffer.getvalue(), PRE)
    ink = [float((view < 128).mean() / (clean < 128).mean()) for view in views]

    assert all((view[0, 0] > 200).all() for view in views)
    assert 0.6 < min(ink) < max(ink) < 1.5
    assert len({view.tobytes() for view in views}) == 20
