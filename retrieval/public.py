"""What a Python user calls, and `retrieve build` with it: make a gallery, and open one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from finetune.errors import UserError
from finetune.lock import Wait
from finetune.network import Tap
from finetune.progress import Bar, Say, no_bar, quiet
from retrieval import encoder, maintenance
from retrieval.encoder import Encoder, EncoderOptions
from retrieval.gallery import Gallery
from retrieval.storage.commit import ChangeSummary
from retrieval.storage.diff import listed

SMALLEST, LARGEST = 0.1, 4.0  # scales of the network's input


def build(
    images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    gallery: str | os.PathLike[str],
    *,
    run: str | os.PathLike[str] | None = None,
    backbone: str | None = None,
    weights: str = "auto",
    size: int | None = None,
    frame: str = "auto",
    taps: str | Sequence[str | Tap] = (),
    scales: str | Sequence[float] = (1.0,),
    flip: bool = False,
    whiten: int | None = None,
    factory: str = "auto",
    recall: float = 0.99,
    memory_mb: float | None = None,
    engine: str | None = None,
    precision: str | None = None,
    on_bad: str = "stop",
    force: bool = False,
    wait: float = 0.0,
    bar: Bar = no_bar,
    say: Say = quiet,
) -> ChangeSummary:
    """Build a gallery in the folder `gallery` from image files and all images in folders.

    The network: that of a finished `run`, of which the gallery carries a copy; or a `backbone` by
    name (a timm model, alexnet or googlenet; tf_efficientnet_lite0) with its `weights` (auto, a
    path, or random) and the side of its input, `size` in pixels. `frame` is crop, squash, or auto:
    measured. It is read at `taps` (`"pooled"`, `"stage6/gem,fc7"`, or a sequence of them), averaged
    over `scales` of its input (0.1 to 4) and over the mirror image with `flip`; `whiten` is the
    number of dimensions that PCA-whitening keeps. `engine` is auto, openvino or torch, `precision`
    auto, bf16 or float32.

    The search index: a faiss `factory` string, or auto: by size. An approximate one is searched so
    that it reaches `recall` (above 0, at most 1); `memory_mb` bounds its codes, in MB.

    `on_bad="skip"` leaves unreadable images out, and the summary's `faults` name them; `force`
    replaces a gallery that is there. `wait` is for how many seconds to wait for another process
    that changes it. `say` takes lines of text, `bar` makes bars of progress.

    Returns the counts of what was done. Raises `UserError` for everything that a user can mend:
    nothing is there then that was not there before.
    """
    given, folder = listed(images), Path(gallery)
    maintenance.check_build(given, folder, force)
    options = EncoderOptions(_taps(taps), _scales(scales), flip, engine, precision)
    return maintenance.build(
        given,
        folder,
        _encoder(run, backbone, weights, size, options),
        whiten=whiten,
        factory=factory,
        recall=recall,
        memory_mb=memory_mb,
        frame=frame,
        on_bad=on_bad,
        force=force,
        wait=Wait(wait, say),
        bar=bar,
        say=say,
    )


def open(gallery: str | os.PathLike[str]) -> Gallery:  # noqa: A001 — as `gzip.open` is called
    """Open the gallery in a folder, as of this moment; `with`, or `close()`, lets it go. Raises
    `UserError` where there is none, and for damaged files."""
    return Gallery(gallery)


def _encoder(
    run: str | os.PathLike[str] | None,
    backbone: str | None,
    weights: str,
    size: int | None,
    options: EncoderOptions,
) -> Encoder:
    if run is None:
        return encoder.open_named(backbone, weights, size=size, options=options)
    if backbone or size or weights != "auto":
        raise UserError(
            "a run brings its own network",
            where="--run",
            fix="leave out --backbone, --weights and --size",
        )
    return encoder.open_run(Path(run), options)


def _taps(given: str | Sequence[str | Tap]) -> tuple[Tap, ...]:
    parts = (given.split(",") if given else []) if isinstance(given, str) else given
    return tuple(part if isinstance(part, Tap) else Tap.parse(part) for part in parts)


def _scales(given: str | Sequence[float]) -> tuple[float, ...]:
    try:
        parts = given.split(",") if isinstance(given, str) else given
        sizes = tuple(float(part) for part in parts)
    except ValueError:
        sizes = ()
    if not sizes or not all(SMALLEST <= size <= LARGEST for size in sizes):
        raise UserError(
            f"no scales are written {given!r}",
            where="--scales",
            fix="write numbers from 0.1 to 4, as in 1,0.7071,0.5",
        )
    return sizes
