"""From an image to its vector: taps, views, scales and whitening; what is carried along; the
manifest."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import galleries
import numpy as np
import pytest
from galleries import ENCODER, NETWORK, features_of, write

from finetune import classifier, run
from finetune.backbones import catalog, create
from finetune.backbones.stages import Backbone
from finetune.data.images import ImageSet, load_unlabelled
from finetune.errors import UserError
from finetune.features import extraction
from finetune.features.store import Store
from finetune.heads import head
from finetune.network import Tap
from retrieval import encode, maintenance
from retrieval.encoder import (
    Encoder,
    EncoderOptions,
    check_manifest,
    describe,
    from_manifest,
    open_named,
    open_run,
)
from retrieval.gallery import Gallery
from retrieval.vectors import unit
from retrieval.whitening import Whitening

SMALL = "test_resnet"  # timm's smallest, with random weights: quick to make, and convolutional
TORCH = EncoderOptions(engine="torch")


def refusal(call: object, *args: object, **how: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **how)  # type: ignore[operator]
    return str(caught.value)


# ------------------------------------------------------------------------------------- combinations


def both_ways(encoder: Encoder, source: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """Vectors by way of the store, and past it."""
    store = Store()
    found = encode.from_store(encoder, source, extraction.digests(source, store), store)
    store.close()
    stored = np.concatenate(list(found.blocks()))
    return stored, encode.directly(encoder, source, encode.open_runners(encoder))[0]


@pytest.mark.parametrize("block", [1, 3, 4096])
def test_taps_and_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Taps stand side by side, each at unit length; views are averaged; both ways give the same, in
    blocks of any size."""
    galleries.install(monkeypatch.setattr)
    monkeypatch.setattr(encode, "ROWS", block)
    taps = (Tap("pooled"), Tap("stage1"))
    encoder = dataclasses.replace(ENCODER, taps=taps, views=("", "flip"))
    source = load_unlabelled(write(tmp_path / "p", {f"{i}.png": f"word {i}" for i in range(5)}))
    expected = []
    for i in range(5):
        total = np.zeros(24)
        for view in ("", "flip"):
            parts = [
                features_of(f"word {i}".encode(), f"{tap}32", view, NETWORK.widths[str(tap)])
                for tap in taps
            ]
            total += np.concatenate([part / np.linalg.norm(part) for part in parts]) / np.sqrt(2)
        expected.append(total / np.linalg.norm(total))
    for made in both_ways(encoder, source):
        np.testing.assert_allclose(np.array(expected), made, atol=1e-6)
    assert 24 == encoder.width


def test_whitening_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whitened vectors are rotated, rescaled and at unit length again; the width follows."""
    galleries.install(monkeypatch.setattr)
    random = np.random.default_rng(0)
    whitening = Whitening(
        random.normal(size=16).astype(np.float32),
        random.normal(size=(16, 5)).astype(np.float32),
        0.1,
    )
    encoder = dataclasses.replace(ENCODER, whitening=whitening)
    source = load_unlabelled(write(tmp_path / "p", {f"{i}.png": f"word {i}" for i in range(5)}))
    plain = both_ways(ENCODER, source)[0]
    expected = unit((plain - whitening.mean) @ whitening.matrix)
    for made in both_ways(encoder, source):
        np.testing.assert_allclose(expected, made, atol=1e-6)
    assert 5 == encoder.width


def test_faults_keep_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unreadable image among queries shifts no other; it and an image without direction have
    rows of zeros."""
    galleries.install(monkeypatch.setattr)
    source = load_unlabelled(
        write(tmp_path / "p", {"0.png": "a", "1.png": "broken", "2.png": "zero", "3.png": "b"})
    )
    shifted = Whitening(np.ones(16, np.float32), np.eye(16, dtype=np.float32), 0.0)
    for encoder in (dataclasses.replace(ENCODER, whitening=shifted), ENCODER):
        vectors, faults = encode.directly(encoder, source, encode.open_runners(encoder))
        assert {1: "damaged", 2: "no features"} == {i: fault.kind for i, fault in faults.items()}
        assert [True, False, False, True] == vectors.any(axis=1).tolist()
    np.testing.assert_allclose(galleries.vector_of("b"), vectors[3], atol=1e-6)


def test_a_row_of_zeros_stays_zero() -> None:
    """`unit` makes lengths one, and leaves zeros alone."""
    np.testing.assert_allclose([[0.6, 0.8], [0, 0]], unit(np.array([[3, 4], [0, 0]], np.float32)))


# ----------------------------------------------------------------------------------------- manifest


def test_the_description_covers_everything() -> None:
    """A change of anything that decides a vector changes its description, in the field that is
    named after it."""
    size = dataclasses.replace(NETWORK, preprocess=dataclasses.replace(NETWORK.preprocess, size=64))
    whitening = Whitening(np.zeros(16, np.float32), np.eye(16, dtype=np.float32), 0.0)
    changes = {
        "backbone": {"networks": (dataclasses.replace(NETWORK, name="other"),)},
        "weights": {"networks": (dataclasses.replace(NETWORK, digest="1" * 64),)},
        "preprocess": {"networks": (size,)},
        "taps": {"taps": (Tap("stage1"),)},
        "pooling": {"taps": (Tap("pooled", pool="gem"),)},
        "scales": {"scales": (0.5,)},
        "views": {"views": ("", "flip")},
        "engine": {"engine": "openvino"},
        "precision": {"precision": "bf16"},
        "whitening": {"whitening": whitening},
    }
    base = describe(ENCODER)
    for field, change in changes.items():
        about = describe(dataclasses.replace(ENCODER, **change))  # type: ignore[arg-type]
        assert base[field] != about[field]
        assert "differs: the gallery has" in refusal(check_manifest, base, about, "here")
    check_manifest(base, json.loads(json.dumps(base)))


# ------------------------------------------------------------------------------------ real networks


@pytest.fixture
def pictures(shapes: Path, tmp_path: Path) -> Path:
    """Eight drawn pictures."""
    for kind in ("circle", "square"):
        for i in range(4):
            write_bytes(
                tmp_path / "drawn" / kind / f"{i}.png",
                (shapes / kind / f"{i:02d}.png").read_bytes(),
            )
    return tmp_path / "drawn"


def write_bytes(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_random_weights_are_carried(pictures: Path, shapes: Path, tmp_path: Path) -> None:
    """An index whose weights cannot be found elsewhere carries them; with the cache gone, queries
    are made by the same ones."""
    index = tmp_path / "x.index"
    encoder = open_named(
        SMALL,
        "random",
        options=EncoderOptions(
            taps=(Tap("pooled"), Tap("stage2", pool="gem")), flip=True, engine="torch"
        ),
    )
    maintenance.build([pictures], index, encoder)
    assert 1 == len(list((index / "network").glob("model-*.safetensors")))
    query = shapes / "circle" / "19.png"
    with Gallery(index) as gallery:
        found = gallery.encode(load_unlabelled([query]))[0]
        np.testing.assert_allclose(
            encode.directly(encoder, load_unlabelled([query]), encode.open_runners(encoder))[0],
            found,
            atol=1e-5,
        )
        answers, _ = gallery.query(load_unlabelled([query]), 3)
    assert 3 == len(answers[0].hits)


def test_carried_weights_are_checked(pictures: Path, tmp_path: Path) -> None:
    """Weights in the index that were damaged, or exchanged, are refused."""
    index = tmp_path / "x.index"
    maintenance.build([pictures], index, open_named(SMALL, "random", options=TORCH))
    path = next((index / "network").iterdir())
    path.write_bytes(b"\x00" + path.read_bytes()[1:])
    assert str(path) in refusal(Gallery, index)


def test_weights_that_changed_elsewhere_are_refused(pictures: Path, tmp_path: Path) -> None:
    """Where the weights of a name are no longer those of the index, a query that needs them says
    so."""
    index = tmp_path / "x.index"
    maintenance.build([pictures], index, open_named(SMALL, "random", options=TORCH))
    with Gallery(index) as gallery:
        manifest = gallery.manifest
    network = manifest["networks"][0] | {"digest": "1" * 64}
    about = manifest["vector"] | {"weights": "1" * 64}
    wrong = from_manifest(index, manifest | {"networks": [network], "vector": about})
    assert "weights differ" in refusal(wrong.loads[0])


def test_scales(pictures: Path, tmp_path: Path) -> None:
    """Several scales are several input sizes of one network, averaged; the manifest holds them all,
    and queries follow."""
    weights = tmp_path / "w.safetensors"
    create.save(catalog.open_named(SMALL, "random").load(), weights)
    encoder = open_named(
        SMALL, str(weights), options=EncoderOptions(scales=(1.0, 0.5), engine="torch")
    )
    assert [160, 64] == [network.preprocess.size for network in encoder.networks]
    index = tmp_path / "x.index"
    maintenance.build([pictures], index, encoder)
    singles = []
    source = load_unlabelled(pictures)
    for network, load in zip(encoder.networks, encoder.loads, strict=True):
        one = dataclasses.replace(encoder, networks=(network,), loads=(load,), scales=(1.0,))
        singles.append(encode.directly(one, source, encode.open_runners(one))[0])
    with Gallery(index) as gallery:
        np.testing.assert_allclose(
            unit(singles[0] + singles[1]), gallery.encode(source)[0], atol=1e-5
        )
        _, ids = gallery.now.everything()
        assert (8, [1.0, 0.5]) == (len(ids), gallery.manifest["vector"]["scales"])
    assert "cannot be loaded a second time" in refusal(
        open_named, SMALL, "random", options=EncoderOptions(scales=(1.0, 0.5))
    )


def test_unknown_taps_are_refused_before_work() -> None:
    """A tap that the network does not have is refused with those that it has."""
    assert "stage99" in refusal(
        open_named, SMALL, "random", options=EncoderOptions((Tap("stage99"),), engine="torch")
    )


def finished_run(folder: Path, tiny: Backbone) -> Path:
    """A run whose head reads two taps of a small network."""
    taps = (Tap("pooled"), Tap("stage2"))
    width = sum(tiny.network.width(tap) for tap in taps)
    linear = head.Head(taps, ("a", "b"), np.zeros((2, width), np.float32), np.zeros(2, np.float32))
    with run.open_run(folder, "made", "0" * 64) as made:
        create.save(tiny, made.path / "model.safetensors")
        classifier.save(
            made.path, classifier.Classifier(tiny.network, linear, lambda: tiny, "torch", "float32")
        )
        made.finish({})
    return folder


def test_a_run_goes_with_its_index(
    pictures: Path, shapes: Path, tiny: Backbone, tmp_path: Path
) -> None:
    """Built from a run, an index reads where the run's head reads, and carries the network: the run
    may go."""
    folder = finished_run(tmp_path / "run", tiny)
    index = tmp_path / "x.index"
    encoder = open_run(folder)
    maintenance.build([pictures], index, encoder)
    query = load_unlabelled([shapes / "circle" / "19.png"])
    expected = encode.directly(encoder, query, encode.open_runners(encoder))[0]
    with Gallery(index) as gallery:
        assert (["pooled", "stage2"], ()) == (
            gallery.manifest["vector"]["taps"],
            gallery.warnings(),
        )
        (folder / "run.json").write_text((folder / "run.json").read_text() + "\n")
        assert "trained again" in gallery.warnings()[0]
        shutil.rmtree(folder)
        assert () == gallery.warnings()
        np.testing.assert_allclose(expected, gallery.encode(query)[0], atol=1e-5)
    assert [Tap("stage1")] == list(
        open_run(finished_run(tmp_path / "two", tiny), EncoderOptions((Tap("stage1"),))).taps
    )


def test_gem_and_rmac(pictures: Path, tiny: Backbone) -> None:
    """GeM and R-MAC pooling of a stage give vectors of its width that differ from the mean's."""
    width = tiny.network.width(Tap("stage3"))
    made = []
    for pool in ("mean", "gem", "rmac"):
        encoder = Encoder(
            (tiny.network,),
            (lambda: tiny,),
            (Tap("stage3", pool=pool),),
            engine="torch",
            precision="float32",
        )
        made.append(
            encode.directly(encoder, load_unlabelled(pictures), encode.open_runners(encoder))[0]
        )
        assert (8, width) == made[-1].shape
    assert not np.allclose(made[0], made[1], atol=1e-3)
    assert not np.allclose(made[1], made[2], atol=1e-3)


def test_whitening_of_a_gallery(
    pictures: Path, shapes: Path, tiny: Backbone, tmp_path: Path
) -> None:
    """A whitening is fitted at the build, stored with a digest, and used for queries and
    additions."""
    index = tmp_path / "x.index"
    encoder = Encoder(
        (tiny.network,), (lambda: tiny,), (Tap("stage3"),), engine="torch", precision="float32"
    )
    maintenance.build(
        [pictures],
        index,
        dataclasses.replace(encoder, save_weights=lambda path: create.save(tiny, path)),
        whiten=4,
    )
    assert {"whitening-1.safetensors", "model-1.safetensors"} == {
        path.name for path in (index / "network").iterdir()
    }
    maintenance.add(index, [shapes / "triangle"])
    with Gallery(index) as gallery:
        again = from_manifest(index, gallery.manifest)
        plain = encode.directly(
            dataclasses.replace(again, whitening=None),
            load_unlabelled(pictures),
            encode.open_runners(again),
        )[0]
        assert again.whitening is not None
        np.testing.assert_allclose(
            unit(again.whitening(plain)), gallery.encode(load_unlabelled(pictures))[0], atol=1e-5
        )
        positions, _ = gallery.now.everything()
        assert (28, 4) == gallery.now.vectors(positions).shape
        answers, _ = gallery.query(
            load_unlabelled([pictures / "circle" / "0.png"]), 1, keep_self=True
        )
    assert 1.0 == pytest.approx(answers[0].hits[0].score)
    assert "dimensions" in refusal(
        maintenance.build, [pictures], index, encoder, whiten=50, force=True
    )
