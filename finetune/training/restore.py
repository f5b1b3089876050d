"""Try a training out and leave no trace: weights, buffers, gradients, optimiser, modes and random
numbers are put back, bit by bit."""

from __future__ import annotations

import contextlib
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextlib.contextmanager
def unchanged(
    modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer | None = None
) -> Iterator[None]:
    """Whatever happens inside, `modules` and `optimizer` come out as they went in.

    That holds for parameters, buffers (those that are not saved, too), gradients, the train or eval
    mode of every part, whether a parameter asks for gradients, the optimiser's moments, learning
    rates and other settings, and the global random numbers of torch (all devices), numpy and
    Python. Inside, gradients begin as none and the optimiser works on a copy of its moments.
    """
    tensors = _tensors(modules)
    before = [tensor.detach().clone() for tensor in tensors]
    parameters = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
    gradients = [(parameter, parameter.grad, parameter.requires_grad) for parameter in parameters]
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for parameter in parameters:
        parameter.grad = None
    try:
        with _random_numbers(), _settings(optimizer):
            yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        for parameter, gradient, asks in gradients:
            parameter.grad = gradient
            parameter.requires_grad_(asks)
        for part, mode in modes:
            part.training = mode


def _tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Every parameter and buffer once, though modules may share them."""
    found = {
        id(tensor): tensor
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    }
    return list(found.values())


@contextlib.contextmanager
def _settings(optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Let the optimiser work on copies; its own moments and settings are put aside meanwhile."""
    if optimizer is None:
        yield
        return
    state, groups = optimizer.state, [dict(group) for group in optimizer.param_groups]
    copies = {
        parameter: {key: _copy(value) for key, value in moments.items()}
        for parameter, moments in state.items()
    }
    optimizer.state = defaultdict(dict, copies)
    try:
        yield
    finally:
        optimizer.state = state
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(values)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _random_numbers() -> Iterator[None]:
    """Put the global generators back."""
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    devices = torch.cuda.get_rng_state_all() if on_cuda else []
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)
