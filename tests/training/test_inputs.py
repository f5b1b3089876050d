"""What the training loop is fed with: activations stored once, and networks started behind them."""

from __future__ import annotations

import dataclasses
import errno
import io
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trainings import FAMILIES, TRAIN, VAL, build, fit, make, plainly, plan, tensors

from finetune import files
from finetune.backbones import create as home
from finetune.backbones import stages
from finetune.backbones.stages import Backbone
from finetune.data.images import ImageSet
from finetune.errors import UserError
from finetune.training import inputs as feeding
from finetune.training import loop
from finetune.training import partial_forward as tails
from finetune.training.config import Training

pytestmark = pytest.mark.usefixtures("one_thread")


def sample_of(backbone: Backbone, count: int = 3) -> torch.Tensor:
    size = backbone.network.preprocess.size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("family", "moving"), [(f, k) for f in FAMILIES for k in (0, 1, 2) if (f, k) != ("resnet", 0)]
)
def test_the_tail_gives_what_the_whole_network_gives(family: str, moving: int) -> None:
    """At every boundary the network, started behind it, gives the features and the gradients of the
    whole."""
    backbone = make(family)
    trainable = stages.last_stages(backbone, moving)
    stages.freeze(backbone, trainable)
    end, x = feeding.boundary(backbone), sample_of(backbone)
    assert end
    with torch.no_grad():
        activation = tails.until(backbone.module, end, x)
    whole = backbone.module(x).flatten(1)
    parameters = [p for p in backbone.module.parameters() if p.requires_grad]
    expected = torch.autograd.grad(whole.square().sum(), parameters, allow_unused=True)
    with tails.tail(backbone, end, tails.tail_works(backbone, end, x)) as tail:
        found = tail(activation)
        gradients = torch.autograd.grad(found.square().sum(), parameters, allow_unused=True)

    assert torch.allclose(whole, found, rtol=1e-5, atol=1e-6)
    for a, b in zip(expected, gradients, strict=True):
        assert (a is None) == (b is None)
        assert (
            a is None
            or b is None
            or torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(a.abs().max()))
        )


def test_the_tail_works_on_lite0_with_real_weights() -> None:
    """The default backbone is started behind its sixth stage, at its own size."""
    backbone = home.load("tf_efficientnet_lite0")
    stages.freeze(backbone, stages.last_stages(backbone, 1))
    with torch.no_grad():
        assert tails.tail_works(backbone, "blocks.5", sample_of(backbone, 1)) is False


def test_storing_changes_where_the_time_goes_not_what_is_learned(
    data: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 and without augmentation the stored and the plain loop learn the same weights up
    to rounding."""
    results = []
    for _ in range(2):
        backbone = make()
        result = fit(backbone, data, plan(backbone, augment="none"), precision="float32")
        results.append((result, tensors(backbone)))
        plainly(monkeypatch)
    (stored, first), (plain, second) = results

    assert () == tuple(w for w in stored.warnings if "every epoch" in w)
    assert stored.head_weight == pytest.approx(plain.head_weight, rel=1e-2, abs=1e-3)
    assert [row["val/loss"] for row in stored.history] == pytest.approx(
        [row["val/loss"] for row in plain.history], rel=1e-3
    )
    for key in first:
        assert torch.allclose(first[key].float(), second[key].float(), rtol=1e-2, atol=1e-3), key


def test_the_frozen_stages_run_once_a_view(data: ImageSet) -> None:
    """However many epochs, the stem sees each view of each image once (and the few images of the
    comparison)."""
    backbone = make()
    seen: list[int] = []
    hook = backbone.module.get_submodule("blocks.0").register_forward_hook(
        lambda _m, inputs, _o: seen.append(len(inputs[0]))
    )
    fit(backbone, data, plan(backbone, epochs=6, views=3))
    hook.remove()
    blank = [count for count in seen if count == 1]

    assert 3 * len(TRAIN) + len(VAL) + 3 * feeding.VERIFIED == sum(seen) - len(blank)


def test_every_view_is_used_and_the_first_is_clean() -> None:
    """Over as many epochs as views each image shows each of its stored views once; without views
    every epoch is new."""
    job = type("J", (), {"training": Training((), augment="light")})()
    feed = feeding.Feed(3, lambda _: iter(()), lambda x: x, lambda _: None)
    for k in range(5):
        assert {0, 1, 2} == {loop._view(job, feed, epoch, k) for epoch in (1, 2, 3)}
    fresh = dataclasses.replace(feed, views=0)

    assert [1, 2, 3] == [loop._view(job, fresh, epoch, 4) for epoch in (1, 2, 3)]
    job.training = Training((), augment="none")
    assert [0, 0] == [loop._view(job, fresh, epoch, 4) for epoch in (1, 2)]


class Leaky(nn.Module):
    """A network whose end looks at the image again: it cannot be started in the middle."""

    def __init__(self, *, pair: bool = False) -> None:
        super().__init__()
        self.layer1, self.layer2, self.layer3 = (
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(4, 4, 3),
            nn.Conv2d(4, 4, 3),
        )
        self.pair = pair

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        end = self.layer3(self.layer2(self.layer1(x)))
        return torch.cat([end.mean((2, 3)), x.mean((2, 3))], 1)


def test_a_network_that_cannot_be_started_in_the_middle_trains_plainly(data: ImageSet) -> None:
    """Where the comparison fails, the frozen stages run in every epoch, and a warning says why."""
    backbone = build(Leaky(), "leaky")
    rows: list[dict[str, Any]] = []
    result = fit(backbone, data, plan(backbone, trainable=("stage3",)), log=rows.append)

    assert 0 == rows[0]["stored_views"]
    assert any(
        "leaky gives something else when it is started behind layer2" in warning
        for warning in result.warnings
    )


def test_activations_that_do_not_fit_are_not_stored(
    data: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the stated limit, or the free disk, the loop runs plainly and says how much it would
    have taken."""
    for name, value, words in (
        ("STORE_LIMIT", 1000, "that is the limit"),
        ("FREE_SHARE", 0.0, "of the disk may be filled"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(feeding, name, value)
            backbone = make()
            result = fit(backbone, data, plan(backbone, epochs=1))

        assert any(
            "GiB of activations" in warning and words in warning for warning in result.warnings
        ), result.warnings


def test_a_disk_that_fills_up_is_a_user_error(
    data: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room while the activations are written: an error that says what to do, and nothing is left
    behind."""

    class Full(io.BytesIO):
        def write(self, _data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    backbone = make()
    before = tensors(backbone)
    with pytest.raises(UserError, match="the disk is full"):
        fit(backbone, data, checkpoint=tmp_path / "c")

    assert ["way.json"] == [path.name for path in (tmp_path / "c").iterdir()]
    assert all(torch.equal(before[key], tensor) for key, tensor in tensors(backbone).items())


def test_no_activations_are_left(data: ImageSet, tmp_path: Path) -> None:
    """Neither the cache nor the checkpoint folder keeps them."""
    fit(make(), data)
    fit(make(), data, checkpoint=tmp_path / "c")

    assert [] == list(files.cache_dir("activations").iterdir())
    assert {"last.safetensors", "way.json"} == {path.name for path in (tmp_path / "c").iterdir()}
