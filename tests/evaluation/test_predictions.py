"""The table of predictions: exact, quoted so that every reader finds the same cells, one order of
columns."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import UserError
from finetune.evaluation import predictions

NAMES = st.text(st.characters(exclude_categories=()), min_size=1, max_size=6).filter(
    lambda text: not any(0xD800 <= ord(c) <= 0xDC7F or 0xDCFF < ord(c) <= 0xDFFF for c in text)
)


@given(
    st.lists(
        st.tuples(NAMES, NAMES, st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3)),
        max_size=6,
    ),
    st.lists(NAMES, min_size=3, max_size=3, unique=True),
)
@settings(max_examples=60, deadline=None)
def test_a_table_of_predictions_is_an_exact_round_trip(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], classes: list[str]
) -> None:
    """Any names and any float32 probabilities come back equal to the last bit."""
    path = tmp_path_factory.mktemp("p") / "predictions.csv"
    values = np.array([row[2] for row in rows], dtype=np.float32).reshape(len(rows), 3)

    predictions.write_predictions(
        path, [row[0] for row in rows], [row[1] for row in rows], classes, values
    )
    back = predictions.read_predictions(path)

    assert ([row[0] for row in rows], [row[1] for row in rows], classes) == (
        back.paths,
        back.labels,
        back.classes,
    )
    assert values.tobytes() == back.probabilities.astype(np.float32).tobytes()


def test_the_table_of_predictions_by_hand(tmp_path: Path) -> None:
    """The columns, the first of equal probabilities as the prediction, and classes that are called
    like columns."""
    path = tmp_path / "p.csv"
    predictions.write_predictions(
        path,
        ["a,b.jpg", "é.jpg"],
        ["path", ""],
        ["path", 'a "b"'],
        np.array([[0.5, 0.5], [0.1, 0.9]]),
    )

    assert [
        'path,label,prediction,score,p:path,"p:a ""b"""',
        '"a,b.jpg",path,path,0.5,0.5,0.5',
        'é.jpg,,"a ""b""",0.9,0.1,0.9',
    ] == path.read_text(encoding="utf-8").splitlines()
    assert ["path", 'a "b"'] == predictions.read_predictions(path).classes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,b\n1,2\n",
        "path,label,prediction,score,p:a\nx,y,z,0.5,nonsense\n",
        "path,label,prediction,score,p:a\nx,y,z,0.5\n",
    ],
)
def test_what_is_no_table_of_predictions_is_named(tmp_path: Path, text: str) -> None:
    """An empty file, other columns, text for a number and a short row are refused."""
    path = tmp_path / "p.csv"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(UserError, match="not a table of predictions"):
        predictions.read_predictions(path)
    with pytest.raises(UserError, match="no such file"):
        predictions.read_predictions(tmp_path / "absent.csv")


def test_the_columns_of_predict_stand_between_the_score_and_the_probabilities(
    tmp_path: Path,
) -> None:
    """second, second_score and unsure, where they are asked for; `read_predictions` reads both
    kinds of tables."""
    path = tmp_path / "p.csv"
    values = np.array([[0.25, 0.75, 0.0], [0.5, 0.0, 0.5]], np.float32)
    predictions.write_predictions(
        path, ["a", "b"], ["", ""], ["x", "y", "z"], values, runner_up=True, unsure=0.6
    )

    assert [
        "path,label,prediction,score,second,second_score,unsure,p:x,p:y,p:z",
        "a,,y,0.75,x,0.25,no,0.25,0.75,0.0",
        "b,,x,0.5,z,0.5,yes,0.5,0.0,0.5",
    ] == path.read_text(encoding="utf-8").splitlines()
    back = predictions.read_predictions(path)
    assert (["a", "b"], ["x", "y", "z"]) == (back.paths, back.classes)
    np.testing.assert_array_equal(values, back.probabilities)


@pytest.mark.parametrize(
    "name", ["one\rtwo.png", "one\ntwo.png", "caf\udce9.png", "a\\b.png", 'a,"b".png']
)
def test_any_name_is_one_cell_of_one_row_in_utf8(tmp_path: Path, name: str) -> None:
    """A name with a line break, or of bytes that are no text, tears no row for Python's csv, and
    comes back."""
    path = tmp_path / "p.csv"
    predictions.write_predictions(
        path, [name], ["one\rtwo"], ["one\rtwo", "b"], np.array([[0.5, 0.5]])
    )
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))

    assert [2, [6, 6]] == [len(rows), [len(row) for row in rows]]
    assert [name] == predictions.read_predictions(path).paths
    assert "one\rtwo" == rows[1][2]
