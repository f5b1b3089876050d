"""Corrected labels: which rows count, what is refused, and that no image changes its part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finetune.data import corrections, images
from finetune.data.images import ImageSet
from finetune.errors import UserError

HEAD = "path,given,proposed,confidence,corrected\n"
PATHS = ("a/1.png", "a/2.png", "b/1.png", "b/2.png", "b/copy.png")
IDS = ["1", "2", "3", "4", "4"]


@pytest.fixture
def pictures() -> ImageSet:
    labels = np.array([0, 0, 1, 1, 1])
    parts = np.array(["train", "test", "train", "train", "train"])
    return ImageSet("set", Path("set"), PATHS, labels, ("a", "b"), split=parts)


def table(folder: Path, text: str, head: str = HEAD) -> str:
    path = folder / "corrected.csv"
    path.write_text(head + text, encoding="utf-8")
    return str(path)


def test_filled_rows_alone_correct(pictures: ImageSet, tmp_path: Path) -> None:
    """An empty `corrected`, or one that agrees with the label, changes nothing; the others are
    remembered and counted by part."""
    rows = "a/1.png,a,b,0.9,\na/2.png,a,b,0.9,b\nb/1.png,b,a,0.9,b\n"
    new = corrections.apply(pictures, IDS, table(tmp_path, rows))

    assert [0, 1, 1, 1, 1] == new.labels.tolist()
    assert [("a/2.png", "a", "b")] == [(c.path, c.given, c.corrected) for c in new.corrections]
    assert {"train": 0, "val": 0, "test": 1} == corrections.changed(new)
    assert [0, 0, 1, 1, 1] == corrections.given_labels(new).tolist() == pictures.labels.tolist()


def test_copies_get_the_label_too(pictures: ImageSet, tmp_path: Path) -> None:
    """One row corrects all files of the same bytes: no image stands under two labels by it."""
    new = corrections.apply(pictures, IDS, table(tmp_path, "b/2.png,b,a,1,a\n"))

    assert [0, 0, 1, 0, 0] == new.labels.tolist()
    assert [] == images.two_labels(new, IDS)


def test_a_table_of_a_spreadsheet_is_read(pictures: ImageSet, tmp_path: Path) -> None:
    """Semicolons, a capital letter in the header and other columns do no harm."""
    text = table(tmp_path, "b/1.png;x;a;b\n", "Path;note;corrected;given\n")

    assert 0 == corrections.apply(pictures, IDS, text).labels[2]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("a/9.png,a,b,1,b\n", "a/9.png is not among the images"),
        ("a/1.png,a,b,1,c\n", "no class is called 'c'"),
        ("b/1.png,a,b,1,a\nb/2.png,c,b,1,a\n", "'b' now, and the row corrects 'c'"),
        ("a/1.png,a\n", "2 values under 5 columns"),
    ],
)
def test_what_does_not_fit_is_refused_by_line(
    pictures: ImageSet, tmp_path: Path, rows: str, words: str
) -> None:
    """Unknown paths and classes, another label than the one given and short rows name their line,
    and a way on."""
    with pytest.raises(UserError, match=words) as error:
        corrections.apply(pictures, IDS, table(tmp_path, rows))

    assert "line" in str(error.value.where)
    assert error.value.fix


def test_another_table_is_refused_with_its_columns(pictures: ImageSet, tmp_path: Path) -> None:
    """A table without the columns is told what it has, and what makes one."""
    with pytest.raises(UserError, match="no column 'given'") as error:
        corrections.apply(pictures, IDS, table(tmp_path, "a/1.png,b\n", "path,corrected\n"))

    assert "finetune check" in str(error.value.fix)


def test_what_was_mended_in_the_folder_is_no_fault(pictures: ImageSet, tmp_path: Path) -> None:
    """A row whose image has the corrected label already changes nothing."""
    new = corrections.apply(pictures, IDS, table(tmp_path, "a/1.png,b,a,1,a\n"))

    assert () == new.corrections


def test_parts_are_those_of_the_labels_as_given(pictures: ImageSet, tmp_path: Path) -> None:
    """`as_given` has the labels from before; where these contradict each other, the corrected
    ones."""
    torn = images.dataclasses.replace(pictures, labels=np.array([0, 0, 1, 0, 1]))
    rows = "a/1.png,a,b,1,b\nb/2.png,a,b,1,b\n"
    new = corrections.apply(torn, IDS, table(tmp_path, rows))

    assert [1, 0, 1, 1, 1] == new.labels.tolist()
    assert [0, 0, 1, 1, 1] == corrections.as_given(new, IDS).labels.tolist()
