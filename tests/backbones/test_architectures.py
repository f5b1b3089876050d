"""Every architecture of the row, end to end: profile, stages, taps, SVM, fine-tuning, and back into
plain timm or torchvision."""

from __future__ import annotations

import importlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision.models
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from finetune.backbones import create, stages, statedict
from finetune.backbones.extractor import Reader
from finetune.backbones.profile import profile
from finetune.backbones.stages import Backbone
from finetune.cli import cli as finetune
from finetune.data.images import ImageSet
from finetune.features import engine, extraction
from finetune.features.store import Store
from finetune.heads import svm
from finetune.heads.head import Head
from finetune.network import Tap
from finetune.training import loop
from finetune.training.config import Training
from retrieval.cli import cli as retrieve

DOCS = Path(__file__).resolve().parents[2] / "docs"
CLASSES = ("red", "green", "blue")


@dataclass(frozen=True)
class Row:
    """An architecture, the smallest input that it takes, and how many stages are numbered."""

    name: str
    side: int
    stages: int
    slow: bool = True


ROWS = (
    Row("alexnet", 64, 3),
    Row("vgg16", 32, 5),
    Row("vgg19", 32, 5),
    Row("googlenet", 32, 4, slow=False),
    Row("inception_v3", 75, 5),
    Row("inception_v4", 75, 5),
    Row("inception_resnet_v2", 75, 5),
    Row("resnet18", 32, 4, slow=False),
    Row("resnet34", 32, 4),
    Row("resnet50", 32, 4),
    Row("resnet101", 32, 4),
    Row("resnet152", 32, 4),
    Row("resnext50_32x4d", 32, 4),
    Row("convnext_tiny", 32, 4),
    Row("nasnetalarge", 32, 5),
    Row("mobilenetv3_large_100", 32, 7, slow=False),
    Row("efficientnet_b0", 32, 7),
    Row("tf_efficientnet_lite0", 32, 7, slow=False),
    Row("tf_efficientnet_lite1", 32, 7),
    Row("tf_efficientnet_lite2", 32, 7),
    Row("densenet121", 32, 5),
    Row("vit_small_patch16_224", 32, 12),
    Row("deit_small_patch16_224", 32, 12),
    Row("swin_tiny_patch4_window7_224", 32, 4),
    Row("vit_small_patch14_dinov2", 28, 12),
    Row("vit_base_patch32_clip_224", 64, 12),
    Row("resnet50_clip", 32, 4),
)
each_row = pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row.name, marks=[pytest.mark.slow] if row.slow else []) for row in ROWS],
)


def colours(count: int = 9) -> ImageSet:
    """Noisy images in three colours: the colour is the class."""
    rng = np.random.default_rng(0)
    encoded: dict[str, bytes] = {}
    for i in range(count):
        pixels = rng.integers(0, 120, (80, 80, 3), dtype=np.uint8)
        pixels[:, :, i % 3] += 120
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        encoded[f"{i}.png"] = buffer.getvalue()
    labels = np.arange(count) % 3
    source = encoded.__getitem__
    return ImageSet("colours", Path("colours"), tuple(encoded), labels, CLASSES, source=source)


def pixels(found: Backbone, count: int = 2) -> torch.Tensor:
    shape = (count, found.network.preprocess.size, found.network.preprocess.size, 3)
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))


def plain(row: Row) -> nn.Module:
    """The architecture as its own library makes it, with a classifier of three classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if row.name == "alexnet":
            return torchvision.models.alexnet(num_classes=3)
        if row.name == "googlenet":
            return torchvision.models.googlenet(num_classes=3, aux_logits=False)
        extra: dict[str, Any] = {}
        if has_positions(row.name):
            extra["img_size"] = row.side
        return timm.create_model(row.name, num_classes=3, **extra)


def has_positions(name: str) -> bool:
    """Whether the network has a table of positions, and is made for one input size."""
    return name.startswith(("vit", "deit", "swin", "resnet50_clip"))


def check_profile(row: Row, found: Backbone) -> None:
    """The classifier is all that a backbone lacks of what is profiled."""
    counted = profile(row.name, row.side)
    trunk = sum(parameter.numel() for parameter in found.module.parameters())
    head = sum(one.parameters for one in counted.layers if one.stage == "classifier")

    assert trunk == counted.parameters - head
    assert counted.multiply_adds > 0


def check_stages(row: Row, found: Backbone) -> None:
    """Stages cover every tensor once, and what is frozen stays as it is in train mode."""
    numbered = [stage for stage in found.stages if stage.name.startswith("stage")]
    module = found.module
    tensors = [key for key, _ in (*module.named_parameters(), *module.named_buffers())]
    x = torch.randn(2, 3, row.side, row.side)

    assert row.stages == len(numbered)
    assert all(stage.end for stage in numbered), "a stage cannot be read"
    assert sorted(tensors) == sorted(key for stage in found.stages for key in stage.keys)
    with torch.no_grad():
        expected = module.eval()(x)
        stages.freeze(found, ())
        assert torch.equal(expected, module.train()(x))
    module.eval()


def check_taps(found: Backbone) -> None:
    """Every tap gives numbers of the width that is written, and OpenVINO gives the same."""
    taps = [Tap.parse(text) for text in found.network.widths]
    with torch.inference_mode():
        read = [block.numpy() for block in Reader(found, taps).eval()(pixels(found))]
    how = {"engine": "openvino", "precision": "float32"}
    converted = engine.open_runner(found.network, taps, lambda: found, **how)(pixels(found).numpy())

    assert list(found.network.widths.values()) == [block.shape[1] for block in read]
    for tap, one, other in zip(taps, read, converted, strict=True):
        scale = float(np.abs(one).max())
        assert np.isfinite(one).all(), tap
        assert float(np.abs(one - other).max()) <= 2e-3 * scale + 1e-6, tap


def check_svm(found: Backbone, images: ImageSet, folder: Path) -> None:
    """A machine on pooled features and the last stage's map tells the colours apart."""
    store = Store(folder / "store")
    taps = [Tap("pooled"), Tap(stages.last_stages(found, 1)[0])]
    named = found.network, taps, lambda: found
    features = extraction.extract(images, *named, store=store, engine_name="torch").blocks
    head = svm.choose(features, images.labels, CLASSES, default_taps=taps).head
    scores = head.scores([np.asarray(features[tap]) for tap in head.taps])

    assert images.labels.tolist() == scores.argmax(1).tolist()


def fine_tune(found: Backbone, images: ImageSet) -> loop.TrainResult:
    """Two steps on the last stage and a new head."""
    last = stages.last_stages(found, 1)
    training = Training(
        trainable=last, epochs=1, batch_size=4, views=1, input_size=found.network.preprocess.size
    )
    before = {key: value.clone() for key, value in found.module.state_dict().items()}
    result = loop.fit(found, images, np.arange(8), None, training, classes=3, seed=0, device="cpu")
    after = found.module.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    allowed = {key for stage in found.stages if stage.name in last for key in stage.keys}

    assert moved
    assert moved <= allowed
    return result


def check_saved(row: Row, found: Backbone, head: Head, path: Path) -> None:
    """The file opens in the library itself, strictly, with the same scores, and here."""
    create.save(found, path, (head.weight, head.bias))
    own = plain(row)
    own.load_state_dict(statedict.read(path).tensors, strict=True)
    x = Reader(found, []).normalise(pixels(found))
    with torch.inference_mode():
        features = found.module.eval()(x).flatten(1).numpy()
        scores = own.eval()(x).numpy()

    np.testing.assert_allclose(scores, head.scores([features]), rtol=1e-3, atol=1e-3)
    again = create.load(row.name, str(path), row.side)
    path.unlink()  # some have half a gigabyte
    assert create.described(found, "fine-tuned").network.digest == again.network.digest


def first_convolution(module: nn.Module) -> str:
    """The key of the weights that read the three colours."""
    found = [key for key, value in module.state_dict().items() if value.ndim == 4]
    return next(key for key in found if module.state_dict()[key].shape[1] == 3)


@each_row
def test_wrapped_weights_of_other_channels_are_adapted(row: Row, tmp_path: Path) -> None:
    """A checkpoint of a parallel training on grey images, or on those of four channels: every
    tensor arrives, and the first convolution gives for a grey image what it gave."""
    module, channels = plain(row), 1 if ROWS.index(row) % 2 else 4
    state = dict(module.state_dict())
    first = first_convolution(module)
    torch.manual_seed(0)
    state[first] = torch.randn(len(state[first]), channels, *state[first].shape[2:])
    wrapped = {f"module.{key}": value for key, value in state.items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, tmp_path / "model.pth.tar")

    found = create.load(row.name, str(tmp_path / "model.pth.tar"), row.side)
    (tmp_path / "model.pth.tar").unlink()  # some have half a gigabyte
    own = found.module.state_dict()
    spread = state[first].repeat(1, 3, 1, 1)[:, :3] * (channels / 3)

    assert "its state_dict; without the prefix module." in found.network.source
    torch.testing.assert_close(own.pop(first), spread)
    assert [] == [key for key, value in own.items() if not torch.equal(value, state[key])]


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name)
        for row in ROWS
        if has_positions(row.name) and row.name != "resnet50_clip"
    ],
)
def test_positions_of_another_input_size_are_resampled_as_timm_does(
    row: Row, tmp_path: Path
) -> None:
    """Weights for a larger input load at a smaller one: equal to what timm's own loader makes."""
    torch.manual_seed(0)
    larger = 7 * row.side if row.name.startswith("vit_small_patch14") else 224
    trained = timm.create_model(row.name, num_classes=3, img_size=larger)
    path = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in trained.state_dict().items()}, path)

    found = create.load(row.name, str(path), row.side)
    expected = timm.create_model(
        row.name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path), "num_classes": 3},
        num_classes=3,
        img_size=row.side,
    ).state_dict()

    own = found.module.state_dict()
    assert set(own) <= set(expected)
    for key, value in own.items():
        torch.testing.assert_close(value, expected[key], msg=key)


@pytest.mark.slow
def test_positions_of_attention_pooling_are_resampled_as_its_layer_does(tmp_path: Path) -> None:
    """CLIP's ResNet of 224 pixels, loaded at 64: its features are those that timm's own module of
    224 pixels gives for such an image."""
    torch.manual_seed(0)
    trained: Any = timm.create_model("resnet50_clip").eval()
    path = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in trained.state_dict().items()}, path)
    trained.reset_classifier(0)
    found = create.load("resnet50_clip", str(path), 64)
    x = Reader(found, []).normalise(pixels(found))

    assert "head.pos_embed resampled" in found.network.source
    with torch.inference_mode():
        torch.testing.assert_close(found.module(x), trained(x), rtol=1e-3, atol=1e-4)


def table() -> dict[str, str]:
    """The lines of docs/architectures.md, by the name of the model."""
    lines = (DOCS / "architectures.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    return {line.split("`")[1]: line for line in rows}


def test_the_table_of_architectures_is_that_of_this_row() -> None:
    """No architecture is tested and not listed, or listed and not tested; the numbers of stages
    agree."""
    stages_told = {name: line.split("|")[3].count("stage") for name, line in table().items()}

    assert {row.name: row.stages for row in ROWS} == stages_told


@each_row
def test_a_line_of_the_table_is_what_the_network_is(row: Row, monkeypatch: Any) -> None:
    """docs/architectures.md holds what its script would write now; a sample in the ordinary suite,
    all of it among the slow tests."""
    monkeypatch.syspath_prepend(str(DOCS))
    script = importlib.import_module("make_architectures")

    assert script.line(row.name) == table()[row.name]


@pytest.mark.slow
def test_wide_layers_go_into_svm_and_gallery(tmp_path: Path) -> None:
    """AlexNet's 4096-d layers, before and after the ReLU, by the names that users write."""
    images = colours(36)
    folder = tmp_path / "photos"
    for path, label in zip(images.paths, images.labels, strict=True):
        (folder / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        (folder / CLASSES[label] / path).write_bytes(images.source(path))  # type: ignore[misc]
    network = ["--backbone", "alexnet", "--weights", "random", "--size", "64", "--engine", "torch"]
    gallery = str(tmp_path / "photos.index")
    built = CliRunner().invoke(
        retrieve, ["build", str(folder), "-o", gallery, *network, "--taps", "fc7"]
    )
    output = str(tmp_path / "f.npz")
    taps = ["--taps", "fc6-pre,fc6,fc7-pre,fc7", "-o", output]
    svm_network = [word for word in network if word not in ("--size", "64")]
    extracted = CliRunner().invoke(finetune, ["extract", str(folder), *svm_network, *taps])

    assert (0, 0) == (built.exit_code, extracted.exit_code), built.output + extracted.output
    assert "36 images" in built.output
    with np.load(output) as found:
        before, after, last_before, last = np.split(found["X"], 4, axis=1)
    assert (36, 4096) == before.shape
    assert (before < 0).any()
    assert (last_before < 0).any()
    assert np.array_equal(np.maximum(before, 0), after)
    assert np.array_equal(np.maximum(last_before, 0), last)


@each_row
def test_an_architecture_works_end_to_end(row: Row, tmp_path: Path, one_thread: None) -> None:
    """Random weights and the smallest input: profile, stages and freezing, every tap, an SVM, two
    steps of fine-tuning with a new head, and the file in plain timm or torchvision."""
    found = create.load(row.name, "random", row.side)
    images = colours()

    check_profile(row, found)
    check_stages(row, found)
    check_taps(found)
    check_svm(found, images, tmp_path)
    result = fine_tune(found, images)
    head = Head((Tap("pooled"),), CLASSES, result.head_weight, result.head_bias, normalize=False)
    check_saved(row, found, head, tmp_path / "model.safetensors")
