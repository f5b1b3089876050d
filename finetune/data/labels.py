"""Labels of a table as words: those that list several classes, and those that are classes of their
own perhaps by mistake."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

MEASURED = 20  # rows, of which nearly each has a decimal number of its own: these are no classes


def listed(label: str, known: Collection[str], asked: bool) -> list[str]:
    """The classes that a label lists; itself alone where it is one.

    Parts between commas are classes only where all are `known` labels; so are those between | or ;
    where the column was `asked` for by name.
    """
    if label[0] in "[{" and label[-1] in "]}":
        inside = [part.strip(" '\"") for part in label[1:-1].split(",")]
        return [*inside, ""] if len(inside) == 1 else inside
    for marks, doubtful in ((r"[|;]", asked), (",", True)):
        parts = [part.strip() for part in re.split(marks, label) if part.strip()]
        if len(parts) > 1 and (not doubtful or all(part in known for part in parts)):
            return parts
    return [label]


def notes(labels: Sequence[str]) -> Iterator[str]:
    """Lines about labels that differ in case, inner spaces or the writing of a number alone, and
    about those that are measurements."""
    counts = Counter(labels)
    alike: dict[str, list[tuple[str, int]]] = {}
    for label, count in counts.items():
        alike.setdefault(_folded(label), []).append((label, count))
    if groups := [group for group in alike.values() if len(group) > 1]:
        few = "; ".join(
            " and ".join(f"{label!r} ({count})" for label, count in group) for group in groups[:3]
        )
        more = f"; and {len(groups) - 3} more" * (len(groups) > 3)
        yield (
            f"labels that differ in case, spaces or the writing of a number alone are different "
            f"classes here: {few}{more}"
        )
    many = len(counts) >= MEASURED and len(counts) > 0.9 * len(labels)
    if many and all(re.fullmatch(r"[+-]?\d*[.,]\d+", label) for label in counts):
        yield (
            f"the {len(labels)} labels are {len(counts)} different decimal numbers: they look like "
            f"measurements, not classes; --label-column NAME names another column"
        )


def _folded(label: str) -> str:
    """What labels have in common that are perhaps one class."""
    try:
        return f"{float(label):g}"
    except ValueError:
        return " ".join(label.casefold().split())
