"""The plain-data description of a network: taps as text, widths, and JSON there and back."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import UserError
from finetune.network import Network, Preprocess, Tap

NETWORK = Network(
    name="resnet18.a1_in1k",
    digest="ab" * 32,
    source="ImageNet, from a package",
    pretraining="imagenet",
    preprocess=Preprocess(224, 236, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    widths={"pooled": 512, "fc7": 4096, "stage1": 64, "stage1/3x3": 576, "moments": 9600},
)
STAGES = st.one_of(
    st.sampled_from(["pooled", "stem", "neck", "fc6", "fc7-pre", "moments"]),
    st.integers(1, 40).map("stage{}".format),
)
TAPS = st.one_of(
    st.builds(Tap, STAGES, grid=st.integers(1, 9)),
    st.builds(Tap, STAGES, pool=st.sampled_from(["mean", "gem", "rmac"])),
)


# --------------------------------------------------------------------------------------------- taps


@pytest.mark.parametrize(
    ("text", "tap"),
    [
        ("pooled", Tap("pooled")),
        ("stage6", Tap("stage6")),
        (" stage12 ", Tap("stage12")),
        ("stage6/3x3", Tap("stage6", grid=3)),
        ("stage6/1x1", Tap("stage6")),
        ("stage6/gem", Tap("stage6", pool="gem")),
        ("stage6/mean", Tap("stage6")),
        ("stage4/rmac", Tap("stage4", pool="rmac")),
        ("fc7", Tap("fc7")),
        ("fc7-pre", Tap("fc7-pre")),
    ],
)
def test_a_tap_is_read_from_its_written_form(text: str, tap: Tap) -> None:
    """The forms that the documentation promises."""
    assert tap == Tap.parse(text)


@given(TAPS)
def test_a_tap_survives_being_written_and_read(tap: Tap) -> None:
    """Text is the form in which taps are stored: nothing may be lost on the way."""
    assert tap == Tap.parse(str(tap))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pool",
        "stage",
        "stage0",
        "stage06",
        "stage6/",
        "stage6/3x4",
        "stage6/0x0",
        "stage6/max",
        "fc8",
        "fc7/pre",
        "/3x3",
        "stage6/3x3/gem",
    ],
)
def test_anything_else_is_refused_with_the_forms_that_exist(text: str) -> None:
    """A misspelt tap names itself and shows how taps are written."""
    with pytest.raises(UserError, match="no tap is written") as caught:
        Tap.parse(text)

    assert repr(text) in caught.value.what
    assert "stage6/3x3" in caught.value.fix


def test_a_tap_has_a_grid_or_a_pool() -> None:
    """Both at once cannot be written as text, so such a tap cannot be made."""
    with pytest.raises(ValueError, match="a grid or a pool"):
        Tap("stage6", grid=3, pool="gem")


# ------------------------------------------------------------------------------------------- widths


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ("pooled", 512),
        ("fc7", 4096),
        ("stage1", 64),
        ("stage1/3x3", 576),
        ("stage1/2x2", 256),
        ("stage1/gem", 64),
        ("stage1/rmac", 64),
        ("moments", 9600),
    ],
)
def test_the_width_of_a_tap(text: str, width: int) -> None:
    """Named in `widths`, or derived from the width of its stage: a grid has cells × channels
    features."""
    assert width == NETWORK.width(Tap.parse(text))


@pytest.mark.parametrize(
    "text",
    [
        "stage9",
        "stage9/3x3",
        "stage9/gem",
        "fc6",
        "pooled/3x3",
        "pooled/2x2",
        "pooled/gem",
        "fc7/rmac",
        "moments/gem",
    ],
)
def test_a_tap_that_the_network_lacks_is_refused_with_those_that_it_has(text: str) -> None:
    """A vector has neither a grid nor a pool: such a tap would be the plain one under another
    name."""
    with pytest.raises(UserError, match="has no tap") as caught:
        NETWORK.width(Tap.parse(text))

    assert text in caught.value.what
    assert "pooled, fc7, stage1, stage1/3x3" in caught.value.fix


# --------------------------------------------------------------------------------------------- JSON


def test_a_network_survives_the_way_through_json() -> None:
    """What a run directory holds is the network, field by field, tuples included."""
    assert NETWORK == Network.from_json(json.loads(json.dumps(NETWORK.to_json())))


def test_a_network_does_not_change() -> None:
    """It names features in the store: whoever needs another one makes another one."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        NETWORK.digest = "x"  # type: ignore[misc]
