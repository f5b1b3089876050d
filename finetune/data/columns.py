"""Which column of a table is the path, the label, the split and the group: the one that was named,
else by usual names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
FLAGS = {
    **dict.fromkeys(("true", "1", "1.0", "yes"), "val"),
    **dict.fromkeys(("false", "0", "0.0", "no"), "train"),
}
# what announces an image's file, as tables write it
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"),
    *(".JPG", ".JPEG", ".PNG"),
)
NO_HEADER = "say so: --no-header; the columns are then called 1, 2 and so on: --path-column 1"
ONE_LABEL = "write one class an image: multi-label training is not offered"
NONE = "none"  # in place of a column's name: there is no such column

# The names of each role, without case, spaces, underscores and hyphens. A later line counts where
# no earlier one is there.
USUAL: dict[str, tuple[tuple[str, ...], ...]] = {
    "path": (
        ("path",),
        (
            *("file", "filename", "filepath", "fname", "fn", "relpath", "relativepath"),
            *("image", "imagefile", "imagefilename", "imagefilepath", "imagename", "imagepath"),
            *("img", "imgfile", "imgfilename", "imgname", "imgpath"),
        ),
        ("name", "id", "idcode", "imageid", "imgid"),
    ),
    "label": (
        ("label",),
        ("class", "classname", "category", "categoryname", "labelname", "target", "targetname"),
        ("breed", "diagnosis", "dx", "species", "classid", "categoryid", "labelid", "targetid"),
    ),
    "split": (("split",), ("dataset", "part", "partition", "phase", "set", "subset", "usage")),
    "group": (("group",), ("groupid", "groupname", "patient", "patientid", "subject", "subjectid")),
}
VALIDATION_FLAGS = ("isval", "isvalid", "isvalidation", "val", "valid", "validation")
INDEX = re.compile(r"|unnamed: ?\d+")  # what pandas writes before each row

Rows = Sequence[tuple[int, list[str]]]  # (line number, values)


@dataclass(frozen=True)
class Layout:
    """What was said of a table: names of columns (None: found by the usual names; split and group
    may be "none").

    `root` is the folder that its paths start from, where it is not the table's own. A table without
    a `header` begins with its first row: its columns are called 1, 2 and so on.
    """

    path: str | None = None
    label: str | None = None
    split: str | None = None
    group: str | None = None
    root: str | None = None
    header: bool = True

    @property
    def given(self) -> tuple[str, ...]:
        """The options that say something of a table."""
        options = {f"--{role}-column": getattr(self, role) for role in USUAL} | {
            "--image-root": self.root,
            "--no-header": None if self.header else True,
        }
        return tuple(option for option, value in options.items() if value is not None)


@dataclass(frozen=True)
class Columns:
    """Positions of the columns that are used; `flag` says whether the split is true or false:
    validation or training."""

    at: dict[str, int]
    flag: bool
    notes: tuple[str, ...]


def plain(name: str) -> str:
    """A column's name without case, spaces, underscores and hyphens."""
    return re.sub(r"[\s_-]+", "", name).casefold()


def choose(where: object, header: Sequence[str], rows: Rows, layout: Layout) -> Columns:
    """Say which columns are used, or refuse a table in which path or label cannot be told, naming
    its columns."""
    if layout.header and layout.label is None:
        _refuse_multi_label(where, header)
    if not layout.header:
        layout = _by_number(layout, len(header))
    at: dict[str, int] = {}
    notes: list[str] = []
    for role in USUAL:
        asked = getattr(layout, role)
        if asked == NONE and role in ("split", "group"):
            continue
        found = (
            _asked(where, header, role, asked)
            if asked is not None
            else _usual(header, rows, role, at)
        )
        if len(found) > 1:
            names = ", ".join(repr(header[i]) for i in found)
            if role in ("path", "label"):
                raise UserError(
                    f"several columns may be the {role}: {names}",
                    where=where,
                    fix=f"say which: --{role}-column NAME",
                )
            notes.append(
                f"several columns may be the {role}: {names}; none is "
                f"used, --{role}-column NAME says which"
            )
        elif found:
            at[role] = found[0]
    if missing := [role for role in ("path", "label") if role not in at]:
        _refuse(where, header, rows, missing)
    if layout.header and _is_image(header[at["path"]]):
        _refuse_row(where, header)
    flag = "split" in at and _is_flag(header, rows, at["split"], asked=layout.split is not None)
    return Columns(at, flag, (*_told(header, at, flag), *notes))


def _by_number(layout: Layout, width: int) -> Layout:
    """Where there are no names: the first column is the path and the second the label, unless
    others are named by their numbers."""
    free = [str(i + 1) for i in range(width) if str(i + 1) not in (layout.path, layout.label)]
    path = layout.path or (free.pop(0) if free else None)
    label = layout.label or (free.pop(0) if free else None)
    split, group = layout.split or NONE, layout.group or NONE
    return dataclasses.replace(layout, path=path, label=label, split=split, group=group)


def _asked(where: object, header: Sequence[str], role: str, name: str) -> list[int]:
    """The column that was asked for by name."""
    same = [i for i, other in enumerate(header) if other == name.strip()]
    found = same or [i for i, other in enumerate(header) if plain(other) == plain(name)]
    if not found:
        raise UserError(
            f"no column {name!r}; {_has(header)}",
            where=where,
            fix=f"name one of them: --{role}-column NAME",
        )
    _refuse_twins(where, header, role, found)
    return found


def _usual(header: Sequence[str], rows: Rows, role: str, taken: dict[str, int]) -> list[int]:
    """Columns with a usual name of the role that are not `taken`: of the first line of names that
    has any."""
    free = [i for i in range(len(header)) if i not in taken.values()]
    for names in USUAL[role]:
        found = [i for i in free if plain(header[i]) in names]
        if role == "split" and names != ("split",):  # a set of stamps is no part of the data
            found = [i for i in found if all(cell in SPLIT_NAMES for cell in _cells(rows, i))]
        if found:
            return found
    return [i for i in free if _is_flag(header, rows, i)] if role == "split" else []


def _is_flag(header: Sequence[str], rows: Rows, column: int, asked: bool = False) -> bool:
    return (asked or plain(header[column]) in VALIDATION_FLAGS) and all(
        cell in FLAGS for cell in _cells(rows, column)
    )


def _cells(rows: Rows, column: int) -> Iterator[str]:
    return (values[column].strip().lower() for _, values in rows if len(values) > column)


def _told(header: Sequence[str], at: dict[str, int], flag: bool) -> tuple[str, ...]:
    """In one line: which columns are what, and which are not used; nothing where the names say it
    all."""
    others = [
        header[i]
        for i in range(len(header))
        if i not in at.values() and not INDEX.fullmatch(header[i].lower())
    ]
    if not others and all(header[i].lower() == role for role, i in at.items()):
        return ()
    words = "; ".join(
        f"{role} is {header[i]!r}"
        + " (true: validation; --split-column none: not used)" * (flag and role == "split")
        for role, i in at.items()
    )
    return (
        f"columns: {words}" + (f"; not used: {', '.join(map(repr, others))}" if others else ""),
    )


# ----------------------------------------------------------------------------------------- refusals


def refuse_twins(where: object, header: Sequence[str]) -> None:
    """Refuse a table with two columns of one name that may be used."""
    for role, lines in USUAL.items():
        _refuse_twins(
            where, header, role, [i for i, name in enumerate(header) if plain(name) in lines[0]]
        )


def _refuse_twins(where: object, header: Sequence[str], role: str, found: Sequence[int]) -> None:
    names = [header[i].lower() for i in found]
    if len(set(names)) < len(names):
        what = f"{'multi-label table: ' * (role == 'label')}column {names[0]!r} appears twice"
        raise UserError(
            what,
            where=where,
            fix=f"{ONE_LABEL}; or rename one in the first line"
            if role == "label"
            else "rename one",
        )


def _refuse_multi_label(where: object, header: Sequence[str]) -> None:
    several = [
        name
        for name in header
        if re.fullmatch(r"labels|label[ _-]?\d+|tags|categories", name.lower())
    ]
    if several:
        what = f"multi-label table: column{'s' * (len(several) > 1)} {', '.join(several)}"
        raise UserError(
            what,
            where=where,
            fix=f"{ONE_LABEL}; if one column holds one class: --label-column NAME",
        )


def _is_image(name: str) -> bool:
    return name.endswith(SUFFIXES)


def _refuse_row(where: object, header: Sequence[str]) -> None:
    what = f"the first line is a row already: {', '.join(header)}"
    raise UserError(what, where=where, fix=f"{NO_HEADER}; or write path,label above it")


def _refuse(where: object, header: Sequence[str], rows: Rows, missing: Sequence[str]) -> None:
    if any(map(_is_image, header)):
        _refuse_row(where, header)
    used = {name for lines in USUAL.values() for names in lines for name in names}
    flags = [
        name
        for i, name in enumerate(header)
        if plain(name) not in used and rows and is_binary(rows, i)
    ]
    if "label" in missing and len(flags) > 1:
        what = f"multi-label table: 0/1 columns {', '.join(flags[:4])} in place of a label"
        raise UserError(what, where=where, fix=ONE_LABEL)
    raise UserError(
        f"no column {' and no column '.join(map(repr, missing))}; {_has(header)}",
        where=where,
        fix=f"name {'it' if len(missing) == 1 else 'them'}: "
        f"{' '.join(f'--{role}-column NAME' for role in missing)}"
        + "; where the first line is a row already: --no-header"
        * (len(missing) > 1),
    )


def _has(header: Sequence[str]) -> str:
    return f"it has {', '.join(map(repr, header)) or 'no header'}"


def is_binary(rows: Rows, column: int) -> bool:
    """Whether a column holds nothing but 0 and 1."""
    return all(
        len(values) > column and values[column].strip() in ("0", "1", "0.0", "1.0")
        for _, values in rows
    )
