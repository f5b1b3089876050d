"""The `retrieve` command: declare options, import inside, call one function, print.

Results go to stdout (`--json` for machines), progress and warnings to stderr. Nothing heavy is
imported at the top, so that every `--help` answers at once.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from finetune import console
from finetune.names import shown, typed

if TYPE_CHECKING:
    from finetune.data.images import Fault
    from finetune.lock import Wait
    from retrieval.diff import Change

F = TypeVar("F", bound=Callable[..., Any])

SHOWN = 20  # lines about unreadable files: a screen is not filled with ten thousand
a_path = click.Path(path_type=Path)
index_argument = click.argument("index", type=a_path)
as_json = click.option("--json", "json_", is_flag=True, help="print one JSON value instead of text")
bad_images = click.option(
    "--on-bad-image",
    "on_bad",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    help="what an unreadable image does [stop]",
)
waiting = click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="SECONDS",
    help="for another process that changes it [0]",
    callback=lambda _context, _option, seconds: _wait(seconds),
)


def _wait(seconds: float) -> Wait:
    from finetune.lock import Wait

    return Wait(seconds, functools.partial(click.echo, err=True))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="regraft", prog_name="retrieve")
def cli() -> None:
    """Put in an image, get the images like it.

    \b
    Example:
      retrieve build photos/ -o photos.index
      retrieve query photos.index cat.jpg
    """


@cli.command()
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
    help="what runs the network [auto: what is timed as fastest here; with --run, its own]",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "bf16", "float32"]),
    help="of its numbers [auto: float32, or bf16 where that is timed as clearly faster]",
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
    _print_change(change, out, json_)
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
    from retrieval import encode

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
        return encode.open_named(
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
    return encode.open_run(
        run, taps=read, scales=sizes, flip=flip, engine_name=engine, precision=precision
    )


@cli.command()
@index_argument
@click.argument("images", nargs=-1, required=True, type=a_path)
@click.option("-k", type=click.IntRange(min=1), default=10, help="results a query [10]")
@click.option(
    "--threshold",
    type=click.FloatRange(-1, 1),
    metavar="SCORE",
    help="show only results of at least this score",
)
@click.option("--average", is_flag=True, help="all images together are one query")
@click.option(
    "--expand",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="search again with the mean of the first N results",
)
@click.option(
    "--keep-self", is_flag=True, help="show the query's own path, too, where it is in the index"
)
@click.option(
    "--collapse",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SCORE",
    help="show one of results that are this alike",
)
@click.option("--html", type=a_path, metavar="FILE", help="write a contact sheet with thumbnails")
@bad_images
@as_json
def query(
    index: Path,
    images: tuple[Path, ...],
    k: int,
    average: bool,
    html: Path | None,
    on_bad: str,
    json_: bool,
    **how: Any,
) -> None:
    """The images most like each of IMAGES, best first; scores are cosines.

    A file of the very same bytes comes first and is marked, whatever its name; the query's own path
    is left out. Marked, too, are files that are missing, or changed since the index was made.

    \b
    Example:
      retrieve query photos.index cat.jpg -k 10
      retrieve query photos.index front.jpg back.jpg --average --html found.html
    """
    from finetune.data.images import load_unlabelled
    from retrieval import hits
    from retrieval.gallery import Gallery

    with Gallery(index) as gallery:
        _warn(gallery.warnings())
        source = load_unlabelled(images)
        names = _as_typed(images, [source.root / path for path in source.paths])
        answers, faults = gallery.query(
            source, k, names=names, together=average, on_bad=on_bad, **how
        )
        root = gallery.root
    _say_faults(faults)
    found = [hit for answer in answers for hit in answer.hits]
    _warn(
        hits.advice(
            (p for hit in found for p in hit.missing),
            (p for hit in found for p in hit.changed),
            index,
        )
    )
    if html is not None:
        from finetune import files
        from retrieval import contact_sheet

        title = (
            f"{shown(index.name)}: "
            f"{shown(answers[0].query) if len(answers) == 1 else f'{len(answers)} queries'}"
        )
        files.write_text(html, contact_sheet.page(answers, root, title))
    if json_:
        _print_json([answer.to_json() for answer in answers])
    elif html is not None:
        click.echo(f"written to {shown(html)}")
    else:
        click.echo("\n\n".join(answer.to_text() for answer in answers))


def _as_typed(given: Sequence[Path], found: Sequence[Path]) -> list[str]:
    """Names of found files as the user would write them."""
    import os

    typed = {Path(os.path.abspath(item.expanduser())): item for item in given}
    names = []
    for file in found:
        parent = next((folder for folder in (file, *file.parents) if folder in typed), None)
        names.append(str(file) if parent is None else str(typed[parent] / file.relative_to(parent)))
    return names


@cli.command()
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

    _print_change(
        maintenance.add(index, images, on_bad=on_bad, wait=wait, bar=console.progress), index, json_
    )


@cli.command()
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

    _print_change(maintenance.remove(index, images, wait=wait), index, json_)


@cli.command()
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
    _print_change(change, index, json_)


@cli.command()
@index_argument
@click.argument("queries", required=False, type=a_path)
@click.option(
    "--labels",
    default="folder",
    metavar="folder|CSV",
    help="what matches: images of one folder name, or pairs [folder]",
)
@click.option("-k", "ks", default="1,5,10", metavar="K[,K]", help="where to measure [1,5,10]")
@click.option(
    "--limit", type=click.IntRange(min=1), help="of the index's own images used as queries [2000]"
)
@click.option("--seed", type=click.IntRange(min=0), help="which images these are [0]")
@as_json
def evaluate(
    index: Path, queries: Path | None, labels: str, ks: str, json_: bool, **drawn: int | None
) -> None:
    """How good the answers are: recall, precision, mAP, MRR with intervals, and what the search
    loses against exact search.

    QUERIES is a folder of query images in folders named as those of the index; without it, the
    images of the index ask for each other. A CSV has the columns query,match: one pair a line.

    \b
    Example:
      retrieve evaluate photos.index
      retrieve evaluate photos.index --labels pairs.csv
    """
    from finetune.errors import UserError
    from retrieval import evaluate as home
    from retrieval.gallery import Gallery

    if not all(text.strip().isdecimal() and int(text) > 0 for text in ks.split(",")):
        raise UserError(
            f"no number of results is written {ks!r}",
            where="-k",
            fix="write whole numbers, as in 1,5,10",
        )
    cuts = sorted({int(text) for text in ks.split(",")})
    if labels != "folder" and queries is not None:
        raise UserError(
            "the CSV names the queries already",
            where="QUERIES",
            fix="leave out QUERIES, or --labels",
        )
    drawing = {name: value for name, value in drawn.items() if value is not None}
    if drawing and (labels != "folder" or queries is not None):
        named = "the CSV" if labels != "folder" else "QUERIES"
        what = f"it draws from the index's own images, and the queries are those of {named}"
        raise UserError(
            what,
            where=f"--{min(drawing)}",
            fix=f"leave out --{' and --'.join(sorted(drawing))}, or {named}",
        )
    with Gallery(index) as gallery:
        _warn(gallery.warnings())
        if labels == "folder":
            judged = home.by_folder(gallery, queries, ks=cuts, **drawing)
        else:
            judged = home.by_pairs(gallery, Path(labels), ks=cuts)
    _print_json(judged.to_json()) if json_ else click.echo(judged.to_text())


@cli.command()
@index_argument
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.95,
    help="the score of near-duplicates [0.95]",
)
@as_json
def duplicates(index: Path, threshold: float, json_: bool) -> None:
    """Groups of images that are the same or nearly so.

    \b
    Example:
      retrieve duplicates photos.index --threshold 0.95
    """
    from retrieval import evaluate as home
    from retrieval import hits
    from retrieval.gallery import Gallery

    with Gallery(index) as gallery:
        _warn(gallery.warnings())
        groups = home.duplicates(gallery, threshold)
    missing, changed = (
        {path for group in groups for path in group.get(key, ())}
        for key in ("missing_paths", "changed_paths")
    )
    _warn(hits.advice(missing, changed, index))
    groups = [
        {
            key: list(map(shown, value)) if key.endswith("paths") else value
            for key, value in group.items()
        }
        for group in groups
    ]
    if json_:
        _print_json(groups)
    elif not groups:
        click.echo(f"no two images are {threshold:g} alike")
    else:
        words = dict.fromkeys(map(shown, changed), f"  ({hits.CHANGED})")
        words |= dict.fromkeys(map(shown, missing), f"  ({hits.MISSING})")
        for group in groups:
            click.echo(
                "\n".join(
                    [
                        f"{group['score']:.3f}",
                        *(f"  {path}{words.get(path, '')}" for path in group["paths"]),
                    ]
                )
            )


@cli.command()
@index_argument
@click.option("--check", is_flag=True, help="read every byte, and say whether something is damaged")
@as_json
def info(index: Path, check: bool, json_: bool) -> None:
    """What the index holds, and how it was made.

    \b
    Example:
      retrieve info photos.index --check
    """
    from retrieval.gallery import Gallery, info_text

    with Gallery(index) as gallery:
        if check:
            gallery.now.verify()
            gallery.now.verify_copy()
        about = gallery.info()
    if check:
        about["check"] = "every byte is as it was written"
    _warn(about["warnings"])
    if json_:
        _print_json(about)
        return
    click.echo(f"{shown(index)}\n{info_text(about)}")
    if check:
        click.echo(f"  {'check':<9}every byte is as it was written")


@cli.command()
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

    _print_change(maintenance.compact(index, wait=wait, bar=console.progress), index, json_)


@cli.command()
@index_argument
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="the address to listen on; another one needs --token",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--token", metavar="TEXT", help="what a visitor has to know")
def serve(index: Path, host: str, port: int, token: str | None) -> None:
    """A web page to search with, and its API.

    \b
    Example:
      retrieve serve photos.index --port 8000
    """
    from retrieval.web import app

    app.serve(index, host=host, port=port, token=token)


# ----------------------------------------------------------------------------------------- printing


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _warn(warnings: Sequence[str]) -> None:
    for text in warnings:
        click.echo(f"warning: {text}", err=True)


def _say_faults(faults: Sequence[Fault]) -> None:
    for fault in faults:
        click.echo(f"left out: {fault.to_text()}", err=True)


def _print_change(change: Change, index: Path, json_: bool) -> None:
    _say_faults(change.faults[:SHOWN])
    if len(change.faults) > SHOWN:
        click.echo(f"left out: {len(change.faults) - SHOWN} more; --json lists them all", err=True)
    _warn(change.notes)
    if json_:
        _print_json(change.to_json())
        return
    click.echo(f"{shown(index)}: {change.to_text()}")


def main() -> NoReturn:
    """The console script."""
    console.guarded(cli, "retrieve")
