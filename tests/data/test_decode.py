"""Decoding: every format upright and in RGB, every fault named, and the network's input as timm
makes it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from faults import encode, exif, png_header
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from timm.data import create_transform

from finetune.data import decode
from finetune.data.decode import DecodeError
from finetune.errors import UserError
from finetune.network import Preprocess

BICUBIC = Preprocess(224, 256, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@cache
def photograph(name: str = "china.jpg", size: tuple[int, int] = (500, 375)) -> Image.Image:
    """A photograph that comes with scikit-learn, resized."""
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(name)).resize(size, Image.Resampling.LANCZOS)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def fault(data: bytes, **how: int) -> DecodeError:
    with pytest.raises(DecodeError) as caught:
        decode.decode(data, **how)
    return caught.value


def is_answered(data: bytes) -> bool:
    """Whether bytes are decoded to RGB, or refused with a reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return decode.decode(data, short_side=10).mode == "RGB"
        except DecodeError as error:
            return bool(error.kind and error.detail)


def by_timm(data: bytes, pre: Preprocess) -> np.ndarray:
    """The input that timm's evaluation transform makes, before normalisation."""
    transform = create_transform(
        (3, pre.size, pre.size),
        crop_pct=pre.size / (pre.resize + 0.5),  # timm divides, and cuts to whole pixels
        crop_mode="squash" if pre.squash else "center",
        interpolation=pre.interpolation,
        use_prefetcher=True,
    )
    return np.asarray(transform(Image.open(BytesIO(data)).convert("RGB"))).transpose(1, 2, 0)


# ------------------------------------------------------------------------- against timm's transform

SIZES = [
    (500, 375),
    (375, 500),
    (501, 333),
    (333, 501),
    (224, 224),
    (256, 256),
    (257, 256),
    (255, 256),
    (256, 300),
    (100, 37),
    (37, 700),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize(
    "pre",
    [
        BICUBIC,
        Preprocess(224, 235, "bilinear", (0, 0, 0), (1, 1, 1)),
        Preprocess(288, 288, "bicubic", (0, 0, 0), (1, 1, 1)),
        Preprocess(240, 251, "bicubic", (0, 0, 0), (1, 1, 1)),
        Preprocess(224, 224, "bicubic", (0, 0, 0), (1, 1, 1), squash=True),
    ],
    ids=lambda pre: f"{pre.size}of{pre.resize}{pre.interpolation}{'squashed' * pre.squash}",
)
def test_input_is_what_timm_makes(pre: Preprocess, name: str, size: tuple[int, int]) -> None:
    """The input equals that of timm's evaluation transform up to the rounding of a few pixels."""
    data = encode(photograph(name, size), "PNG")
    difference = np.abs(by_timm(data, pre).astype(int) - decode.to_input(data, pre))
    assert difference.max() <= 3
    assert difference.mean() < 0.02


def test_jpeg_of_usual_size_is_decoded_at_full_scale() -> None:
    """A 500 × 375 JPEG gives the input of timm's transform: nothing is reduced."""
    data = encode(photograph(), "JPEG", quality=90)
    difference = np.abs(by_timm(data, BICUBIC).astype(int) - decode.to_input(data, BICUBIC))
    assert difference.max() <= 2
    assert difference.mean() < 0.01


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (61, 35), (30, 30)])
def test_missing_borders_are_black_as_in_torchvision(size: tuple[int, int]) -> None:
    """Where the crop is larger than the resized image, the rest is black and the image where
    torchvision puts it."""
    from torchvision.transforms import CenterCrop, Resize

    pre = Preprocess(64, 35, "bilinear", (0, 0, 0), (1, 1, 1))
    image = photograph(size=size)
    assert np.array_equal(
        np.asarray(CenterCrop(64)(Resize(35)(image))), decode.to_array(image, pre)
    )


def test_input_shape_and_type() -> None:
    """The input is `(size, size, 3)`, uint8, writable and contiguous."""
    array = decode.to_input(encode(photograph(), "JPEG"), BICUBIC)
    assert ((224, 224, 3), np.uint8) == (array.shape, array.dtype)
    assert array.flags.writeable
    assert array.flags.c_contiguous


def test_one_pixel_becomes_an_input() -> None:
    """A single pixel fills the whole input."""
    data = encode(Image.new("RGB", (1, 1), (10, 20, 30)), "PNG")
    assert [[10, 20, 30]] == np.unique(
        decode.to_input(data, BICUBIC).reshape(-1, 3), axis=0
    ).tolist()


def test_unknown_interpolation_is_named() -> None:
    """An interpolation that does not exist is a user's error that lists those that do."""
    with pytest.raises(UserError, match=r"'cubic'(.|\n)*bicubic"):
        decode.to_array(photograph(), Preprocess(224, 256, "cubic", (0, 0, 0), (1, 1, 1)))


# --------------------------------------------------------------------------- JPEGs at reduced scale


@pytest.mark.parametrize("size", [(1601, 1203), (1203, 1601), (3000, 777)])
def test_large_jpeg_keeps_the_short_side_that_is_asked_for(size: tuple[int, int]) -> None:
    """Reduced decoding makes a large JPEG smaller, but never smaller than asked."""
    image = decode.decode(encode(photograph(size=size), "JPEG"), short_side=256)
    assert 256 <= min(image.size) < min(size)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_jpeg_lies_where_the_full_one_lies(
    orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd sides are rounded up by the reduced scale; the input is not shifted by that, whichever
    way it is turned."""
    image = photograph(size=(1433, 1075)).resize((1433, 1077))
    data = encode(image, "JPEG", quality=95, exif=exif(orientation))
    full = decode.to_array(decode.decode(data), BICUBIC).astype(int)
    reduced = decode.to_input(data, BICUBIC).astype(int)
    assert decode.decode(data, short_side=359).size in ((717, 539), (539, 717))
    assert np.abs(full - reduced).mean() < 0.8
    whole = decode.to_array(decode.decode(data, short_side=359), BICUBIC).astype(int)
    assert np.abs(full - reduced).mean() < np.abs(full - whole).mean()


def test_small_jpeg_is_not_reduced() -> None:
    """A JPEG that a scale of one half would make too small is decoded as it is."""
    assert (500, 375) == decode.decode(encode(photograph(), "JPEG"), short_side=188).size


# ------------------------------------------------------------------------------------------ upright

TURN: dict[
    int, Callable[[Image.Image], Image.Image]
] = {  # how a camera stores an upright picture under an orientation
    1: lambda im: im,
    2: lambda im: im.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda im: im.transpose(Image.Transpose.ROTATE_180),
    4: lambda im: im.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda im: im.transpose(Image.Transpose.TRANSPOSE),
    6: lambda im: im.transpose(Image.Transpose.ROTATE_90),
    7: lambda im: im.transpose(Image.Transpose.TRANSVERSE),
    8: lambda im: im.transpose(Image.Transpose.ROTATE_270),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_orientation_is_applied(kind: str, options: dict[str, object], orientation: int) -> None:
    """An image is turned as its metadata say, once, in every format that has them."""
    upright = photograph(size=(60, 40))
    data = encode(TURN[orientation](upright), kind, exif=exif(orientation), **options)
    assert np.array_equal(pixels(upright), pixels(decode.decode(data)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_jpeg_is_applied(orientation: int) -> None:
    """A JPEG is turned, before and after it is reduced."""
    upright = photograph(size=(640, 400))
    data = encode(TURN[orientation](upright), "JPEG", quality=95, exif=exif(orientation))
    assert np.abs(pixels(upright) - pixels(decode.decode(data))).mean() < 3
    reduced = decode.decode(data, short_side=200)
    assert (320, 200) == reduced.size
    assert (
        np.abs(pixels(upright.resize((320, 200), Image.Resampling.BOX)) - pixels(reduced)).mean()
        < 3
    )


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_metadata_do_not_spoil_the_pixels() -> None:
    """An image with unreadable EXIF is decoded as it is stored."""
    data = encode(
        photograph(size=(60, 40)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x07\x00garbage"
    )
    assert (60, 40) == decode.decode(data).size


# ------------------------------------------------------------------------------- colours and depths


def ramp() -> np.ndarray:
    """Grey values 0, 257, …, 65535: the 8-bit values 0–255 in 16 bits."""
    return (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    """16-bit grey keeps its gradation in 8 bits, as PNG, TIFF and PGM."""
    expected = np.arange(256).reshape(16, 16)
    pgm = b"P5 16 16 65535\n" + ramp().astype(">u2").tobytes()
    for data in (
        encode(Image.fromarray(ramp()), "PNG"),
        encode(Image.fromarray(ramp()), "TIFF"),
        pgm,
    ):
        assert np.array_equal(np.stack([expected] * 3, axis=2), pixels(decode.decode(data)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.linspace(0, 1, 256, dtype=np.float32), np.arange(256)),
        (np.arange(256, dtype=np.float32), np.arange(256)),
        (np.arange(256, dtype=np.float32) * 257, np.arange(256)),
        (np.linspace(-5, 5, 256, dtype=np.float32), np.arange(256)),
        (np.arange(256, dtype=np.int32) * 257, np.arange(256)),
        (np.arange(256, dtype=np.int32) * 1_000_000, np.arange(256)),
        (np.full(256, -3, dtype=np.int32), np.zeros(256)),
    ],
)
def test_wide_greys_are_scaled_to_their_range(values: np.ndarray, expected: np.ndarray) -> None:
    """Floats and 32-bit integers are scaled from 0–1, 0–255, 0–65535 or their own span to 0–255."""
    data = encode(Image.fromarray(values.reshape(16, 16)), "TIFF")
    assert np.array_equal(expected, pixels(decode.decode(data))[:, :, 0].ravel())


def test_not_a_number_is_black() -> None:
    """A float image with NaN and infinity in it is decoded without a warning."""
    values = np.array([[0.0, 1.0], [np.nan, np.inf]], dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [[0, 255], [0, 0]] == pixels(decode.decode(encode(Image.fromarray(values), "TIFF")))[
            :, :, 0
        ].tolist()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_alpha_lies_on_white(kind: str) -> None:
    """Transparent pixels are white whatever colour they hide; half transparent ones are mixed with
    white."""
    rgba = np.zeros((8, 8, 4), dtype=np.uint8)
    rgba[:4, :, :3], rgba[:4, :, 3] = (0, 0, 200), 255
    rgba[6:, :, 3] = 128
    data = encode(
        Image.fromarray(rgba), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})
    )
    found = pixels(decode.decode(data))
    assert [0, 0, 200] == found[0, 0].tolist()
    assert [255, 255, 255] == found[5, 5].tolist()
    assert [127, 127, 127] == found[7, 7].tolist()


def test_grey_with_alpha_lies_on_white() -> None:
    """Grey with alpha is treated as colour with alpha."""
    data = encode(Image.fromarray(np.array([[[10, 255], [10, 0]]], dtype=np.uint8)), "PNG")
    assert [[[10] * 3, [255] * 3]] == pixels(decode.decode(data)).tolist()


def test_transparent_colour_without_alpha_channel() -> None:
    """A PNG may declare one colour, grey or palette entry transparent: it becomes white."""
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert [[[255] * 3, [4, 5, 6]]] == pixels(
        decode.decode(encode(rgb, "PNG", transparency=(1, 2, 3)))
    ).tolist()
    grey = Image.fromarray(np.array([[1, 2]], dtype=np.uint8))
    assert [[[255] * 3, [2] * 3]] == pixels(
        decode.decode(encode(grey, "PNG", transparency=1))
    ).tolist()
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    palette.putpalette([9, 8, 7, 6, 5, 4])
    for kind in ("PNG", "GIF"):
        assert [[[255] * 3, [6, 5, 4]]] == pixels(
            decode.decode(encode(palette, kind, transparency=0))
        ).tolist()


def test_palette_becomes_its_colours() -> None:
    """Palette images without transparency get the colours of the palette."""
    image = photograph(size=(40, 30)).quantize(16)
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        assert np.array_equal(
            pixels(image.convert("RGB")), pixels(decode.decode(encode(image, kind)))
        )


def test_one_bit_and_grey() -> None:
    """1-bit and 8-bit grey images get three equal channels."""
    grey = photograph(size=(40, 30)).convert("L")
    for image in (grey, grey.convert("1")):
        assert np.array_equal(
            pixels(image.convert("RGB")), pixels(decode.decode(encode(image, "PNG")))
        )


def test_cmyk_jpeg_has_its_colours() -> None:
    """CMYK JPEGs, which are stored inverted, come out in the colours that went in."""
    image = Image.new("RGB", (32, 32), (200, 30, 60))
    found = pixels(decode.decode(encode(image.convert("CMYK"), "JPEG", quality=95)))
    assert np.abs(found - np.array([200, 30, 60])).max() <= 4


def test_lab_has_its_colours() -> None:
    """A TIFF in CIELAB comes out in RGB."""
    red = Image.new("LAB", (8, 8), (139, 200, 190))
    found = pixels(decode.decode(encode(red, "TIFF")))[0, 0]
    assert found[0] > 200
    assert found[1:].max() < 60


# ------------------------------------------------------------------------------------------ formats


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("PPM", {}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("WEBP", {"lossless": True}),
        ("JPEG2000", {}),
    ],
)
def test_lossless_formats_keep_every_pixel(kind: str, options: dict[str, object]) -> None:
    """Every lossless format gives back the pixels that were written."""
    image = photograph(size=(60, 40))
    assert np.array_equal(pixels(image), pixels(decode.decode(encode(image, kind, **options))))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF"])
def test_lossy_formats_come_close(kind: str) -> None:
    """Every lossy format gives back about the pixels that were written."""
    image = photograph(size=(60, 40))
    assert np.abs(pixels(image) - pixels(decode.decode(encode(image, kind, quality=95)))).mean() < 4


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_is_taken(kind: str) -> None:
    """Of an animation, or a TIFF with several pages, the first picture is decoded."""
    first, second = Image.new("RGB", (20, 10), (255, 0, 0)), Image.new("RGB", (20, 10), (0, 0, 255))
    data = encode(
        first,
        kind,
        save_all=True,
        append_images=[second],
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    assert [[255, 0, 0]] == np.unique(pixels(decode.decode(data)).reshape(-1, 3), axis=0).tolist()


def test_several_pictures_in_one_jpeg() -> None:
    """Of an MPO (a JPEG with more pictures behind the first) the first is decoded, reduced where
    asked."""
    data = encode(
        photograph(size=(640, 400)),
        "MPO",
        save_all=True,
        append_images=[Image.new("RGB", (640, 400))],
    )
    image = decode.decode(data, short_side=200)
    assert (320, 200) == image.size
    assert pixels(image).mean() > 50


def test_names_do_not_matter() -> None:
    """The content decides the format: there is no name to be misled by."""
    assert (60, 40) == decode.decode(encode(photograph(size=(60, 40)), "GIF")).size


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"]
)
def test_a_picture_in_memory_has_the_pixels_of_its_lossless_file(mode: str) -> None:
    """Grey, palette, transparent, 16 and 32 bits: `encode` gives what `decode` makes of the picture
    as PNG or TIFF."""
    values = np.random.default_rng(0).integers(0, 256, (7, 9, 4), dtype=np.uint8)
    picture = Image.fromarray(values, "RGBA")
    if mode in ("I;16", "I"):
        picture = Image.fromarray(values[..., 0].astype(np.uint16) * 257 + values[..., 1])
        picture = picture if mode == "I;16" else picture.convert("I")
    elif mode == "F":
        picture = Image.fromarray(values[..., 0].astype(np.float32) / 300)
    elif mode in ("P", "PA"):
        picture = picture.convert("RGB").convert("P").convert(mode)
    elif mode != "RGBA":
        picture = picture.convert("RGB" if mode in ("CMYK", "YCbCr") else "RGBA").convert(mode)
    file = BytesIO()
    picture.convert("RGBA" if mode == "PA" else mode).save(
        file, "TIFF" if mode in ("CMYK", "YCbCr", "I", "F") else "PNG"
    )

    assert mode == picture.mode
    expected = decode.decode(file.getvalue())
    assert expected.tobytes() == decode.decode(decode.encode(picture)).tobytes()
    assert expected.size == decode.decode(decode.encode(picture)).size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_in_memory_is_turned_upright(orientation: int) -> None:
    """The orientation in its metadata counts as it does in the file that it was opened from."""
    file = BytesIO()
    exif = Image.Exif()
    exif[decode.ORIENTATION] = orientation
    values = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    Image.fromarray(values).save(file, "PNG", exif=exif)

    expected = decode.decode(file.getvalue())
    assert expected.tobytes() == decode.decode(decode.encode(Image.open(file))).tobytes()


def test_a_picture_in_memory_that_cannot_be_read_is_a_fault() -> None:
    """Pillow opens a file that is cut short without a word; the pixels are asked for later."""
    file = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        file, "PNG"
    )

    with pytest.raises(
        decode.DecodeError, match="damaged: a picture of 64 × 64 pixels in mode RGB"
    ):
        decode.encode(Image.open(BytesIO(file.getvalue()[:1000])))


def test_size_comes_from_the_header() -> None:
    """The size is known without the pixels, even of a file that is cut short."""
    data = encode(photograph(), "JPEG")
    assert (500, 375) == decode.size(data[: len(data) // 2])
    with pytest.raises(DecodeError):
        decode.size(b"")


# ------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("data", "kind", "says"),
    [
        (b"", "empty", "0 bytes"),
        (b"hello, this is text\n", "not an image", "hello"),
        (b"\xff\xd8", "not an image", "2 bytes"),
        (bytes(100), "not an image", "100 bytes"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "unsupported", "HEIC"),
        (b'<?xml version="1.0"?><svg xmlns=', "unsupported", "SVG"),
        (b"%PDF-1.7", "unsupported", "PDF"),
        (b"8BPS\0\1", "unsupported", "Photoshop"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, kind: str, says: str) -> None:
    """Empty files, text and formats that are not read are faults of their own kind."""
    found = fault(data)
    assert kind == found.kind
    assert says in found.detail


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_truncated_is_named(kind: str) -> None:
    """A file of which the second half is missing is a fault, at full and at reduced scale."""
    data = encode(photograph(size=(600, 500)), kind)
    cut = data[: len(data) // 2]
    assert fault(cut).kind in ("truncated", "damaged")
    assert fault(cut, short_side=100).kind in ("truncated", "damaged")
    if kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP"):
        assert "truncated" == fault(cut).kind


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_that_lost_its_last_rows_is_truncated(progressive: bool) -> None:
    """A JPEG is read to its end: a missing tail is found though the centre is there."""
    data = encode(photograph(), "JPEG", progressive=progressive)
    assert "truncated" == fault(data[: int(len(data) * 0.97)], short_side=100).kind


def test_header_alone_is_a_fault() -> None:
    """Of a file that ends within its header the format is named."""
    found = fault(encode(photograph(), "PNG")[:20])
    assert "PNG" in found.detail


def test_wrong_checksum_is_damage() -> None:
    """A PNG whose pixels do not match their checksum is damaged, not decoded."""
    data = bytearray(encode(photograph(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    assert "damaged" == fault(bytes(data)).kind


def test_bomb_is_refused_before_its_pixels_are_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """600 megapixels are refused from the header: the decoder is never started."""
    monkeypatch.setattr(
        PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("pixels were allocated")
    )
    found = fault(png_header(30_000, 20_000))
    assert "too large" == found.kind
    assert "30,000 × 20,000" in found.detail


def test_bomb_does_not_depend_on_settings_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is our own: neither Pillow's limit nor the warning filter lets a bomb through or
    stops an image."""
    files = [encode(photograph(size=(60, 40)), kind) for kind in ("PNG", "JPEG", "GIF", "BMP")]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert "too large" == fault(png_header(30_000, 20_000)).kind
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [(60, 40)] * 4 == [decode.decode(data).size for data in files]


def test_large_jpeg_is_allowed_where_it_is_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A baseline JPEG over the limit is decoded at a reduced scale under it; a progressive one
    needs the memory of all."""
    monkeypatch.setattr(decode, "MAX_PIXELS", 100_000)
    data = encode(photograph(size=(800, 600)), "JPEG")
    assert (200, 150) == decode.decode(data, short_side=150).size
    assert "too large" == fault(data).kind
    assert (
        "too large"
        == fault(encode(photograph(size=(800, 600)), "JPEG", progressive=True), short_side=150).kind
    )
    monkeypatch.setattr(decode, "MAX_JPEG_PIXELS", 400_000)
    assert "too large" == fault(data, short_side=150).kind


def test_lack_of_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that does not fit into memory is a fault like any other."""

    def full(self: object) -> None:
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", full)
    assert "too large" == fault(encode(photograph(size=(60, 40)), "PNG")).kind


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=200),
    st.sampled_from(
        [
            b"",
            b"\xff\xd8\xff",
            b"\x89PNG\r\n\x1a\n",
            b"GIF89a",
            b"II*\0",
            b"BM\0\0\0\0\0\0\0\0",
            b"P6 ",
        ]
    ),
)
def test_arbitrary_bytes_raise_nothing_else(tail: bytes, head: bytes) -> None:
    """Whatever the bytes are, the answer is an image or a `DecodeError`."""
    assert is_answered(head + tail)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]),
    st.integers(0, 10**6),
    st.binary(min_size=1, max_size=8),
)
def test_damaged_files_raise_nothing_else(kind: str, at: int, junk: bytes) -> None:
    """An image with some bytes overwritten is decoded or is a `DecodeError`."""
    data = bytearray(encode(photograph(size=(60, 40)), kind))
    at %= len(data)
    data[at : at + len(junk)] = junk
    assert is_answered(bytes(data))


def test_threads_agree() -> None:
    """Images decoded side by side in threads are those decoded one after the other."""
    files = [
        encode(photograph(name, size), kind)
        for name in ("china.jpg", "flower.jpg")
        for size in SIZES
        for kind in ("JPEG", "PNG", "WEBP")
    ]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: decode.to_input(data, BICUBIC), files))
    assert all(
        np.array_equal(decode.to_input(data, BICUBIC), found)
        for data, found in zip(files, together, strict=True)
    )


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("TGA", "RGB", {}),
        ("TGA", "P", {"compression": "tga_rle"}),
        ("PCX", "RGB", {}),
        ("SGI", "L", {}),
        ("ICO", "RGBA", {"sizes": [(24, 24)]}),
        ("ICO", "RGBA", {"sizes": [(24, 24)], "bitmap_format": "bmp"}),
    ],
)
def test_further_formats_are_known_by_their_first_bytes(
    kind: str, mode: str, options: dict[str, Any]
) -> None:
    """TGA, PCX, SGI and icons decode to the pixels that were saved, whatever the file's name."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).convert(mode)
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    assert kind == decode.format_of(buffer.getvalue()[:64])
    assert np.array_equal(
        np.asarray(image.convert("RGB")), np.asarray(decode.decode(buffer.getvalue()))
    )


def test_icon_that_hides_a_huge_picture_is_refused() -> None:
    """The size is that of the picture inside, not the one in the icon's list."""
    inside = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (30_000).to_bytes(4, "big") * 2 + b"\x08\2\0\0\0"
    icon = (
        b"\0\0\1\0\1\0"
        + bytes([16, 16, 0, 0, 1, 0, 32, 0])
        + len(inside).to_bytes(4, "little")
        + (22).to_bytes(4, "little")
    )
    with pytest.raises(decode.DecodeError, match="too large"):
        decode.size(icon + inside)
