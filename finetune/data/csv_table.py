"""A table of images: paths, labels, and where they are known splits and groups, read strictly.
Every complaint names the line.

`columns` says which column is what. One class an image: tables with several labels an image are
recognised in their usual forms and refused by name.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from finetune import names
from finetune.data import columns
from finetune.data.columns import FLAGS, ONE_LABEL, Columns, Layout, Rows
from finetune.data.columns import SPLIT_NAMES as SPLIT_NAMES
from finetune.errors import UserError
from finetune.names import shown

# tried where a path has none
SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".tif",
    ".tiff",
    ".bmp",
    ".gif",
    ".JPG",
    ".JPEG",
    ".PNG",
)
SAMPLE = 50  # rows that tell where the images lie
FOLDERS = 200  # around a table in which they are looked for
OR_SKIP = "or let the job leave such rows out: --on-bad-image skip"


@dataclass(frozen=True)
class Row:
    """One image of a table. `path` is relative to the table's root, POSIX; `split` and `group` are
    empty where not given."""

    line: int
    path: str
    label: str
    split: str
    group: str


@dataclass(frozen=True)
class Table:
    """The rows, the folder that their paths are relative to, and lines to be told."""

    rows: tuple[Row, ...]
    root: Path
    notes: tuple[str, ...]


def read(path: Path, layout: Layout = Layout()) -> Table:  # noqa: B008 (frozen)
    """Read and check a table; raises `UserError` that names the line or the column."""
    header, lines = _lines(path)
    columns.refuse_twins(path, header)
    for line, values in lines:
        if len(values) != len(header):
            fix = (
                "quote values that hold a comma" if len(values) > len(header) else "fill the row up"
            )
            raise UserError(
                f"{len(values)} values under {len(header)} columns",
                where=f"{path}, line {line}",
                fix=fix,
            )
    chosen = columns.choose(path, header, lines, layout)
    cells = [
        (line, {role: values[i].strip() for role, i in chosen.at.items()}) for line, values in lines
    ]
    whole = [(line, row) for line, row in cells if row["path"] and row["label"]]
    if len(whole) < len(cells) and layout.on_bad != "skip":
        line, row = next((line, row) for line, row in cells if not (row["path"] and row["label"]))
        name = "label" if row["path"] else "path"
        raise UserError(
            f"empty {name}", where=f"{path}, line {line}", fix=f"give every row a {name}, {OR_SKIP}"
        )
    if not whole:
        raise UserError(
            "holds no images: there are no rows below the header",
            where=path,
            fix="add a row an image",
        )
    root, texts, found_by = _located(path, [row["path"] for _, row in whole], layout)
    rows = [
        Row(
            line,
            _relative(root, text),
            unicodedata.normalize("NFC", row["label"]),
            _split(path, line, row, chosen),
            row.get("group", ""),
        )
        for text, (line, row) in zip(texts, whole, strict=True)
    ]
    if layout.label is None:
        _check_one_label(path, header, lines, rows)
    _check_lists(path, rows)
    rows, repeated = _once(path, rows, layout)
    rows, missing = _existing(path, root, rows, layout)
    left = {
        "without a path or a label": len(cells) - len(whole),
        "listed before": repeated,
        "without a file": missing,
    }
    return Table(tuple(rows), root, (*chosen.notes, *found_by, *_left_out(left), *_spellings(rows)))


def _lines(path: Path) -> tuple[list[str], Rows]:
    """The header, and (line number, values) of every row that is not blank."""
    try:
        with path.open("rb") as raw:
            wide = raw.read(2) in (b"\xff\xfe", b"\xfe\xff")  # what Excel calls Unicode text
        with path.open(encoding="utf-16" if wide else "utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            separator = max(",;\t", key=first.count)
            reader = csv.reader(file, delimiter=separator, strict=True)
            header = [name.strip() for name in next(reader, [])]
            lines = [
                (reader.line_num, values)
                for values in reader
                if any(value.strip() for value in values)
            ]
    except UnicodeError as error:
        place = (
            f" ({error.reason} at byte {error.start})"
            if isinstance(error, UnicodeDecodeError)
            else ""
        )
        fix = (
            f"save it as UTF-8 (Excel: CSV UTF-8); one in Latin-1: iconv -f LATIN1 -t UTF-8 "
            f"{names.typed(path.name)} > new.csv"
        )
        raise UserError(f"not UTF-8 text{place}", where=path, fix=fix) from error
    except csv.Error as error:
        fix = "mend this line: a quote that is opened must be closed"
        raise UserError(
            f"not a readable CSV: {error}", where=f"{path}, line {reader.line_num}", fix=fix
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror}", where=path, fix="check its name and permissions"
        ) from error
    return header, lines


def _split(path: Path, line: int, row: dict[str, str], chosen: Columns) -> str:
    if "split" not in row:
        return ""
    found = (FLAGS if chosen.flag else SPLIT_NAMES).get(row["split"].lower(), "")
    if not found:
        fix = "write train, val or test, or do not use the column: --split-column none"
        raise UserError(f"split {row['split']!r}", where=f"{path}, line {line}", fix=fix)
    return found


def _relative(folder: Path, text: str) -> str:
    """The path as the table's folder sees it, spelled in one way.

    A path that no file has may be written as `names.shown` shows it, or with the separators of
    Windows.
    """
    if "\\" in text and not os.path.lexists(folder / text):
        plain = names.meant(text)
        text = plain if os.path.lexists(folder / plain) else text.replace("\\", "/")
    return posixpath.normpath(
        Path(os.path.relpath(text, folder)).as_posix() if Path(text).is_absolute() else text
    )


def _check_lists(path: Path, rows: Sequence[Row]) -> None:
    """Refuse labels that list several classes."""
    labels = {row.label for row in rows}
    for row in rows:
        parts = [part.strip() for part in re.split(r"[|;]", row.label)]
        by_comma = [part.strip() for part in row.label.split(",")]
        is_list = len([p for p in parts if p]) > 1 or (
            row.label[0] in "[{" and row.label[-1] in "]}"
        )
        if is_list or (len(by_comma) > 1 and all(part in labels for part in by_comma)):
            raise UserError(
                f"multi-label table: label {row.label!r}",
                where=f"{path}, line {row.line}",
                fix=ONE_LABEL,
            )


def _check_one_label(path: Path, header: Sequence[str], lines: Rows, rows: Sequence[Row]) -> None:
    """Refuse a column of 0 and 1 that is named like a class."""
    folded = {row.label.lower() for row in rows}
    flags = [
        i for i, name in enumerate(header) if name.lower() in folded and columns.is_binary(lines, i)
    ]
    if flags:
        fix = f"{ONE_LABEL}; if the label column holds it: --label-column NAME"
        raise UserError(
            f"multi-label table: 0/1 column {header[flags[0]].lower()!r} named like a class",
            where=path,
            fix=fix,
        )


def _once(path: Path, rows: Sequence[Row], layout: Layout) -> tuple[list[Row], int]:
    """Each image once, and how many rows that say the same again were left out."""
    seen: dict[str, Row] = {}
    for row in rows:
        before = seen.setdefault(row.path, row)
        where = f"{path}, lines {before.line} and {row.line}"
        if before.label != row.label:
            what = f"multi-label table: {shown(row.path)} is {before.label!r} and {row.label!r}"
            raise UserError(what, where=where, fix=ONE_LABEL)
        if before is not row and (
            layout.on_bad != "skip" or dataclasses.replace(row, line=before.line) != before
        ):
            same = dataclasses.replace(row, line=before.line) == before
            fix = (
                "keep the first of each: --on-bad-image skip"
                if same
                else "their splits or groups differ: remove one of the rows"
            )
            raise UserError(f"{shown(row.path)} is listed twice", where=where, fix=fix)
    return list(seen.values()), len(rows) - len(seen)


def _existing(path: Path, root: Path, rows: Sequence[Row], layout: Layout) -> tuple[list[Row], int]:
    """The rows whose files are there, and how many are not."""
    missing = {row.path: row for row in rows if not _is_file(root, row.path)}
    if missing and (layout.on_bad != "skip" or len(missing) == len(rows)):
        few = "; ".join(
            f"{shown(row.path)} (line {row.line})" for row in list(missing.values())[:3]
        )
        what = f"{len(missing)} of {len(rows)} files are missing: {few}{' …' * (len(missing) > 3)}"
        raise UserError(what, where=path, fix=_where_they_lie(path, root, list(missing), len(rows)))
    return [row for row in rows if row.path not in missing], len(missing)


def _left_out(counts: dict[str, int]) -> Iterator[str]:
    if total := sum(counts.values()):
        words = ", ".join(f"{count} {why}" for why, count in counts.items() if count)
        yield f"{total} row{'s' * (total > 1)} of the table left out: {words}"


def _spellings(rows: Sequence[Row]) -> Iterator[str]:
    """A line about labels that differ in case or inner spaces alone: they are different classes,
    perhaps by mistake."""
    alike: dict[str, list[tuple[str, int]]] = {}
    for label, count in Counter(row.label for row in rows).items():
        alike.setdefault(" ".join(label.casefold().split()), []).append((label, count))
    if groups := [group for group in alike.values() if len(group) > 1]:
        few = "; ".join(
            " and ".join(f"{label!r} ({count})" for label, count in group) for group in groups[:3]
        )
        more = f"; and {len(groups) - 3} more" * (len(groups) > 3)
        yield f"labels that differ in case or spaces alone are different classes here: {few}{more}"


# ----------------------------------------------------------------------------- where the images lie


def _located(
    path: Path, texts: list[str], layout: Layout
) -> tuple[Path, list[str], tuple[str, ...]]:
    """The folder that paths start from, the paths below it, and what was changed about them.

    Below a root that was named, paths may begin with folders that are not there, as those of
    another machine do.
    """
    root, notes = path.parent, list[str]()
    if layout.root is not None:
        root = Path(layout.root).expanduser()
        if not root.is_dir():
            raise UserError(
                "no such folder",
                where=f"--image-root {shown(root)}",
                fix="name the folder that holds the images",
            )
        cut = max(range(_depth(texts) + 1), key=lambda k: (_share(root, texts, k), -k))
        if cut:
            notes.append(
                f"paths are read without "
                f"{shown(texts[0][: len(texts[0]) - len(_without(texts[0], cut))])!r}"
            )
            texts = [_without(text, cut) for text in texts]
    completed = [_completed(root, text) for text in texts]
    if added := [new for new, old in zip(completed, texts, strict=True) if new != old]:
        count = f"{len(added)} path{'s' * (len(added) > 1)}"
        notes.append(
            f"{count} without an image's extension got that of the file, as in {shown(added[0])}"
        )
    return root, completed, tuple(notes)


def _completed(root: Path, text: str) -> str:
    """The path with the extension that its file has, where it has none and there is one such
    file."""
    if os.path.splitext(text)[1].lower() in SUFFIXES or os.path.lexists(root / text):
        return text
    found = [text + suffix for suffix in SUFFIXES if _is_file(root, text + suffix)]
    return found[0] if len(found) == 1 else text


def _where_they_lie(path: Path, root: Path, missing: Sequence[str], count: int) -> str:
    """What to do about missing files: a folder near the table that holds most of them, else what
    there is to say."""
    for folder in dict.fromkeys((*_near(path.parent), Path())):
        if any(_share(folder, missing, cut) > 0.5 for cut in range(_depth(missing) + 1)):
            return f"they lie below {shown(folder)}: --image-root {shown(folder)}"
    return f"paths are relative to {shown(root)}; --image-root DIR names another folder, " + OR_SKIP


def _near(folder: Path) -> Iterator[Path]:
    """Folders below and above a table, the nearest first."""
    below = [folder]
    for here in below:
        yield here
        if len(below) < FOLDERS and len(here.parts) - len(folder.parts) < 3:
            try:
                below += sorted(
                    entry for entry in here.iterdir() if entry.is_dir() and entry.name[0] != "."
                )[:FOLDERS]
            except OSError:
                continue
    yield from list(folder.absolute().parents)[:3]


def _share(root: Path, texts: Sequence[str], cut: int) -> float:
    """Of some of the paths, the share that has a file below `root` without their first `cut`
    parts."""
    some = texts[:: max(1, len(texts) // SAMPLE)]
    names = (_without(text, cut) for text in some)
    return sum(_is_file(root, _completed(root, name)) for name in names) / len(some)


def _without(text: str, cut: int) -> str:
    return "/".join(_parts(text)[cut:]) if cut else text


def _depth(texts: Sequence[str]) -> int:
    """How many folders all the paths begin with."""
    folders = [_parts(text)[:-1] for text in texts]
    same = (first == last for first, last in zip(min(folders), max(folders), strict=False))
    return sum(itertools.takewhile(bool, same))


def _parts(text: str) -> tuple[str, ...]:
    return PurePosixPath(text.replace("\\", "/")).parts


def _is_file(root: Path, name: str) -> bool:
    return os.path.isfile(os.path.join(root, name))
