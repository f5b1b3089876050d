"""The training loop: what it may change, what it must not, what it learns, and faults."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from trainings import FAMILIES, TRAIN, VAL, fit, keys_of, make, plainly, plan, tensors

from finetune.backbones import create as home
from finetune.backbones import extractor
from finetune.backbones.stages import Backbone
from finetune.data import images
from finetune.data.images import ImageSet
from finetune.errors import UserError
from finetune.heads.head import side_by_side
from finetune.network import Tap
from finetune.training import checkpoints, loop, probe, schedules
from finetune.training import inputs as feeding
from finetune.training import partial_forward as tails

pytestmark = pytest.mark.usefixtures("one_thread")


# ----------------------------------------------------------------------------------------- freezing


@pytest.mark.parametrize("norm_moves", [False, True])
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_stages_do_not_move_by_a_bit(
    family: str, stored: bool, norm_moves: bool, data: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters and buffers of frozen stages are bit-identical after training, with stored
    activations and without."""
    if not stored:
        plainly(monkeypatch)
    backbone = make(family)
    training = plan(backbone, norm_moves=norm_moves, epochs=1)
    before, rows = tensors(backbone), list[dict[str, Any]]()
    fit(backbone, data, training, log=rows.append, val_index=None)
    after, moving = tensors(backbone), keys_of(backbone, training.trainable)

    assert (1 if stored else 0) == rows[0]["stored_views"]
    assert [] == [
        key for key in after if key not in moving and not torch.equal(before[key], after[key])
    ]
    assert [] != [key for key in moving if not torch.equal(before[key], after[key])]


@pytest.mark.parametrize("norm_moves", [False, True])
def test_running_statistics_of_trainable_stages_move_only_when_asked(
    norm_moves: bool, data: ImageSet
) -> None:
    """BatchNorm in trainable stages keeps its statistics unless `norm_moves`; its weights learn
    either way."""
    backbone = make("resnet")
    training = plan(backbone, norm_moves=norm_moves)
    before = tensors(backbone)
    fit(backbone, data, training)
    after, moving = tensors(backbone), keys_of(backbone, training.trainable)
    statistics = [key for key in moving if "running_" in key or "num_batches" in key]

    assert norm_moves == any(not torch.equal(before[key], after[key]) for key in statistics)
    assert statistics


@pytest.mark.parametrize("family", FAMILIES)
def test_the_module_is_whole_again_afterwards(family: str, data: ImageSet) -> None:
    """After training no forward is replaced, no hook or gradient is left, the layout is torch's
    usual one, and it is in eval."""
    backbone = make(family)
    fit(backbone, data, plan(backbone, epochs=1), val_index=None)
    for path, part in backbone.module.named_modules():
        assert "forward" not in part.__dict__, path
        assert not part._forward_hooks, path
        assert not part._forward_pre_hooks, path
        assert not part.training, path
    for key, parameter in backbone.module.named_parameters():
        assert parameter.is_contiguous(), key
        assert parameter.grad is None, key


def test_the_callers_random_numbers_are_left_alone(data: ImageSet) -> None:
    """Training draws from its own seeds, and puts torch's generator back."""
    backbone = make()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(backbone, data)

    assert torch.equal(expected, torch.rand(3))


# ----------------------------------------------------------------------------------------- learning


def test_it_learns_what_is_there_and_judges_by_validation(data: ImageSet) -> None:
    """On three colours the classes are learned from a zero head; rows carry the promised keys; the
    best epoch is kept."""
    backbone = make()
    result = fit(
        backbone,
        data,
        plan(backbone, head_init="zero", epochs=12, trunk_lr_scale=1.0, ema=False, patience=0),
    )
    row = result.history[0]

    assert result.history[-1]["val/top1"] >= 0.9
    assert 12 == result.best_epoch  # few images cannot tell epochs apart: the last is kept
    assert {
        "epoch",
        "step",
        "train/loss",
        "val/loss",
        "val/top1",
        "seconds",
        "lr/head",
        "update_ratio/stage5",
    } <= set(row)
    assert 12 * 3 == result.steps
    assert "all 12 epochs" == result.stopped
    json.dumps(result.history, allow_nan=False)


def test_twelve_images_are_learned_by_heart(
    data: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random labels on a few images reach a loss near zero: nothing between pixels and loss is
    cut."""
    plainly(monkeypatch)
    rng = np.random.default_rng(1)
    wrong = dataclasses.replace(data, labels=rng.integers(0, 3, 60))
    backbone = make()
    every = tuple(stage.name for stage in backbone.stages)
    training = plan(
        backbone,
        trainable=every,
        epochs=40,
        batch_size=4,
        augment="none",
        trunk_lr_scale=0.3,
        head_init="zero",
    )
    result = fit(backbone, wrong, training, train_index=np.arange(12), val_index=None)

    assert result.history[-1]["train/loss"] < 0.05


def test_shuffled_labels_are_at_chance(data: ImageSet) -> None:
    """What cannot be learned is not: validation top-1 stays near a third."""
    rng = np.random.default_rng(2)
    shuffled = dataclasses.replace(data, labels=rng.permutation(data.labels))
    result = fit(make(), shuffled)

    assert result.history[-1]["val/top1"] < 0.75


def test_the_result_is_the_model_that_was_judged(data: ImageSet) -> None:
    """The module and the head that come back give the validation scores of the best epoch."""
    backbone = make()
    result = fit(backbone, data, precision="float32")
    reader = extractor.Reader(backbone, ())
    from finetune.data import decode

    pixels = np.stack(
        [decode.to_input(data.read(int(i)), backbone.network.preprocess) for i in VAL]
    )
    with torch.no_grad():
        features = backbone.module(reader.normalise(torch.from_numpy(pixels))).flatten(1).numpy()

    assert result.val_scores is not None
    assert (3, 15, 3) == result.val_scores.shape
    assert result.val_scores[result.best_epoch] == pytest.approx(
        features @ result.head_weight.T + result.head_bias, rel=1e-3, abs=1e-3
    )


def test_a_zero_head_starts_at_ln_c(data: ImageSet) -> None:
    """The first loss is ln C, with label smoothing and class weights too; before the first step
    validation has it as well."""
    backbone = make()
    training = plan(backbone, head_init="zero", label_smoothing=0.1, class_weight="balanced")
    result = fit(backbone, data, training)

    assert math.log(3) == pytest.approx(result.start["train/loss"], abs=1e-5)
    assert math.log(3) == pytest.approx(result.start["val/loss"], abs=1e-5)


def test_a_head_can_be_given(data: ImageSet) -> None:
    """`head_start` is the head before the first step: no epochs give it back as it was."""
    backbone = make()
    width = backbone.network.widths["pooled"]
    rng = np.random.default_rng(0)
    weight, bias = (
        rng.normal(size=(3, width)).astype(np.float32),
        rng.normal(size=3).astype(np.float32),
    )
    before = tensors(backbone)
    result = fit(backbone, data, plan(backbone, epochs=0), head_start=(weight, bias))

    assert np.array_equal(weight, result.head_weight)
    assert np.array_equal(bias, result.head_bias)
    assert (0, 0, ()) == (result.best_epoch, result.steps, result.history)
    assert all(torch.equal(before[key], tensor) for key, tensor in tensors(backbone).items())


def test_without_epochs_the_probe_is_the_result(data: ImageSet) -> None:
    """The head starts from the probe on the pooled features of the un-augmented images."""
    backbone = make()
    result = fit(backbone, data, plan(backbone, epochs=0), val_index=None, precision="float32")
    reader = extractor.Reader(backbone, (home.Tap("pooled"),))
    from finetune.data import decode

    pixels = np.stack(
        [decode.to_input(data.read(int(i)), backbone.network.preprocess) for i in TRAIN]
    )
    with torch.no_grad():
        (features,) = reader(torch.from_numpy(pixels))
    weight, bias = probe.probe(features.numpy(), data.labels[TRAIN], 3)

    assert weight == pytest.approx(result.head_weight, rel=1e-2, abs=1e-4)
    assert bias == pytest.approx(result.head_bias, rel=1e-2, abs=1e-3)


def test_the_probe_is_scikit_learns_logistic_regression() -> None:
    """Scores on raw features equal those of LogisticRegression behind a StandardScaler; a constant
    feature does no harm."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 120)
    x = (rng.normal(size=(120, 10)) + rng.normal(size=(4, 10))[y]) * rng.uniform(
        0.5, 4, 10
    ) + rng.normal(size=10)
    x[:, 3] = 2.5
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=5000, tol=1e-8)).fit(
        x, y
    )
    weight, bias = probe.probe(x, y, 4, C=0.1)
    scores, expected = x @ weight.T + bias, model.decision_function(x)

    assert expected - expected.mean(1, keepdims=True) == pytest.approx(
        scores - scores.mean(1, keepdims=True), abs=1e-3
    )
    assert np.float32 == weight.dtype == bias.dtype


def test_nothing_but_the_head_can_learn(data: ImageSet) -> None:
    """With no trainable stage the pooled features are stored, and the whole trunk stays as it
    was."""
    backbone = make()
    before, rows = tensors(backbone), list[dict[str, Any]]()
    result = fit(
        backbone, data, plan(backbone, trainable=(), head_init="zero", epochs=8), log=rows.append
    )

    assert all(torch.equal(before[key], tensor) for key, tensor in tensors(backbone).items())
    assert ["head", "head/no-decay"] == [group["name"] for group in rows[0]["groups"]]
    assert result.history[-1]["train/loss"] < math.log(3)


def test_rates_and_ratios_are_logged_by_group(data: ImageSet) -> None:
    """The ratio of two groups' learning rates never changes; a zero head is warming in a first
    epoch of one step."""
    backbone = make()
    result = fit(
        backbone,
        data,
        plan(backbone, head_init="zero", batch_size=64, epochs=3, trunk_lr_scale=0.5),
    )
    ratios = [row["lr/stage5"] / row["lr/head"] for row in result.history]
    factor = schedules.factors(plan(backbone), 3)

    assert [0.01 * factor(step) for step in range(3)] == pytest.approx(
        [row["lr/head"] for row in result.history]
    )
    assert [0.5 * 0.8] * 3 == pytest.approx(ratios)
    assert "warming" == result.history[0]["update_ratio/head"]
    assert 0 < result.history[1]["update_ratio/head"]
    assert 0 < result.history[1]["update_ratio/stage5"] < 0.1


def test_l2_sp_keeps_the_trunk_near_its_start(data: ImageSet) -> None:
    """A strong pull leaves the trainable stages closer to where they began."""
    distances = []
    for strength in (0.0, 300.0):
        backbone = make()
        before = tensors(backbone)
        fit(
            backbone,
            data,
            plan(backbone, l2_sp=strength, epochs=4, optimizer="sgd", clip=0.0, lr=0.005),
            val_index=None,
        )
        distances.append(
            sum(
                float((t - before[key]).float().square().sum())
                for key, t in tensors(backbone).items()
            )
        )

    assert distances[1] < 0.5 * distances[0]


@pytest.mark.parametrize(
    "changes",
    [{"mixup": 0.2}, {"label_smoothing": 0.1}, {"augment": "strong", "flip": False}, {"ema": True}],
)
@pytest.mark.parametrize("stored", [True, False])
def test_options_change_the_weights(
    changes: dict[str, Any], stored: bool, data: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each option has an effect, with stored activations and without, and gives finite weights."""
    if not stored:
        plainly(monkeypatch)
    heads = []
    for options in ({}, changes):
        backbone = make()
        result = fit(backbone, data, plan(backbone, **options), val_index=None)
        heads.append(result.head_weight)
        assert np.isfinite(result.head_weight).all()

    assert not np.array_equal(*heads)


def test_clipping_bounds_the_step(data: ImageSet) -> None:
    """With a tiny largest norm and no momentum yet, one step of SGD moves all weights together by
    lr times that norm."""
    backbone = make()
    training = plan(
        backbone,
        optimizer="sgd",
        clip=1e-3,
        epochs=1,
        batch_size=64,
        trunk_lr_scale=1.0,
        layer_decay=1.0,
        weight_decay=0.0,
    )
    width = backbone.network.widths["pooled"]
    before = tensors(backbone)
    result = fit(
        backbone, data, training, head_start=(np.zeros((3, width)), np.zeros(3)), val_index=None
    )
    moved = [
        (t - before[key]).double().square().sum().item()
        for key, t in tensors(backbone).items()
        if t.is_floating_point()
    ]
    head = (
        np.square(result.head_weight, dtype=np.float64).sum()
        + np.square(result.head_bias, dtype=np.float64).sum()
    )

    assert 0.01 * 1e-3 == pytest.approx(math.sqrt(sum(moved) + head), rel=1e-2)


def test_the_average_is_what_is_kept(data: ImageSet) -> None:
    """A run of one step has nothing to average; over more steps the kept weights are neither the
    last nor the first."""
    heads = {}
    for ema, size in itertools.product((True, False), (64, 4)):
        backbone = make()
        training = plan(backbone, ema=ema, epochs=1, batch_size=size, head_init="zero")
        heads[ema, size] = fit(backbone, data, training, val_index=None).head_weight

    assert np.array_equal(heads[True, 64], heads[False, 64])
    assert 0 < np.abs(heads[True, 4]).sum() < 0.999 * np.abs(heads[False, 4]).sum()


def test_class_weights_favour_their_class(data: ImageSet) -> None:
    """A heavy class is predicted more often; balanced weights are n / (C n_c); bad ones are
    refused."""
    uneven = np.concatenate(
        [np.flatnonzero(data.labels[TRAIN] == 0), np.flatnonzero(data.labels[TRAIN] == 1)[:3]]
    )
    backbone = make()
    training = plan(backbone, class_weight="balanced")
    weights = loop.class_weights_of(data.labels[uneven], 3, training, None)

    assert [18 / (3 * 15), 18 / (3 * 3), 18 / 3] == pytest.approx(weights.tolist())
    favoured = fit(backbone, data, plan(backbone, head_init="zero"), class_weights=[1, 50, 1])
    assert favoured.val_scores is not None
    assert (favoured.val_scores[-1].argmax(1) == 1).mean() > 0.5
    with pytest.raises(UserError, match="class weights"):
        fit(backbone, data, class_weights=[1, 0, 1])


# --------------------------------------------------------------------------------- batches and ends


@pytest.mark.parametrize("count", [1, 3, 17])
@pytest.mark.parametrize("norm_moves", [False, True])
def test_small_sets_train(count: int, norm_moves: bool, data: ImageSet) -> None:
    """Fewer images than a batch, or one more than fits, take steps; a single one cannot move
    BatchNorm and says so."""
    backbone = make()
    training = plan(backbone, norm_moves=norm_moves, head_init="zero")
    if norm_moves and count == 1:
        with pytest.raises(UserError, match="batches of one image"):
            fit(backbone, data, training, train_index=np.arange(count))
        return
    result = fit(backbone, data, training, train_index=np.arange(count))

    assert 2 * math.ceil(count / 16) == result.steps


def test_batches_hold_every_item_once_and_are_even() -> None:
    """33 items in batches of 32 are 17 and 16, not 32 and 1; all of them appear, in order."""
    for count, size in itertools.product((1, 2, 31, 32, 33, 65, 100), (1, 7, 32)):
        items = [(i, 0) for i in range(count)]
        batches = feeding.even_batches(items, size)
        sizes = [len(batch) for batch in batches]

        assert items == [item for batch in batches for item in batch]
        assert max(sizes) <= size
        assert max(sizes) - min(sizes) <= 1
        assert math.ceil(count / size) == len(batches)


def test_patience_ends_the_training_and_the_start_can_win(
    data: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gain it stops after `patience` epochs, keeps the weights from before the first step,
    and says both."""
    monkeypatch.setattr(loop, "CHOOSES", 1)
    backbone = make()
    before = tensors(backbone)
    result = fit(backbone, data, plan(backbone, lr=1e-12, epochs=9, patience=2))
    other = make()
    worse = fit(other, data, plan(backbone, lr=0.3, epochs=2, clip=0.0, optimizer="sgd"))

    assert 2 == len(result.history)
    assert "validation accuracy has not gained in 2 epochs" == result.stopped
    assert 0 == worse.best_epoch
    assert any("before the first step" in warning for warning in worse.warnings)
    for key, tensor in tensors(backbone).items():
        assert torch.allclose(before[key].float(), tensor.float()), key
    assert all(torch.equal(before[key], tensor) for key, tensor in tensors(other).items())


def test_a_gain_within_the_noise_is_pointed_out() -> None:
    """A better top-1 that is less than one binomial standard error away is called so, with its
    size; a real one is not."""
    state = checkpoints.State(start={"val/top1": 0.80}, history=[{"val/top1": 0.82}], best_epoch=1)
    (doubt,) = loop._doubts(state, 100)

    assert (
        "from 80.0% to 82.0%: less than one binomial standard error (3.8% with 100 images)" in doubt
    )
    assert [] == loop._doubts(state, 10_000)
    state.history[0]["val/top1"] = 0.70
    assert ["validation top-1 fell from 80.0% to 70.0% (n = 100)"] == loop._doubts(state, 100)


def test_bad_input_is_refused_by_name(data: ImageSet) -> None:
    """No images, unlabelled images, shared parts and unknown words give errors that say what is
    wrong."""
    backbone = make()
    unlabelled = dataclasses.replace(data, labels=np.where(np.arange(60) == 7, -1, data.labels))
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("no training images", lambda: fit(backbone, data, train_index=[])),
        ("label -1 is none of the 3 classes", lambda: fit(backbone, unlabelled)),
        ("label 2 is none of the 2 classes", lambda: fit(backbone, data, classes=2)),
        ("train and validate", lambda: fit(backbone, data, val_index=[3, 50])),
        ("no device 'warp'", lambda: fit(backbone, data, device="warp")),
        ("no stage stage99", lambda: fit(backbone, data, plan(backbone, trainable=("stage99",)))),
        ("'prob'", lambda: fit(backbone, data, plan(backbone, head_init="prob"))),
        ("batch_size is 0", lambda: fit(backbone, data, plan(backbone, batch_size=0))),
        ("no precision", lambda: fit(backbone, data, precision="fp8")),
        ("'wild'", lambda: fit(backbone, data, plan(backbone, augment="wild"))),
    ]
    for words, call in cases:
        with pytest.raises(UserError, match=words):
            call()


def test_a_bad_image_is_named(data: ImageSet) -> None:
    """An image that cannot be decoded stops the training with its path."""
    broken = dataclasses.replace(
        data, source=lambda path: data.source(path)[: 90 if path == "9.png" else None]
    )  # type: ignore[misc]
    with pytest.raises(UserError, match=r"colours/9\.png: (truncated|damaged)"):
        fit(make(), broken)


def test_progress_counts_to_its_end(data: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress never goes back and ends at the total that it named: images stored, and images
    trained on."""
    for expected in (2 * 45 + 15 + 2 * 45, 2 * 45):
        calls: list[tuple[int, int]] = []
        fit(make(), data, progress=lambda done, total, calls=calls: calls.append((done, total)))

        assert (expected, expected) == calls[-1]
        assert calls == sorted(calls)
        assert {expected} == {total for _, total in calls}
        plainly(monkeypatch)


# ---------------------------------------------------------------------------------------- precision


def test_slow_bf16_convolutions_run_in_float32() -> None:
    """Under autocast, strided and wide depthwise convolutions give bf16 of the float32 result;
    others are left alone."""
    torch.manual_seed(0)
    parts = {
        "wide": nn.Conv2d(8, 8, 5, padding=2, groups=8),
        "strided": nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
        "small": nn.Conv2d(8, 8, 3, padding=1, groups=8),
        "dense": nn.Conv2d(8, 8, 5),
        "frozen": nn.Conv2d(8, 8, 5, groups=8).requires_grad_(False),
    }
    module, x = nn.ModuleDict(parts), torch.randn(2, 8, 9, 9)
    replaced = tails.slow_in_bf16(module)
    expected = parts["wide"](x.bfloat16().float()).bfloat16()
    with tails.replaced(module, replaced), torch.autocast("cpu", torch.bfloat16):
        found = parts["wide"](x.bfloat16())

    assert {"wide", "strided"} == set(replaced)
    assert torch.equal(expected, found)
    assert "forward" not in parts["wide"].__dict__


def test_bf16_learns_what_float32_learns(data: ImageSet) -> None:
    """Both precisions end at nearly the same validation loss; the log says which one was used."""
    losses = {}
    for precision in ("float32", "bf16"):
        backbone, rows = make(), list[dict[str, Any]]()
        result = fit(
            backbone, data, plan(backbone, augment="none"), precision=precision, log=rows.append
        )
        losses[rows[0]["bf16"]] = result.history[-1]["val/loss"]

    assert losses[False] == pytest.approx(losses[True], abs=0.05)


# --------------------------------------------------------------------------------- no longer finite


def poisoned(backbone: Backbone, key: str, at_step: int) -> None:
    """Make the gradient of one parameter NaN at a step."""
    steps = itertools.count(1)
    parameter = backbone.module.get_parameter(key)
    parameter.requires_grad_(True)
    parameter.register_hook(
        lambda gradient: gradient * math.nan if next(steps) == at_step else gradient
    )


def test_a_nan_gradient_stops_with_step_and_group(data: ImageSet, tmp_path: Path) -> None:
    """NaN in one group in the fifth step: the error names both, and the model is that of the last
    finished epoch."""
    backbone = make()
    key = next(
        key
        for key, p in backbone.module.named_parameters()
        if key.startswith("blocks.4") and p.ndim > 1
    )
    poisoned(backbone, key, at_step=5)
    with pytest.raises(
        UserError, match=r"at step 5 \(epoch 2\); not finite: gradients of stage5 *\n"
    ):
        fit(backbone, data, checkpoint=tmp_path)
    good = safetensors.torch.load_file(tmp_path / "last.safetensors")

    for name, tensor in tensors(backbone).items():
        assert torch.isfinite(tensor).all(), name
        if f"good/trunk.{name}" in good:
            assert torch.equal(good[f"good/trunk.{name}"], tensor), name
    assert any(name.startswith("good/trunk.") for name in good)


def test_broken_weights_are_named_before_gradients(data: ImageSet) -> None:
    """Where a weight is NaN to begin with, its group is named, not all those that it spoils."""
    backbone = make()
    with torch.no_grad():
        backbone.module.get_parameter("blocks.4.0.conv_pw.weight").view(-1)[0] = math.nan
    head = (np.zeros((3, backbone.network.widths["pooled"])), np.zeros(3))
    with pytest.raises(
        UserError, match=r"at step 1 \(epoch 1\); not finite: weights of stage5 *\n"
    ):
        fit(backbone, data, head_start=head, val_index=None)


def test_a_learning_rate_that_explodes_is_noticed(data: ImageSet) -> None:
    """An absurd rate ends in the error that advises a lower one, never in NaN results."""
    backbone = make()
    training = plan(backbone, optimizer="sgd", lr=1e30, clip=0.0, trunk_lr_scale=1.0)
    with pytest.raises(UserError, match=r"(?s)step \d+.*lower --set train\.lr"):
        fit(backbone, data, training)
    assert all(torch.isfinite(tensor).all() for tensor in tensors(backbone).values())


def test_folders_train_too(shapes: Path) -> None:
    """An image folder from disk goes through the same door."""
    backbone, source = make(), images.load(shapes)
    result = fit(
        backbone, source, train_index=np.arange(0, 60, 2), val_index=np.arange(1, 60, 2), seed=3
    )

    assert 2 == len(result.history)


def test_a_head_on_several_taps_starts_from_a_logistic_regression(data: ImageSet) -> None:
    """Before the first step it scores what scikit-learn's regression on the normalised taps scores;
    trained with stored activations, taps of frozen and of moving stages reach it alike."""
    from sklearn.linear_model import LogisticRegression

    backbone = make()
    taps = ("stage2/3x3", "stage5", "pooled")
    training = plan(backbone, taps=taps, augment="none", head_strength=2.0, label_smoothing=0.1)
    result = fit(backbone, data, training, precision="float32")
    fresh = make()
    reader = extractor.Reader(fresh, tuple(map(Tap.parse, taps)))
    from finetune.data import decode

    def read(index: np.ndarray) -> np.ndarray:
        pixels = [decode.to_input(data.read(int(i)), fresh.network.preprocess) for i in index]
        with torch.no_grad():
            blocks = [block.numpy() for block in reader(torch.from_numpy(np.stack(pixels)))]
        return side_by_side(blocks, normalize=True)

    machine = LogisticRegression(C=2.0, max_iter=5000, tol=1e-8)
    machine.fit(read(TRAIN), data.labels[TRAIN])
    assert result.val_scores is not None
    expected = machine.predict_proba(read(VAL))
    start = torch.softmax(torch.from_numpy(result.val_scores[0]), 1).numpy()

    assert expected == pytest.approx(start, abs=0.03)
    assert result.head_weight.shape == (3, sum(fresh.network.width(Tap.parse(t)) for t in taps))


def test_taps_are_read_alike_with_and_without_stored_activations(
    data: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored or not, a head on taps before and behind the freeze boundary learns the same."""
    heads = []
    for _ in range(2):
        backbone = make()
        training = plan(backbone, taps=("stage2", "stage5", "pooled"), augment="none")
        heads.append(fit(backbone, data, training, precision="float32").head_weight)
        plainly(monkeypatch)

    assert heads[0] == pytest.approx(heads[1], rel=1e-2, abs=1e-3)


@pytest.mark.parametrize(
    ("top1", "calibrated", "kept"),
    [
        ([0.5, 0.6, 0.7], [1, 1, 1], 2),
        ([0.5, 0.6, 0.6, 0.6], [1, 0.9, 0.8, 0.7], 3),
        ([0.5, 0.4], [1, 0.1], 0),
    ],
)
def test_epochs_are_chosen_by_accuracy_then_by_calibrated_loss(
    top1: list[float], calibrated: list[float], kept: int
) -> None:
    """Each is the mean of an epoch and the one before; the start stands for itself."""
    rows = [{"val/top1": a, "val/calibrated": c} for a, c in zip(top1, calibrated, strict=True)]
    best = max(range(len(rows)), key=lambda epoch: loop._worth(rows, epoch))

    assert kept == best
