"""Bytes to pixels: one RGB image, upright and 8 bits a channel, and the input that a network was
trained to see.

Every image goes through `decode`, whatever its format: the orientation in its metadata is applied,
transparency is laid on white, 16 bits are scaled (not clipped) to 8, and of an animation the first
frame is taken. Colour profiles are not applied, as in the evaluation transforms that the weights
come with. What cannot be decoded raises `DecodeError`, whose kind and detail name the fault.
Nothing depends on warnings or settings of Pillow, and threads can decode side by side.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    IcoImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PcxImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    SgiImagePlugin,
    TgaImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from finetune.errors import UserError
from finetune.network import Preprocess

MAX_PIXELS = 200_000_000  # decoded pixels: beyond them the header alone refuses the file
# a baseline JPEG may be this large if reduced decoding brings it under MAX_PIXELS
MAX_JPEG_PIXELS = 1_000_000_000
# the reduced scale keeps the short side this much longer than the resize needs: finer detail would
# alias
DRAFT_MARGIN = 1.4
FORMAT = (
    1  # names the pixels that this module makes, in the feature store: raise it when they change
)
ORIENTATION = 0x0112  # the EXIF tag

UPRIGHT = {  # EXIF orientation → what turns the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def _icon(file: BytesIO, _name: str) -> Any:
    """The largest picture of a Windows icon. Its own header is asked for the size: the icon's list
    may say another one.

    Pillow's `IcoImageFile` would decode it before anyone could refuse it.
    """
    icon = IcoImagePlugin.IcoFile(file)
    start = icon.entry[0].offset
    head = file.getvalue()[start : start + 24]
    if head.startswith(b"\x89PNG"):
        width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    else:
        width, height = int.from_bytes(head[4:8], "little"), int.from_bytes(head[8:12], "little")
    _check_pixels(width, height, MAX_PIXELS)
    return icon.frame(0)


# A TGA file begins with no mark: its header is known by values that fit together, and is asked for
# last.
TGA = re.compile(
    # colours: true or grey, or a palette
    rb".(\x00[\x02\x03\x0a\x0b]\x00{5}|\x01[\x01\x09]...[\x00\x01][\x0f\x10\x18\x20])"
    # origin, width, height, bits, flags
    rb".{4}(?!\x00\x00)..(?!\x00\x00)..[\x01\x08\x0f\x10\x18\x20][\x00-\x3f]",
    re.DOTALL,
)

# The first bytes decide which parser sees the file, never its name. The parsers are called
# directly: `Image.open` would try every format that Pillow knows (some start other programs) and
# compare the size with a limit that anyone may change.
PARSERS: tuple[tuple[re.Pattern[bytes], str, Callable[..., Any]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), "JPEG", JpegImagePlugin.jpeg_factory),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG", PngImagePlugin.PngImageFile),
    (re.compile(rb"GIF8[79]a"), "GIF", GifImagePlugin.GifImageFile),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), "WebP", WebPImagePlugin.WebPImageFile),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), "TIFF", TiffImagePlugin.TiffImageFile),
    (re.compile(rb"BM.{4}\0\0\0\0", re.DOTALL), "BMP", BmpImagePlugin.BmpImageFile),
    (re.compile(rb"P[1-6]\s"), "PNM", PpmImagePlugin.PpmImageFile),
    (
        re.compile(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n"),
        "JPEG 2000",
        Jpeg2KImagePlugin.Jpeg2KImageFile,
    ),
    (re.compile(rb".{4}ftypavi[fs]", re.DOTALL), "AVIF", AvifImagePlugin.AvifImageFile),
    (re.compile(rb"\x00\x00\x01\x00[\x01-\x40]\x00"), "ICO", _icon),
    (
        re.compile(rb"\x01\xda[\x00\x01][\x01\x02]\x00[\x01-\x03]"),
        "SGI",
        SgiImagePlugin.SgiImageFile,
    ),
    (
        re.compile(rb"\n[\x00\x02\x03\x05]\x01[\x01\x02\x04\x08]"),
        "PCX",
        PcxImagePlugin.PcxImageFile,
    ),
    (TGA, "TGA", TgaImagePlugin.TgaImageFile),
)
FOREIGN = (
    (re.compile(rb".{4}ftyp(hei[cxms]|hev[cx]|mif1|msf1)", re.DOTALL), "HEIC"),
    (re.compile(rb"8BPS"), "Photoshop"),
    (re.compile(rb"%PDF|%!PS"), "PDF or PostScript"),
    (re.compile(rb"\s*(<\?xml[^>]*>\s*)?<svg"), "SVG"),
)


KINDS = ("empty", "not an image", "unsupported", "too large", "truncated", "damaged")


class DecodeError(Exception):
    """An image that cannot be decoded. `kind` is one of `KINDS`; `detail` says more in words."""

    def __init__(self, kind: str, detail: str) -> None:
        self.kind = kind
        self.detail = detail
        super().__init__(f"{kind}: {detail}")


def decode(data: bytes, *, short_side: int | None = None) -> Image.Image:
    """Decode the bytes of one image file to an upright RGB image.

    With `short_side` (pixels) a JPEG is decoded at 1/2, 1/4 or 1/8 of its scale where its short
    side stays at least that long; without it, or in other formats, at full size. Raises
    `DecodeError`.
    """
    return _decode(data, short_side)[0]


def size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels from the header, before any orientation is applied. Raises
    `DecodeError`."""
    name, parse = _parser(data)
    with _naming_faults(data, name):
        width, height = parse(BytesIO(data), "").size
    return width, height


def format_of(data: bytes) -> str:
    """The name of an image file's format, from its first bytes alone. Raises `DecodeError`."""
    return _parser(data)[0]


def encode(picture: Image.Image) -> bytes:
    """A picture in memory as a file, whose pixels are those that `decode` gives where it was saved
    without loss.

    That is what `decode` does with a file: upright, transparency on white, 16 bits scaled to 8.
    Raises `DecodeError`.
    """
    about = f"a picture of {picture.width:,} × {picture.height:,} pixels in mode {picture.mode}"
    if picture.width * picture.height > MAX_PIXELS:
        raise DecodeError(
            "too large", f"{about}; at most {MAX_PIXELS // 1_000_000} million are taken"
        )
    try:
        picture.load()
        rgb = _to_rgb(_upright(picture))
        return b"P6 %d %d 255\n" % rgb.size + rgb.tobytes()
    except MemoryError as error:
        raise DecodeError("too large", f"{about}: not enough memory") from error
    except (
        Exception
    ) as error:  # it may be read from its file only now, and that file may hold anything
        raise DecodeError("damaged", f"{about}: {error or type(error).__name__}") from error


def to_input(data: bytes, pre: Preprocess) -> NDArray[np.uint8]:
    """Bytes of one image file to the network's input before normalisation: `(size, size, 3)`,
    uint8. Raises `DecodeError`."""
    image, box = _decode(data, math.ceil(pre.resize * DRAFT_MARGIN))
    return to_array(image, pre, box)


def to_array(image: Image.Image, pre: Preprocess, box: Box | None = None) -> NDArray[np.uint8]:
    """Resize and crop an RGB image as the evaluation transform of the weights does: `(size, size,
    3)`, uint8.

    The short side becomes `pre.resize` (both sides where `pre.squash`), the centre `pre.size` ×
    `pre.size` is kept, and missing borders are black: torchvision's `Resize` and `CenterCrop` with
    their rounding. Only the pixels that survive the crop are computed. `box` (left, top, right,
    bottom, in pixels) is the part of `image` that counts as the image.
    """
    if pre.interpolation not in FILTERS:
        raise UserError(
            f"no interpolation is called {pre.interpolation!r}",
            where="preprocess",
            fix=f"use {', '.join(FILTERS)}",
        )
    resample, size = FILTERS[pre.interpolation], pre.size
    x0, y0, x1, y1 = box or (0, 0, *image.size)
    width, height = _resized(x1 - x0, y1 - y0, pre)
    # halves go to the even number, as in torchvision
    left, top = (round((width - size) / 2), round((height - size) / 2))
    window = (left, top, left + size, top + size)
    if min(width, height) < size:
        return np.array(
            _centre_padded(image.resize((width, height), resample, (x0, y0, x1, y1)), size)
        )
    if image.size == (width, height) or _vertical_first(
        image.size, (width, height)
    ) != _vertical_first(image.size, (size, size)):
        return np.array(image.resize((width, height), resample, (x0, y0, x1, y1)).crop(window))
    x, y = (x1 - x0) / width, (y1 - y0) / height
    part = (
        x0 + left * x,
        y0 + top * y,
        min(x0 + (left + size) * x, x1),
        min(y0 + (top + size) * y, y1),
    )
    return np.array(image.resize((size, size), resample, part))


def _decode(data: bytes, short_side: int | None) -> tuple[Image.Image, Box]:
    """The image, and the part of it that the file's pixels cover: reduced decoding rounds odd sides
    up."""
    name, parse = _parser(data)
    with _naming_faults(data, name):
        image = parse(BytesIO(data), "")
        box = _reduce(image, name, short_side)
        image.load()
        box = _turned(box, _orientation(image), image.size)
        rgb = _to_rgb(_upright(image))
    return rgb, box or (0, 0, *rgb.size)


@contextlib.contextmanager
def _naming_faults(data: bytes, name: str) -> Iterator[None]:
    try:
        yield
    except DecodeError:
        raise
    except (MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError("too large", f"{name}: {error or 'not enough memory'}") from error
    except (
        Exception
    ) as error:  # the parsers meet arbitrary bytes, and raise whatever their code ran into
        kind = "truncated" if _cut_short(data, name, str(error)) else "damaged"
        raise DecodeError(
            kind, f"{name} of {len(data):,} bytes: {error or type(error).__name__}"
        ) from error


def _vertical_first(source: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether Pillow may resize the columns before the rows.

    Each pass rounds to 8 bits, so the order shows in the features; it depends on the size that is
    asked for, and a resize of the crop alone must keep the order of the whole.
    """
    down_x, down_y = source[0] - target[0], source[1] - target[1]
    return down_y > 0 and down_y > 2 * down_x


def _resized(width: float, height: float, pre: Preprocess) -> tuple[int, int]:
    """(width, height) after the resize; the long side is cut to whole pixels, not rounded."""
    if pre.squash:
        return pre.resize, pre.resize
    if width <= height:
        return pre.resize, int(pre.resize * height / width)
    return int(pre.resize * width / height), pre.resize


def _centre_padded(image: Image.Image, size: int) -> Image.Image:
    """The centre `size` × `size` of an image that is smaller than it along a side, on black."""
    canvas = Image.new("RGB", (max(image.width, size), max(image.height, size)))
    canvas.paste(image, (max(size - image.width, 0) // 2, max(size - image.height, 0) // 2))
    left, top = round((canvas.width - size) / 2), round((canvas.height - size) / 2)
    return canvas.crop((left, top, left + size, top + size))


def _parser(data: bytes) -> tuple[str, Callable[..., Any]]:
    if not data:
        raise DecodeError("empty", "0 bytes")
    for pattern, name, parse in PARSERS:
        if pattern.match(data):
            return name, parse
    for pattern, name in FOREIGN:
        if pattern.match(data):
            raise DecodeError(
                "unsupported", f"{name} files are not read: convert them to JPEG or PNG"
            )
    raise DecodeError("not an image", f"{len(data):,} bytes that begin with {data[:12]!r}")


def _reduce(image: Any, name: str, short_side: int | None) -> Box | None:
    """Choose the scale of a JPEG, and refuse what would still be too many pixels, while only the
    header has been read."""
    width, height = image.size
    box = None
    if name == "JPEG" and short_side is not None:
        drafted = image.draft(None, (short_side, short_side))
        box = drafted and drafted[1]
    # A progressive JPEG keeps the coefficients of the whole image in memory, however few pixels
    # come out.
    limit = MAX_JPEG_PIXELS if name == "JPEG" and "progressive" not in image.info else MAX_PIXELS
    if image.width * image.height > MAX_PIXELS:
        limit = 0
    _check_pixels(width, height, limit)
    return box


def _check_pixels(width: int, height: int, limit: int) -> None:
    if width * height > limit:
        raise DecodeError(
            "too large",
            f"{width:,} × {height:,} pixels; at most {MAX_PIXELS // 1_000_000} million are decoded",
        )


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except (
        Exception
    ):  # damaged metadata does not spoil the pixels: viewers show them as they are stored
        return 1


def _upright(image: Image.Image) -> Image.Image:
    turn = UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _turned(box: Box | None, orientation: int, size: tuple[int, int]) -> Box | None:
    """Where a box of the stored pixels, of `size` (width, height), lies when they are turned
    upright."""
    if box is None:
        return None
    x0, y0, x1, y1 = box
    if orientation in (2, 3, 7, 8):
        x0, x1 = size[0] - x1, size[0] - x0
    if orientation in (3, 4, 6, 7):
        y0, y1 = size[1] - y1, size[1] - y0
    return (x0, y0, x1, y1) if orientation < 5 else (y0, x0, y1, x1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def _to_8_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Scale grey values of more than 8 bits to 0–255.

    16-bit files use the whole of 0–65535. 32-bit integers and floats have no agreed range: the
    narrowest of 0–1 (floats only), 0–255 (floats only) and 0–65535 that holds the values is taken,
    else the span from the lowest to the highest.
    """
    grey = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(grey.min()), float(grey.max())
    usual = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (65535.0,)
    top = next((top for top in usual if low >= 0 and high <= top), None)
    if top is None:
        grey, top = grey - low, max(high - low, 1e-12)
    return (grey * (255.0 / top) + 0.5).astype(np.uint8)


def _cut_short(data: bytes, name: str, message: str) -> bool:
    """Whether a file that failed to decode ends before its format says that it ends."""
    if re.search(r"truncat|unexpected end|premature|end of file|\bEOF\b", message, re.IGNORECASE):
        return True
    if name == "WebP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    return (name == "PNG" and b"IEND" not in data[-64:]) or (
        name == "GIF" and not data.endswith(b";")
    )
