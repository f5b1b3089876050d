"""Profiles: every cell from the shape of its layer, totals as published, and as torch counts
them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from finetune.backbones import architectures, profile_table
from finetune.backbones.profile import Layer, Profile, profile
from finetune.cli import cli
from finetune.errors import UserError

SMALL = (
    "test_resnet",
    "test_efficientnet",
    "test_convnext",
    "test_vit",
    "test_vit3",
    "test_nfnet",
    "alexnet",
    "resnet18",
)
LARGE = (
    "vgg16",
    "vgg19",
    "googlenet",
    "inception_v3",
    "inception_v4",
    "inception_resnet_v2",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "convnext_tiny",
    "nasnetalarge",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "densenet121",
    "vit_small_patch16_224",
    "deit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "vit_small_patch14_dinov2",
    "vit_base_patch32_clip_224",
    "resnet50_clip",
    "test_maxvit",
)


def rows(found: Profile) -> dict[str, Layer]:
    return {layer.name: layer for layer in found.layers}


# --------------------------------------------------------------------------- AlexNet of the lecture

# Layer: channels and side of the output, KiB of it, thousands of parameters, millions of
# multiply-adds, as a lecture's table prints them for an input of 227 pixels.
LECTURE = {
    "features.0": (64, 56, 784, 23, 73),
    "features.2": (64, 27, 182, 0, 0),
    "features.3": (192, 27, 547, 307, 224),
    "features.5": (192, 13, 127, 0, 0),
    "features.6": (384, 13, 254, 664, 112),
    "features.8": (256, 13, 169, 885, 145),
    "features.10": (256, 13, 169, 590, 100),
    "features.12": (256, 6, 36, 0, 0),
    "classifier.1": (4096, 1, 16, 37_749, 38),
    "classifier.4": (4096, 1, 16, 16_777, 17),
    "classifier.6": (1000, 1, 4, 4_096, 4),
}
EXPLAINED = {
    # 256 × 384 × 3 × 3 weights at each of 13 × 13 places are 149,520,384: the table's 145 is a slip
    ("features.8", "multiply-adds"): 150,
    # the table leaves the biases of the fully connected layers out: 4096, 4096 and 1000 numbers
    ("classifier.1", "parameters"): 37_753,
    ("classifier.4", "parameters"): 16_781,
    ("classifier.6", "parameters"): 4_097,
}


def by_hand(part: nn.Module, side: int) -> tuple[int, int, int, int]:
    """Channels and side of the output, parameters and multiply-adds, from the settings of a layer
    and the side of its input; a pool gives 0 channels: it keeps those it gets."""
    if isinstance(part, nn.Linear):
        weights = part.in_features * part.out_features
        return part.out_features, 1, weights + part.out_features, weights
    assert isinstance(part, (nn.Conv2d, nn.MaxPool2d))
    kernel, stride, padding = (
        value[0] if isinstance(value, tuple) else value
        for value in (part.kernel_size, part.stride, part.padding)
    )
    after = math.floor((side + 2 * padding - kernel) / stride) + 1
    if isinstance(part, nn.MaxPool2d):
        return 0, after, 0, 0
    weights = part.in_channels * part.out_channels * kernel**2
    return part.out_channels, after, weights + part.out_channels, weights * after**2


def test_every_cell_of_alexnet_is_that_of_its_layers_shape() -> None:
    """Output, memory, parameters and multiply-adds at 227 pixels follow from kernel, stride and
    padding; the lecture's table says the same, but for the cells that are explained."""
    module = architectures.shapes("alexnet").module
    found, channels, side = rows(profile("alexnet", 227)), 3, 227
    for name, (maps, width, kib, thousands, millions) in LECTURE.items():
        made, side, parameters, products = by_hand(module.get_submodule(name), side)
        channels = made or channels
        layer = found[name]

        assert (channels, side) == (maps, width)
        assert layer.output == ((maps, width, width) if name.startswith("f") else (maps,))
        assert channels * side**2 * 4 == layer.output_bytes
        assert (parameters, products) == (layer.parameters, layer.multiply_adds)
        assert kib == round(layer.output_bytes / 1024)
        assert EXPLAINED.get((name, "parameters"), thousands) == round(parameters / 1e3)
        assert EXPLAINED.get((name, "multiply-adds"), millions) == round(products / 1e6)


@pytest.mark.parametrize(("side", "width"), [(224, 55), (227, 56)])
def test_the_first_map_of_alexnet_is_55_or_56_wide(side: int, width: int) -> None:
    """Kernel 11, stride 4, padding 2: (224 + 4 - 11) / 4 + 1 = 55.25 is cut to 55, and 227 pixels
    give 56 exactly; both pool to 27, so that all layers behind are the same."""
    found = rows(profile("alexnet", side))

    assert (64, width, width) == found["features.0"].output
    assert (64, 27, 27) == found["features.2"].output
    assert (11, 4, 2) == tuple(
        int(value)
        for value in (
            found["features.0"].kernel,
            found["features.0"].stride,
            found["features.0"].padding,
        )
    )


# ------------------------------------------------------------------------------------------- totals


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [
        ("alexnet", 61.1, 0.71),
        ("vgg16", 138.4, 15.5),
        ("googlenet", 6.6, 1.5),
        ("resnet18", 11.7, 1.8),
        ("resnet50", 25.6, 4.1),
    ],
)
def test_totals_are_the_published_ones(name: str, parameters: float, multiply_adds: float) -> None:
    """Millions of parameters and billions of multiply-adds at 224 pixels, GoogLeNet without its
    auxiliary heads; a FLOP is half of a multiply-add."""
    found = profile(name, 224)

    assert parameters == pytest.approx(found.parameters / 1e6, abs=0.05)
    assert multiply_adds == pytest.approx(found.multiply_adds / 1e9, abs=0.05)
    assert 2 * found.multiply_adds == found.flops


def counted_by_torch(name: str) -> tuple[int, int]:
    """FLOPs of torch's own counter, attention as plain products, and the number of parameters."""
    whole = architectures.shapes(name)
    side = int(architectures.input_config(whole)["input_size"][-1])
    whole.module.requires_grad_(False)  # the counter stumbles over parameters that are inputs
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        whole.module.eval()(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops(), sum(p.numel() for p in whole.module.parameters())


@pytest.mark.parametrize(
    "name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]
)
def test_flops_are_those_of_torchs_own_counter(name: str) -> None:
    """Exactly twice the multiply-adds, and every parameter is in one row; both leave out sums,
    normalisation, activations, pooling and softmax, and the profile lists what it left out."""
    found = profile(name)

    assert counted_by_torch(name) == (found.flops, found.parameters)
    assert found.uncounted
    assert not {"conv", "product", "attention"} & set(found.uncounted)


# ------------------------------------------------------------------------------------------- memory


def test_activations_kept_for_training_are_what_the_way_back_reads() -> None:
    """AlexNet by hand: the input of each layer with weights, the output of each ReLU, the indices
    of each pool (8 bytes per number); what two layers share counts once."""
    maps = [3 * 227**2, 64 * 56**2, 64 * 27**2, 192 * 27**2, 192 * 13**2, 384 * 13**2]
    maps += [256 * 13**2] * 2 + [256 * 6**2] * 2 + [4096] * 2
    indices = [64 * 27**2, 192 * 13**2, 256 * 6**2]

    assert 4 * sum(maps) + 8 * sum(indices) == profile("alexnet", 227).kept_bytes


def test_the_peak_of_inference_is_what_lives_at_once() -> None:
    """VGG: image, output of the first convolution, and its ReLU, which is not in place here, so
    that features before it can be read."""
    found = profile("vgg11")

    assert 4 * (3 * 224**2 + 2 * 64 * 224**2) == found.peak_bytes
    assert "features.1" == found.peak_at


def test_a_residual_sum_and_attention_have_rows() -> None:
    """What a module computes outside of layers is not lost: rows add up to the totals."""
    found = profile("test_vit")
    by_name = rows(found)

    assert "add" == by_name["blocks.0"].kind
    attention = by_name["blocks.0.attn"]
    tokens, width = 101, 64
    assert ("attention", 2 * tokens**2 * width) == (attention.kind, attention.multiply_adds)
    assert (tokens, 3 * width) == by_name["blocks.0.attn.qkv"].output
    assert tokens * width + width == by_name["(network)"].parameters  # positions, class token


def test_attention_is_not_held_as_a_matrix_of_pairs() -> None:
    """Kernels for attention never make it: with 1,025 tokens it alone would be 67 MB."""
    found = profile("vit_small_patch16_224", 512)

    assert found.peak_bytes < 4 * 1025**2 * 6


# ------------------------------------------------------------------------------------ what is shown


def run(*words: str) -> Any:
    done = CliRunner().invoke(cli, ["profile", *words])
    assert 0 == done.exit_code, done.output
    return done.stdout


def test_the_text_says_which_number_is_multiply_adds_and_which_flops() -> None:
    """Both totals in one line, shares of the stages as bars, and the memory of both uses."""
    text = run("alexnet", "--size", "227")

    assert "716.8 million multiply-adds = 1.43 billion FLOPs" in text
    assert "parameters: most in classifier.1 (linear), 62%" in text
    assert "not counted: average pool, max pool, relu" in text
    assert "244.4 MB of parameters" in text
    assert "3.7 MB of activations kept per image" in text


def test_the_csv_is_a_row_per_layer_and_a_row_of_totals() -> None:
    """Numbers are exact, and there is a column for multiply-adds and one for FLOPs."""
    table = list(csv.DictReader(io.StringIO(run("test_resnet", "--csv"))))
    found = profile("test_resnet")

    assert len(found.layers) + 1 == len(table)
    total = table.pop()
    assert "total" == total["name"]
    for column, expected in (("multiply_adds", found.multiply_adds), ("flops", found.flops)):
        assert expected == int(total[column]) == sum(int(row[column]) for row in table)


def test_the_json_has_everything() -> None:
    """Layers, totals and shares, each total under its own name."""
    told = json.loads(run("test_vit", "--size", "64", "--json"))

    assert [3, 64, 64] == told["input"]
    assert 2 * told["multiply_adds"] == told["flops"]
    assert told["parameters"] == sum(layer["parameters"] for layer in told["layers"])
    assert all(sum(shares.values()) == pytest.approx(1) for shares in told["shares"].values())


def test_shares_run_from_stem_to_classifier() -> None:
    """The order of the data, however many stages there are."""
    told = profile_table.to_json(profile("vit_small_patch16_224"))["shares"]["parameters"]
    numbered = [f"stage{i}" for i in range(1, 13)]

    assert ["stem", *numbered, "neck", "classifier"] == list(told)


@pytest.mark.parametrize("words", [("--time",), ("--time", "--csv"), ("--time", "--json")])
def test_milliseconds_stand_beside_the_counts_on_request(words: Sequence[str]) -> None:
    """Each layer has its own time, those inside it left out, and the network its sum."""
    text = run("test_resnet", *words)

    assert ("milliseconds" if words[1:] else "ms per image in torch") in text
    if "--json" in words:
        told = json.loads(text)
        assert all(layer["milliseconds"] > 0 for layer in told["layers"])
        assert told["milliseconds"] > max(layer["milliseconds"] for layer in told["layers"])


def test_counting_takes_no_memory_for_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network larger than the memory can be profiled: none of its tensors has values."""
    made: list[nn.Module] = []
    create = timm.create_model

    def watched(*given: Any, **options: Any) -> nn.Module:
        made.append(create(*given, **options))
        return made[-1]

    monkeypatch.setattr(timm, "create_model", watched)
    profile("vgg19")

    assert all(value.is_meta for module in made for value in module.state_dict().values())


@pytest.mark.parametrize(
    ("name", "size", "fix"),
    [
        ("resnet8", None, "resnet18"),
        ("test_vit", 100, "multiples of 16, such as 96"),
        ("alexnet", 20, "64 can be taken"),
    ],
)
def test_what_cannot_be_profiled_is_refused_with_what_can(
    name: str, size: int | None, fix: str
) -> None:
    """A misspelt name, patches that do not fit, an input too small for the pools."""
    with pytest.raises(UserError) as caught:
        profile(name, size)
    assert fix in caught.value.fix


def test_two_forms_at_once_are_refused() -> None:
    """`--csv --json` names both."""
    done = CliRunner().invoke(cli, ["profile", "alexnet", "--csv", "--json"])

    assert 2 == done.exit_code
    assert "--csv and --json" in done.output
