"""Files of other programs, opened by these."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import torch

from finetune.backbones import create
from finetune.backbones.stages import Backbone
from finetune.errors import UserError
from finetune.export import formats, graph
from finetune.export.graph import Part


@pytest.fixture(scope="module")
def traced(tiny: Backbone) -> tuple[Part, Any]:
    """Taps on a grid and by GeM, a kernel machine and an average in one graph, and that graph as
    torch.export has it: traced once."""
    first = exports.model(tiny, exports.linear(tiny))
    (whole,) = graph.parts(exports.average(first, exports.model(tiny, exports.kernel(tiny))))
    return whole, graph.program(whole)


@pytest.fixture
def part(traced: tuple[Part, Any], monkeypatch: pytest.MonkeyPatch) -> Part:
    """The graph, which is not traced again."""
    monkeypatch.setattr(graph, "program", lambda part: traced[1])
    return traced[0]


def labels(path: Path, to: str) -> list[str]:
    """The labels inside a file, read without Regraft."""
    text: Any
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        text = session.get_modelmeta().custom_metadata_map["labels"]
    elif to == "openvino":
        import openvino

        text = openvino.Core().read_model(path).get_rt_info(["model_info", "labels"]).astype(str)
    else:
        kept = {"labels.json": ""}
        torch.export.load(path, extra_files=kept)
        text = kept["labels.json"]
    return list(json.loads(text))


@pytest.mark.parametrize("to", ["onnx", "openvino", "torch-export"])
def test_a_file_says_what_the_graph_says(
    to: str, part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one image and for several, to 1e-5, with the labels inside, whatever is in them. ONNX is
    also read where onnxruntime is not installed: by OpenVINO."""
    path = tmp_path / formats.FILES[to]
    formats.write(part, path, to, {"labels": exports.CLASSES})
    _, ask = formats.opened(path, to)
    side = part.preprocess.size
    x = np.random.default_rng(0).normal(size=(5, 3, side, side)).astype(np.float32)
    with torch.inference_mode():
        expected = part.graph(torch.from_numpy(x)).numpy()

    for batch in (1, 2, 5):
        assert expected[:batch] == pytest.approx(ask(x[:batch]), abs=1e-5)
    assert list(exports.CLASSES) == labels(path, to)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    other, ask = formats.opened(path, to)
    assert {"torch-export": "torch"}.get(to, "openvino") == other
    assert expected == pytest.approx(ask(x), abs=1e-5)


@pytest.mark.slow
def test_a_network_that_openvino_cannot_convert_from_torch_goes_by_way_of_onnx(
    tmp_path: Path,
) -> None:
    """A transformer whose position table is resized says in OpenVINO what it says in torch."""
    own = create.load("test_vit", "random")
    (whole,) = graph.parts(exports.model(own, exports.linear(own, exports.POOLED)))
    formats.write(whole, tmp_path / "model.xml", "openvino", {"labels": exports.CLASSES})
    _, ask = formats.opened(tmp_path / "model.xml", "openvino")
    side = whole.preprocess.size
    x = np.random.default_rng(0).normal(size=(3, 3, side, side)).astype(np.float32)
    with torch.inference_mode():
        expected = whole.graph(torch.from_numpy(x)).numpy()

    assert expected == pytest.approx(ask(x), abs=1e-5)
    assert list(exports.CLASSES) == labels(tmp_path / "model.xml", "openvino")
    assert {"model.xml", "model.bin"} == {path.name for path in tmp_path.iterdir()}


def test_a_missing_library_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal says what is missing, and how to get it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnx and onnxscript[\s\S]*regraft\[export\]"):
        formats.check_installed("onnx")


def test_what_torch_cannot_trace_is_told_without_a_traceback(
    part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal holds torch's reason and another way."""

    def fails(part: Part) -> None:
        raise RuntimeError("no such operator\nand many lines")

    monkeypatch.setattr(graph, "program", fails)
    with pytest.raises(UserError, match=r"no such operator[\s\S]*timm"):
        formats.write(part, tmp_path / "model.xml", "openvino", {})
