"""Labels corrected by a table: `path,given,corrected`, as `finetune check --labels` prepares it.

A row whose `corrected` is empty changes nothing. A row names the label that it corrects, so that a
table that does not belong to these images is noticed. All copies of an image get its label.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from finetune import names
from finetune.data import csv_table, splits
from finetune.data.faults import some
from finetune.data.images import Correction, ImageSet, two_labels
from finetune.errors import UserError, printable
from finetune.names import shown

PATH, GIVEN, CORRECTED = COLUMNS = ("path", "given", "corrected")
AS_CHECK = "give the table that `finetune check DATA --labels` writes, with `corrected` filled in"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row that corrects something."""

    line: int
    path: str
    given: str
    corrected: str


def read(path: Path) -> list[Row]:
    """The rows of a table whose `corrected` is filled in and is not the label given. Raises
    `UserError` for what is no such table."""
    header, lines = csv_table.read_lines(path)
    at = {name: i for i, name in enumerate(map(str.lower, header)) if name in COLUMNS}
    if missing := [name for name in COLUMNS if name not in at]:
        has = ", ".join(map(repr, header))
        what = f"no column {' and no column '.join(map(repr, missing))}; it has {has}"
        raise UserError(what, where=path, fix=AS_CHECK)
    found = []
    for line, values in lines:
        if len(values) != len(header):
            what = f"{len(values)} values under {len(header)} columns"
            raise UserError(what, where=f"{path}, line {line}", fix="quote values with a comma")
        cell = {name: unicodedata.normalize("NFC", values[i].strip()) for name, i in at.items()}
        if cell[CORRECTED] and cell[CORRECTED] != cell[GIVEN]:
            found.append(Row(line, values[at[PATH]].strip(), cell[GIVEN], cell[CORRECTED]))
    return found


def apply(pictures: ImageSet, ids: Sequence[str], path: str) -> ImageSet:
    """The images with the labels that the table at `path` corrects; what was changed stands in
    `corrections`.

    Raises `UserError` for a path that is not among the images, another label than the one given,
    and a class that is not known.
    """
    table = Path(names.written(path)).expanduser()
    rows = read(table)
    label = {printable(name): k for k, name in enumerate(pictures.classes)}
    _check_classes(pictures, table, rows, label)
    place = {shown(name): i for i, name in enumerate(pictures.paths)}
    alike = {i: group for group in splits.alike(ids) for i in group}
    gone = {shown(fault.path) for fault in pictures.left_out}
    new: dict[int, int] = {}
    for row in rows:
        i = place.get(row.path, place.get(shown(row.path)))
        if i is None and row.path in gone:
            continue
        now = _checked(pictures, table, row, i)
        if printable(row.corrected) == now:  # mended in the folder already
            continue
        assert i is not None
        new |= dict.fromkeys(alike.get(i, (i,)), label[printable(row.corrected)])
        new[i] = label[printable(row.corrected)]
    return _relabelled(pictures, new)


def _relabelled(pictures: ImageSet, new: dict[int, int]) -> ImageSet:
    new = {i: k for i, k in sorted(new.items()) if pictures.labels[i] != k}
    labels = pictures.labels.copy()
    labels[list(new)] = list(new.values())
    name = pictures.classes
    changed = tuple(
        Correction(pictures.paths[i], name[pictures.labels[i]], name[k]) for i, k in new.items()
    )
    return dataclasses.replace(pictures, labels=labels, corrections=changed)


def _checked(pictures: ImageSet, table: Path, row: Row, i: int | None) -> str:
    """The label that image i has now, once it is known to be the one that the row speaks of."""
    where = f"{table}, line {row.line}"
    if i is None:
        what = f"{row.path} is not among the images of {shown(pictures.name)}"
        raise UserError(what, where=where, fix=f"remove the row, or {AS_CHECK}")
    now = printable(pictures.classes[pictures.labels[i]])
    if now not in (printable(row.given), printable(row.corrected)):
        what = f"{row.path} is {now!r} now, and the row corrects {row.given!r}"
        raise UserError(what, where=where, fix="the table is out of date: remove the row")
    return now


def _check_classes(
    pictures: ImageSet, table: Path, rows: Sequence[Row], label: dict[str, int]
) -> None:
    unknown = [row for row in rows if printable(row.corrected) not in label]
    if unknown:
        raise UserError(
            f"no class is called {unknown[0].corrected!r}",
            where=f"{table}, line {unknown[0].line}",
            fix=f"write one of {some(list(pictures.classes), 8)}; images of a new class go into a "
            f"folder of their own",
        )


def as_given(pictures: ImageSet, ids: Sequence[str]) -> ImageSet:
    """The same images with the labels from before, by which they are divided: a correction moves
    nothing from one part to another.

    Where the labels from before contradict each other, or their class is gone, the corrected ones
    stay.
    """
    known = {name: k for k, name in enumerate(pictures.classes)}
    before = {one.path: known.get(one.given) for one in pictures.corrections}
    labels = pictures.labels.copy()
    for i, path in enumerate(pictures.paths):
        if (k := before.get(path)) is not None:
            labels[i] = k
    old = dataclasses.replace(pictures, labels=labels)
    for group in two_labels(old, ids):
        labels[group] = pictures.labels[group]
    return old


def given_labels(pictures: ImageSet) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Labels `(n,)` from before the corrections; −1 where that class is gone."""
    known = {name: k for k, name in enumerate(pictures.classes)}
    before = {one.path: known.get(one.given, -1) for one in pictures.corrections}
    pairs = zip(pictures.paths, pictures.labels.tolist(), strict=True)
    return np.array([before.get(path, k) for path, k in pairs], dtype=np.int64)


def changed(pictures: ImageSet) -> dict[str, int]:
    """How many labels were corrected of each part, by its name."""
    paths = {one.path for one in pictures.corrections}
    among = np.array([path in paths for path in pictures.paths], dtype=bool)
    split = np.full(len(pictures), "train") if pictures.split is None else pictures.split
    return {name: int((among & (split == name)).sum()) for name in splits.SPLITS}
