"""What can be wrong with a set of images: faults of single files, and the report of a check, as
plain data and in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.errors import UserError, printable
from finetune.names import shown

FEW = 20  # training images: a class with fewer is pointed out
NAMED = 8  # classes that a line names
ON_BAD = ("stop", "skip")
TWO_LABELS = "two labels"  # the kind of fault


@dataclass(frozen=True)
class Rules:
    """What is done with images at fault, as the recipe's keys of these names say (`on_bad`:
    `on_bad_image`).

    `on_bad` is for files that cannot be read and for rows of a table that name no image,
    `on_conflict` for one image under two labels, `on_leak` for copies of test images,
    `on_empty_class` for classes without training images, `on_stray` for images and folders beside
    the class folders.
    """

    on_bad: str = "stop"
    on_conflict: str = "stop"
    on_leak: str = "tell"
    on_empty_class: str = "stop"
    on_stray: str = "stop"


STOP = Rules()


@dataclass(frozen=True)
class Fault:
    """What is wrong with one file: `kind` in a word or two, `detail` with the value."""

    path: str
    kind: str
    detail: str

    def cells(self) -> tuple[str, str, str]:
        """Path, kind and detail as text that can be printed: a row of a table."""
        return shown(self.path), self.kind, printable(self.detail)

    def to_json(self) -> dict[str, Any]:
        return dict(zip(("path", "kind", "detail"), self.cells(), strict=True))

    def to_text(self) -> str:
        path, kind, detail = self.cells()
        return f"{path}: {kind} ({detail})"


@dataclass(frozen=True)
class Report:
    """What a check of `images` images found.

    `classes` counts images a class, `parts` the same a split; `duplicates` are groups of paths with
    the same bytes, `across_splits` those of them in more than one split; `imbalance` is the largest
    class over the smallest that has images; `few` are the classes with less than `FEW` training
    images, `untested` those without test images, where others have some. `notes` are lines about
    the set as a whole, `ways` the options with which a job goes on in spite of the faults.
    """

    name: str
    images: int
    faults: tuple[Fault, ...]
    classes: dict[str, int]
    parts: dict[str, dict[str, int]]
    duplicates: tuple[tuple[str, ...], ...]
    across_splits: tuple[tuple[str, ...], ...]
    imbalance: float
    few: dict[str, int]
    untested: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    ways: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        groups = {
            key: tuple(tuple(map(shown, group)) for group in getattr(self, key))
            for key in ("duplicates", "across_splits")
        }
        faults = tuple(fault.to_json() for fault in self.faults)
        return {**dataclasses.asdict(self), "name": shown(self.name), "faults": faults, **groups}

    def to_text(self) -> str:
        """Everything that was found, for reading: a line a fault, a class and a group of
        duplicates."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{shown(self.name)}: {self.images:,} images" + (
            f" in {len(self.classes)} classes" if self.classes else ""
        )
        yield from (
            f"  {part}: {sum(counts.values()):,} images" for part, counts in self.parts.items()
        )
        if self.classes:
            width = max(map(len, self.classes))
            yield from (f"  {name:<{width}}  {count:,}" for name, count in self.classes.items())
            yield f"largest class over smallest: {self.imbalance:.1f}"
        if self.few:
            fewest = sorted(self.few.items(), key=lambda entry: entry[1])
            names = some([f"{name} ({n})" for name, n in fewest], NAMED)
            yield (
                f"{len(self.few)} of {len(self.classes)} classes have less than {FEW} training "
                f"images: {names}"
            )
        if self.untested:
            yield f"classes without test images: {some(self.untested, NAMED)}"
        yield from (f"note: {note}" for note in self.notes)
        yield from _titled("faults", [fault.to_text() for fault in self.faults])
        if self.ways:
            yield f"  to go on without these: {'; '.join(self.ways)}"
        told = {fault.path for fault in self.faults if fault.kind == TWO_LABELS}
        yield from _titled(
            "duplicates across splits", [same(group) for group in self.across_splits]
        )
        yield from _titled(
            "duplicates",
            [
                same(group)
                for group in self.duplicates
                if group not in self.across_splits and group[0] not in told
            ],
        )


def check_on_bad(word: str) -> None:
    """Refuse another word than stop and skip: taken for skip, it would leave images out unasked."""
    if word not in ON_BAD:
        raise UserError(
            f"an unreadable image cannot {word!r}",
            where="on_bad",
            fix=f"choose {' or '.join(ON_BAD)}",
        )


def list_faults(faults: Sequence[Fault], most: int = 3) -> str:
    """In one line: how many images are bad, and the first few with what is wrong."""
    words = [f"{shown(fault.path)} ({fault.kind}: {fault.detail})" for fault in faults]
    return f"{len(faults)} bad image{'s' * (len(faults) != 1)}: {some(words, most)}"


def some(items: Sequence[str], most: int = 3) -> str:
    """The first few, and how many more there are."""
    return "; ".join(items[:most]) + (
        f"; and {len(items) - most} more" if len(items) > most else ""
    )


def same(paths: Sequence[str]) -> str:
    """Files of the same bytes in one line."""
    return " = ".join(map(shown, paths))


def _titled(title: str, lines: Sequence[str]) -> Iterator[str]:
    yield f"{title}: {len(lines) or 'none'}"
    yield from (f"  {line}" for line in lines)
