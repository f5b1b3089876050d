"""`finetune predict` as it is typed: a row an input, one kind of table, both of two options
obeyed."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from finetune import cli, job
from finetune.errors import UserError
from finetune.evaluation import evaluate, predict, predictions

TINY: dict[str, Any] = {
    "backbone": ["test_efficientnet"],
    "weights": "random",
    "engine": "torch",
    "precision": "float32",
}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    return job.fit(
        shapes, out=tmp_path_factory.mktemp("predict") / "run", strategy="svm", **TINY
    ).path


@pytest.fixture
def here(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: two images, a folder with one and a note, an empty file."""
    for name, source in {
        "a.png": "circle/00.png",
        "b.png": "square/00.png",
        "in/c.png": "circle/01.png",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((shapes / source).read_bytes())
    (tmp_path / "in" / "notes.txt").touch()
    (tmp_path / "bad.png").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(fitted: Path, *words: str) -> Result:
    done = CliRunner().invoke(cli.cli, ["predict", str(fitted), *words])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_a_row_an_input_under_the_name_that_was_typed(fitted: Path, here: Path) -> None:
    """Given twice, there are two rows; a folder stands at its place; other arguments change no
    name."""
    done = run(fitted, "a.png", "./a.png", "in/", "a.png", "--json")

    assert ["a.png", "./a.png", "in/c.png", "a.png"] == [
        row["path"] for row in json.loads(done.stdout)
    ]
    assert "1 file is left out, as no image extension announces them: 1 .txt" in done.stderr
    text = [line.split()[0] for line in run(fitted, "in", "a.png", "b.png").stdout.splitlines()]
    assert ["in/c.png", "a.png", "b.png"] == text


def test_json_and_a_table_are_both_written(fitted: Path, here: Path) -> None:
    """stdout is one JSON value, the file a table of the same numbers; --unsure marks the same rows
    in both."""
    done = run(fitted, "a.png", "b.png", "--json", "-o", "out.csv", "--unsure", "0.4")
    rows = json.loads(done.stdout)
    with (here / "out.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))

    assert "2 predictions written to out.csv" in done.stderr
    assert [(row["path"], row["score"], row["second_score"]) for row in rows] == [
        (row["path"], float(row["score"]), float(row["second_score"])) for row in table
    ]
    assert [row["unsure"] for row in rows] == [row["unsure"] == "yes" for row in table]
    assert [row["second"] for row in rows] == [row["second"] for row in table]


def test_the_table_is_that_of_a_run(fitted: Path, here: Path, shapes: Path) -> None:
    """Its columns in their order, those of predict before the probabilities; equal to
    predictions.csv, bit for bit."""
    own = predictions.read_predictions(fitted / "predictions.csv")
    run(fitted, *(str(shapes / path) for path in own.paths), "-o", "out.csv")
    again = predictions.read_predictions(here / "out.csv")

    header = (here / "out.csv").read_text(encoding="utf-8").splitlines()[0]
    assert "path,label,prediction,score,second,second_score,p:circle,p:square,p:triangle" == header
    assert [str(shapes / path) for path in own.paths] == again.paths
    np.testing.assert_array_equal(own.probabilities, again.probabilities)


@pytest.mark.skipif(os.name == "nt", reason="names there are text")
def test_any_name_of_a_file_is_one_row(fitted: Path, here: Path) -> None:
    """A line break, a comma, bytes that are no text: the table is whole, JSON is text, and the
    names lead back."""
    names = [os.fsdecode(name) for name in (b"one\rtwo.png", b"a,b\n.png", b"caf\xe9.png")]
    for name in names:
        (here / name).write_bytes((here / "a.png").read_bytes())
    done = run(fitted, *names, "--json", "-o", "out.csv")
    with (here / "out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))

    assert names == predictions.read_predictions(here / "out.csv").paths
    assert [9] * 4 == [len(row) for row in rows]
    assert [row[0] for row in rows[1:]] == [row["path"] for row in json.loads(done.stdout)]
    assert r"caf\xe9.png" in run(fitted, *names).stdout


def test_rows_and_what_is_left_out_make_the_inputs(fitted: Path, here: Path) -> None:
    """With skip each bad or missing input is named on stderr, once for each time that it was
    given."""
    done = run(
        fitted, "bad.png", "a.png", "gone.png", "bad.png", "--on-bad-image", "skip", "-o", "out.csv"
    )
    left_out = [line for line in done.stderr.splitlines() if line.startswith("left out: ")]

    assert ["bad.png", "gone.png", "bad.png"] == [line.split(": ")[1] for line in left_out]
    assert ["a.png"] == predictions.read_predictions(here / "out.csv").paths


def test_the_same_from_python(fitted: Path, here: Path) -> None:
    """What is left out is told, and the rows are those of the pictures in memory, too."""
    said: list[str] = []
    found = predict.predict(
        fitted, ["a.png", (here / "a.png").read_bytes(), "bad.png"], on_bad="skip", say=said.append
    )

    assert ["a.png", "[1]"] == [row["path"] for row in predict.rows(found)]
    assert ["left out: bad.png: empty (0 bytes)"] == said


# --------------------------------------------------------------------------------- unlike the rest


def test_unknown_adds_two_columns_and_a_mark(fitted: Path, here: Path) -> None:
    """--unknown marks what is above it, in the table, as JSON and in the CSV, which can be read
    back; without it nothing is there."""
    told = json.loads(run(fitted, "a.png", "b.png", "--unknown", "0", "--json").stdout)
    rows = predict.predict(fitted, ["a.png", "b.png"])
    assert rows.unfamiliar is not None

    assert rows.unfamiliar.tolist() == [row["unfamiliar"] for row in told]
    assert [value > 0 for value in rows.unfamiliar.tolist()] == [row["unknown"] for row in told]
    run(fitted, "a.png", "-o", "out.csv", "--unsure", "0.5", "--unknown", "0.99")
    with (here / "out.csv").open(encoding="utf-8") as file:
        header = next(csv.reader(file))
    assert ["unsure", "unfamiliar", "unknown"] == header[6:9]
    assert 1 == len(predictions.read_predictions(here / "out.csv").paths)
    assert "unfamiliar" not in json.loads(run(fitted, "a.png", "--json").stdout)[0]


def test_an_image_alone_is_as_unfamiliar_as_beside_others(fitted: Path, here: Path) -> None:
    """But for one rank: BLAS rounds by the place of a row."""
    both = predict.predict(fitted, ["a.png", "b.png"]).unfamiliar
    alone = predict.predict(fitted, ["b.png"]).unfamiliar
    assert both is not None and alone is not None  # noqa: PT018 (for the types)

    assert both[1] == pytest.approx(alone[0], abs=0.03)


def test_an_old_run_says_what_to_do(here: Path) -> None:
    """A run of version 0.1.0 predicts as ever, and refuses --unknown with the way on."""
    old = Path(__file__).parents[1] / "fixtures" / "v0.1.0" / "run-linear"
    done = CliRunner().invoke(cli.cli, ["predict", str(old), "a.png", "--unknown", "0.99"])

    assert isinstance(done.exception, UserError)
    assert "fit it again" in str(done.exception.fix)


def test_evaluate_tells_the_share_that_would_be_marked(fitted: Path, shapes: Path) -> None:
    """The operating point stands in the text and in the JSON."""
    told = evaluate.evaluate(fitted, shapes)

    assert {"level": 0.99, "share": told["unfamiliar"]["share"]} == told["unfamiliar"]
    assert 0 <= told["unfamiliar"]["share"] <= 1
    line = evaluate.metrics_text(told).splitlines()[-1]
    assert line.startswith("unlike the training images")
    assert "beyond 0.99; 0.01 is expected" in line
