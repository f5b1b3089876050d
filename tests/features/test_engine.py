"""The engines: what timm gives in float32, close to it in bfloat16, the same bits however images
are batched."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from PIL import Image

from finetune import files
from finetune.backbones import create, device
from finetune.backbones.device import Way
from finetune.data import decode
from finetune.errors import UserError
from finetune.features import conversion, engine
from finetune.network import Tap

if TYPE_CHECKING:
    from finetune.backbones.stages import Backbone
    from finetune.network import Network

POOLED = Tap("pooled")
CONVERT = """
import json, socket, sys
from pathlib import Path
def refuse(*args, **kwargs):
    raise SystemExit(f"tried the network: {args}")
socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse
socket.create_connection = socket.getaddrinfo = refuse
import numpy as np
from finetune.backbones import create as backbone
from finetune.features import conversion, engine
from finetune.network import Tap
found = backbone.load("test_efficientnet", sys.argv[1])
size = found.network.preprocess.size
how = {"engine": "openvino", "precision": "float32"}
runner = engine.open_runner(found.network, [Tap("pooled")], lambda: found, **how)
(block,) = runner(np.full((1, size, size, 3), 99, np.uint8))
told = {"network": found.network.to_json(), "pooled": block[0].tolist()}
Path(sys.argv[2]).write_text(json.dumps(told))
"""
OPEN = """
import json, sys
from pathlib import Path
import numpy as np
from finetune import classifier
from finetune.features import engine, extraction as features
from finetune.network import Network, Tap
def never():
    raise SystemExit("the torch backbone was asked for")
said = json.loads(Path(sys.argv[1]).read_text())
network = Network.from_json(said["network"])
size = network.preprocess.size
runner = engine.open_runner(network, [Tap("pooled")], never, engine="openvino", precision="float32")
(block,) = runner(np.full((1, size, size, 3), 99, np.uint8))
assert block[0].tolist() == said["pooled"]
heavy = {"torch", "torchvision", "timm", "sklearn", "faiss", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def inputs(folder: Path, network: Network) -> NDArray[np.uint8]:
    return np.stack(
        [
            decode.to_input(path.read_bytes(), network.preprocess)
            for path in sorted(folder.iterdir())
        ]
    )


def noise(network: Network, count: int, seed: int = 0) -> NDArray[np.uint8]:
    size = network.preprocess.size
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def run(
    found: Backbone, taps: list[Tap], images: NDArray[np.uint8], name: str, precision: str
) -> list[NDArray[np.float32]]:
    return engine.open_runner(found.network, taps, lambda: found, engine=name, precision=precision)(
        images
    )


def timm_features(found: Backbone, folder: Path) -> NDArray[np.float32]:
    """Pooled features by timm alone: its evaluation transform of the files, its model in
    float32."""
    config: Any = timm.data.resolve_model_data_config(found.module)
    transform: Any = timm.data.create_transform(**config, is_training=False)
    with torch.inference_mode():
        files = sorted(folder.iterdir())
        return np.concatenate(
            [found.module(transform(Image.open(path))[None]).numpy() for path in files]
        )


@pytest.fixture(scope="module")
def by_timm(lite0: Backbone, photographs: Path) -> NDArray[np.float32]:
    """The reference that every engine is held against."""
    return timm_features(lite0, photographs)


# ---------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("name", ["openvino", "torch"])
def test_float32_gives_the_features_that_timm_gives(
    lite0: Backbone, photographs: Path, by_timm: NDArray[np.float32], name: str
) -> None:
    """Our decoding, resizing, normalisation and engine against timm's transform and model, on
    photographs."""
    (block,) = run(lite0, [POOLED], inputs(photographs, lite0.network), name, "float32")

    assert cosine(by_timm, block).min() >= 0.99999
    np.testing.assert_allclose(
        np.linalg.norm(block, axis=1), np.linalg.norm(by_timm, axis=1), rtol=1e-3
    )


@pytest.mark.parametrize("name", ["openvino", "torch"])
def test_bfloat16_stays_close_to_timm_in_float32(
    lite0: Backbone, photographs: Path, by_timm: NDArray[np.float32], name: str
) -> None:
    """Half of the images within 0.002 of a cosine of 1, all of them within 0.01."""
    (block,) = run(lite0, [POOLED], inputs(photographs, lite0.network), name, "bf16")
    found = cosine(by_timm, block)

    assert np.median(found) >= 0.998
    assert found.min() >= 0.99


def test_every_tap_is_close_in_bfloat16(lite0: Backbone, photographs: Path) -> None:
    """Early stages and grids, too: they are what classifiers of unusual images read."""
    taps = [tap for tap in conversion.standard(lite0.network) if tap != Tap("stage1")]
    images = inputs(photographs, lite0.network)
    pairs = zip(
        run(lite0, taps, images, "openvino", "float32"),
        run(lite0, taps, images, "openvino", "bf16"),
        strict=True,
    )
    found = {str(tap): cosine(*pair) for tap, pair in zip(taps, pairs, strict=True)}

    assert {} == {
        tap: values
        for tap, values in found.items()
        if np.median(values) < 0.999 or values.min() < 0.995
    }


def test_a_large_jpeg_decoded_at_reduced_scale_stays_close(lite0: Backbone, tmp_path: Path) -> None:
    """Twelve megapixels, decoded at an eighth of the work, against timm's resize of the whole."""
    from sklearn.datasets import load_sample_images

    for i, image in enumerate(load_sample_images().images):
        Image.fromarray(image).resize((4000, 3000), Image.Resampling.BICUBIC).save(
            tmp_path / f"{i}.jpg", quality=90
        )
    (block,) = run(lite0, [POOLED], inputs(tmp_path, lite0.network), "openvino", "float32")

    assert cosine(timm_features(lite0, tmp_path), block).min() >= 0.99


def test_every_tap_of_one_engine_is_that_of_the_other(tiny: Backbone) -> None:
    """All taps in float32: maps, grids and the pooled end."""
    taps = list(conversion.standard(tiny.network))
    images = noise(tiny.network, 3)

    for tap, a, b in zip(
        taps,
        run(tiny, taps, images, "openvino", "float32"),
        run(tiny, taps, images, "torch", "float32"),
        strict=True,
    ):
        assert (3, tiny.network.width(tap)) == a.shape
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max(), err_msg=str(tap))


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet"])
def test_other_families_convert(name: str) -> None:
    """Tokens, layer norms and residual networks, with pools that are not converted beforehand."""
    torch.manual_seed(0)
    found = create.load(name, "random")
    taps = [POOLED, Tap("stage2", grid=3), Tap("stage3", pool="gem"), Tap("stage3", pool="rmac")]
    images = noise(found.network, 2)

    for a, b in zip(
        run(found, taps, images, "openvino", "float32"),
        run(found, taps, images, "torch", "float32"),
        strict=True,
    ):
        assert cosine(a, b).min() >= 0.99999


def test_taps_that_are_the_same_tensor_come_out_twice() -> None:
    """AlexNet's pooled end is its fc7: both names are served, alone and together."""
    torch.manual_seed(0)
    found = create.load("alexnet", "random", 64)
    images = noise(found.network, 1)

    pooled, fc7, before = run(
        found, [POOLED, Tap("fc7"), Tap("fc7-pre")], images, "openvino", "float32"
    )
    assert np.array_equal(pooled, fc7)
    assert np.array_equal(np.maximum(before, 0), fc7)
    (alone,) = run(found, [Tap("fc7")], images, "openvino", "float32")
    # another graph: some processors sum it in another order
    np.testing.assert_allclose(alone, fc7, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", ["openvino", "torch"])
def test_the_order_of_images_does_not_change_a_bit(
    tiny: Backbone, name: str, precision: str
) -> None:
    """A permuted set gives the permuted rows, and an image alone the row that it has among
    others."""
    runner = engine.open_runner(
        tiny.network,
        [POOLED, Tap("stage2", grid=3)],
        lambda: tiny,
        engine=name,
        precision=precision,
    )
    images = noise(tiny.network, runner.batch + 5)
    order = np.random.default_rng(1).permutation(len(images))
    whole, permuted, alone = runner(images), runner(images[order]), runner(images[7:8])

    for a, b, c in zip(whole, permuted, alone, strict=True):
        assert np.array_equal(a[order], b)
        assert np.array_equal(a[7:8], c)


# (network, precision, threads of torch, the largest difference as a share of the largest feature)
SEAMS = [
    ("test_efficientnet", precision, threads, 0.0)
    for precision in ("float32", "bf16")
    for threads in (1, 2, 4)
] + [
    ("test_efficientnet", "float32", 3, 2e-6),
    ("test_efficientnet_gn", "float32", 5, 2e-6),
    ("test_efficientnet_gn", "bf16", 5, 2e-2),
]


@pytest.mark.parametrize(("network", "precision", "threads", "most"), SEAMS)
def test_one_image_alone_is_what_it_is_in_a_batch(
    network: str, precision: str, threads: int, most: float
) -> None:
    """To the bit in 1, 2 and 4 threads of torch; in a number that does not divide the batch, within
    the bound that is told."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        own = create.load(network, "random")
        size = own.network.preprocess.size
        pixels = np.random.default_rng(0).integers(
            0, 256, (engine.TORCH_BATCH, size, size, 3), dtype=np.uint8
        )
        runner = engine.open_runner(
            own.network, [POOLED], lambda: own, engine="torch", precision=precision
        )
        (whole,), (turned,) = runner(pixels), runner(pixels[::-1])
        alone = np.concatenate([runner(pixels[i : i + 1])[0] for i in (0, 2, 5, 7)])
    finally:
        torch.set_num_threads(before)

    scale = float(np.abs(whole).max())
    assert float(np.abs(whole[[0, 2, 5, 7]] - alone).max()) <= most * scale
    assert float(np.abs(whole - turned[::-1]).max()) <= most * scale


@pytest.mark.parametrize("name", ["openvino", "torch"])
def test_batches_come_out_in_the_order_in_which_they_went_in(tiny: Backbone, name: str) -> None:
    """However many requests are under way, and whatever the size of a batch."""
    images = noise(tiny.network, 7)
    runner = engine.open_runner(
        tiny.network, [POOLED], lambda: tiny, engine=name, precision="float32"
    )
    (whole,) = runner(images)
    parts = [block for (block,) in runner.stream(images[i : i + 1] for i in (3, 1, 6, 0, 2, 5, 4))]

    assert np.array_equal(whole[[3, 1, 6, 0, 2, 5, 4]], np.concatenate(parts))


@pytest.mark.parametrize("name", ["openvino", "torch"])
def test_no_images_give_no_rows(tiny: Backbone, name: str) -> None:
    """An empty set keeps the widths."""
    blocks = run(tiny, [POOLED, Tap("stage1")], noise(tiny.network, 0), name, "float32")

    assert [(0, 256), (0, 16)] == [block.shape for block in blocks]


def test_the_network_is_fed_as_results_are_taken(tiny: Backbone) -> None:
    """A stream does not swallow its source: memory is bounded however many images there are."""
    taken: list[int] = []

    def source() -> Any:
        for i in range(100):
            taken.append(i)
            yield noise(tiny.network, 1, i)

    stream = engine.open_runner(
        tiny.network, [POOLED], lambda: tiny, engine="openvino", precision="float32"
    ).stream(source())
    next(stream)

    assert len(taken) < 20


def test_a_network_in_train_mode_is_refused(tiny: Backbone) -> None:
    """Its features would depend on what else is in the batch."""
    torch.manual_seed(0)
    found = create.load("test_resnet", "random")
    runner = engine.open_runner(
        found.network, [POOLED], lambda: found, engine="torch", precision="float32"
    )
    found.module.train()

    with pytest.raises(RuntimeError, match="train mode"):
        runner(noise(found.network, 1))


# ----------------------------------------------------------------------------------------- rounding

FLOATS = st.floats(-4, 4, width=32)


@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
        elements=FLOATS,
    )
)
def test_rounded_kernels_are_bfloat16_and_keep_their_sums(weight: NDArray[np.float32]) -> None:
    """Every value has the lower half of its bits empty; no kernel's sum is off by more than one
    rounding."""
    rounded = conversion.round_kernels(weight)
    largest = np.abs(weight).max(axis=(-2, -1))

    assert not (rounded.view(np.uint32) & 0xFFFF).any()
    assert weight.shape == rounded.shape
    off = np.abs((rounded.astype(np.float64) - weight).sum(axis=(-2, -1)))
    assert (off <= largest * 2**-8 + 1e-38).all()
    assert (np.abs(rounded - weight).max(axis=(-2, -1)) <= largest * 2**-7 + 1e-38).all()


def test_a_kernel_is_rounded_by_hand() -> None:
    """1 + 2⁻⁹ four times: the first rounds down, its loss moves on until a step of 2⁻⁷ is full."""
    weight = np.full((1, 1, 2, 2), 1 + 2**-9, dtype=np.float32)

    assert [1, 1, 1 + 2**-7, 1] == conversion.round_kernels(weight).reshape(-1).tolist()


def test_kept_sums_are_what_makes_bfloat16_good_enough(
    lite0: Backbone, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On smooth images the error of pooled features is less than half of what plain rounding
    gives."""
    if not device.has_bf16("openvino"):
        pytest.skip("no bfloat16 in this hardware")
    images = inputs(shapes / "circle", lite0.network)
    (exact,) = run(lite0, [POOLED], images, "openvino", "float32")
    kept = 1 - cosine(exact, run(lite0, [POOLED], images, "openvino", "bf16")[0])
    monkeypatch.setattr(conversion, "round_weights", lambda _: None)
    plain = 1 - cosine(exact, run(lite0, [POOLED], images, "openvino", "bf16")[0])

    assert np.median(kept) < np.median(plain) / 2
    assert kept.max() < plain.max() / 2


# ----------------------------------------------------------------------------------- what is chosen


def test_float32_by_openvino_comes_first() -> None:
    """`auto` leaves four ways open; the first is taken unless another one is clearly faster."""
    found = [str(way) for way in device.ways()]

    assert ["openvino float32", "openvino bf16", "torch float32", "torch bf16"] == found


def test_what_is_asked_for_is_what_is_used() -> None:
    """Words other than auto are taken as they are."""
    assert [Way("torch", "float32")] == device.ways("torch", "float32")
    assert [Way("openvino", "bf16")] == device.ways("openvino", "bf16")
    assert {"bf16"} == {way.precision for way in device.ways("auto", "bf16")}


def test_moments_are_read_by_torch(tiny: Backbone) -> None:
    """What enters BatchNorm does not exist any more in a converted network; the store is told so,
    too."""
    runner = engine.open_runner(
        tiny.network, [Tap("moments")], lambda: tiny, engine="openvino", precision="float32"
    )

    assert [Way("torch", "float32")] == device.ways("openvino", "float32", [Tap("moments")])
    assert "torch" == runner.engine


@pytest.mark.parametrize(
    ("words", "where"), [(("onnx", "auto"), "--engine"), (("auto", "int8"), "--precision")]
)
def test_unknown_words_are_refused_with_those_that_exist(
    words: tuple[str, str], where: str
) -> None:
    """The option is named, and its values are listed."""
    with pytest.raises(UserError, match="is called") as caught:
        device.ways(*words)
    assert where == caught.value.where
    assert "auto" in caught.value.fix


def test_a_tap_that_the_network_lacks_is_refused_before_anything_is_loaded(tiny: Backbone) -> None:
    """The check costs nothing: the backbone is not asked for."""

    def never() -> Backbone:
        raise AssertionError

    with pytest.raises(UserError, match="has no tap stage77"):
        engine.open_runner(tiny.network, [Tap("stage77")], never)


def test_everything_works_without_openvino(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not installed, torch is taken; who asks for it by name reads how to get it."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "openvino" else find_spec(name, *rest),
    )
    monkeypatch.setitem(sys.modules, "openvino", None)  # importing it fails, too

    assert {"torch"} == {way.engine for way in device.ways()}
    runner = engine.open_runner(tiny.network, [POOLED, Tap("stage5", grid=3)], lambda: tiny)
    assert "torch" == runner.engine
    assert [(2, 256), (2, 576)] == [block.shape for block in runner(noise(tiny.network, 2))]
    with pytest.raises(UserError, match="OpenVINO is not installed") as caught:
        device.ways("openvino")
    assert "--engine torch" in caught.value.fix


# ---------------------------------------------------------------------------------------- the cache


@pytest.fixture(scope="module")
def pristine(tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small network, converted once: `pristine.xml` and `pristine.bin`."""
    path = tmp_path_factory.mktemp("pristine") / "pristine.xml"
    assert conversion._keep(conversion._convert(tiny, conversion.standard(tiny.network)), path)
    return path


@pytest.fixture
def copied(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Conversions take no time in this test: they are read from a file. The list says where they
    were kept."""
    asked: list[Path] = []
    keep = conversion._keep

    def kept(model: Any, path: Path) -> bool:
        asked.append(path)
        return keep(model, path)

    monkeypatch.setattr(
        conversion, "_convert", lambda _found, _taps: device._core().read_model(str(pristine))
    )
    monkeypatch.setattr(conversion, "_keep", kept)
    return asked


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which nothing was converted before."""
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compiled"


def counted(found: Backbone) -> tuple[Any, list[int]]:
    calls: list[int] = []

    def load() -> Backbone:
        calls.append(1)
        return found

    return load, calls


def test_a_network_is_converted_once_with_all_its_taps(tiny: Backbone, own_cache: Path) -> None:
    """The second opening, for another tap, does not ask for the torch backbone."""
    load, calls = counted(tiny)
    engine.open_runner(tiny.network, [POOLED], load, engine="openvino")
    engine.open_runner(
        tiny.network, [Tap("stage3", grid=3), Tap("stage1")], load, engine="openvino"
    )

    assert [1] == calls
    assert [".bin", ".json", ".xml"] == sorted(
        path.suffix for path in own_cache.iterdir() if path.is_file()
    )


@pytest.mark.parametrize("change", ["digest", "mean", "version"])
def test_another_network_is_another_conversion(
    tiny: Backbone,
    own_cache: Path,
    copied: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    """New weights, another normalisation or another OpenVINO: what was converted before is not
    used."""
    engine.open_runner(tiny.network, [POOLED], lambda: tiny, engine="openvino")
    network = tiny.network
    if change == "digest":
        network = dataclasses.replace(network, digest="0" * 64)
    elif change == "mean":
        network = dataclasses.replace(
            network, preprocess=dataclasses.replace(network.preprocess, mean=(0.1, 0.2, 0.3))
        )
    else:
        monkeypatch.setattr("openvino.__version__", "another")
    engine.open_runner(network, [POOLED], lambda: tiny, engine="openvino")

    assert 2 == len(set(copied))


def changed(path: Path, part: float = 0.7) -> None:
    """One byte in a hundred changed, from there to the end: as large as before, and still
    readable."""
    data = bytearray(path.read_bytes())
    for i in range(int(part * len(data)), len(data), 100):
        data[i] ^= 0x7F
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    ["cut weights", "changed weights", "no weights", "cut graph", "empty graph", "changed seal"],
)
def test_a_damaged_conversion_is_made_again(
    tiny: Backbone, own_cache: Path, copied: list[Path], damage: str
) -> None:
    """The cache can always be made again: no message, the same features."""
    images = noise(tiny.network, 1)
    (expected,) = run(tiny, [POOLED], images, "openvino", "float32")
    (graph,), (values,) = own_cache.glob("*.xml"), own_cache.glob("*.bin")
    shutil.rmtree(own_cache / "blobs")
    if damage == "no weights":
        values.unlink()
    elif damage.startswith("changed"):
        changed(values if damage == "changed weights" else graph.with_suffix(".json"))
    else:
        target = values if damage == "cut weights" else graph
        target.write_bytes(target.read_bytes()[: 0 if damage == "empty graph" else 1000])

    assert np.array_equal(expected, run(tiny, [POOLED], images, "openvino", "float32")[0])
    assert 2 == len(copied)


def test_a_conversion_without_a_seal_is_used_and_sealed(
    tiny: Backbone, own_cache: Path, copied: list[Path]
) -> None:
    """An earlier version wrote it: nothing is converted again, and from now on damage is seen."""
    engine.open_runner(tiny.network, [POOLED], lambda: tiny, engine="openvino")
    (seal,) = own_cache.glob("*.json")
    seal.unlink()
    engine.open_runner(tiny.network, [POOLED], lambda: tiny, engine="openvino")
    assert 1 == len(copied)

    changed(next(own_cache.glob("*.bin")))
    engine.open_runner(tiny.network, [POOLED], lambda: tiny, engine="openvino")
    assert 2 == len(copied)


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "no model", "changed", "no seal", "changed seal", "a folder"]
)
def test_a_damaged_compiled_model_is_compiled_again(
    tiny: Backbone, own_cache: Path, copied: list[Path], damage: str
) -> None:
    """OpenVINO would run its own copy with changed weights: it is dropped, and the features are
    right."""
    images = noise(tiny.network, 1)
    (expected,) = run(tiny, [POOLED], images, "openvino", "float32")
    (blob,), (seal,) = own_cache.glob("blobs/*/*.blob"), own_cache.glob("blobs/*/seal.json")
    whole = blob.read_bytes()
    if damage in ("changed", "changed seal"):
        changed(blob if damage == "changed" else seal)
    elif damage == "no seal":
        changed(blob)
        seal.unlink()
    elif damage == "a folder":
        seal.unlink()
        seal.mkdir()
    else:
        blob.write_bytes(
            {"cut": whole[: len(whole) // 2], "empty": b"", "no model": b"x" * 1000}[damage]
        )

    assert np.array_equal(expected, run(tiny, [POOLED], images, "openvino", "float32")[0])
    assert np.array_equal(expected, run(tiny, [POOLED], images, "openvino", "float32")[0])
    if damage != "a folder":
        assert files.is_sealed(seal, list(blob.parent.glob("*.blob")))


def test_a_conversion_that_cannot_be_written_is_used_and_leaves_nothing(
    tiny: Backbone,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A full disk while converting costs time alone: the features are right, a line says why, and
    there is no half file."""
    images = noise(tiny.network, 1)
    (expected,) = run(tiny, [POOLED], images, "openvino", "float32")
    monkeypatch.setenv("REGRAFT_CACHE", str(own_cache.parent / "full"))

    def full(_model: object, path: str, **_: object) -> None:
        Path(path).write_text("half")
        raise RuntimeError("can not write")

    monkeypatch.setattr("openvino.save_model", full)

    assert np.array_equal(expected, run(tiny, [POOLED], images, "openvino", "float32")[0])
    assert (
        "the converted network cannot be written (can not write) → set $REGRAFT_CACHE"
        in caplog.text
    )
    assert [] == [
        path.name for path in (own_cache.parent / "full" / "compiled").iterdir() if path.is_file()
    ]


def test_without_a_cache_a_network_is_converted_in_memory(
    tiny: Backbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The same features to the bit; one line says so, however often a network is opened."""
    images = noise(tiny.network, 1)
    (expected,) = run(tiny, [POOLED], images, "openvino", "bf16")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "file"))

    for _ in range(2):
        assert np.array_equal(expected, run(tiny, [POOLED], images, "openvino", "bf16")[0])
    assert 1 == caplog.text.count("going on without a cache")
    assert f"$REGRAFT_CACHE: {tmp_path / 'file'}" in caplog.text


@pytest.fixture(scope="module")
def elsewhere(tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A fresh process that may not use sockets converts and runs a network, with a home folder of
    its own."""
    base = tmp_path_factory.mktemp("elsewhere")
    places = {name: base / name for name in ("home", "cache", "said.json", "weights.safetensors")}
    places["home"].mkdir()
    create.save(tiny, places["weights.safetensors"])
    env = {**os.environ, "HOME": str(places["home"]), "REGRAFT_CACHE": str(places["cache"])}
    command = [
        sys.executable,
        "-c",
        CONVERT,
        str(places["weights.safetensors"]),
        str(places["said.json"]),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stderr
    return places


def test_converting_neither_calls_home_nor_writes_there(elsewhere: dict[str, Path]) -> None:
    """No socket was opened (the process would have ended), and the home folder is as empty as
    before."""
    assert [] == [str(path) for path in elsewhere["home"].rglob("*")]


def test_a_converted_network_is_opened_without_torch(elsewhere: dict[str, Path]) -> None:
    """Another process gives the same features to the bit, and imports neither torch nor any other
    heavy library."""
    env = {**os.environ, "REGRAFT_CACHE": str(elsewhere["cache"])}
    command = [sys.executable, "-c", OPEN, str(elsewhere["said.json"])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    assert 0 == done.returncode, done.stderr


def test_both_processes_agree_with_this_one(elsewhere: dict[str, Path], tiny: Backbone) -> None:
    """The network was loaded from a file over there: the same digest, the same features."""
    said = json.loads(elsewhere["said.json"].read_text())
    size = tiny.network.preprocess.size
    (block,) = run(tiny, [POOLED], np.full((1, size, size, 3), 99, np.uint8), "openvino", "float32")

    assert tiny.network.digest == said["network"]["digest"]
    np.testing.assert_allclose(block[0], said["pooled"], rtol=1e-4, atol=1e-6)
