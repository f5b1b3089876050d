"""BatchNorm becomes part of the convolution before it, where that changes nothing but the time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from finetune.backbones import create, extractor
from finetune.features import conversion, fuse_bn
from finetune.network import Tap

NOISE = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution and a BatchNorm with some history, put together by `way`."""

    def __init__(self, way: Callable[[Net, Tensor], Tensor], norm: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = norm or nn.BatchNorm2d(3)
        self.other = nn.Linear(8, 8)
        for value in (self.norm.weight, self.norm.bias, self.norm.running_mean):
            nn.init.normal_(value)  # type: ignore[arg-type]
        nn.init.uniform_(self.norm.running_var, 0.5, 2)  # type: ignore[arg-type]
        self.way = way
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.way(self, x),)


def norms(module: nn.Module) -> int:
    """How many BatchNorms are left."""
    return sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())


@pytest.mark.parametrize("norm", [None, BatchNormAct2d(3), BatchNormAct2d(3, apply_act=False)])
def test_a_convolution_takes_its_batchnorm_in(norm: nn.Module | None) -> None:
    """The same values, the activation of the norm included; the module itself stays as it was, and
    shares the rest."""
    module = Net(lambda self, x: self.other(self.norm(self.conv(x))), norm)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    (expected,) = module(NOISE)

    found = fuse_bn.folded(module, NOISE)

    torch.testing.assert_close(found(NOISE)[0], expected)
    assert (0, 1) == (norms(found), norms(module))
    assert found.other.weight is module.other.weight
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


WAYS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "the output is read elsewhere, too": lambda self, x: self.norm(y := self.conv(x)) + y,
    "it is written to in between": lambda self, x: self.norm(self.conv(x).relu_()),
    "something comes in between": lambda self, x: self.norm(self.conv(x) + x),
    "the convolution runs twice": lambda self, x: self.norm(self.conv(self.conv(x))),
    "the norm runs twice": lambda self, x: self.norm(self.norm(self.conv(x))),
    "the norm comes first": lambda self, x: self.conv(self.norm(x)),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_folding_would_change_is_left_alone(way: Callable[[Net, Tensor], Tensor]) -> None:
    """The module itself comes back."""
    module = Net(way)

    assert fuse_bn.folded(module, NOISE) is module


def test_a_network_is_not_run_to_be_folded() -> None:
    """What reads what is seen without numbers: large networks would take seconds for each pass."""
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Flatten()).eval()
    devices = []
    module[0].register_forward_pre_hook(lambda _part, inputs: devices.append(inputs[0].device.type))
    folded = fuse_bn.folded(module, NOISE)

    assert folded is not module
    assert ["meta"] == devices


class Asking(nn.Module):
    """A network that looks at its numbers, so that it must run on some."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.norm(self.conv(x))
        return (y if float(y.detach().sum()) > -1e9 else -y,)


def test_a_network_that_asks_for_numbers_is_folded_on_some() -> None:
    """It is compared with its copy then."""
    module = Asking().eval()
    folded = fuse_bn.folded(module, NOISE)

    assert folded is not module
    torch.testing.assert_close(folded(NOISE)[0], module(NOISE)[0])


def test_a_norm_that_reads_its_batch_is_left_alone() -> None:
    """Without running statistics there is nothing to fold."""
    module = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten()
    ).eval()

    assert fuse_bn.folded(module, NOISE) is module


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("test_efficientnet", 0),
        ("test_resnet", 0),
        ("mobilenetv3_small_050", 0),
        ("test_vit", 0),
        ("densenet121", 62),
    ],
)
def test_features_are_those_of_the_network_as_it_was(name: str, left: int) -> None:
    """At every tap; no BatchNorm is left but those of DenseNet that read what several layers
    gave."""
    torch.manual_seed(0)
    found = create.load(name, "random", 64)
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    taps = [
        Tap("pooled"),
        *(tap for tap in conversion.standard(found.network) if tap.stage != "pooled"),
    ]
    reader = extractor.Reader(found, taps).eval()
    folded = fuse_bn.folded(reader, pixels)
    assert left == norms(folded)
    with torch.inference_mode():
        for tap, a, b in zip(taps, reader(pixels), folded(pixels), strict=True):
            torch.testing.assert_close(
                b, a, rtol=1e-3, atol=1e-4 * float(a.abs().max()), msg=str(tap)
            )
