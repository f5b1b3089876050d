"""Commands that ask a gallery: query, evaluate, duplicates, info."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from finetune.names import shown
from retrieval.cli.options import (
    a_gallery,
    a_path,
    as_json,
    bad_images,
    print_json,
    say_faults,
    warn,
)


@click.command()
@a_gallery
@click.argument("images", nargs=-1, required=True, type=click.Path())
@click.option("-k", type=click.IntRange(min=1), default=10, help="results per query [10]")
@click.option(
    "--threshold",
    type=click.FloatRange(-1, 1),
    metavar="SCORE",
    help="show only results of at least this score",
)
@click.option("--average", is_flag=True, help="query with the mean of all images")
@click.option(
    "--expand",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="search again with the mean of the first N results",
)
@click.option(
    "--keep-self", is_flag=True, help="show the query's own path, too, where it is in the gallery"
)
@click.option(
    "--collapse",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SCORE",
    help="group results at least this similar",
)
@click.option("--html", type=a_path, metavar="FILE", help="write a contact sheet with thumbnails")
@bad_images
@as_json
def query(
    folder: Path,
    images: tuple[str, ...],
    k: int,
    average: bool,
    html: Path | None,
    on_bad: str,
    json_: bool,
    **how: Any,
) -> None:
    """Find the images most similar to each of IMAGES, best first; scores are cosines.

    A file of the very same bytes comes first and is marked, whatever its name; the query's own path
    is left out. Files that are missing, or changed since the gallery was made, are marked, too.

    \b
    Example:
      retrieve query photos.gallery cat.jpg -k 10
      retrieve query photos.gallery front.jpg back.jpg --average --html found.html
    """
    from finetune.data import loose
    from retrieval import hits
    from retrieval.gallery import Gallery

    with Gallery(folder) as gallery:
        warn(gallery.warnings())
        source = loose.load(images, on_bad=on_bad)
        answers, faults = gallery.query(source, k, together=average, on_bad=on_bad, **how)
        root = gallery.root
    say_faults(faults)
    found = [hit for answer in answers for hit in answer.hits]
    warn(
        hits.advice(
            (p for hit in found for p in hit.missing),
            (p for hit in found for p in hit.changed),
            folder,
        )
    )
    if html is not None:
        from finetune import files
        from retrieval import contact_sheet

        title = (
            f"{shown(folder.name)}: "
            f"{shown(answers[0].query) if len(answers) == 1 else f'{len(answers)} queries'}"
        )
        files.write_text(html, contact_sheet.page(answers, root, title))
    if json_:
        print_json([answer.to_json() for answer in answers])
    elif html is not None:
        click.echo(f"written to {shown(html)}")
    else:
        click.echo("\n\n".join(answer.to_text() for answer in answers))


@click.command()
@a_gallery
@click.argument("queries", required=False, type=a_path)
@click.option(
    "--labels",
    default="folder",
    metavar="folder|CSV",
    help="images that match: those with the same folder name, or pairs of a table [folder]",
)
@click.option("-k", "ks", default="1,5,10", metavar="K[,K]", help="cut-offs k [1,5,10]")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="most images of the gallery to use as queries [2000]",
)
@click.option("--seed", type=click.IntRange(min=0), help="random seed that draws these images [0]")
@as_json
def evaluate(
    folder: Path, queries: Path | None, labels: str, ks: str, json_: bool, **drawn: int | None
) -> None:
    """Evaluate the answers: recall, precision, mAP, MRR with intervals, and the loss of the search
    against exact search.

    QUERIES is a folder of query images in folders named as those of the gallery; without it, the
    images of the gallery ask for each other. A CSV has the columns query,match: one pair per line.

    \b
    Example:
      retrieve evaluate photos.gallery
      retrieve evaluate photos.gallery --labels pairs.csv
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
        what = f"it draws from the gallery's own images, and the queries are those of {named}"
        raise UserError(
            what,
            where=f"--{min(drawing)}",
            fix=f"leave out --{' and --'.join(sorted(drawing))}, or {named}",
        )
    with Gallery(folder) as gallery:
        warn(gallery.warnings())
        if labels == "folder":
            judged = home.by_folder(gallery, queries, ks=cuts, **drawing)
        else:
            judged = home.by_pairs(gallery, Path(labels), ks=cuts)
    print_json(judged.to_json()) if json_ else click.echo(judged.to_text())


@click.command()
@a_gallery
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.95,
    help="lowest score of near-duplicates [0.95]",
)
@as_json
def duplicates(folder: Path, threshold: float, json_: bool) -> None:
    """Find groups of images that are the same or nearly so.

    \b
    Example:
      retrieve duplicates photos.gallery --threshold 0.95
    """
    from retrieval import evaluate as home
    from retrieval import hits
    from retrieval.gallery import Gallery

    with Gallery(folder) as gallery:
        warn(gallery.warnings())
        groups = home.duplicates(gallery, threshold)
    missing, changed = (
        {path for group in groups for path in group.get(key, ())}
        for key in ("missing_paths", "changed_paths")
    )
    warn(hits.advice(missing, changed, folder))
    groups = [
        {
            key: list(map(shown, value)) if key.endswith("paths") else value
            for key, value in group.items()
        }
        for group in groups
    ]
    if json_:
        print_json(groups)
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


@click.command()
@a_gallery
@click.option("--check", is_flag=True, help="read every byte and report damage")
@as_json
def info(folder: Path, check: bool, json_: bool) -> None:
    """Describe what the gallery holds, and how it was made.

    \b
    Example:
      retrieve info photos.gallery --check
    """
    from retrieval.gallery import Gallery
    from retrieval.info import to_text

    with Gallery(folder) as gallery:
        if check:
            gallery.now.verify()
            gallery.now.verify_copy()
        about = gallery.info()
    if check:
        about["check"] = "every byte is as it was written"
    warn(about["warnings"])
    if json_:
        print_json(about)
        return
    click.echo(f"{shown(folder)}\n{to_text(about)}")
    if check:
        click.echo(f"  {'check':<9}every byte is as it was written")
