"""A training that was tried out leaves no trace."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from finetune.training.restore import unchanged

pytestmark = pytest.mark.usefixtures("one_thread")


def fingerprint(modules: list[nn.Module], optimizer: torch.optim.Optimizer | None) -> str:
    """A digest of every bit that a training may change."""
    digest = hashlib.sha256()
    parts: list[Any] = [torch.get_rng_state().numpy().tobytes(), str(np.random.get_state())]
    parts.append(str(random.getstate()))
    for module in modules:
        for key, tensor in (*module.named_parameters(), *module.named_buffers()):
            grad = tensor.grad
            parts += [key, tensor.detach().numpy().tobytes(), tensor.requires_grad]
            parts += [grad is None or grad.numpy().tobytes()]
        parts += [part.training for part in module.modules()]
    if optimizer is not None:
        state = optimizer.state_dict()
        parts += [state["param_groups"]]
        for key, moments in state["state"].items():
            parts += [key, *((name, value.numpy().tobytes()) for name, value in moments.items())]
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
    return digest.hexdigest()


def training() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model in the middle of a training: moments, gradients, one frozen layer, modes mixed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model[0].weight.requires_grad_(False)
    model[2].eval()
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=0.1)
    model(torch.randn(6, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def spoil(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Everything that a check may do."""
    model.train()
    for group in optimizer.param_groups:
        group["lr"] *= 100
        group["weight_decay"] = 0.0
        group["base_lr"] = 1.0
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(6, 4)).square().sum().backward()
        optimizer.step()
    model.requires_grad_(True)
    np.random.random(3)
    random.random()
    torch.rand(3)


def test_all_is_put_back_to_the_bit() -> None:
    """Weights, buffers, gradients, modes, what is frozen, moments, rates, and the random numbers of
    torch, numpy and Python have the same digest afterwards."""
    model, optimizer = training()
    before = fingerprint([model], optimizer)
    with unchanged([model], optimizer):
        spoil(model, optimizer)
        assert before != fingerprint([model], optimizer)

    assert before == fingerprint([model], optimizer)


def test_an_error_inside_changes_nothing_either() -> None:
    """The same where the trial ends in an exception."""
    model, optimizer = training()
    before = fingerprint([model], optimizer)

    def used() -> None:
        with unchanged([model], optimizer):
            spoil(model, optimizer)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        used()

    assert before == fingerprint([model], optimizer)


def test_the_training_goes_on_as_if_nothing_had_been() -> None:
    """The next real step is bit for bit the one that would have been made."""
    results = []
    for tried in (False, True):
        model, optimizer = training()
        if tried:
            with unchanged([model], optimizer):
                spoil(model, optimizer)
        optimizer.zero_grad()
        model(torch.randn(6, 4)).sum().backward()
        optimizer.step()
        results.append(fingerprint([model], optimizer))

    assert results[0] == results[1]
