"""Where a network runs: the engine, the precision and the device."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune import hardware
from finetune.errors import UserError
from finetune.network import Tap

ENGINES = ("auto", "openvino", "torch")

PRECISIONS = ("auto", "bf16", "float32")


@dataclass(frozen=True)
class Way:
    """How a network runs: what is part of the key of every feature."""

    engine: str
    precision: str

    def __str__(self) -> str:
        return f"{self.engine} {self.precision}"


def ways(engine: str = "auto", precision: str = "auto", taps: Sequence[Tap] = ()) -> list[Way]:
    """The ways to read `taps` that the words leave open here; the first one is taken unless another
    one is measured to be clearly faster.

    Raises `UserError` where OpenVINO is asked for and not installed, and for unknown words.
    """
    if engine not in ENGINES:
        raise UserError(
            f"no engine is called {engine!r}",
            where="--engine",
            fix=f"choose one of {', '.join(ENGINES)}",
        )
    if precision not in PRECISIONS:
        raise UserError(
            f"no precision is called {precision!r}",
            where="--precision",
            fix=f"choose one of {', '.join(PRECISIONS)}",
        )
    if engine == "openvino" and not has_openvino():
        raise UserError(
            "OpenVINO is not installed",
            where="--engine",
            fix="pip install openvino, or use --engine torch",
        )
    engines = [engine]
    if engine == "auto":
        engines = ["openvino", "torch"] if has_openvino() and not _has_gpu() else ["torch"]
    if any(tap.stage == "moments" for tap in taps):
        engines = ["torch"]  # the inputs of BatchNorm: OpenVINO folds them away
    precisions = ["float32", "bf16"] if precision == "auto" else [precision]
    return [Way(name, bits) for name in engines for bits in precisions]


def has_openvino() -> bool:
    """Whether OpenVINO is installed here."""
    return importlib.util.find_spec("openvino") is not None


def _has_gpu() -> bool:
    """Whether torch would find a CUDA device, asked without importing it where no driver is
    there."""
    return hardware.gpu() is not None and torch_device() == "cuda"


def torch_device() -> str:
    """The device that torch computes on, in as many threads as this process may use."""
    import torch

    if (count := hardware.fewer_threads()) and torch.get_num_threads() > count:
        torch.set_num_threads(count)
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@functools.cache
def has_bf16(engine: str) -> bool:
    """Whether bfloat16 arithmetic is in the hardware, as it says itself: elsewhere it is emulated.
    It does not tell that bf16 is fast."""
    if engine == "openvino":
        return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    import torch

    if torch_device() == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def _openvino() -> Any:
    """The module openvino, and the one place that imports it."""
    # It sends telemetry and writes into the home folder unless this module cannot be imported when
    # it is first.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


@functools.cache
def _core() -> Any:
    return _openvino().Core()
