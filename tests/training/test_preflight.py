"""`finetune.preflight` for a torch loop of one's own: faults that it names, and what it leaves
alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from test_restore import fingerprint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import finetune
from finetune.errors import UserError
from finetune.training import range_picture
from finetune.training.preflight import Preflight

pytestmark = pytest.mark.usefixtures("one_thread")

Loss = Callable[[Tensor, Tensor], Tensor]


def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))[:128]
    pixels = (found.images[order].astype(np.float32) - 4.88) / 6.02
    return torch.from_numpy(pixels)[:, None], torch.from_numpy(found.target[order])


def network(classes: int = 10) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(),
        nn.Linear(12 * 64, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, classes),
    )  # fmt: skip


def run(
    model: nn.Module | None = None,
    loss: Loss | None = None,
    x: Tensor | None = None,
    y: Tensor | None = None,
    **more: Any,
) -> Preflight:
    """Four batches of digits, with what a test changes."""
    pixels, labels = digits()
    pixels, labels = pixels if x is None else x, labels if y is None else y
    batches = list(zip(pixels.split(32), labels.split(32), strict=True))
    return finetune.preflight(model or network(), batches, loss or nn.CrossEntropyLoss(), **more)


def statuses(found: Preflight) -> dict[str, str]:
    return {check.name: check.status for check in found.checks}


@pytest.fixture(scope="module")
def healthy() -> Preflight:
    """With label smoothing, dropout and BatchNorm."""
    return run(loss=nn.CrossEntropyLoss(label_smoothing=0.1))


def test_a_healthy_training_passes_every_check(healthy: Preflight) -> None:
    """Nothing is warned of, though smoothing keeps the training's own loss above 0.05."""
    names = {
        *("input", "initial loss", "gradients", "update ratio"),
        *("learning rate", "overfit"),
    }

    assert dict.fromkeys(names, "pass") == statuses(healthy), str(healthy)
    assert "pass" == healthy.status


def test_the_result_is_text_json_and_a_picture(healthy: Preflight) -> None:
    """The same verdicts in each form; the picture names the planned rate and holds no script."""
    assert [check.to_json() for check in healthy.checks] == json.loads(
        json.dumps(healthy.to_json(), allow_nan=False)
    )["checks"]
    assert "PASS  gradients: finite" in str(healthy)
    assert healthy.range_test is not None
    picture = range_picture.svg(healthy.range_test, "digits <&>")
    assert "planned 1.0e-03" in picture
    assert "digits &lt;&amp;&gt;" in picture
    assert "<script" not in range_picture.page(healthy.range_test, "digits")


def focal(output: Tensor, y: Tensor) -> Tensor:
    log = torch.log_softmax(output, 1)[torch.arange(len(y)), y]
    return -((1 - log.exp()) ** 2 * log).mean()


def binary(output: Tensor, y: Tensor) -> Tensor:
    target = nn.functional.one_hot(y, output.shape[1]).float()
    return nn.functional.binary_cross_entropy_with_logits(output, target)


@pytest.mark.parametrize(("loss", "words"), [(focal, "focal"), (binary, "binary cross-entropy")])
def test_other_losses_are_recognised(loss: Loss, words: str) -> None:
    """Focal and binary losses start where their formulas say."""
    found = run(loss=loss)

    assert "fail" != found.status, str(found)
    (initial,) = (check for check in found.checks if check.name == "initial loss")
    assert ("pass", f"that of {words}") == (initial.status, initial.meaning)


def dead() -> nn.Module:
    model = network()
    nn.init.constant_(model[4].bias, -1000.0)
    return model


def half_dead() -> nn.Module:
    model = network()
    with torch.no_grad():
        model[4].bias[:20] = -1000.0
    return model


def frozen() -> nn.Module:
    model = network()
    model[-1].requires_grad_(False)
    return model


def broken() -> nn.Module:
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("nan")
    return model


def unfinite(output: Tensor, y: Tensor) -> Tensor:
    zero = (output - output.detach()).square().sum()
    return nn.functional.cross_entropy(output, y) + zero.sqrt()


def softmaxed() -> nn.Module:
    return network().append(nn.Softmax(1))


X, Y = digits()
SUM = nn.CrossEntropyLoss(reduction="sum")
FAULTS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "summed loss": ({"loss": SUM}, "initial loss", "fail", "sum"),
    "frozen head": ({"model": frozen}, "gradients", "fail", "head is frozen"),
    "dead layer": ({"model": dead}, "gradients", "fail", "no gradient reaches 0"),
    "half a layer dead": ({"model": half_dead}, "gradients", "warn", "62% of the units of 4"),
    "NaN in a weight": ({"model": broken}, "gradients", "fail", "weights of 0"),
    "NaN in a pixel": ({"x": torch.full_like(X, torch.nan)}, "input", "fail", "NaN"),
    "NaN in a gradient": ({"loss": unfinite}, "gradients", "fail", "gradients of 0"),
    "too few outputs": ({"model": lambda: network(9)}, "classes", "fail", "label 9 is none"),
    "too many outputs": ({"model": lambda: network(50)}, "classes", "warn", "40 outputs"),
    "one class": ({"y": torch.full_like(Y, 3)}, "classes", "fail", "one class"),
    "softmax before the loss": ({"model": softmaxed}, "classes", "warn", "probabilities"),
    "raw pixels": ({"x": X * 100 + 80}, "input", "warn", "raw pixel values"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_by_its_check(fault: str) -> None:
    """The check that is about it says so, in its words, and what to do."""
    changes, name, status, words = FAULTS[fault]
    if "model" in changes:
        changes = {**changes, "model": changes["model"]()}
    found = run(**changes)
    (check,) = (check for check in found.checks if check.name == name)

    assert status == check.status, str(found)
    assert words in check.value + check.meaning
    assert check.action


def test_a_head_that_the_optimiser_does_not_hold_is_named() -> None:
    """Gradients alone move nothing."""
    model = network()
    found = run(model, optimizer=torch.optim.AdamW(model[:-1].parameters(), lr=1e-3))

    assert "7.weight, 7.bias: in no group of the optimiser" in str(found)
    assert "fail" == found.status


@pytest.mark.parametrize(("rate", "status"), [(1.0, "fail"), (1e-7, "warn")])
def test_a_rate_that_is_off_by_thousands_is_seen_twice(rate: float, status: str) -> None:
    """By the ratio of update to weight, and by the range test; a good rate is proposed."""
    model = network()
    found = run(model, optimizer=torch.optim.AdamW(model.parameters(), lr=rate))

    assert status == statuses(found)["update ratio"] == statuses(found)["learning rate"], str(found)


def test_forgotten_normalisation_is_seen_where_the_weights_say_what_they_want() -> None:
    """A timm model carries mean and std: pixels from 0 to 1 were not normalised."""
    model = network()
    model.pretrained_cfg = {"mean": (0.5,), "std": (0.5,)}  # type: ignore[assignment]
    raw = (X - X.min()) / (X.max() - X.min())

    assert "fail" == statuses(run(model, x=raw))["input"]
    assert "pass" == statuses(run(model, x=(raw - 0.5) / 0.5))["input"]


def test_a_zero_head_raises_no_false_alarm() -> None:
    """‖Δw‖ / ‖w‖ of a head from zero has no meaning: it is called warming, and divides nothing."""
    model = network()
    for parameter in model[-1].parameters():
        nn.init.zeros_(parameter)
    found = run(model)

    assert "pass" == found.status, str(found)
    assert "7 warming" in str(found)


def test_nothing_of_the_training_is_changed() -> None:
    """Model, buffers, optimiser, modes and the random numbers of torch, numpy and Python have the
    same bits afterwards, with a shuffling loader and an optimiser in the middle of its work."""
    model = network().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    model(X[:8]).sum().backward()
    optimizer.step()
    before = fingerprint([model], optimizer)
    loader = DataLoader(TensorDataset(X, Y), batch_size=32, shuffle=True)
    finetune.preflight(model, loader, nn.CrossEntropyLoss(), optimizer=optimizer)

    assert before == fingerprint([model], optimizer)


def test_the_same_seed_gives_the_same_verdicts() -> None:
    """Numbers included, though the model has dropout."""
    assert str(run(seed=3)) == str(run(seed=3))


def test_no_batch_is_refused() -> None:
    """With what to give."""
    with pytest.raises(UserError, match="there is no batch"):
        finetune.preflight(network(), [], nn.CrossEntropyLoss())
