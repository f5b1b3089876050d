"""A CSV of images: `path,label[,split][,group]`, read strictly. Every complaint names the line.

One class an image: tables with several labels an image are recognised in their usual forms and refused by name.
"""

from __future__ import annotations

import csv
import os
import posixpath
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UserError

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
ONE_LABEL = "write one class an image: multi-label training is not offered"


@dataclass(frozen=True)
class Row:
    """One image of a table. `path` is relative to the table's folder, POSIX; `split` and `group` are empty where not given."""

    line: int
    path: str
    label: str
    split: str
    group: str


def read(path: Path) -> list[Row]:
    """Read and check a table; raises `UserError` that names the line or the column."""
    header, lines = _lines(path)
    columns: dict[str, int] = {name: header.index(name) for name in ("path", "label", "split", "group") if name in header}
    _check_header(path, header, lines)
    rows = []
    for line, values in lines:
        if len(values) != len(header):
            fix = "quote values that hold a comma" if len(values) > len(header) else "fill the row up"
            raise UserError(f"{len(values)} values under {len(header)} columns", where=f"{path}, line {line}", fix=fix)
        cells = {name: values[at].strip() for name, at in columns.items()}
        rows.append(_row(path, line, cells))
    if not rows:
        raise UserError("holds no images: there are no rows below the header", where=path)
    _check_labels(path, header, lines, rows)
    _check_paths(path, rows)
    return rows


def _lines(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header in lower case, and (line number, values) of every row that is not blank."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            separator = max(",;\t", key=first.count)
            reader = csv.reader(file, delimiter=separator, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            lines = [(reader.line_num, values) for values in reader if any(value.strip() for value in values)]
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text ({error.reason} at byte {error.start})", where=path, fix="save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"not a readable CSV: {error}", where=f"{path}, line {reader.line_num}") from error
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=path) from error
    return header, lines


def _check_header(path: Path, header: list[str], lines: list[tuple[int, list[str]]]) -> None:
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        what = f"{'multi-label table: ' * (repeated[0] == 'label')}column {repeated[0]!r} appears twice"
        raise UserError(what, where=path, fix=ONE_LABEL if repeated[0] == "label" else "rename one")
    several = [name for name in header if re.fullmatch(r"labels|label[ _-]?\d+|tags|categories", name)]
    if several:
        raise UserError(f"multi-label table: column{'s' * (len(several) > 1)} {', '.join(several)}", where=path, fix=ONE_LABEL)
    if "path" in header and "label" in header:
        return
    others = [i for i, name in enumerate(header) if name not in ("path", "split", "group")]
    flags = [header[i] for i in others if lines and all(_is_flag(values, i) for _, values in lines)]
    if "label" not in header and len(flags) > 1:
        raise UserError(f"multi-label table: 0/1 columns {', '.join(flags[:4])} in place of a label", where=path, fix=ONE_LABEL)
    missing = [name for name in ("path", "label") if name not in header]
    raise UserError(
        f"no column {' and no column '.join(map(repr, missing))}; it has {', '.join(map(repr, header)) or 'no header'}",
        where=path,
        fix="the first line must be path,label with split and group as options",
    )


def _is_flag(values: list[str], column: int) -> bool:
    return len(values) > column and values[column].strip() in ("0", "1", "0.0", "1.0")


def _row(path: Path, line: int, cells: dict[str, str]) -> Row:
    for name in ("path", "label"):
        if not cells[name]:
            raise UserError(f"empty {name}", where=f"{path}, line {line}", fix=f"give every row a {name}")
    split = ""
    if "split" in cells:
        split = SPLIT_NAMES.get(cells["split"].lower(), "")
        if not split:
            raise UserError(f"split {cells['split']!r}", where=f"{path}, line {line}", fix="write train, val or test")
    name = unicodedata.normalize("NFC", cells["label"])
    return Row(line, _relative(path.parent, cells["path"]), name, split, cells.get("group", ""))


def _relative(folder: Path, text: str) -> str:
    """The path as the table's folder sees it, spelled in one way; Windows separators are understood where they must be."""
    if "\\" in text and not (folder / text).exists():
        text = text.replace("\\", "/")
    return posixpath.normpath(Path(os.path.relpath(text, folder)).as_posix() if Path(text).is_absolute() else text)


def _check_labels(path: Path, header: list[str], lines: list[tuple[int, list[str]]], rows: list[Row]) -> None:
    labels = {row.label for row in rows}
    for row in rows:
        parts = [part.strip() for part in re.split(r"[|;]", row.label)]
        by_comma = [part.strip() for part in row.label.split(",")]
        is_list = len([p for p in parts if p]) > 1 or (row.label[0] in "[{" and row.label[-1] in "]}")
        if is_list or (len(by_comma) > 1 and all(part in labels for part in by_comma)):
            raise UserError(f"multi-label table: label {row.label!r}", where=f"{path}, line {row.line}", fix=ONE_LABEL)
    folded = {label.lower() for label in labels}
    flags = [i for i, name in enumerate(header) if name in folded and all(_is_flag(values, i) for _, values in lines)]
    if flags:
        raise UserError(f"multi-label table: 0/1 column {header[flags[0]]!r} named like a class", where=path, fix=ONE_LABEL)


def _check_paths(path: Path, rows: list[Row]) -> None:
    seen: dict[str, Row] = {}
    for row in rows:
        before = seen.setdefault(row.path, row)
        if before is row:
            continue
        where = f"{path}, lines {before.line} and {row.line}"
        if before.label != row.label:
            what = f"multi-label table: {row.path} is {before.label!r} and {row.label!r}"
            raise UserError(what, where=where, fix=ONE_LABEL)
        raise UserError(f"{row.path} is listed twice", where=where, fix="remove one of the rows")
    missing = [row for row in rows if not os.path.isfile(path.parent / row.path)]  # noqa: PTH113
    if missing:
        few = "; ".join(f"{row.path} (line {row.line})" for row in missing[:3])
        raise UserError(
            f"{len(missing)} of {len(rows)} files are missing: {few}{' …' * (len(missing) > 3)}",
            where=path,
            fix=f"paths are relative to {path.parent}",
        )
