"""The table of predictions, whoever writes it: one order of columns, one way of quoting, names as
`names.shown` shows them.

The columns are `path,label,prediction,score`, then `second,second_score,unsure` and
`unfamiliar,unknown` where they were asked for, then a column `p:CLASS` a class, in the order of the
classes.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.files import write_csv
from finetune.names import meant, shown

TEST = "predictions.csv"  # of the test images
SELECTION = "predictions-selection.csv"  # of the images that chose, which it was not fitted on
FIRST = ("path", "label", "prediction", "score")
# after those, before the probabilities
SECOND, SECOND_SCORE, UNSURE, UNFAMILIAR, UNKNOWN = EXTRA = (
    *("second", "second_score", "unsure"),
    *("unfamiliar", "unknown"),
)
# begins the name of a probability's column, so that a class called `path` collides with nothing
PROBABILITY = "p:"


class Predictions(NamedTuple):
    """A table of predictions: `probabilities` is `(n, C)` float64; `labels` are empty texts where
    the truth is not known."""

    paths: list[str]
    labels: list[str]
    classes: list[str]
    probabilities: NDArray[np.float64]


def write_predictions(
    path: Path,
    paths: Sequence[str],
    labels: Sequence[str],
    classes: Sequence[str],
    probabilities: NDArray[Any],
    *,
    runner_up: bool = False,
    unsure: float | None = None,
    unfamiliar: NDArray[Any] | None = None,
    unknown: float = 1.0,
) -> None:
    """Write `path,label,prediction,score,p:<class>,…`, a row an image.

    The prediction is the first class of the largest probability, the score that probability.
    `runner_up` adds the columns `second` and `second_score`, `unsure` the column `unsure`: `yes`
    where the score is below it, else `no`. `unfamiliar` `(n,)` adds the columns `unfamiliar` and
    `unknown`: `yes` where it is above the level `unknown`, else `no`.
    """
    extra = [SECOND, SECOND_SCORE] * runner_up + [UNSURE] * (unsure is not None)
    extra += [] if unfamiliar is None else [UNFAMILIAR, UNKNOWN]
    strange = [None] * len(paths) if unfamiliar is None else unfamiliar.tolist()

    def rows() -> Iterator[list[object]]:
        for name, label, row, (best, *others), value in zip(
            paths, labels, probabilities, ranked(probabilities), strange, strict=True
        ):
            second = [classes[others[0]], row[others[0]]] if runner_up else []
            doubt = [] if unsure is None else ["yes" if row[best] < unsure else "no"]
            far = [] if value is None else [value, "yes" if value > unknown else "no"]
            yield [shown(name), label, classes[best], row[best], *second, *doubt, *far, *row]

    write_csv(path, [*FIRST, *extra, *(f"{PROBABILITY}{name}" for name in classes)], rows())


def ranked(probabilities: NDArray[Any]) -> list[list[int]]:
    """For each row its two most probable classes (one, where there is one), the first of equal ones
    first."""
    order: list[list[int]] = np.argsort(-probabilities, axis=1, kind="stable")[:, :2].tolist()
    return order


def read_predictions(path: Path) -> Predictions:
    """Read back what `write_predictions` wrote: paths are those of the files, probabilities equal
    to the last bit."""
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            header, *rows = csv.reader(file)
        told = next(
            (i for i, name in enumerate(header) if name.startswith(PROBABILITY)), len(header)
        )
        known = tuple(header[:4]) == FIRST and set(header[4:told]) <= set(EXTRA)
        if not known or not all(name.startswith(PROBABILITY) for name in header[told:]):
            raise ValueError(f"its columns are {', '.join(header[:5])}")
        if short := next((row for row in rows if len(row) != len(header)), None):
            raise ValueError(f"{len(short)} cells stand below {len(header)} columns")
        values = np.array([[float(cell) for cell in row[told:]] for row in rows], dtype=np.float64)
    except FileNotFoundError as error:
        raise UserError("no such file", where=path) from error
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"not a table of predictions ({error})",
            where=path,
            fix="give the predictions.csv of a run",
        ) from error
    classes = [name.removeprefix(PROBABILITY) for name in header[told:]]
    return Predictions(
        [meant(row[0]) for row in rows],
        [row[1] for row in rows],
        classes,
        values.reshape(len(rows), len(classes)),
    )
