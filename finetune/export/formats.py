"""A graph as a file of another program, with its labels inside; and that file opened again by the
program that it is for."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.backbones import device
from finetune.errors import UserError
from finetune.export import graph
from finetune.export.graph import Part

Floats = NDArray[np.float32]
Ask = Callable[[Floats], Floats]  # normalised images `(N, 3, S, S)` to probabilities `(N, C)`

FILES = {"onnx": "model.onnx", "openvino": "model.xml", "torch-export": "model.pt2"}
FORMATS = ("onnx", "openvino", "timm", "torch-export")
IMAGE, PROBABILITIES = "image", "probabilities"  # names of input and output
NEEDED = {"onnx": ("onnx", "onnxscript")}
INSTALL = "pip install 'regraft[export]'"


def check_installed(to: str) -> None:
    """Refuse a format whose libraries are not here, before any work is done."""
    missing = [name for name in NEEDED.get(to, ()) if importlib.util.find_spec(name) is None]
    if to == "openvino" and not device.has_openvino():
        raise UserError("openvino is not installed here", where="--to", fix="pip install openvino")
    if missing:
        what = f"writing {to} needs {' and '.join(missing)}, which is not installed here"
        raise UserError(what, where="--to", fix=INSTALL)


def write(part: Part, path: Path, to: str, about: Mapping[str, Any]) -> None:
    """Write the graph of `part`; `about` (plain data by name, each as JSON) goes into the file."""
    texts = {name: json.dumps(value, ensure_ascii=False) for name, value in about.items()}
    with _quiet():
        program = _traced(part)
        if to == "onnx":
            _write_onnx(program, path, texts)
        elif to == "openvino":
            _write_openvino(program, part, path, texts)
        else:
            torch.export.save(program, path, extra_files={f"{k}.json": v for k, v in texts.items()})


def _traced(part: Part) -> Any:
    try:
        return graph.program(part)
    except Exception as error:  # torch raises its own zoo of types for what it cannot trace
        what = (
            f"torch cannot make one graph of this run: {str(error).strip().splitlines()[0][:200]}"
        )
        fix = "--to timm holds a linear layer on pooled features without a graph"
        raise UserError(what, where="--to", fix=fix) from error


def opened(path: Path, to: str) -> tuple[str, Ask]:
    """The program that opens what `write` wrote, and the model asked through it."""
    if to == "torch-export":
        with _quiet():
            module = torch.export.load(path).module()

        def ask(x: Floats) -> Floats:
            with torch.inference_mode():
                return np.asarray(module(torch.from_numpy(x)))

        return "torch", ask
    if to == "onnx" and importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return "onnxruntime", lambda x: np.asarray(session.run([PROBABILITIES], {IMAGE: x})[0])
    return "openvino", _openvino_asked(path)


def _write_onnx(program: Any, path: Path, texts: Mapping[str, str]) -> None:
    import onnx

    made: Any = torch.onnx.export(
        program,
        input_names=[IMAGE],
        output_names=[PROBABILITIES],
        dynamo=True,
        verbose=False,
        external_data=False,
    )
    model = made.model_proto
    onnx.helper.set_model_props(model, dict(texts))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]  # they name the batch otherwise; a reader infers them
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _write_openvino(program: Any, part: Part, path: Path, texts: Mapping[str, str]) -> None:
    import openvino

    try:
        model = openvino.convert_model(program)
    except Exception as error:  # an operator that it does not know from torch
        model = _by_way_of_onnx(program, path, texts, error)
    model.reshape([-1, 3, part.preprocess.size, part.preprocess.size])
    for port, name in ((model.inputs[0], IMAGE), (model.outputs[0], PROBABILITIES)):
        port.get_tensor().set_names({name})
    for name, text in texts.items():
        model.set_rt_info(text, ["model_info", name])
    openvino.save_model(model, str(path), compress_to_fp16=False)


def _by_way_of_onnx(program: Any, path: Path, texts: Mapping[str, str], error: Exception) -> Any:
    """The model in OpenVINO: ONNX's exporter has computed what depends on no input, such as
    position tables that are resized."""
    import openvino

    try:
        check_installed("onnx")
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            _write_onnx(program, Path(folder) / FILES["onnx"], texts)
            return openvino.convert_model(Path(folder) / FILES["onnx"])
    except Exception:  # the first trouble is the one to tell
        why = str(error).strip().splitlines()[-1][:200]
        raise UserError(
            f"OpenVINO cannot convert this run: {why}",
            where="--to",
            fix=f"--to onnx, which OpenVINO opens, too ({INSTALL})",
        ) from error


def _openvino_asked(path: Path) -> Ask:
    import openvino

    # a processor that knows bfloat16 would use it, unless it is told not to
    model = openvino.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: np.array(model({IMAGE: x})[PROBABILITIES])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn and log at length of what they do inside."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
