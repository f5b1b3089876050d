"""Commands that make and change a gallery: build, add, remove, sync, compact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune import console
from finetune.names import typed
from retrieval.cli.options import a_gallery, a_path, as_json, bad_images, print_change, waiting

if TYPE_CHECKING:
    from finetune.lock import Wait


@click.command()
@click.argument("images", nargs=-1, required=True, type=a_path)
@click.option(
    "-o", "--out", required=True, type=a_path, metavar="GALLERY", help="folder of the gallery"
)
@click.option(
    "--run", type=a_path, help="use the network of a fine-tuned run, and copy it into the gallery"
)
@click.option(
    "--backbone", metavar="NAME", help="timm model, alexnet or googlenet [tf_efficientnet_lite0]"
)
@click.option(
    "--weights",
    metavar="auto|PATH|random",
    default="auto",
    help="source of the pretrained weights [auto]",
)
@click.option(
    "--size",
    type=click.IntRange(min=16),
    metavar="PIXELS",
    help="side of the network's input [that of the weights]",
)
@click.option(
    "--frame",
    type=click.Choice(["auto", "crop", "squash", "whole"]),
    metavar="auto|crop|squash",
    help="centre crop of the weights, or the whole image squashed [auto: measured; a run's own]",
)
@click.option(
    "--taps",
    default="",
    metavar="TAP[,TAP]",
    help="taps to read: pooled, stage6/gem, stage6/rmac, fc7 [pooled; a run's own]",
)
@click.option(
    "--scales",
    metavar="S[,S]",
    default="1",
    help="average over input scales, as in 1,0.7071,0.5 [1]",
)
@click.option("--flip", is_flag=True, help="average over the image and its mirror image")
@click.option(
    "--whiten",
    type=click.IntRange(min=1),
    metavar="DIMS",
    help="whiten to DIMS dimensions by PCA, fitted on these images",
)
@click.option(
    "--index",
    "factory",
    metavar="FACTORY",
    default="auto",
    help="faiss factory string of the search index, as in HNSW32 [auto: by size]",
)
@click.option(
    "--recall",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.99,
    help="target recall of an approximate index [0.99]",
)
@click.option(
    "--memory",
    "memory_mb",
    type=click.FloatRange(0, min_open=True),
    metavar="MB",
    help="memory limit of the search index [no limit]",
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "openvino", "torch"]),
    help="engine that runs the network [auto: the fastest as timed here; with --run, its own]",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "bf16", "float32"]),
    help="precision of the network [auto: float32, or bf16 where timed as clearly faster]",
)
@bad_images
@click.option("--force", is_flag=True, help="replace an existing gallery")
@waiting
@as_json
def build(
    images: tuple[Path, ...],
    out: Path,
    frame: str | None,
    wait: Wait,
    json_: bool,
    **options: Any,
) -> None:
    """Build a gallery from image files and the images in folders.

    \b
    Example:
      retrieve build photos/ -o photos.gallery
      retrieve build photos/ -o photos.gallery --run runs/photos --flip
    """
    from retrieval import public

    change = public.build(
        images,
        out,
        frame=frame or "auto",
        wait=wait.seconds,
        bar=console.progress,
        say=wait.say,
        **options,
    )
    print_change(change, out, json_)
    if not json_:
        from retrieval.gallery import Gallery

        with Gallery(out) as gallery:
            click.echo(
                f"  search  {gallery.info()['search']}\n  query   retrieve query {typed(out)} IMAGE"
            )


@click.command()
@a_gallery
@click.argument("images", nargs=-1, required=True, type=a_path)
@bad_images
@waiting
@as_json
def add(folder: Path, images: tuple[Path, ...], on_bad: str, wait: Wait, json_: bool) -> None:
    """Add image files and the images in folders; only new contents go through the network.

    \b
    Example:
      retrieve add photos.gallery more/
    """
    from retrieval import maintenance

    change = maintenance.add(folder, images, on_bad=on_bad, wait=wait, bar=console.progress)
    print_change(change, folder, json_)


@click.command()
@a_gallery
@click.argument("images", nargs=-1, required=True, type=a_path)
@waiting
@as_json
def remove(folder: Path, images: tuple[Path, ...], wait: Wait, json_: bool) -> None:
    """Remove images from the gallery: paths as `query` shows them, files, or folders.

    The files themselves stay. A later `sync` brings back what still lies in the folders of the
    gallery.

    \b
    Example:
      retrieve remove photos.gallery holiday/blurred.jpg
    """
    from retrieval import maintenance

    print_change(maintenance.remove(folder, images, wait=wait), folder, json_)


@click.command()
@a_gallery
@click.option("--root", type=a_path, metavar="DIR", help="folder of the images, if it was moved")
@click.option("--allow-empty", is_flag=True, help="accept that no image is left")
@bad_images
@waiting
@as_json
def sync(
    folder: Path, root: Path | None, allow_empty: bool, on_bad: str, wait: Wait, json_: bool
) -> None:
    """Update the gallery to its folders: files that came, changed, moved and went.

    \b
    Example:
      retrieve sync photos.gallery
    """
    from retrieval import maintenance

    change = maintenance.sync(
        folder, root=root, on_bad=on_bad, allow_empty=allow_empty, wait=wait, bar=console.progress
    )
    print_change(change, folder, json_)


@click.command()
@a_gallery
@waiting
@as_json
def compact(folder: Path, wait: Wait, json_: bool) -> None:
    """Drop removed images for good, and merge what many small additions have left.

    This also happens by itself.

    \b
    Example:
      retrieve compact photos.gallery
    """
    from retrieval import maintenance

    print_change(maintenance.compact(folder, wait=wait, bar=console.progress), folder, json_)
