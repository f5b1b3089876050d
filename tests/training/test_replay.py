"""Images that go again and again through a network whose last stages take other weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.backbones import create
from finetune.backbones.extractor import Reader
from finetune.backbones.stages import Backbone
from finetune.data import augment
from finetune.data.images import ImageSet, load
from finetune.network import Tap
from finetune.training import replay
from finetune.training.replay import Moving

MOVING = ("stage4", "stage5", "neck")
TAPS = (Tap("stage2"), Tap("stage4"), Tap("pooled"))


@pytest.fixture(scope="module")
def pictures(shapes: Path) -> ImageSet:
    return load(shapes).subset(np.arange(0, 60, 4))


@pytest.fixture
def backbone() -> Backbone:
    return create.load("test_efficientnet", "random")


def whole(backbone: Backbone, pictures: ImageSet) -> dict[Tap, np.ndarray]:
    """What the taps give in one plain pass."""
    plan = [[(i, 0) for i in range(len(pictures))]]
    pre = backbone.network.preprocess
    (pixels,) = augment.batches(pictures, plan, pre, "none", flip=False, seed=0)
    with torch.no_grad():
        found = Reader(backbone, TAPS)(torch.from_numpy(pixels))
    return {tap: block.numpy() for tap, block in zip(TAPS, found, strict=True)}


@pytest.mark.parametrize("moving", [MOVING, (), None])
def test_kept_images_give_what_the_whole_network_gives(
    backbone: Backbone, pictures: ImageSet, moving: tuple[str, ...] | None
) -> None:
    """With the weights that it takes later, too; also where every stage moves, or none."""
    stages = tuple(s.name for s in backbone.stages) if moving is None else moving
    reader = Moving(backbone, stages, TAPS)
    kept = reader.keep(pictures)
    other = {
        key: value * 1.1 if value.is_floating_point() else value
        for key, value in replay.only(replay.tensors(backbone), backbone, stages).items()
    }
    reader.put(other)

    for tap, block in whole(backbone, pictures).items():
        assert block == pytest.approx(reader.read(kept)[tap], abs=1e-4, rel=1e-4)


def test_statistics_are_those_of_the_images_and_frozen_ones_stay(
    backbone: Backbone, pictures: ImageSet
) -> None:
    """The first BatchNorm that moves gets the mean and variance of what comes in; those of frozen
    stages and all counters do not change by a bit."""
    before = replay.tensors(backbone)
    reader = Moving(backbone, MOVING, TAPS)
    kept = reader.keep(pictures)
    first = next(
        path
        for path, part in backbone.module.named_modules()
        if isinstance(part, torch.nn.BatchNorm2d) and path.startswith("blocks.3")
    )
    came: list[torch.Tensor] = []
    hook = backbone.module.get_submodule(first).register_forward_pre_hook(
        lambda module, inputs: came.append(inputs[0])
    )
    count = reader.reestimate(kept)
    hook.remove()
    after = replay.tensors(backbone)

    assert count > 0
    assert torch.cat(came).mean((0, 2, 3)) == pytest.approx(
        after[f"{first}.running_mean"], abs=1e-4
    )
    assert set(replay.moved(backbone, before, after)) <= set(MOVING)
    assert all(
        torch.equal(before[key], after[key]) for key in before if key.endswith("batches_tracked")
    )
    assert not backbone.module.get_submodule(first).training


def test_a_mean_averages_numbers_and_copies_counters() -> None:
    """Floating tensors are averaged, integers copied from the one with the largest share."""
    states = [
        {"w": torch.tensor([1.0, 2.0]), "count": torch.tensor(3)},
        {"w": torch.tensor([3.0, 6.0]), "count": torch.tensor(8)},
    ]
    found = replay.mixed(states, (0.25, 0.75))

    assert [2.5, 5.0] == found["w"].tolist()
    assert (8, torch.int64) == (found["count"].item(), found["count"].dtype)
    assert torch.equal(states[0]["w"], replay.mixed(states, (1.0, 0.0))["w"])


def test_distances_are_relative_and_zero_where_nothing_moved(backbone: Backbone) -> None:
    """‖new − old‖ / ‖old‖ a stage."""
    old = replay.tensors(backbone)
    new = {
        key: value * 1.1 if value.is_floating_point() and key.startswith("conv_head") else value
        for key, value in old.items()
    }
    found = replay.distances(backbone, old, new)

    assert ["neck"] == replay.moved(backbone, old, new)
    assert 0 < found["neck"] <= 0.1 + 1e-6
    assert {0.0} == {value for name, value in found.items() if name != "neck"}
