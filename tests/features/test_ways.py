"""The engine and precision that `auto` comes to: by timing, by what is stored, by what a run, a
gallery or a file of features records."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from finetune import job, similarity, timings
from finetune.backbones import device
from finetune.backbones.device import Way
from finetune.data import images
from finetune.evaluation import fitting, predict
from finetune.features import engine, extraction
from finetune.features.extraction import Features
from finetune.network import Network, Preprocess, Tap
from retrieval import encoder, maintenance
from retrieval.gallery import Gallery

FLOAT32, BF16 = Way("openvino", "float32"), Way("openvino", "bf16")
POOLED = Tap("pooled")
PREPROCESS = Preprocess(8, 8, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
NETWORK = Network("made-up", "0" * 64, "made for tests", "random", PREPROCESS, {"pooled": 3})
SMALL: dict[str, Any] = {"backbone": ["test_efficientnet"], "weights": "random"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No set is too small to be timed; nothing is compared with ImageNet's photographs."""
    monkeypatch.setattr(extraction, "FEW", 1)
    monkeypatch.setattr(similarity, "measure", lambda *_, **__: similarity.unknown("a test"))


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say how fast each precision is from now on; what is remembered is forgotten."""

    def say(float32: float, bf16: float) -> None:
        timings.forget()
        known = {"float32": float32, "bf16": bf16}
        monkeypatch.setattr(
            timings,
            "measure",
            lambda ways, _opened: {
                # by torch all are slower
                way: known["bf16" if "bf16" in way else "float32"] / (1 + ("torch" in way))
                for way in ways
            },
        )

    return say


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In the place of the networks: the mean colours, a little larger in bf16. Lists how each image
    was read."""
    found: list[str] = []

    def opened(_network: Network, taps: tuple[Tap, ...], _load: object, way: Way) -> engine.Runner:
        def stream(batches: Iterable[NDArray[np.uint8]]) -> Iterator[list[NDArray[np.float32]]]:
            for pixels in batches:
                found.extend([str(way)] * len(pixels))
                yield [pixels.mean((1, 2), dtype=np.float32) + (way.precision == "bf16")]

        return engine.Runner(taps, way.engine, way.precision, 16, stream)

    monkeypatch.setattr(engine, "_open", opened)
    return found


def read(folder: Path, **how: Any) -> Features:
    return extraction.extract(
        images.load_unlabelled(folder), NETWORK, [POOLED], lambda: pytest.fail("no torch"), **how
    )


@pytest.fixture
def flat(shapes: Path, tmp_path: Path) -> Path:
    """Twenty pictures in one folder, to write into."""
    shutil.copytree(shapes / "circle", tmp_path / "flat")
    return tmp_path / "flat"


# ------------------------------------------------------------------------------------------- timing


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize(
    ("float32", "bf16", "taken"), [(205, 140, FLOAT32), (100, 110, FLOAT32), (100, 200, BF16)]
)
def test_auto_is_what_was_timed(
    float32: float,
    bf16: float,
    taken: Way,
    flag: bool,
    flat: Path,
    rates: Any,
    seen: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the processor says that it can; the features are those that the same words ask
    for."""
    monkeypatch.setattr(device, "has_bf16", lambda _engine: flag)
    rates(float32, bf16)
    found = read(flat)
    again = read(flat, engine_name=taken.engine, precision=taken.precision)

    assert taken == found.way == again.way
    assert found.spaces == again.spaces
    assert [str(taken)] * 20 == seen
    np.testing.assert_array_equal(found.blocks[POOLED], again.blocks[POOLED])


def test_a_few_images_are_not_worth_a_timing(
    flat: Path, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read in float32 at once, and nothing is remembered."""
    monkeypatch.setattr(extraction, "FEW", 64)
    monkeypatch.setattr(timings, "measure", lambda *_: pytest.fail("timed"))

    assert FLOAT32 == read(flat).way
    assert {} == timings.recall(engine.task(NETWORK))


# --------------------------------------------------------------------------------- what is stored


def test_stored_rows_of_the_other_precision_are_used(
    flat: Path, rates: Any, seen: list[str]
) -> None:
    """Where all are there, nothing is computed, though the other one is faster; a new image joins
    them in their precision."""
    rates(200, 100)
    read(flat, engine_name="openvino", precision="bf16")
    seen.clear()
    found = read(flat)
    assert (BF16, []) == (found.way, seen)
    (flat / "new.png").write_bytes((flat.parent / "flat" / "00.png").read_bytes() + b"more")
    more = read(flat)

    assert (BF16, ["openvino bf16"], 21) == (more.way, seen, len(more))


def test_rows_of_two_precisions_are_never_mixed(flat: Path, rates: Any, seen: list[str]) -> None:
    """A few stored rows in bf16 do not keep a set from float32, and are no part of it then."""
    rates(200, 100)
    few = images.load_unlabelled(flat).subset(np.arange(5))
    how: dict[str, Any] = {"engine_name": "openvino", "precision": "bf16"}
    extraction.extract(few, NETWORK, [POOLED], lambda: pytest.fail("no torch"), **how)
    seen.clear()
    found = read(flat)
    exact = read(flat, engine_name="openvino", precision="float32")

    assert (FLOAT32, ["openvino float32"] * 20) == (found.way, seen)
    np.testing.assert_array_equal(exact.blocks[POOLED], found.blocks[POOLED])


def test_a_file_of_features_says_what_made_it(shapes: Path, tmp_path: Path, rates: Any) -> None:
    """The manifest names engine and precision."""
    rates(100, 200)
    job.extract(shapes, tmp_path / "x.npz", engine="torch", **SMALL)
    manifest = json.loads(str(np.load(tmp_path / "x.npz")["manifest"]))

    assert ("torch", "bf16") == (manifest["engine"], manifest["precision"])


# --------------------------------------------------------------------------------- what is recorded


def record_of(path: Path) -> tuple[str, str]:
    about = json.loads((path / "config.json").read_text())["regraft"]
    return about["engine"], about["precision"]


@pytest.mark.parametrize(("before", "after"), [((100, 200), (200, 100)), ((200, 100), (100, 200))])
def test_a_run_predicts_as_it_was_made(
    before: Sequence[float], after: Sequence[float], shapes: Path, tmp_path: Path, rates: Any
) -> None:
    """Whatever is timed later: `predict`, `evaluate` and a gallery of the run go by its record,
    also when they are told auto."""
    rates(*before)
    taken = ("torch", "bf16" if before[1] > before[0] else "float32")
    run = job.fit(shapes, out=tmp_path / "run", strategy="svm", engine="torch", **SMALL).path
    rates(*after)

    assert taken == record_of(run)
    for words in ({}, {"engine_name": "auto", "precision": "auto"}):
        with predict.open_run(run, **words) as model:
            model.predict([shapes / "circle" / "00.png"])
            (runner,) = model._runners
        assert taken == (runner.engine, runner.precision)
    made = encoder.open_run(run)
    assert taken == (made.engine, made.precision)


def test_a_run_that_goes_on_keeps_its_way(
    shapes: Path, tmp_path: Path, rates: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its features, on a machine that times otherwise now and has lost its store, it
    ends with the record of its beginning."""
    how: dict[str, Any] = {"out": tmp_path / "run", "strategy": "svm", "engine": "torch", **SMALL}
    rates(100, 200)
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "baseline", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            job.fit(shapes, **how)
    rates(200, 100)
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "other-cache"))

    assert ("torch", "bf16") == record_of(job.fit(shapes, **how).path)


def test_a_run_on_a_machine_without_its_engine(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A line says that it was made with OpenVINO, and that the last digits may differ; so does a
    run that goes on there."""
    pytest.importorskip("openvino")
    how: dict[str, Any] = {"out": tmp_path / "half", "strategy": "svm", **SMALL}
    run = job.fit(shapes, **{**how, "out": tmp_path / "run"}).path
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "baseline", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            job.fit(shapes, **how)
    monkeypatch.setattr(device, "has_openvino", lambda: False)
    with caplog.at_level(logging.WARNING), predict.open_run(run) as model:
        model.predict([shapes / "circle" / "00.png"])
    lines: list[str] = []
    job.fit(shapes, say=lines.append, **how)

    assert ("openvino", "torch") == (record_of(run)[0], model.engine)
    assert "was made with openvino, which is not installed here" in caplog.text
    assert any("torch goes on with what openvino began" in line for line in lines)
    assert "torch" == record_of(tmp_path / "half")[0]


def test_a_gallery_keeps_the_way_of_its_vectors(shapes: Path, tmp_path: Path, rates: Any) -> None:
    """What is timed later changes neither additions nor queries."""
    rates(100, 200)
    shutil.copytree(shapes, tmp_path / "photos")
    options = encoder.EncoderOptions(engine="torch")
    made = encoder.open_named("test_efficientnet", "random", options=options)
    maintenance.build([tmp_path / "photos" / "circle"], tmp_path / "index", made)
    rates(200, 100)
    maintenance.add(tmp_path / "index", [tmp_path / "photos" / "square"])
    with Gallery(tmp_path / "index") as gallery:
        opened = encoder.from_manifest(tmp_path / "index", gallery.manifest)

    assert "bf16" == made.precision == opened.precision
    assert "bf16" == gallery.manifest["vector"]["precision"]
