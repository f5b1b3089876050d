"""Commands that make and change a gallery: build, add, remove, sync, compact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune import console
from finetune.names import typed
from retrieval.cli.options import a_path, as_json, bad_images, index_argument, print_change, waiting

if TYPE_CHECKING:
    from finetune.lock import Wait


@click.command()
@click.argument("images", nargs=-1, required=True, type=a_path)
@click.option(
    "-o", "--out", required=True, type=a_path, metavar="INDEX", help="the folder of the index"
)
@click.option(
    "--run", type=a_path, help="use the network of a fine-tuned run; the index carries a copy of it"
)
@click.option(
    "--backbone", metavar="NAME", help="a timm model, alexnet or googlenet [tf_efficientnet_lite0]"
)
@click.option(
    "--weights",
    metavar="auto|PATH|random",
    default="auto",
    help="where the pretrained weights come from [auto]",
)
@click.option(
    "--size",
    type=click.IntRange(min=16),
    metavar="PIXELS",
    help="side of the network's input [the weights' own]",
)
@click.option(
    "--frame",
    type=click.Choice(["auto", "crop", "squash", "whole"]),
    metavar="auto|crop|squash",
    help="the weights' own centre crop, or the whole picture "
    "squashed [auto: measured; a run's own]",
)
@click.option(
    "--taps",
    metavar="TAP[,TAP]",
    help="where to read: pooled, stage6/gem, stage6/rmac, fc7 [pooled; a run's own]",
)
@click.option(
    "--scales",
    metavar="S[,S]",
    default="1",
    help="average over input sizes, as in 1,0.7071,0.5 [1]",
)
@click.option("--flip", is_flag=True, help="average over the image and its mirror image")
@click.option(
    "--whiten",
    type=click.IntRange(min=1),
    metavar="DIMS",
    help="PCA-whitening to DIMS dimensions, fitted here",
)
@click.option(
    "--index",
    "factory",
    metavar="FACTORY",
    default="auto",
    help="any faiss factory string, as in HNSW32 [auto: by size]",
)
@click.option(
    "--recall",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.99,
    help="what an approximate index has to reach [0.99]",
)
@click.option(
    "--memory",
    "memory_mb",
    type=click.FloatRange(0, min_open=True),
    metavar="MB",
    help="of its codes [no limit]",
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "openvino", "torch"]),
    help="what runs the network [auto]",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "bf16", "float32"]),
    help="[auto: bf16 where the hardware has it]",
)
@bad_images
@click.option("--force", is_flag=True, help="replace the index that is there")
@waiting
@as_json
def build(
    images: tuple[Path, ...],
    out: Path,
    whiten: int | None,
    factory: str,
    recall: float,
    memory_mb: float | None,
    frame: str | None,
    on_bad: str,
    force: bool,
    wait: Wait,
    json_: bool,
    **network: Any,
) -> None:
    """Make an index of the images in folders, or of image files.

    \b
    Example:
      retrieve build photos/ -o photos.index
      retrieve build photos/ -o photos.index --run runs/photos --flip
    """
    from retrieval import maintenance

    maintenance.check_build(images, out, force)
    encoder = _encoder(**network)
    change = maintenance.build(
        images,
        out,
        encoder,
        whiten=whiten,
        factory=factory,
        recall=recall,
        memory_mb=memory_mb,
        frame=frame or "auto",
        on_bad=on_bad,
        force=force,
        wait=wait,
        bar=console.progress,
        say=lambda text: click.echo(text, err=True),
    )
    print_change(change, out, json_)
    if not json_:
        from retrieval.gallery import Gallery

        with Gallery(out) as gallery:
            click.echo(
                f"  search  {gallery.info()['search']}\n  query   retrieve query {typed(out)} IMAGE"
            )


def _encoder(
    run: Path | None,
    backbone: str | None,
    weights: str,
    size: int | None,
    taps: str | None,
    scales: str,
    flip: bool,
    engine: str | None,
    precision: str | None,
) -> Any:
    from finetune.errors import UserError
    from finetune.network import Tap
    from retrieval import encoder

    try:
        sizes = tuple(float(text) for text in scales.split(","))
    except ValueError:
        sizes = ()
    if not sizes or not all(0.1 <= s <= 4 for s in sizes):
        raise UserError(
            f"no scales are written {scales!r}",
            where="--scales",
            fix="write numbers from 0.1 to 4, as in 1,0.7071,0.5",
        )
    read = tuple(Tap.parse(text) for text in taps.split(",")) if taps else ()
    if run is None:
        return encoder.open_named(
            backbone,
            weights,
            size=size,
            taps=read or (Tap("pooled"),),
            scales=sizes,
            flip=flip,
            engine_name=engine or "auto",
            precision=precision or "auto",
        )
    if backbone or size or weights != "auto":
        raise UserError(
            "a run brings its own network",
            where="--run",
            fix="leave out --backbone, --weights and --size",
        )
    return encoder.open_run(
        run, taps=read, scales=sizes, flip=flip, engine_name=engine, precision=precision
    )


@click.command()
@index_argument
@click.argument("images", nargs=-1, required=True, type=a_path)
@bad_images
@waiting
@as_json
def add(index: Path, images: tuple[Path, ...], on_bad: str, wait: Wait, json_: bool) -> None:
    """Add image files, or all images in folders; only contents that are new go through the network.

    \b
    Example:
      retrieve add photos.index more/
    """
    from retrieval import maintenance

    print_change(
        maintenance.add(index, images, on_bad=on_bad, wait=wait, bar=console.progress), index, json_
    )


@click.command()
@index_argument
@click.argument("images", nargs=-1, required=True, type=a_path)
@waiting
@as_json
def remove(index: Path, images: tuple[Path, ...], wait: Wait, json_: bool) -> None:
    """Take images out of the index: paths as `query` shows them, files, or folders. The files
    themselves stay.

    A later `sync` brings back what still lies in the folders of the index.

    \b
    Example:
      retrieve remove photos.index holiday/blurred.jpg
    """
    from retrieval import maintenance

    print_change(maintenance.remove(index, images, wait=wait), index, json_)


@click.command()
@index_argument
@click.option(
    "--root", type=a_path, metavar="DIR", help="the folder of the images, if it was moved"
)
@click.option("--allow-empty", is_flag=True, help="no image is left: this is right")
@bad_images
@waiting
@as_json
def sync(
    index: Path, root: Path | None, allow_empty: bool, on_bad: str, wait: Wait, json_: bool
) -> None:
    """Bring the index up to date with its folders: files that came, changed, moved and went.

    \b
    Example:
      retrieve sync photos.index
    """
    from retrieval import maintenance

    change = maintenance.sync(
        index, root=root, on_bad=on_bad, allow_empty=allow_empty, wait=wait, bar=console.progress
    )
    print_change(change, index, json_)


@click.command()
@index_argument
@waiting
@as_json
def compact(index: Path, wait: Wait, json_: bool) -> None:
    """Drop removed images for good, and merge what many small additions have left. It also happens
    by itself.

    \b
    Example:
      retrieve compact photos.index
    """
    from retrieval import maintenance

    print_change(maintenance.compact(index, wait=wait, bar=console.progress), index, json_)
