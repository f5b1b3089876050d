"""Weights in the files of other programs: what wraps them is taken off, and what is taken and left
is said."""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from finetune.backbones import create, statedict
from finetune.backbones.stages import Backbone
from finetune.errors import UserError

TINY = "test_efficientnet"


@pytest.fixture
def module() -> Any:
    """A whole timm model, its classifier included."""
    torch.manual_seed(1)
    return timm.create_model(TINY, num_classes=10)


def packed(tiny: Backbone) -> dict[str, Any]:
    """Its tensors in one piece each: another test may have left the shared network in the layout
    that torch is fastest in."""
    return {key: value.contiguous() for key, value in tiny.module.state_dict().items()}


def named(tiny: Backbone, prefix: str) -> dict[str, Any]:
    return {f"{prefix}{key}": value for key, value in tiny.module.state_dict().items()}


def spoilt(tiny: Backbone, prefix: str = "") -> dict[str, Any]:
    """The same names with other values."""
    return {key: value + 1 for key, value in named(tiny, prefix).items()}


WRAPPED: dict[str, tuple[Callable[[Backbone], Any], str]] = {
    "a checkpoint": (lambda t: {"epoch": 3, "state_dict": named(t, "")}, "its state_dict"),
    "as in PyTorch's tutorial": (
        lambda t: {"model_state_dict": named(t, ""), "loss": 0.1},
        "its model_state_dict",
    ),
    "data parallelism": (lambda t: named(t, "module."), "without the prefix module."),
    "a compiled model": (
        lambda t: {"model": named(t, "_orig_mod.")},
        "its model; without the prefix _orig_mod.",
    ),
    "both": (
        lambda t: named(t, "module._orig_mod."),
        "without the prefix _orig_mod.; without the prefix module.",
    ),
    "averaged by torch": (
        lambda t: {"n_averaged": torch.tensor(3), **named(t, "module.")},
        "without the prefix module.; 1 tensor (n_averaged) left out",
    ),
    "Lightning": (
        lambda t: {
            "state_dict": {**named(t, "model."), "loss.weight": torch.ones(2)},
            "global_step": 7,
        },
        "its state_dict; without the prefix model.; 1 tensor (loss.weight) left out",
    ),
    "Lightning with an average": (
        lambda t: {"state_dict": {**spoilt(t, "model."), **named(t, "model_ema.")}},
        "its state_dict; without the prefix model_ema.; 86 tensors (model.conv_stem",
    ),
    "DINO": (
        lambda t: {
            "student": spoilt(t, "module.backbone."),
            "teacher": {**named(t, "backbone."), "head.last.weight": torch.ones(2)},
            "args": argparse.Namespace(lr=0.1),
        },
        "its teacher, averaged weights; without the prefix backbone.; 1 tensor "
        "(head.last.weight) left out",
    ),
    "DINO's student alone": (lambda t: {"student": named(t, "module.backbone.")}, "its student"),
    "DeiT": (
        lambda t: {"model": spoilt(t), "model_ema": named(t, "")},
        "its model_ema, averaged weights",
    ),
    "fastai": (
        lambda t: {
            "model": {**named(t, "0.model."), "1.2.weight": torch.ones(2)},
            "opt": {"state": [], "hypers": [{"lr": 0.1}]},
        },
        "its model; without the prefix 0.model.; 1 tensor (1.2.weight) left out",
    ),
    "with numbers beside it": (
        lambda t: {**named(t, ""), "version": 3},
        "without 1 entry (version) that are no tensors",
    ),
}


@pytest.mark.parametrize("form", WRAPPED)
def test_weights_are_taken_out_of_what_wraps_them(
    tmp_path: Path, tiny: Backbone, form: str
) -> None:
    """Checkpoints of the usual programs give the same network; its source says in one line what was
    taken and left."""
    make, words = WRAPPED[form]
    torch.save(make(tiny), tmp_path / "x.pth")

    found = create.load(TINY, str(tmp_path / "x.pth"))

    assert tiny.network.digest == found.network.digest
    assert found.network.source.startswith(f"the file x.pth ({words}")
    assert "\n" not in found.network.source


@pytest.mark.parametrize("average", [True, False])
def test_a_checkpoint_of_timm_loads(tmp_path: Path, module: Any, average: bool) -> None:
    """What timm's own saver writes: options beside the weights, the averaged weights where there
    are some."""
    options = argparse.Namespace(model=TINY, lr=0.1, mean=(0.5, 0.5, 0.5), resume="")
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.conv_stem.weight.add_(1)
    averaged = timm.utils.ModelEmaV3(module)
    saver = timm.utils.CheckpointSaver(
        other if average else module,
        torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
        args=options,
        model_ema=averaged if average else None,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(4, metric=71.5)

    found = create.load(TINY, str(tmp_path / "model_best.pth.tar"))

    assert torch.equal(
        module.state_dict()["conv_stem.weight"], found.module.state_dict()["conv_stem.weight"]
    )
    words = "its state_dict_ema, averaged weights" if average else "its state_dict"
    assert f"the file model_best.pth.tar ({words})" == found.network.source


def test_a_name_that_is_not_utf_8_is_read_and_shown(tmp_path: Path, tiny: Backbone) -> None:
    """Names of files are bytes: such a file is opened, and its name written out where it is
    shown."""
    if sys.platform != "linux":
        pytest.skip("names are text here")
    for suffix in ("pth", "safetensors"):
        path = tmp_path / os.fsdecode(b"caf\xe9." + suffix.encode())
        save = torch.save if suffix == "pth" else save_file
        save(packed(tiny), tmp_path / "x")  # type: ignore[operator]
        (tmp_path / "x").rename(path)

        found = create.load(TINY, str(path))

        assert tiny.network.digest == found.network.digest
        assert f"the file caf\\xe9.{suffix}" == found.network.source


def test_a_part_of_weights_says_that_it_is_one(tmp_path: Path, tiny: Backbone) -> None:
    """A shard, the list of shards, and a folder are refused with what to give instead."""
    save_file(packed(tiny), tmp_path / "model-00002-of-00003.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")

    for name, what in (
        ("model-00002-of-00003.safetensors", "is part 2 of 3"),
        ("model.safetensors.index.json", "saved in pieces"),
        ("", "is a folder"),
    ):
        with pytest.raises(UserError, match=what) as caught:
            create.load(TINY, str(tmp_path / name))
        assert caught.value.fix


def test_a_large_checkpoint_is_not_read_whole(tmp_path: Path, tiny: Backbone) -> None:
    """The optimizer's half of a checkpoint stays on the disk: only what is taken comes into
    memory."""
    # 64 MB
    torch.save(
        {"state_dict": tiny.module.state_dict(), "optimizer": torch.zeros(1 << 24)},
        tmp_path / "x.pth",
    )
    code = (
        "import sys, torch; from pathlib import Path; from finetune.backbones import statedict\n"
        "def peak(): return "
        "int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "before = peak(); statedict.read(Path(sys.argv[1])); print(peak() - before)"
    )
    if sys.platform != "linux":
        pytest.skip("memory is told elsewhere here")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.pth")],
        capture_output=True,
        text=True,
        check=True,
    )

    assert int(done.stdout) < 32_000  # kilobytes


def test_a_tensor_with_the_name_of_a_wrapper_is_a_tensor(tmp_path: Path) -> None:
    """A file whose tensors are called weights or model is read as tensors, of any size."""
    torch.save({"weights": torch.ones(3), "model": torch.zeros(2, 2)}, tmp_path / "x.pth")
    assert {"weights", "model"} == set(statedict.read(tmp_path / "x.pth").tensors)
