"""The same seed gives the same bits, and so does going on after an interrupt or a kill."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainings import TRAIN, VAL, fit, make, outcome, plainly, plan, tensors

from finetune.backbones.stages import Backbone
from finetune.data import images
from finetune.data.images import ImageSet
from finetune.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("stored", [True, False])
def test_the_same_seed_gives_the_same_bits(
    stored: bool, data: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trainings with one seed agree in every bit; another seed gives another model."""
    if not stored:
        plainly(monkeypatch)
    outcomes = []
    for seed in (0, 0, 1):
        backbone = make()
        outcomes.append(
            outcome(backbone, fit(backbone, data, plan(backbone, mixup=0.2, ema=True), seed=seed))
        )

    assert outcomes[0] == outcomes[1]
    assert outcomes[0]["weights"] != outcomes[2]["weights"]


def stop_after(epoch: int, error: BaseException) -> Callable[[dict[str, Any]], None]:
    def log(row: dict[str, Any]) -> None:
        if row.get("epoch") == epoch:
            raise error

    return log


SHAKY = {"ema": True, "mixup": 0.2, "l2_sp": 0.01}
STEADY = {"optimizer": "sgd", "norm_moves": True, "schedule": "step"}


@pytest.mark.parametrize(
    ("family", "changes", "judged", "stored"),
    [
        ("efficientnet", SHAKY, True, True),
        ("efficientnet", SHAKY, False, False),
        ("resnet", STEADY, True, False),
        ("resnet", STEADY, False, True),
        ("vit", {"augment": "strong", "label_smoothing": 0.1}, True, True),
    ],
)
def test_two_and_two_epochs_are_four(
    family: str,
    changes: dict[str, Any],
    judged: bool,
    stored: bool,
    data: ImageSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted in the third of four epochs and called again, it ends with the bits of the
    uninterrupted training."""
    if not stored:
        plainly(monkeypatch)
    parts = {"val_index": VAL if judged else None}

    def dropping() -> Backbone:
        backbone = make(family)
        backbone.module.drop_rate = 0.2  # type: ignore[assignment]
        return backbone

    backbone = dropping()
    training = plan(backbone, epochs=4, **changes)
    whole = outcome(backbone, fit(backbone, data, training, **parts))

    backbone = dropping()
    before = tensors(backbone)
    with pytest.raises(KeyboardInterrupt):
        fit(
            backbone,
            data,
            training,
            checkpoint=tmp_path,
            log=stop_after(3, KeyboardInterrupt()),
            **parts,
        )
    assert all(torch.equal(before[key], tensor) for key, tensor in tensors(backbone).items())

    rows: list[dict[str, Any]] = []
    resumed = fit(backbone, data, training, checkpoint=tmp_path, log=rows.append, **parts)

    assert [3, 4] == [row["epoch"] for row in rows if "epoch" in row]
    assert whole == outcome(backbone, resumed)


def train_shapes(
    folder: Path, checkpoint: Path, log: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """What the killed process, the one that goes on and the undisturbed one all do."""
    torch.set_num_threads(1)
    backbone, source = make(), images.load(folder)
    index = np.random.default_rng(0).permutation(len(source))
    training = plan(backbone, epochs=4, ema=True)
    return outcome(
        backbone,
        fit(
            backbone,
            source,
            training,
            train_index=index[:48],
            val_index=index[48:],
            checkpoint=checkpoint,
            log=log,
        ),
    )


def die(row: dict[str, Any]) -> None:
    if row.get("epoch") == 3:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_goes_on(shapes: Path, tmp_path: Path) -> None:
    """After kill -9 in the third of four epochs, a new process ends with the bits of one that was
    never killed."""
    here = Path(__file__).resolve()
    code = (
        f"import test_checkpoints as t; t.train_shapes(t.Path({str(shapes)!r}), "
        f"t.Path({str(tmp_path / 'a')!r}), t.die)"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(here.parent), str(here.parents[1]), str(here.parents[2])]
        ),
    }
    killed = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=environment,
    )

    assert -signal.SIGKILL == killed.returncode, killed.stderr
    assert {"last.safetensors", "way.json"} == {path.name for path in (tmp_path / "a").iterdir()}
    rows: list[dict[str, Any]] = []
    assert train_shapes(shapes, tmp_path / "b") == train_shapes(shapes, tmp_path / "a", rows.append)
    assert [3, 4] == [row["epoch"] for row in rows if "epoch" in row]


def test_a_finished_training_is_not_repeated(data: ImageSet, tmp_path: Path) -> None:
    """Called again after its end, it gives the same result without reading one image."""
    backbone = make()
    first = outcome(backbone, fit(backbone, data, checkpoint=tmp_path))
    blind = dataclasses.replace(data, source=lambda path: pytest.fail(f"{path} was read"))
    backbone = make()

    assert first == outcome(backbone, fit(backbone, blind, checkpoint=tmp_path))


def test_a_checkpoint_of_another_training_is_refused(data: ImageSet, tmp_path: Path) -> None:
    """Another plan, seed, set of images or starting weights do not go on from it; the error says
    which file."""
    fit(make(), data, checkpoint=tmp_path)
    other = make()
    with torch.no_grad():
        next(other.module.parameters()).add_(1)
    cases: list[Callable[[], Any]] = [
        lambda: fit(make(), data, plan(make(), lr=0.02), checkpoint=tmp_path),
        lambda: fit(make(), data, checkpoint=tmp_path, seed=1),
        lambda: fit(make(), data, checkpoint=tmp_path, train_index=TRAIN[1:]),
        lambda: fit(other, data, checkpoint=tmp_path),
        lambda: fit(
            make(),
            data.subset(np.arange(60)[::-1]),
            checkpoint=tmp_path,
            train_index=59 - TRAIN,
            val_index=59 - VAL,
        ),
        lambda: fit(make(), data, checkpoint=tmp_path, class_weights=[1, 2, 1]),
    ]
    for call in cases:
        with pytest.raises(UserError, match=r"last\.safetensors: belongs to another training"):
            call()


def test_a_damaged_checkpoint_is_named(data: ImageSet, tmp_path: Path) -> None:
    """A checkpoint that is no safetensors file, a pickle for one, is refused with its path."""
    path = tmp_path / "last.safetensors"
    torch.save({"epoch": 1}, path)
    with pytest.raises(UserError, match=r"last\.safetensors: damaged"):
        fit(make(), data, checkpoint=tmp_path)
