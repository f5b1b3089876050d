"""`finetune ensemble`: finished runs averaged into one, from the command to the file."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import combined
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import SHAPES, draw

import finetune
from finetune import cli
from finetune.combining import averaging, members
from finetune.errors import UserError
from finetune.evaluation import evaluate, predictions
from finetune.report import ensembles, runs
from retrieval import encoder

ROOT = Path(__file__).resolve().parents[2]


class Made(NamedTuple):
    first: Path
    second: Path
    tuned: Path
    other: Path  # another seed: other test images
    average: Path  # of the first and the fine-tuned


@pytest.fixture(scope="module")
def made(combined_runs: combined.Runs, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Runs, and an average of two of them."""
    found = combined_runs
    average = tmp_path_factory.mktemp("average") / "average"
    ensembles.average([found.first, found.tuned], average)
    return Made(found.first, found.second, found.tuned, found.other, average)


def said(run: Path, shapes: Path) -> np.ndarray:
    """What a run says of the test images of the first."""
    names = predictions.read_predictions(run / "predictions.csv").paths
    with finetune.load(run) as model:
        return model.predict([shapes / name for name in names]).probabilities.astype(np.float64)


def test_it_predicts_the_average_computed_by_hand(made: Made, shapes: Path) -> None:
    """The normalised geometric mean of what the members say, and what its own predictions.csv
    holds, to 1e-6."""
    product = np.sqrt(said(made.first, shapes) * said(made.tuned, shapes))
    found = said(made.average, shapes)
    written = predictions.read_predictions(made.average / "predictions.csv").probabilities

    assert product / product.sum(1, keepdims=True) == pytest.approx(found, abs=1e-6)
    assert written == pytest.approx(found, abs=1e-6)


def test_an_average_as_member_is_taken_apart(made: Made, shapes: Path, tmp_path: Path) -> None:
    """Three models of a backbone each, shares of shares, and the same predictions as the average
    of the average would give."""
    ensembles.average([made.average, made.second], tmp_path / "all")
    about = json.loads((tmp_path / "all" / "ensemble.json").read_text(encoding="utf-8"))
    product = np.sqrt(said(made.average, shapes) * said(made.second, shapes))

    assert [0.25, 0.25, 0.5] == pytest.approx(list(about["members"].values()))
    assert product / product.sum(1, keepdims=True) == pytest.approx(
        said(tmp_path / "all", shapes), abs=1e-6
    )


def test_the_rest_of_the_product_takes_it_as_a_run(made: Made, shapes: Path) -> None:
    """`evaluate` leaves out what any member was trained on and finds the accuracy of metrics.json;
    lists show it; a gallery reads its features."""
    own = json.loads((made.average / "metrics.json").read_text(encoding="utf-8"))
    judged = evaluate.evaluate(made.average, shapes)
    row = next(row for row in runs.list_runs(made.average.parent) if row["run"] == "average")

    assert 12 == judged["n"]
    assert (
        own["test/top1"]["value"] == judged["metrics"]["top1"]["value"] == row["test/top1"]["value"]
    )
    assert "average (first, tuned)" == row["shipped"]
    assert encoder.open_run(made.average).networks


def test_every_member_stands_beside_it(made: Made) -> None:
    """contenders.json and the report: accuracy of all on the same images, paired differences,
    weights, passes; the verdict names the member that the images which choose call best."""
    first, *others = json.loads((made.average / "contenders.json").read_text(encoding="utf-8"))
    page = (made.average / "report.html").read_text(encoding="utf-8")
    verdict = json.loads((made.average / "run.json").read_text(encoding="utf-8"))["verdict"]
    best = max(
        others,
        key=lambda row: (row["selection"]["accuracy"]["value"], -row["selection"]["log_loss"]),
    )

    assert {"first": 0.5, "tuned": 0.5} == first["members"]
    assert (2, 1, 1) == (first["passes"], *(row["passes"] for row in others))
    assert all(12 == row["against"]["difference"]["n"] for row in others)
    assert f"Against {best['name']}, the best of them on the images that choose" in verdict
    assert "The average of 2 runs" in page
    assert "How it was decided" not in page


def test_weights_are_found_on_the_images_that_chose(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked are the members' selection tables, and never a test table."""
    both = [made.first, made.second]
    tables = members.selection_tables(members.open_members(both))
    test = predictions.read_predictions(made.first / "predictions.csv").paths
    asked: list[np.ndarray] = []

    def find(logs: np.ndarray, y: np.ndarray) -> np.ndarray:
        asked.append(logs)
        return np.array([0.7, 0.3])

    monkeypatch.setattr(averaging, "_find", lambda way: find)
    found = ensembles.average(both, tmp_path / "w", weights="learned")

    assert [0.7, 0.3] == [one["weight"] for one in found["members"].values()]
    assert not set(tables[0].paths) & set(test)
    expected = np.log(np.stack([table.probabilities for table in tables]))
    assert expected == pytest.approx(asked[0])


def test_weights_that_leave_one_run_are_no_average(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said, with the way on."""
    monkeypatch.setattr(averaging, "_find", lambda way: lambda logs, y: np.eye(len(logs))[0])
    with pytest.raises(UserError, match="give first everything") as caught:
        ensembles.average([made.first, made.second], tmp_path / "w", weights="greedy")
    assert "--weights equal" in caught.value.fix


def test_what_cannot_be_averaged_is_refused_and_leaves_nothing(made: Made, tmp_path: Path) -> None:
    """One run, one twice, a member of a member, other test images, no run, other classes: each
    with a way on."""
    foreign = ROOT / "tests" / "fixtures" / "v0.1.0" / "run-tuned"
    cases = {
        ("first",): "one run alone",
        ("first", "first"): "is given twice",
        ("average", "first"): "would count twice",
        ("first", "other"): "other test images",
        ("first", "nowhere"): "no run is here",
    }
    where = made._asdict()
    for names, words in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            ensembles.average(
                [where.get(name, tmp_path / name) for name in names], tmp_path / "out"
            )
        assert caught.value.fix
    with pytest.raises(UserError, match="does not know circle; square; triangle"):
        ensembles.average([made.first, foreign], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_member_trained_on_test_images_is_refused(made: Made) -> None:
    """Known by the digests of the images, though the tables name the same test images."""
    found = members.open_members([made.first, made.second])
    test = members.common_test(found, lambda text: None).images
    pictures, ids = members.scanned(found[0])
    at = [pictures.paths.index(path) for path in test.paths]
    guilty = dataclasses.replace(found[1], trained=ids.take(at[:3]))

    with pytest.raises(UserError, match="trained on 3 of the 12 test images"):
        members.common_test((found[0], guilty), lambda text: None)


def test_other_images_judge_where_they_are_given(made: Made, shapes: Path, tmp_path: Path) -> None:
    """--data: runs of different test parts, judged on what is new to both; copies of what they were
    trained on are left out."""
    data = tmp_path / "more"
    rng = np.random.default_rng(9)
    for kind in SHAPES:
        (data / kind).mkdir(parents=True)
        draw(kind, rng).save(data / kind / "new.png")
        shutil.copy(shapes / kind / "03.png", data / kind / "copy.png")
    found = ensembles.average([made.first, made.other], tmp_path / "both", data=str(data))
    trained = [set(evaluate.trained_on(run) or ()) for run in (made.first, made.other)]

    assert 3 == found["contenders"][0]["test"]["accuracy"]["n"]
    assert trained[0] | trained[1] == set(evaluate.trained_on(tmp_path / "both") or ())


def test_the_command_prints_a_line_a_model_and_the_verdict(made: Made) -> None:
    """A finished average is given back as it is."""
    done = CliRunner().invoke(
        cli.cli, ["ensemble", str(made.first), str(made.tuned), "--out", str(made.average)]
    )

    assert 0 == done.exit_code
    assert "holds this average already" in done.stderr
    assert "The average of 2 runs" in done.stdout
    assert "this run:" in done.stdout
