"""Crop or squash: what a gallery's network sees of a picture, how that is chosen, and that
everything later follows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from test_encode import finished_run

from finetune.backbones import catalog, create
from finetune.backbones.stages import Backbone
from finetune.data.images import load_unlabelled
from finetune.errors import UserError
from finetune.features import extraction
from finetune.features.store import Store
from finetune.network import Tap
from retrieval import encode, evaluate, frame, maintenance
from retrieval.cli import cli
from retrieval.encoder import (
    Encoder,
    EncoderOptions,
    describe,
    frame_words,
    from_manifest,
    open_run,
)
from retrieval.frame import Frame
from retrieval.gallery import Gallery


@pytest.fixture
def encoder(tiny: Backbone) -> Encoder:
    """A small network with random weights, which looks at the centre."""
    taps = (Tap("pooled"),)
    how: dict[str, Any] = {
        "engine": "torch",
        "precision": "float32",
        "save_weights": lambda path: create.save(tiny, path),
    }
    return Encoder((tiny.network,), (lambda: tiny,), taps, **how)


@pytest.fixture
def store() -> Iterator[Store]:
    opened = Store()
    yield opened
    opened.close()


def blobs(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Coloured patches that differ from one drawing to the next."""
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )


def brighter(image: Image.Image, by: float) -> Image.Image:
    return image.point(lambda value: int(value * by))


def wide(root: Path, kinds: int = 12, each: int = 2, *, nested: bool = True) -> Path:
    """Wide pictures with one middle; the ends tell the kinds apart, of which there are `each`
    pictures, a shade apart."""
    rng = np.random.default_rng(0)
    middle = blobs(rng, 120, 80)
    for kind in range(kinds):
        picture = Image.new("RGB", (320, 80))
        for at, part in ((0, blobs(rng, 100, 80)), (100, middle), (220, blobs(rng, 100, 80))):
            picture.paste(part, (at, 0))
        for i in range(each):
            path = root / (f"{kind:02d}/{i}.png" if nested else f"{kind:02d}-{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            brighter(picture, 1 - 0.02 * i).save(path)
    return root


def cluttered(root: Path) -> Path:
    """Wide pictures whose kind is in the middle, between ends that say nothing."""
    rng = np.random.default_rng(0)
    for kind in range(6):
        middle = blobs(rng, 110, 80)
        for i in range(5):
            picture = blobs(rng, 320, 80)
            picture.paste(brighter(middle, 1 - 0.02 * i), (105, 0))
            (root / f"{kind}").mkdir(parents=True, exist_ok=True)
            picture.save(root / f"{kind}/{i}.png")
    return root


def chosen(encoder: Encoder, root: Path, store: Store) -> Frame:
    source = load_unlabelled(root)
    classes = [frame.first_folder(path, ()) for path in source.paths]
    return frame.choose(encoder, source, extraction.digests(source, store), classes, store)


def refusal(call: Any, *args: Any, **how: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **how)
    return str(caught.value)


# ----------------------------------------------------------------------------------------- choosing


def test_wide_pictures_are_seen_whole(encoder: Encoder, tmp_path: Path) -> None:
    """Pictures with one middle and different ends: auto sees the ends, each finds its own kind,
    none is another's duplicate."""
    said: list[str] = []
    photos, whole, crop = (
        wide(tmp_path / "photos"),
        tmp_path / "whole.index",
        tmp_path / "crop.index",
    )
    maintenance.build([photos], whole, encoder, frame="auto", say=said.append)
    maintenance.build([photos], crop, encoder, frame="crop")
    success = []
    for index in (whole, crop):
        with Gallery(index) as gallery:
            success.append(evaluate.by_folder(gallery).metrics["success@1"].value)
            groups = [
                {path.split("/")[0] for path in group["paths"]}
                for group in evaluate.duplicates(gallery, 0.99)
            ]
            assert all(len(kinds) == 1 for kinds in groups) == (index == whole)
    assert 1.0 == success[0]
    assert success[1] < 0.2
    assert 1 == len(said)
    assert said[0].startswith("frame      squash: mAP 1.000")
    assert "pairs look the same in the crop alone" in said[0]


def test_wide_pictures_without_classes(encoder: Encoder, store: Store, tmp_path: Path) -> None:
    """Without folders, altered copies of the pictures tell the same: only the whole of a picture
    finds it."""
    found = chosen(encoder, wide(tmp_path / "photos", 30, 1, nested=False), store)
    assert "squash" == found.name
    assert "altered copies find 30 pictures first in" in found.why
    assert found == chosen(encoder, tmp_path / "photos", store)


def test_classes_can_choose_the_crop(encoder: Encoder, store: Store, tmp_path: Path) -> None:
    """Where folders name what is in the middle and the ends are clutter, the crop finds better and
    is taken, with numbers."""
    found = chosen(encoder, cluttered(tmp_path / "photos"), store)
    assert ("crop", True) == (found.name, "in the crop mAP" in found.why)


def test_square_pictures_keep_the_crop(
    encoder: Encoder, store: Store, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the crop costs next to nothing nothing is measured: the weights' own transform
    stays."""
    monkeypatch.setattr(encode, "from_store", lambda *args: pytest.fail("measured"))
    assert Frame(
        "crop", "for their shape the crop loses 0% of the pictures, which are nearly square"
    ) == (chosen(encoder, shapes, store))


def test_too_few_pictures(encoder: Encoder, store: Store, tmp_path: Path) -> None:
    """A handful cannot be measured: nothing is cut off them; what cannot be read does not count."""
    found = chosen(encoder, wide(tmp_path / "few", 5), store)
    assert ("squash", True) == (found.name, "too few to measure more: 10" in found.why)
    for i in range(20):
        (tmp_path / "few" / f"bad{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken" + bytes([i]))
    found = chosen(encoder, tmp_path / "few", store)
    assert ("squash", True) == (
        found.name,
        "too few readable ones to measure more: 10" in found.why,
    )


def test_unreadable_pictures_do_not_disturb(encoder: Encoder, store: Store, tmp_path: Path) -> None:
    """A broken file in the sample is left out of it: the build itself says what is to be done."""
    photos = wide(tmp_path / "photos", 22, 1, nested=False)
    before = chosen(encoder, photos, store)
    (photos / "bad.png").write_bytes(b"broken")
    assert before.name == chosen(encoder, photos, store).name
    assert "1 bad image: bad.png" in refusal(
        maintenance.build, [photos], tmp_path / "x.index", encoder, frame="auto"
    )


def test_the_sample_holds_mates(encoder: Encoder) -> None:
    """Of very many classes as many pictures are drawn as can find each other; single pictures and
    one class say nothing."""
    labels = np.repeat(np.arange(1000), 3)
    part = frame._drawn(labels, np.ones(3000, dtype=np.bool_), 0)
    assert frame.SAMPLE == len(part)
    assert np.bincount(labels[part]).max() <= 3
    assert np.all(np.isin(np.bincount(labels[part]), (0, 2)))
    assert 0 == len(frame._drawn(np.arange(50), np.ones(50, dtype=np.bool_), 0))
    assert 0 == len(frame._drawn(np.zeros(50, np.int64), np.ones(50, dtype=np.bool_), 0))


def test_the_measure_is_not_made_twice(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The features of the sample in the chosen frame are those of the gallery: the store has them
    when it is built."""
    decoded: list[int] = []
    stream = extraction.stream

    def counted(source: Any, positions: Any, *args: Any, **how: Any) -> Any:
        decoded.append(len(positions))
        return stream(source, positions, *args, **how)

    monkeypatch.setattr(extraction, "stream", counted)
    maintenance.build([wide(tmp_path / "photos")], tmp_path / "x.index", encoder, frame="auto")
    assert [24, 24] == decoded


# ----------------------------------------------------------------------------------- what was asked


@pytest.mark.parametrize("asked", ["crop", "squash", "whole"])
def test_the_frame_is_recorded_and_followed(
    encoder: Encoder, tiny: Backbone, store: Store, tmp_path: Path, asked: str
) -> None:
    """A gallery remembers its frame: queries, additions and syncs look in the same way, and info
    says it."""
    index, photos = tmp_path / "x.index", wide(tmp_path / "photos")
    maintenance.build([photos], index, encoder, frame=asked)
    (photos / "00/new.png").write_bytes((photos / "03/0.png").read_bytes() + b" ")
    maintenance.sync(index)
    more = wide(tmp_path / "more", 13) / "12"
    maintenance.add(index, [more])
    name = "crop" if asked == "crop" else "squash"
    network = catalog.framed(tiny.network, "crop" if asked == "crop" else "whole")
    own = dataclasses.replace(encoder, networks=(network,))
    with Gallery(index) as gallery:
        assert f"{name}: as was asked" == gallery.info()["frame"]
        ids = list(extraction.digests(load_unlabelled(more), store))
        known = gallery.positions(ids)
        expected = encode.directly(own, load_unlabelled(more), encode.open_runners(own))[0]
        np.testing.assert_allclose(
            expected, gallery.now.vectors(np.array([known[i] for i in ids])), atol=1e-5
        )
        np.testing.assert_allclose(expected, gallery.encode(load_unlabelled(more))[0], atol=1e-5)
        assert describe(own) == gallery.manifest["vector"]


def test_galleries_without_a_record(encoder: Encoder, tmp_path: Path) -> None:
    """What version 0.1.0 made has no frame in its manifest: it is the crop, described as it always
    was."""
    index = tmp_path / "x.index"
    maintenance.build([wide(tmp_path / "photos")], index, encoder)
    with Gallery(index) as gallery:
        manifest = {key: value for key, value in gallery.manifest.items() if key != "frame"}
        assert "crop" == frame_words(manifest)
        assert describe(encoder) == manifest["vector"] == describe(from_manifest(index, manifest))
        assert "frame" not in manifest["vector"]


def test_a_run_brings_its_frame(tiny: Backbone, tmp_path: Path) -> None:
    """With a run, its frame is taken at every scale; another one beside it is refused, the same is
    not."""
    network = catalog.framed(tiny.network, "whole")
    folder = finished_run(tmp_path / "run", dataclasses.replace(tiny, network=network))
    encoder = open_run(folder, EncoderOptions(scales=(1.0, 0.5), engine="torch"))
    assert [True, True] == [one.preprocess.squash for one in encoder.networks]
    photos = wide(tmp_path / "photos")
    said: list[str] = []
    maintenance.build([photos], tmp_path / "x.index", encoder, frame="auto", say=said.append)
    maintenance.build([photos], tmp_path / "x.index", encoder, frame="whole", force=True)
    assert [] == said
    with Gallery(tmp_path / "x.index") as gallery:
        assert "squash: as the run was trained" == gallery.info()["frame"]
    assert "looks at pictures in the frame 'squash', not 'crop'" in (
        refusal(maintenance.build, [photos], tmp_path / "y.index", encoder, frame="crop")
    )
    assert "choose auto, crop or squash" in refusal(
        maintenance.build, [photos], tmp_path / "y.index", encoder, frame="round"
    )


def test_the_command_says_what_it_chose(tmp_path: Path) -> None:
    """`retrieve build` measures by itself and says the result in one line on stderr; --frame
    decides without a word."""
    photos = wide(tmp_path / "photos")
    how = ["--backbone", "test_efficientnet", "--weights", "random", "--engine", "torch"]
    done = CliRunner().invoke(
        cli, ["build", str(photos), "-o", str(tmp_path / "x.index"), *how], catch_exceptions=False
    )
    assert [True] == [
        line.startswith("frame      squash: mAP")
        for line in done.stderr.splitlines()
        if "frame  " in line
    ]
    done = CliRunner().invoke(
        cli, ["build", str(photos), "-o", str(tmp_path / "y.index"), *how, "--frame", "crop"]
    )
    assert ("", 0) == (done.stderr, done.exit_code)
