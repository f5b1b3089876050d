"""Where a network runs: the engine, the precision and the device."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.network import Tap

ENGINES = ("auto", "openvino", "torch")

PRECISIONS = ("auto", "bf16", "float32")


def resolve(
    engine: str = "auto", precision: str = "auto", taps: Sequence[Tap] = ()
) -> tuple[str, str]:
    """The engine and precision that will be used here for `taps`: part of the key of every feature.

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
    if engine == "auto":
        engine = "openvino" if has_openvino() and not _has_gpu() else "torch"
    if any(tap.stage == "moments" for tap in taps):
        engine = "torch"  # the inputs of BatchNorm: OpenVINO folds them away
    if precision == "auto":
        precision = "bf16" if _fast_bf16(engine) else "float32"
    return engine, precision


def has_openvino() -> bool:
    """Whether OpenVINO is installed here."""
    return importlib.util.find_spec("openvino") is not None


def _has_gpu() -> bool:
    """Whether torch would find a CUDA device, asked without importing it where no driver is
    there."""
    return Path("/dev/nvidiactl").exists() and _torch_device() == "cuda"


def _torch_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@functools.cache
def _fast_bf16(engine: str) -> bool:
    """Whether bfloat16 arithmetic is in the hardware (elsewhere it is emulated, slower than
    float32)."""
    if engine == "openvino":
        return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    import torch

    if _torch_device() == "cuda":
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
