"""A folder with one of each fault and oddity that images come with, and the pieces to make such
files."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

# Files that cannot be decoded, with the kind of fault that names them.
BAD = {
    "train/cat/cut short.jpg": "truncated",
    "train/cat/empty.jpg": "empty",
    "train/dog/bomb.png": "too large",
    "train/dog/text.jpg": "not an image",
}
# Files that are unusual and must be decoded like any other.
ODD = (
    "train/cat/Grüße 猫.png",
    "train/cat/cmyk.jpg",
    "train/dog/rotated.jpg",
    "train/dog/sixteen bits.png",
)
COPIED = ("train/cat/00.png", "test/cat/copy.png")  # the same bytes in two splits
SOLO = "train/solo/only.png"  # a class of one image
IGNORED = "train/cat/notes.txt"


def make_fault_folder(root: Path) -> Path:
    """Make `root` with train/ and test/ of drawn cats (discs) and dogs (crosses), and one of each
    fault among them."""
    for label in ("cat", "dog"):
        for i in range(12):
            _write(root / "train" / label / f"{i:02d}.png", encode(draw(label, seed=i), "PNG"))
        for i in range(4):
            _write(root / "test" / label / f"{i:02d}.png", encode(draw(label, seed=100 + i), "PNG"))
    cat, dog = draw("cat", seed=50), draw("dog", seed=51)
    jpeg = encode(cat, "JPEG", quality=95)
    _write(root / "train/cat/empty.jpg", b"")
    _write(root / "train/cat/cut short.jpg", jpeg[: len(jpeg) // 2])
    _write(root / "train/dog/text.jpg", b"<!doctype html><title>404 Not Found</title>\n")
    _write(root / "train/dog/bomb.png", png_header(30_000, 20_000))
    _write(root / "train/cat/cmyk.jpg", encode(cat.convert("CMYK"), "JPEG", quality=95))
    _write(
        root / "train/dog/sixteen bits.png",
        encode(Image.fromarray(np.asarray(dog.convert("L")).astype(np.uint16) * 257), "PNG"),
    )
    _write(
        root / "train/dog/rotated.jpg",
        encode(dog.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif(6)),
    )
    _write(root / "train/cat/Grüße 猫.png", encode(draw("cat", seed=52), "PNG"))
    _write(root / SOLO, encode(draw("disc and cross", seed=53), "PNG"))
    _write(root / COPIED[1], (root / COPIED[0]).read_bytes())
    _write(root / IGNORED, b"these cats were drawn")
    return root


def draw(label: str, *, seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A disc for a cat, a cross for a dog, both for anything else, at a seeded place in seeded
    colours."""
    rng = np.random.default_rng([seed, len(label)])
    image = Image.fromarray(rng.integers(180, 256, (size[1], size[0], 3), dtype=np.uint8))
    pen = ImageDraw.Draw(image)
    colour = tuple(int(value) for value in rng.integers(0, 120, 3))
    x, y = int(rng.integers(16, size[0] - 16)), int(rng.integers(16, size[1] - 16))
    if label != "dog":
        pen.ellipse((x - 12, y - 12, x + 12, y + 12), fill=colour)
    if label != "cat":
        pen.line((x - 12, y - 12, x + 12, y + 12), fill=colour, width=5)
        pen.line((x - 12, y + 12, x + 12, y - 12), fill=colour, width=5)
    return image


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    """Metadata that say how the pixels are to be turned."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def png_header(width: int, height: int) -> bytes:
    """A grey PNG that announces `width` × `height` pixels and holds the first rows of them."""
    rows = zlib.compress(bytes((width + 1) * 4))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", rows),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
