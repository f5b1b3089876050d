"""A table of images: paths, labels, and where they are known splits and groups, read strictly.
Every complaint names the line.

`columns` says which column is what, `image_root` where the files lie. One class an image: tables
with several labels an image are recognised in their usual forms and refused by name. Rows at fault
are refused, or left out where the rules say so: each with its line and its cells.
"""

from __future__ import annotations

import csv
import dataclasses
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from finetune import names
from finetune.data import columns, folders, image_root, labels
from finetune.data.columns import FLAGS, ONE_LABEL, Columns, Layout, Rows
from finetune.data.columns import SPLIT_NAMES as SPLIT_NAMES
from finetune.data.faults import STOP, Fault, Rules
from finetune.data.image_root import OR_SKIP
from finetune.errors import UserError
from finetune.names import shown

ROW = "row of the table"  # the kind of fault
NO_CONFLICT = "leave such images out: --on-conflict skip, or keep what is said first: first"


@dataclass(frozen=True)
class Row:
    """One image of a table. `path` is relative to the table's root, POSIX; `split` and `group` are
    empty where not given; `written` is the path as the table has it."""

    line: int
    path: str
    label: str
    split: str
    group: str
    written: str = dataclasses.field(default="", compare=False)


@dataclass(frozen=True)
class Gone:
    """A row that cannot be used: its line, what is wrong with it, the same in the words of a count,
    and its cells. `name` is its path, where it has one."""

    line: int
    what: str
    kind: str
    cells: Sequence[str]
    name: str = ""

    def fault(self) -> Fault:
        cells = ", ".join(map(shown, self.cells))
        detail = f"line {self.line}: {self.what} ({cells})"
        return Fault(self.name or f"line {self.line}", ROW, detail)


@dataclass(frozen=True)
class Table:
    """The rows, the folder that their paths are relative to, lines to be told, and the rows that
    are left out."""

    rows: tuple[Row, ...]
    root: Path
    notes: tuple[str, ...]
    left_out: tuple[Fault, ...] = ()


def read(path: Path, layout: Layout = Layout(), rules: Rules = STOP) -> Table:  # noqa: B008 (frozen)
    """Read and check a table; raises `UserError` that names the line or the column."""
    header, lines = read_lines(path, layout.header)
    columns.refuse_twins(path, header)
    whole, gone = _of_one_width(path, header, lines, rules)
    chosen = columns.choose(path, header, whole, layout)
    cells = dict(whole)
    named, nameless = _with_path_and_label(path, whole, chosen, rules)
    named, partless = _with_known_split(path, named, chosen, rules)
    gone += nameless + partless
    if not named:
        _refuse_empty(path, gone)
    texts = [row.written for row in named]
    root, texts, found_by = image_root.locate(path, texts, layout.root)
    rows = [
        dataclasses.replace(row, path=image_root.relative(root, text))
        for text, row in zip(texts, named, strict=True)
    ]
    if layout.header and layout.label is None:
        _check_one_label(path, header, whole, rows)
    rows, lists = _one_label_each(path, rows, rules, asked=layout.label is not None)
    rows, repeated = _once(path, rows, rules)
    rows, missing = _existing(path, root, rows, rules)
    gone += [
        dataclasses.replace(one, cells=cells[one.line]) for one in (*lists, *repeated, *missing)
    ]
    if not rows:
        _refuse_empty(path, gone)
    gone.sort(key=lambda one: one.line)
    notes = (*chosen.notes, *found_by, *_counted(gone), *labels.notes([row.label for row in rows]))
    return Table(tuple(rows), root, notes, tuple(one.fault() for one in gone))


# ---------------------------------------------------------------------------------- lines and cells


def read_lines(path: Path, has_header: bool = True) -> tuple[list[str], Rows]:
    """The header, and (line number, values) of every row that is not blank. A row that goes over
    several lines has the number of its first."""
    start, lines = 1, list[tuple[int, list[str]]]()
    try:
        with path.open("rb") as raw:
            first_bytes = raw.read(2)
        if not first_bytes:
            raise UserError(
                "the file is empty", where=path, fix="write path,label and a row an image"
            )
        wide = first_bytes in (b"\xff\xfe", b"\xfe\xff")  # what Excel calls Unicode text
        with path.open(encoding="utf-16" if wide else "utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=first.count), strict=True)
            for values in reader:
                if not lines or any(value.strip() for value in values):
                    lines.append((start, values))
                start = reader.line_num + 1
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
        fix = "mend this row: a quote that is opened must be closed, and doubled inside a value"
        what = f"not a readable CSV: {error}"
        if reader.line_num > start:
            what += f" (the row that begins here was read to line {reader.line_num})"
        raise UserError(what, where=f"{path}, line {start}", fix=fix) from error
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror}", where=path, fix="check its name and permissions"
        ) from error
    if not has_header:
        return [str(i + 1) for i in range(len(lines[0][1]))], lines
    return [name.strip() for name in lines[0][1]], lines[1:]


def _of_one_width(
    path: Path, header: Sequence[str], lines: Rows, rules: Rules
) -> tuple[list[tuple[int, list[str]]], list[Gone]]:
    """The rows with a value for each column, and the others."""
    gone = [
        Gone(
            line,
            f"{len(values)} values under {len(header)} columns",
            "too short or too long",
            values,
        )
        for line, values in lines
        if len(values) != len(header)
    ]
    if gone:
        long = len(gone[0].cells) > len(header)
        _refuse(path, gone, rules, "quote values that hold a comma" if long else "fill the row up")
    return [(line, values) for line, values in lines if len(values) == len(header)], gone


def _with_path_and_label(
    path: Path, lines: Rows, chosen: Columns, rules: Rules
) -> tuple[list[Row], list[Gone]]:
    """The rows that have both, their splits as they are written."""
    rows, gone = list[Row](), list[Gone]()
    for line, values in lines:
        cell = {role: values[i].strip() for role, i in chosen.at.items()}
        label = unicodedata.normalize("NFC", cell["label"])
        if cell["path"] and label:
            split, group = cell.get("split", ""), cell.get("group", "")
            rows.append(Row(line, "", label, split, group, cell["path"]))
            continue
        what = "empty label" if cell["path"] else "empty path"
        gone.append(Gone(line, what, "without a path or a label", values, cell["path"]))
    if gone:
        _refuse(path, gone, rules, f"give every row a {gone[0].what.removeprefix('empty ')}")
    return rows, gone


def _with_known_split(
    path: Path, rows: Sequence[Row], chosen: Columns, rules: Rules
) -> tuple[list[Row], list[Gone]]:
    """The rows whose split is a part's name, which they get."""
    if "split" not in chosen.at:
        return list(rows), []
    parts = FLAGS if chosen.flag else SPLIT_NAMES
    known = [
        dataclasses.replace(row, split=parts[row.split.lower()])
        for row in rows
        if row.split.lower() in parts
    ]
    gone = [
        Gone(row.line, f"split {row.split!r}", "of an unknown split", (row.split,), row.written)
        for row in rows
        if row.split.lower() not in parts
    ]
    if gone:
        fix = "write train, val or test, or do not use the column: --split-column none"
        _refuse(path, gone, rules, fix)
    return known, gone


def _refuse(path: Path, gone: Sequence[Gone], rules: Rules, fix: str) -> None:
    """Refuse rows that are not to be left out: the first in full, the lines of some others."""
    if rules.on_bad == "skip":
        return
    more = ""
    if len(gone) > 1:
        lines = ", ".join(str(one.line) for one in gone[1:6]) + " …" * (len(gone) > 6)
        more = f"; so {'is' if len(gone) == 2 else 'are'} {len(gone) - 1} more (line {lines})"
    raise UserError(
        gone[0].what + more, where=f"{path}, line {gone[0].line}", fix=f"{fix}, {OR_SKIP}"
    )


def _refuse_empty(path: Path, gone: Sequence[Gone]) -> NoReturn:
    if gone:
        why = "; ".join(_counted(gone))
        raise UserError(f"no row is left: {why}", where=path, fix="mend some of these rows")
    what = "holds no images: there are no rows below the header"
    raise UserError(what, where=path, fix="add a row an image")


# ------------------------------------------------------------------------------ one label, one file


def _one_label_each(
    path: Path, rows: Sequence[Row], rules: Rules, *, asked: bool
) -> tuple[list[Row], list[Gone]]:
    """The rows without labels that list several classes. Where the column was `asked` for by name,
    a label with | or ; inside is a list only where its parts are labels, too."""
    known = {row.label for row in rows}
    lists = {
        row.line: parts for row in rows if len(parts := labels.listed(row.label, known, asked)) > 1
    }
    if not lists:
        return list(rows), []
    listing = [row for row in rows if row.line in lists]
    if rules.on_conflict == "stop":
        row = listing[0]
        one = "" if asked else "; if this is one name: --label-column NAME says so"
        count = f" ({len(listing)} of {len(rows)} rows list several)"
        raise UserError(
            f"multi-label table: label {row.label!r}{count}",
            where=f"{path}, line {row.line}",
            fix=f"{ONE_LABEL}; or {NO_CONFLICT}{one}",
        )
    if rules.on_conflict == "first":
        first = [
            dataclasses.replace(row, label=lists[row.line][0]) if row.line in lists else row
            for row in rows
        ]
        return first, []
    return [row for row in rows if row.line not in lists], [
        Gone(row.line, f"label {row.label!r}", "with several labels", (), row.path)
        for row in listing
    ]


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


def _once(path: Path, rows: Sequence[Row], rules: Rules) -> tuple[list[Row], list[Gone]]:
    """Each image once. Rows that say the same again are bad ones; those that say something else
    follow the rule for conflicts."""
    by_path: dict[str, list[Row]] = {}
    for row in rows:
        by_path.setdefault(row.path, []).append(row)
    kept, repeated, conflicts = list[Row](), list[Gone](), list[Gone]()
    for same in by_path.values():
        agree = len({_said(row) for row in same}) == 1
        keep = agree or rules.on_conflict != "skip"
        kept += same[:1] if keep else []
        rest = same[1:] if keep else same
        what = f"{shown(same[0].path)} is {_differing(same)}"
        if agree:
            repeated += [Gone(row.line, what, "listed before", (), row.path) for row in rest]
        else:
            conflicts += [
                Gone(row.line, what, "of an image under two labels", (), row.path) for row in rest
            ]
    if conflicts and rules.on_conflict == "stop":
        _refuse_conflicts(path, by_path)
    if repeated and rules.on_bad != "skip":
        same = by_path[repeated[0].name]
        lines = f"lines {same[0].line} and {same[1].line}"
        fix = "keep the first of each: --on-bad-image skip"
        raise UserError(repeated[0].what, where=f"{path}, {lines}", fix=fix)
    return kept, repeated + conflicts


def _said(row: Row) -> tuple[str, str, str]:
    return row.label, row.split, row.group


def _differing(same: Sequence[Row]) -> str:
    """What several rows say of one image, in words."""
    names = list(dict.fromkeys(repr(row.label) for row in same))
    if len(names) > 1:
        return " and ".join(names[:3]) + " …" * (len(names) > 3)
    agree = len({_said(row) for row in same}) == 1
    return "listed twice" + (", with different splits or groups" if not agree else "")


def _refuse_conflicts(path: Path, by_path: dict[str, list[Row]]) -> NoReturn:
    """Refuse images of which several rows say different things: a table of several labels an image
    where most are like that."""
    found = [same for same in by_path.values() if len({_said(row) for row in same}) > 1]
    several = [same for same in found if len({row.label for row in same}) > 1]
    same = (several or found)[0]
    other = next(row for row in same if _said(row) != _said(same[0]))
    where = f"{path}, lines {same[0].line} and {other.line}"
    many = len(found) - 1
    others = f" (and so {many} other image{'s' * (many > 1)})" if many else ""
    what = f"{shown(same[0].path)} is {_differing(same)}{others}"
    if 2 * len(several) > len(by_path):
        fix = f"{ONE_LABEL}; or {NO_CONFLICT}"
        raise UserError(f"multi-label table: {what}", where=where, fix=fix)
    raise UserError(what, where=where, fix=f"remove the wrong rows, or {NO_CONFLICT}")


def _existing(
    path: Path, root: Path, rows: Sequence[Row], rules: Rules
) -> tuple[list[Row], list[Gone]]:
    """The rows whose files are there, and the others."""
    missing = [row for row in rows if not image_root.is_file(root, row.path)]
    if missing and (rules.on_bad != "skip" or len(missing) == len(rows)):
        few = "; ".join(f"{shown(row.written)} (line {row.line})" for row in missing[:3])
        what = f"{len(missing)} of {len(rows)} files are missing: {few}{' …' * (len(missing) > 3)}"
        if kind := folders.special(str(root / missing[0].path)):
            what += f"; {shown(missing[0].written)} is {kind}"
        fix = image_root.advice(path, root, [row.written for row in missing], len(rows))
        raise UserError(what, where=path, fix=fix)
    gone = {row.path for row in missing}
    return [row for row in rows if row.path not in gone], [
        Gone(
            row.line,
            folders.special(str(root / row.path)) or "no such file",
            "without a file",
            (),
            row.path,
        )
        for row in missing
    ]


# ------------------------------------------------------------------------------------ what is told


def _counted(gone: Sequence[Gone]) -> Iterator[str]:
    """A line about the rows that are left out: how many of each kind, and their lines."""
    kinds: dict[str, list[int]] = {}
    for one in gone:
        kinds.setdefault(one.kind, []).append(one.line)
    words = (
        f"{len(lines)} {kind} (line{'s' * (len(lines) > 1)} "
        f"{', '.join(map(str, sorted(lines)[:5]))}{' …' * (len(lines) > 5)})"
        for kind, lines in kinds.items()
    )
    if gone:
        yield f"{len(gone)} row{'s' * (len(gone) > 1)} of the table left out: {', '.join(words)}"
