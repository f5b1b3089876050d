"""The Python face: `retrieval.build`, `retrieval.open`, and what a gallery does."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import galleries
import numpy as np
import pytest
from click.testing import CliRunner
from galleries import ENCODER, vector_of, words, write
from PIL import Image

import retrieval
from finetune.errors import UserError
from finetune.network import Tap
from retrieval import public
from retrieval.cli import cli

TINY: dict[str, Any] = {
    "backbone": "test_efficientnet",
    "weights": "random",
    "engine": "torch",
    "precision": "float32",
}


def refusal(call: Callable[..., Any], *args: Any, **how: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **how)
    return str(caught.value)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten files that all differ, seen by the network of `galleries`."""
    galleries.install(monkeypatch.setattr)
    monkeypatch.setattr(public, "_encoder", lambda *_: ENCODER)
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "photos", words(10))


@pytest.fixture
def real(shapes: Path, tmp_path: Path) -> Path:
    """A gallery of sixty drawn shapes, by a small network with random weights."""
    retrieval.build(shapes, tmp_path / "shapes.gallery", frame="crop", **TINY)
    return tmp_path / "shapes.gallery"


# ------------------------------------------------------------------------------------------- a life


def test_a_gallery_is_built_asked_and_changed(photos: Path, tmp_path: Path) -> None:
    """Each change returns its counts, and the open gallery shows it at once."""
    built = retrieval.build(str(photos), "photos.gallery")
    more = write(tmp_path, {"more/new.png": "new", "more/again.png": "word 3"})

    with retrieval.open("photos.gallery") as gallery:
        assert (10, 10, 10) == (built.added, built.images, len(gallery))
        added = gallery.add(more / "more")
        assert (2, 1, 11) == (added.added, added.encoded, len(gallery))
        (answer,), faults = gallery.query(tmp_path / "more" / "again.png", k=2)
        assert ("0003.png", True, ()) == (answer.hits[0].path, answer.hits[0].same, faults)
        removed = gallery.remove(["0001.png", "0002.png"])
        assert (2, 9) == (removed.removed, len(gallery))
        assert 2 == gallery.sync().added
        assert 11 == len(gallery)


def test_the_command_builds_what_python_builds(photos: Path) -> None:
    """The same options give the same gallery: settings, vectors and what they were made by."""
    retrieval.build(photos, "python.gallery", whiten=4, factory="Flat", recall=0.9)
    words = ["build", photos, "-o", "command.gallery", "--whiten", 4, "--index", "Flat"]
    done = CliRunner().invoke(cli, [*map(str, words), "--recall", "0.9", "--json"])

    assert 0 == done.exit_code, done.output
    with retrieval.open("python.gallery") as one, retrieval.open("command.gallery") as other:
        assert one.manifest["vector"] == other.manifest["vector"]
        assert one.now.meta["search settings"] == other.now.meta["search settings"]
        np.testing.assert_array_equal(one.now.table(), other.now.table())
    assert 10 == json.loads(done.stdout)["added"]


def test_names_of_options_are_those_of_the_command() -> None:
    """Whoever knows `retrieve build` knows `retrieval.build`, but for what is of one of them."""
    options = {one.name for one in cli.commands["build"].params}
    known = set(inspect.signature(retrieval.build).parameters)

    assert {"out", "json_"} == options - known
    assert {"gallery", "bar", "say"} == known - options


# ------------------------------------------------------------------------------------------ queries


def test_pictures_in_memory_are_queries(real: Path, shapes: Path) -> None:
    """A file, its bytes, a PIL image and an array give the same answer, in the order given; only
    the file's own path is left out."""
    file = shapes / "circle" / "03.png"
    image = Image.open(file)
    given = [file, file.read_bytes(), image, np.asarray(image.convert("RGB"))]

    with retrieval.open(real) as gallery:
        answers, faults = gallery.query(given, k=3)
        alone, _ = gallery.query(image, k=3)

    assert [str(file), "[1]", "[2]", "[3]"] == [answer.query for answer in answers]
    own, same, *others = answers
    assert "circle/03.png" not in [hit.path for hit in own.hits]
    assert ("circle/03.png", True) == (same.hits[0].path, same.hits[0].same)
    assert [hit.path for hit in own.hits[:2]] == [hit.path for hit in same.hits[1:]]
    for answer in others:
        assert "circle/03.png" == answer.hits[0].path
        assert answer.hits[0].score == pytest.approx(1, abs=1e-5)
        assert [hit.path for hit in same.hits] == [hit.path for hit in answer.hits]
    assert alone[0].hits == answers[2].hits
    assert () == faults


def test_folders_stand_for_their_images(photos: Path) -> None:
    """A folder is as many queries as it holds images, called as it was given."""
    retrieval.build(photos, "photos.gallery")
    with retrieval.open("photos.gallery") as gallery:
        answers, _ = gallery.query("photos", k=1)
        (mean,), _ = gallery.query("photos", k=1, together=True, keep_self=True)

    assert [f"photos/{i:04d}.png" for i in range(10)] == [answer.query for answer in answers]
    assert 10 == len(mean.parts)


def test_bad_queries_stop_or_are_named(photos: Path) -> None:
    """Missing and unreadable queries are a `UserError`; with `skip` they are faults."""
    retrieval.build(photos, "photos.gallery")
    bad = write(Path(), {"bad.png": "broken", "good.png": "word 1 "})
    with retrieval.open("photos.gallery") as gallery:
        assert "no such file" in refusal(gallery.query, "nothing.png")
        assert "bad.png" in refusal(gallery.query, [bad / "bad.png", bad / "good.png"])
        answers, faults = gallery.query([bad / "bad.png", bad / "good.png"], on_bad="skip")

    assert (["good.png"], ["bad.png"]) == (
        [answer.query for answer in answers],
        [fault.path for fault in faults],
    )


def test_missing_queries_are_faults_where_they_are_skipped(real: Path, shapes: Path) -> None:
    """A file that is not there is named beside the answers of the others."""
    good = shapes / "circle" / "00.png"
    with retrieval.open(real) as gallery:
        (answer,), (fault,) = gallery.query(["nothing.png", good], k=1, on_bad="skip")

    assert (str(good), "nothing.png") == (answer.query, fault.path)


def test_vectors_are_searched_for(photos: Path) -> None:
    """Who has vectors of the gallery's kind asks with them: `(q, width)`, cosines come back."""
    retrieval.build(photos, "photos.gallery")
    with retrieval.open("photos.gallery") as gallery:
        found = gallery.search(np.stack([vector_of("word 4"), vector_of("word 5")]), 1)

    assert ["0004.png", "0005.png"] == [hits[0].path for hits in found]


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["build", "query", "add", "remove", "sync", "search"])
def test_a_typo_is_a_type_error(photos: Path, name: str) -> None:
    """No function takes options that it does not know."""
    retrieval.build(photos, "photos.gallery")
    with retrieval.open("photos.gallery") as gallery:
        call = retrieval.build if name == "build" else getattr(gallery, name)
        given: dict[str, tuple[Any, ...]] = {"build": (photos, "x"), "sync": ()}
        with pytest.raises(TypeError, match="treshold"):
            call(*given.get(name, (photos,)), treshold=0.5)


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ({"scales": (1.0, 9.0)}, "scales"),
        ({"scales": "1,x"}, "scales"),
        ({"scales": ()}, "scales"),
        ({"taps": "stage1/nope"}, "stage1/nope"),
        ({"frame": "round"}, "round"),
        ({"on_bad": "maybe"}, "maybe"),
        ({"recall": 2.0, "factory": "HNSW16"}, "recall"),
    ],
)
def test_silly_options_are_refused_and_leave_nothing(
    photos: Path, how: dict[str, Any], word: str
) -> None:
    """The value is named, and no folder is left."""
    assert word in refusal(retrieval.build, photos, "x.gallery", **how)
    assert not Path("x.gallery").exists()


def test_what_is_there_is_kept(photos: Path) -> None:
    """A second build is refused without `force`, before a network is looked for."""
    retrieval.build(photos, "photos.gallery")

    assert "already" in refusal(retrieval.build, photos, "photos.gallery", backbone="no_such")
    assert 10 == retrieval.build(photos, "photos.gallery", force=True).images
    assert "no gallery here" in refusal(retrieval.open, photos)


def test_a_run_brings_its_own_network(shapes: Path, tmp_path: Path) -> None:
    """A run and a backbone at once are refused."""
    how = {"run": tmp_path / "run", "backbone": "resnet18"}

    assert "own network" in refusal(retrieval.build, shapes, tmp_path / "x.gallery", **how)


# ------------------------------------------------------------------------------------------- values


def test_taps_and_scales_are_text_or_values(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taps and scales may be written as for the command, or given one by one."""
    seen: list[Any] = []
    monkeypatch.setattr(public, "_encoder", lambda *given: (seen.append(given[-1]), ENCODER)[1])
    taps = (Tap("pooled"), Tap("stage2", pool="gem"))
    for i, how in enumerate(
        (
            {"taps": "pooled,stage2/gem", "scales": "1,0.5"},
            {"taps": ["pooled", "stage2/gem"], "scales": [1, 0.5]},
            {"taps": taps, "scales": (1.0, 0.5)},
        )
    ):
        retrieval.build(photos, f"{i}.gallery", **how)

    assert [(taps, (1.0, 0.5))] * 3 == [(one.taps, one.scales) for one in seen]


@pytest.mark.parametrize(
    "name", ["build", "open", "Gallery.query", "Gallery.add", "Gallery.remove", "Gallery.sync"]
)
def test_public_functions_are_typed_and_described(name: str) -> None:
    """Every parameter and result has a type, which is not `Any`; each docstring tells what comes
    back."""
    function: Any = retrieval
    for part in name.split("."):
        function = getattr(function, part)
    signature = inspect.signature(function)
    types = [one.annotation for one in signature.parameters.values() if one.name != "self"]

    assert all(isinstance(one, str) for one in (*types, signature.return_annotation))
    assert not any("Any" in one for one in (*types, signature.return_annotation))
    assert len(str(inspect.getdoc(function))) > 100


def test_all_names_are_there() -> None:
    """What `__all__` promises can be imported, and nothing else is made up."""
    assert all(getattr(retrieval, name) is not None for name in retrieval.__all__)
    with pytest.raises(AttributeError, match="no attribute 'biuld'"):
        retrieval.biuld  # noqa: B018
