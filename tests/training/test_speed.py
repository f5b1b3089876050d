"""How a training computes: timed without a trace, and kept by its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import TRAIN, fit, make, plan, tensors

from finetune import timings
from finetune.backbones import device
from finetune.data.images import ImageSet
from finetune.training import checkpoints, speed

measure = timings.measure  # the real one: around every test it is put away
CPU = torch.device("cpu")
MANY = {"count": 10_000, "folder": None}


def rated(monkeypatch: pytest.MonkeyPatch, **rates: float) -> None:
    """Let the ways whose words hold a key have its rate; other ones have 1."""
    monkeypatch.setattr(
        timings,
        "measure",
        lambda ways, _opened: {
            way: max([1.0, *(rate for key, rate in rates.items() if key in way)]) for way in ways
        },
    )


@pytest.mark.parametrize("flag", [True, False])
def test_training_takes_what_was_timed(flag: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the processor says that it can, both ways."""
    monkeypatch.setattr(device, "has_bf16", lambda _engine: flag)
    backbone = make()
    training = plan(backbone)
    rated(monkeypatch, bf16=2.0)
    assert speed.settle(backbone, training, CPU, "auto", **MANY).bf16
    timings.forget()
    rated(monkeypatch, float32=2.0)
    assert not speed.settle(backbone, training, CPU, "auto", **MANY).bf16
    assert speed.settle(backbone, training, CPU, "bf16", **MANY).bf16


def test_timing_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, statistics, gradients, layout, threads and the random numbers are as before."""
    monkeypatch.setattr(timings, "measure", measure)
    monkeypatch.setattr(timings, "SECONDS", 0.0)
    backbone = make()
    training = plan(backbone, norm_moves=True)
    before, state, threads = tensors(backbone), torch.get_rng_state(), torch.get_num_threads()
    way = speed.settle(backbone, training, CPU, "auto", **MANY)
    rates = [row["rates"] for row in timings.overview()]

    assert all(torch.equal(value, before[key]) for key, value in tensors(backbone).items())
    assert all(parameter.grad is None for parameter in backbone.module.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert threads == torch.get_num_threads()
    assert len(rates[0]) >= 4
    assert str(way) in rates[0]


def test_a_short_training_is_not_timed(monkeypatch: pytest.MonkeyPatch, data: ImageSet) -> None:
    """It computes in float32 at once."""
    monkeypatch.setattr(timings, "measure", lambda *_: pytest.fail("timed"))
    backbone, rows = make(), list[dict[str, Any]]()
    fit(backbone, data, plan(backbone, augment="none"), log=rows.append)

    assert len(TRAIN) * 2 < speed.FEW
    assert rows[0]["bf16"] is False


def test_a_training_that_goes_on_keeps_its_way(
    tmp_path: Path, data: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is timed when it goes on changes nothing: it ends with the precision that it began
    with."""
    monkeypatch.setattr(speed, "FEW", 1)
    rated(monkeypatch, bf16=2.0)

    def stop(row: dict[str, Any]) -> None:
        if row.get("epoch") == 1:
            raise KeyboardInterrupt

    backbone = make()
    with pytest.raises(KeyboardInterrupt):
        fit(backbone, data, plan(backbone), checkpoint=tmp_path, log=stop)
    timings.forget()
    rated(monkeypatch, float32=2.0)
    rows: list[dict[str, Any]] = []
    fit(backbone, data, plan(backbone), checkpoint=tmp_path, log=rows.append)

    assert rows[0]["bf16"] is True
    assert json.loads((tmp_path / speed.RECORD).read_text())["bf16"] is True


@pytest.mark.parametrize("flag", [True, False])
def test_a_training_of_version_0_1_0_goes_on_as_it_began(
    flag: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It left a checkpoint without a word on the way: what the processor says of itself decided."""
    monkeypatch.setattr(device, "has_bf16", lambda _engine: flag)
    (tmp_path / checkpoints.FILE).touch()
    backbone = make()
    way = speed.settle(backbone, plan(backbone), CPU, "auto", count=10_000, folder=tmp_path)

    assert flag == way.bf16
    assert way.channels_last
