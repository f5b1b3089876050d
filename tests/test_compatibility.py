"""What version 0.1.0 wrote opens, says the same and goes on: `fixtures/v0.1.0` was made by that
version (see its README)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import finetune
from finetune import files, job, recipe, similarity
from finetune.backbones import catalog
from finetune.cli import cli
from finetune.data import images
from finetune.evaluation import predictions
from finetune.features import engine, extraction, store
from finetune.network import Network, Tap
from retrieval.cli import cli as retrieve

WRITTEN = Path(__file__).parent / "fixtures" / "v0.1.0"
EXPECTED: dict[str, Any] = json.loads((WRITTEN / "expected.json").read_text(encoding="utf-8"))
NETWORK, WEIGHTS = "test_efficientnet", "weights.safetensors"
RUNS = ("run-linear", "run-rbf", "run-tuned")
CLOSE = {"rel": 0, "abs": 1e-5}  # processors round differently

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folders, in which the test works: opening may write."""
    shutil.copytree(WRITTEN, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


@pytest.fixture
def no_network_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a network to run it fails."""
    monkeypatch.setattr(engine, "open_runner", lambda *_, **__: pytest.fail("the network is run"))


def told(command: Any, *words: object) -> Any:
    """The JSON that a command prints."""
    result = CliRunner().invoke(command, [*map(str, words), "--json"], catch_exceptions=False)
    assert 0 == result.exit_code, result.output
    return json.loads(result.stdout)


def queries() -> list[str]:
    return [str(path) for path in sorted(Path("queries").iterdir())]


# --------------------------------------------------------------------------------------------- runs


def assert_same_rows(
    expected: list[dict[str, Any]], found: list[dict[str, Any]], tolerance: float
) -> None:
    """The same images in the same order with the same classes, and probabilities that are as close
    as `tolerance`.

    Version 0.1.0 cut the common folder from their names, which are as they were typed now.
    """
    for old, new in zip(expected, found, strict=True):
        assert f"queries/{old['path']}" == new["path"]
        names = ("prediction", "second")
        assert {name: old[name] for name in names} == {name: new[name] for name in names}
        assert old["probabilities"] == pytest.approx(new["probabilities"], rel=0, abs=tolerance)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_predicts_as_it_did(name: str) -> None:
    """`predict` gives the classes and probabilities that version 0.1.0 gave."""
    assert_same_rows(EXPECTED["predictions"][name], told(cli, "predict", name, *queries()), 1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_the_table_of_a_run_is_what_it_says_today(name: str) -> None:
    """predictions.csv is read, and a run opened in Python gives the same for these images."""
    table = predictions.read_predictions(Path(name, "predictions.csv"))
    found = finetune.load(name).predict([Path("photos", path) for path in table.paths])

    assert list(found.classes) == table.classes
    assert table.probabilities == pytest.approx(found.probabilities, **CLOSE)


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Values and the ends of their intervals."""
    found = {
        name: value if isinstance(value, dict) else {"value": value}
        for name, value in metrics.items()
    }
    return {
        f"{name} {key}": value
        for name, one in found.items()
        for key, value in one.items()
        if not isinstance(value, str)
    }


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_evaluated_as_it_was(name: str) -> None:
    """`evaluate` gives the same metrics with the same intervals."""
    old, new = EXPECTED["evaluations"][name], told(cli, "evaluate", name, "photos")

    assert (old["n"], old["left_out"]) == (new["n"], new["left_out"])
    assert numbers(old["metrics"]) == pytest.approx(numbers(new["metrics"]), rel=0, abs=1e-4)


@pytest.mark.usefixtures("no_network_runs")
@pytest.mark.parametrize("name", RUNS)
def test_the_same_command_finds_the_finished_run(name: str) -> None:
    """The digest of the job is what it was: nothing is fitted again, and no other run is believed
    to be there."""
    said: list[str] = []
    before = Path(name, "run.json").read_bytes()

    outcome = job.fit(source=f"{name}/recipe.yaml", out=name, say=said.append)

    assert json.loads(before)["shipped"] == outcome.shipped
    assert before == Path(name, "run.json").read_bytes()
    assert "holds this run already" in said[-1]


def test_runs_are_listed_and_compared() -> None:
    """Finished and unfinished ones stand in the list; the finished can be compared."""
    listed = told(cli, "runs", "ls", ".")
    compared = told(cli, "runs", "compare", *RUNS)

    assert {*RUNS, "run-half"} == {Path(row["run"]).name for row in listed}
    assert len(RUNS) == len(compared)


def test_a_killed_training_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training of version 0.1.0 that was killed had another plan: the same command says so, does
    it from its start and ends with a whole run."""
    monkeypatch.setattr(similarity, "measure", lambda *_, **__: similarity.unknown("not measured"))
    said: list[str] = []

    job.fit(source="run-half/recipe.yaml", out="run-half", say=said.append)
    log = Path("run-half/log.jsonl").read_bytes()
    rows = [json.loads(line) for line in log.splitlines()]
    told_again = [row["epoch"] for row in rows if row["phase"] == "select" and "epoch" in row]

    assert 2 == files.read_json(Path("run-half/run.json"))["starts"]
    assert any("an earlier version" in line for line in said)
    assert [1, 2, 3, 4] == told_again[-4:]
    assert log.startswith((WRITTEN / "run-half/log.jsonl").read_bytes())
    assert not Path("run-half/checkpoints").exists()
    assert len(queries()) == len(told(cli, "predict", "run-half", *queries()))


# -------------------------------------------------------------------------------- store and recipes


@pytest.mark.usefixtures("no_network_runs")
def test_the_store_has_its_rows() -> None:
    """Images that version 0.1.0 has seen are not seen again, wherever they lie now, and their
    features are the same bits."""
    written = np.load("features.npz")
    manifest = json.loads(str(written["manifest"]))
    taps = [Tap.parse(text) for text in manifest["taps"]]
    source = images.load_unlabelled([Path("photos/dark", path) for path in written["paths"]])
    named = catalog.open_named(NETWORK, WEIGHTS)
    opened = store.Store(Path("features"))

    found = extraction.extract(
        source,
        named.network,
        taps,
        named.load,
        store=opened,
        engine_name="torch",
        precision="float32",
    )
    opened.close()

    assert manifest["network"] == json.loads(json.dumps(named.network.to_json()))
    assert manifest["spaces"] == [found.spaces[tap] for tap in taps]
    assert np.array_equal(written["X"], np.concatenate([found.blocks[tap] for tap in taps], axis=1))


def test_the_features_are_what_they_were() -> None:
    """Without the store, the network gives the features that version 0.1.0 read."""
    written = np.load("features.npz")
    source = images.load_unlabelled([Path("photos/dark", path) for path in written["paths"]])
    named = catalog.open_named(NETWORK, WEIGHTS)
    taps = [Tap.parse(text) for text in json.loads(str(written["manifest"]))["taps"]]

    found = extraction.extract(
        source, named.network, taps, named.load, engine_name="torch", precision="float32"
    )

    assert written["X"] == pytest.approx(
        np.concatenate([found.blocks[tap] for tap in taps], axis=1), rel=1e-4, abs=1e-5
    )


@pytest.mark.parametrize("name", EXPECTED["networks"])
def test_the_keys_of_spaces_stay(name: str) -> None:
    """A network is described as it was, and every tap, engine, precision and view has the key that
    it had."""
    old = EXPECTED["networks"][name]
    now = (
        catalog.open_named() if name == "lite0" else catalog.open_named(NETWORK, WEIGHTS)
    ).network

    assert Network.from_json(old["network"]) == now
    opened = store.Store()
    for words, key in old["keys"].items():
        tap, engine_name, precision, *view = words.split()
        about = extraction.about(now, Tap.parse(tap), engine_name, precision, "".join(view))
        assert key == opened.space(about, now.width(Tap.parse(tap))).key, words
    opened.close()


@pytest.mark.parametrize("name", EXPECTED["recipes"])
def test_the_digests_of_recipes_stay(name: str) -> None:
    """A recipe asks for the same run as it did: keys that came later are left out at their
    defaults."""
    old = EXPECTED["recipes"][name]
    settings = (
        recipe.load(name.removeprefix("shipped: "))
        if old["set"] is None
        else recipe.override(recipe.Recipe(), old["set"])
    )

    assert old["digest"] == recipe.digest(settings)


def test_a_dumped_recipe_loads() -> None:
    """The recipe that a run wrote is read, and asks for the same."""
    settings = recipe.load("recipe.yaml")

    assert EXPECTED["recipe.yaml"] == recipe.digest(settings)
    assert EXPECTED["recipe.yaml"] == recipe.digest(recipe.load("recipe.yaml"))
    assert ("resnet18.a1_in1k",) == settings.backbone.names
    assert (0.1, 1.0) == settings.svm.C


# ------------------------------------------------------------------------------------------ gallery


def assert_same_answers(expected: list[Any], found: list[Any]) -> None:
    """The same images with the same ids in the same order, and cosines that are as close as
    processors round.

    A copy of the query, which version 0.1.0 left out, comes first now and is marked.
    """
    for old, one in zip(expected, found, strict=True):
        new = {
            **one,
            "hits": [hit for hit in one["hits"] if not hit.get("same")][: len(old["hits"])],
        }
        assert old["query"] == new["query"]
        assert [(hit["path"], hit["id"]) for hit in old["hits"]] == [
            (hit["path"], hit["id"]) for hit in new["hits"]
        ]
        assert [hit["score"] for hit in old["hits"]] == pytest.approx(
            [hit["score"] for hit in new["hits"]], **CLOSE
        )


def test_a_gallery_answers_as_it_did() -> None:
    """The same images, ids and scores; nothing is damaged, and the images are found beside the
    gallery."""
    info = told(retrieve, "info", "gallery", "--check")

    assert_same_answers(
        EXPECTED["gallery"]["answers"], told(retrieve, "query", "gallery", *queries(), "-k", 6)
    )
    for name in (
        "images",
        "paths",
        "folders",
        "network",
        "width",
        "vector",
        "search",
        "segments",
        "removed rows",
        "generation",
    ):
        assert EXPECTED["gallery"]["info"][name] == info[name], name
    assert str(Path("photos").absolute()) == info["root"]


def test_a_gallery_takes_more_images() -> None:
    """`add` encodes what is new with the gallery's own weights; the answers of before stay in their
    order."""
    added = told(retrieve, "add", "gallery", "later")
    known = told(retrieve, "add", "gallery", "photos/light/light-02.png")
    new, *answers = told(
        retrieve, "query", "gallery", "later/dark-20.png", *queries(), "-k", 50, "--keep-self"
    )
    before = [
        {**one, "hits": [hit for hit in one["hits"] if "later" not in hit["path"]][:5]}
        for one in answers
    ]

    assert (4, 0, 1) == (added["added"], known["added"], known["unchanged"])
    assert "../later/dark-20.png" == new["hits"][0]["path"]
    assert new["hits"][0]["score"] == pytest.approx(1, **CLOSE)
    # with --keep-self it sees itself
    assert_same_answers(
        [one for one in EXPECTED["gallery"]["answers"] if "known" not in one["query"]],
        [one for one in before if "known" not in one["query"]],
    )


@pytest.mark.usefixtures("no_network_runs")
def test_a_gallery_follows_its_folders() -> None:
    """`sync` finds what was removed, moved and brought back without running the network: contents
    keep their ids."""
    Path("photos/dark/dark-00.png").unlink()
    Path("photos/dark/dark-01.png").rename("photos/dark/moved.png")

    change = told(retrieve, "sync", "gallery")
    again = told(retrieve, "sync", "gallery")

    assert {"added": 1, "moved": 1, "removed": 1} == {
        name: change[name] for name in ("added", "moved", "removed")
    }
    assert {"added": 0, "moved": 0, "removed": 0} == {
        name: again[name] for name in ("added", "moved", "removed")
    }
    hits = told(retrieve, "query", "gallery", "queries/known.png", "-k", 50)[0]["hits"]
    assert {("dark/moved.png", 2), ("dark/dark-05.png", 6)} <= {
        (hit["path"], hit["id"]) for hit in hits
    }
    assert "dark/dark-00.png" not in {hit["path"] for hit in hits}


def test_a_gallery_is_compacted() -> None:
    """One segment without the removed image and a new search index, and the same answers."""
    told(retrieve, "compact", "gallery")
    info = told(retrieve, "info", "gallery", "--check")

    assert (1, 0, 14) == (info["segments"], info["removed rows"], info["images"])
    assert_same_answers(
        EXPECTED["gallery"]["answers"], told(retrieve, "query", "gallery", *queries(), "-k", 6)
    )


# -------------------------------------------------------------------------------- the folder itself


def test_nothing_written_names_a_place_of_its_maker() -> None:
    """Only the neutral folder in which they were made stands in the files."""
    place = re.compile(rb"[/](home|root|Users|work|mnt|var|tmp/[^r])")
    assert [] == [
        path for path in WRITTEN.rglob("*") if path.is_file() and place.search(path.read_bytes())
    ]
