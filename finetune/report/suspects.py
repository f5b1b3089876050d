"""Labels that are doubted, shown: a page with the images and their nearest neighbours, and a table
that a person corrects and `finetune fit --labels` takes back."""

from __future__ import annotations

import base64
import functools
import importlib.resources
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import analysis, files, options
from finetune.analysis import Look
from finetune.data.columns import Layout
from finetune.data.images import AS_NAMED, TWO_LABELS
from finetune.evaluation import fitting, suspects
from finetune.evaluation.suspects import Suspect, Suspects
from finetune.features.store import Store
from finetune.names import shown, typed
from finetune.progress import Bar, Say, no_bar, quiet
from finetune.report.collect import thumbnail

SHOWN = 200  # suspects on the page; the table has all
COLUMNS = ("path", "given", "proposed", "confidence", "corrected")


@dataclass(frozen=True)
class Doubts:
    """The suspects of a set of images, with what is needed to show them. `conflicts` counts images
    that stand under two labels: those are certain, and no suspects."""

    seen: Look
    found: Suspects
    conflicts: int

    @property
    def classes(self) -> tuple[str, ...]:
        return self.seen.images.classes


def examine(
    data: str | Path,
    *,
    seed: int = 0,
    layout: Layout = AS_NAMED,
    say: Say = quiet,
    bar: Bar = no_bar,
    **how: Any,
) -> Doubts:
    """Look for labels to be doubted: the SVM of a job with this seed, out of fold.

    What `finetune check` lists as faults (unreadable files, one image under two labels) is left
    out; `how` are other options of a job (`options.OPTIONS`). Raises `UserError` where the images
    cannot be divided.
    """
    skip = ("on_bad_image", "on_conflict", "on_empty_class", "on_stray")
    named: dict[str, Any] = {
        f"{role}_column": getattr(layout, role) for role in ("path", "label", "split", "group")
    }
    given = named | {"image_root": layout.root, "no_header": None if layout.header else True}
    settings, _ = options.build(
        data,
        None,
        (),
        {**given, **dict.fromkeys(skip, "skip"), "seed": seed, "strategy": "svm", **how},
    )
    store = Store()
    try:
        pictures, ids = analysis.scan(settings, store, say)
        seen = analysis.take(settings, pictures, ids, store, say, bar)
        found = suspects.find(seen, fitting.baseline(seen, say))
    finally:
        store.close()
    conflicts = sum(fault.kind == TWO_LABELS for fault in seen.images.left_out)
    return Doubts(seen, found, conflicts)


# ------------------------------------------------------------------------------- tables and text


def write(doubts: Doubts, page: Path) -> list[Path]:
    """Write the page and, beside it, `suspects.csv` of training and validation images and, where
    there are any, `suspects-test.csv` of test images, which are not to be corrected lightly: what
    judges would be chosen by what is judged."""
    stem = page.with_suffix("")
    tables = {stem.with_suffix(".csv"): doubts.found.training}
    if doubts.found.test:
        tables[stem.with_name(f"{stem.name}-test.csv")] = doubts.found.test
    for path, part in tables.items():
        files.write_csv(path, COLUMNS, _cells(doubts, part))
    files.write_text(page, render(doubts, next(iter(tables))))
    return [page, *tables]


def _cells(doubts: Doubts, part: Sequence[Suspect]) -> Iterator[list[object]]:
    """A row a file: the copies of a suspect follow it, so that all of them are corrected."""
    paths, name = doubts.seen.images.paths, doubts.classes
    for one in part:
        for i in (one.index, *one.copies):
            yield [shown(paths[i]), name[one.given], name[one.proposed], one.confidence, ""]


def to_json(doubts: Doubts) -> dict[str, Any]:
    """The suspects as plain values; `looked_at` are the numbers of images of both parts."""
    paths, name, found = doubts.seen.images.paths, doubts.classes, doubts.found

    def one(suspect: Suspect) -> dict[str, Any]:
        return {
            "path": shown(paths[suspect.index]),
            "copies": [shown(paths[i]) for i in suspect.copies],
            "given": name[suspect.given],
            "given_probability": suspect.own,
            "proposed": name[suspect.proposed],
            "confidence": suspect.confidence,
            "neighbours": [
                {"path": shown(paths[i]), "label": _label(doubts, i), "cosine": cosine}
                for i, cosine in suspect.near
            ],
        }

    return {
        "suspects": [one(suspect) for suspect in found.training],
        "test": [one(suspect) for suspect in found.test],
        "looked_at": {"training": found.looked_at[0], "test": found.looked_at[1]},
        "two_labels": doubts.conflicts,
        "note": found.note,
    }


def to_text(doubts: Doubts, most: int = 10) -> str:
    """The first suspects for a person, a line each, and how many there are."""
    found = doubts.found
    if found.note:
        return f"labels: {found.note}"
    lines = [
        f"labels that the model doubts: {len(found.training)} of {found.looked_at[0]:,} training "
        f"and validation images, {len(found.test)} of {found.looked_at[1]:,} test images"
    ]
    for title, part in (("training and validation", found.training), ("test", found.test)):
        lines += [f" {title}:"] if part else []
        lines += [f"  {_line(doubts, one)}" for one in part[:most]]
        lines += [f"  and {len(part) - most} more"] if len(part) > most else []
    if found.all:
        lines.append(" a suspicion is no error: look at each image before it is corrected")
    return "\n".join(lines)


def _line(doubts: Doubts, one: Suspect) -> str:
    name = doubts.classes
    return (
        f"{shown(doubts.seen.images.paths[one.index])}: given {name[one.given]} "
        f"({one.own:.0%}), rather {name[one.proposed]} ({one.confidence:.0%})"
    )


def _label(doubts: Doubts, i: int) -> str:
    return doubts.classes[doubts.seen.images.labels[i]]


# --------------------------------------------------------------------------------------- the page


def render(doubts: Doubts, table: Path) -> str:
    """The page as HTML text that holds its own pictures; `table` is the CSV to correct."""
    found, images = doubts.found, doubts.seen.images
    data = typed(images.name)
    return str(
        _template().render(
            title=shown(images.name),
            found=found,
            conflicts=doubts.conflicts,
            parts=[
                (
                    "Training and validation images",
                    "Each was judged by a model that had not seen it.",
                    [_shown(doubts, one) for one in found.training[:SHOWN]],
                    len(found.training),
                ),
                (
                    "Test images",
                    "Apart, and in a table of their own: whoever corrects test labels by what a "
                    "model says of them makes the model look better. Correct these only after a "
                    "look at every one of them.",
                    [_shown(doubts, one) for one in found.test[:SHOWN]],
                    len(found.test),
                ),
            ],
            table=shown(table),
            command=f"finetune fit {data} --labels {typed(table)}",
        )
    )


def _shown(doubts: Doubts, one: Suspect) -> dict[str, Any]:
    """What the page shows of a suspect."""
    images = doubts.seen.images
    return {
        "path": shown(images.paths[one.index]),
        "copies": [shown(images.paths[i]) for i in one.copies],
        "given": doubts.classes[one.given],
        "own": one.own,
        "proposed": doubts.classes[one.proposed],
        "confidence": one.confidence,
        "picture": _picture(doubts, one.index),
        "near": [
            {
                "picture": _picture(doubts, i, 96),
                "label": _label(doubts, i),
                "path": shown(images.paths[i]),
                "agrees": int(images.labels[i]) == one.given,
                "cosine": cosine,
            }
            for i, cosine in one.near
        ],
    }


def _picture(doubts: Doubts, i: int, side: int = 160) -> str:
    data = thumbnail(doubts.seen.images, i, side)
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}" if data else ""


@functools.cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    home = importlib.resources.files("finetune.report")
    text = home.joinpath("suspects.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text)
