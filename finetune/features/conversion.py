"""Networks converted for OpenVINO: made once with all their taps, kept in the cache, compiled from
there.

What is not whole in the cache is made again; where nothing can be kept, it is made in memory.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune import files, hardware, names
from finetune.backbones.device import _core, _openvino
from finetune.errors import UserError
from finetune.network import Network, Tap

if TYPE_CHECKING:
    from finetune.backbones.stages import Backbone

# Batches are static: an image then gets the same bits whatever comes with it (`engine.Runner` says
# how far).
BATCH = 4  # more would fall out of a CPU's cache
# of what its largest operation reads and writes in float32, a stream of OpenVINO takes
HELD = {"bf16": 0.4, "float32": 0.8}
FORMAT = 4  # of the converted networks, and of how they are run; a change makes the old ones unused


def round_kernels(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round convolution kernels `(…, height, width)` to values that bfloat16 holds, and keep the
    sum of each kernel.

    Rounded one by one, the weights of a kernel shift its sum, hence its answer to every smooth area
    of an image: in the first depthwise layers of a network that is most of what bfloat16 costs. So
    the rounding error of each weight is carried over to the next one of the same kernel.
    """
    kernels = np.array(weight, dtype=np.float32).reshape(*weight.shape[:-2], -1)
    carry = np.zeros(kernels.shape[:-1], dtype=np.float32)
    for i in range(kernels.shape[-1]):
        exact = kernels[..., i] + carry
        bits = exact.view(np.uint32)
        # Half of the last bit that stays, and ties to even: the upper half of a float32 is the
        # bfloat16.
        kernels[..., i] = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)
        carry = exact - kernels[..., i]
    return kernels.reshape(weight.shape)


def one_stream(model: Any, network: Network, precision: str) -> str:
    """`1` where the memory is short of two batches at a time, else no text; refused where one does
    not fit."""
    side = network.preprocess.size
    batch = HELD[precision] * BATCH * side**2
    if hardware.fits(hardware.cores() * batch * hardware.MANY):
        return ""
    sizes = []
    for node in model.get_ops():
        if node.get_type_name() != "Constant":
            ends = [*node.outputs(), *node.input_values()]
            sizes.append(
                sum(
                    end.get_element_type().size * int(np.prod(list(end.get_shape())))
                    for end in ends
                )
            )
    need = HELD[precision] * max(sizes)
    if not hardware.fits(need):
        from finetune.backbones import memory

        fix = memory.smaller(need, side)
        hardware.afford(
            need, f"{network.name} with an input of {side} pixels", where="input size", fix=fix
        )
    return "" if hardware.fits(hardware.cores() * need) else "1"


def round_weights(model: Any) -> None:
    for node in model.get_ops():
        if node.get_type_name() in ("Convolution", "GroupConvolution"):
            weight = node.input_value(1).get_node()
            if weight.get_type_name() == "Constant" and tuple(weight.shape)[-2:] != (1, 1):
                rounded = _openvino().op.Constant(round_kernels(weight.data))
                node.input(1).replace_source_output(rounded.output(0))


def standard(network: Network) -> tuple[Tap, ...]:
    """All the taps of a network that its `widths` name: they are converted together, once."""
    return tuple(Tap.parse(text) for text in network.widths if text != "moments")


def compiled(model: Any, options: dict[str, str], name: str) -> Any:
    """The model compiled, by way of the copy that OpenVINO keeps in the cache where it is whole.

    OpenVINO does not see a changed byte in its copy. So each model has a folder for it, sealed when
    it is written.
    """
    try:
        folder = files.cache_dir("compiled", "blobs", name)
        seal = folder / "seal.json"
        kept = sorted(folder.glob("*.blob"))
        if kept and not files.is_sealed(seal, kept):
            for path in kept:
                path.unlink(missing_ok=True)
            kept = []
        compiled = _core().compile_model(model, "CPU", {**options, "CACHE_DIR": _text(folder)})
        if (now := sorted(folder.glob("*.blob"))) != kept:
            files.seal(seal, now)
    except (
        OSError,
        UserError,
        RuntimeError,
    ):  # a cache that cannot be written, or OpenVINO's trouble with it
        return _core().compile_model(model, "CPU", options)
    return compiled


def converted(
    network: Network, taps: tuple[Tap, ...], load: Callable[[], Backbone]
) -> tuple[Any, str]:
    """The OpenVINO model with at least `taps` as outputs, named by them, and its own name: from the
    cache, else made now.

    Where nothing can be kept in the cache, it is made in memory.
    """
    every = standard(network)
    wanted = every if set(taps) <= set(every) else tuple(dict.fromkeys(taps))
    pre = network.preprocess  # how an image is cut to its input is no part of the graph
    made_of = [
        FORMAT,
        _openvino().__version__,
        BATCH,
        network.name,
        network.digest,
        pre.size,
        pre.mean,
        pre.std,
    ]
    name = f"{network.name}-{files.digest_json([*made_of, [str(tap) for tap in wanted]])[:24]}"
    with _converting:
        path = _place(f"{name}.xml")
        model = _kept(path) if path else None
        if model is None:
            model = _convert(load(), wanted)
            if path and _keep(model, path):
                # so that the first process runs what the later ones do
                model = _kept(path) or model
        return model, name


def _place(name: str) -> Path | None:
    try:
        path = files.cache_dir("compiled") / name
        _text(path)
        return path
    except UserError as error:
        _tell(str(error))
        return None


def _text(path: Path) -> str:
    """A path for OpenVINO, which takes no name that is not UTF-8."""
    if isinstance(names.to_database(str(path)), bytes):
        fix = "choose another folder with $REGRAFT_CACHE, or --engine torch"
        raise UserError("OpenVINO cannot use a cache whose name is not UTF-8", where=path, fix=fix)
    return str(path)


@functools.cache
def _tell(why: str) -> None:
    """Once, although a network may be opened several times."""
    files.note(f"going on without a cache, which takes longer: {' '.join(why.split())}")


def _kept(path: Path) -> Any:
    """The converted network in the cache; None where it is not there, or not what was written."""
    both, seal = (path, path.with_suffix(".bin")), path.with_suffix(".json")
    if not path.exists() or (seal.exists() and not files.is_sealed(seal, both)):
        return None
    try:
        model = _core().read_model(_text(path))
    except RuntimeError:
        return None
    if not seal.exists():  # an earlier version wrote it: it is sealed as it is
        with contextlib.suppress(OSError, UserError):
            files.seal(seal, both)
    return model


_converting = threading.Lock()


def _convert(backbone: Backbone, taps: tuple[Tap, ...]) -> Any:
    """The reader of `taps` in OpenVINO's format."""
    import torch

    from finetune.backbones import memory
    from finetune.backbones.extractor import Reader

    openvino = _openvino()
    side = backbone.network.preprocess.size
    memory.check(backbone.module, backbone.network.name, side, memory.CONVERTED * BATCH)
    reader = Reader(backbone, taps).eval()
    example = torch.zeros(BATCH, side, side, 3, dtype=torch.uint8)
    shape = [(openvino.PartialShape([BATCH, side, side, 3]), openvino.Type.u8)]
    with torch.inference_mode(), warnings.catch_warnings():
        # tracing warns of every shape that it fixes: fixed shapes are what we want
        warnings.simplefilter("ignore")
        # Traced here: convert_model would trace twice more, to check that the network gives the
        # same each time.
        model = openvino.convert_model(
            torch.jit.trace(reader, example, check_trace=False), input=shape
        )
    for output in model.outputs:
        output.get_tensor().set_names(set())
    for tap, output in zip(taps, model.outputs, strict=True):
        output.get_tensor().add_names({str(tap)})
    return model


def _keep(model: Any, path: Path) -> bool:
    """Write a converted network to the cache; False, and a note, where that fails: it costs time
    alone.

    The .xml is renamed last, so its existence means both are there.
    """
    temporary, seal = (
        path.with_name(f".{path.stem}.{threading.get_native_id()}.xml"),
        path.with_suffix(".json"),
    )
    try:
        with files.disk_errors(path):
            _openvino().save_model(model, str(temporary), compress_to_fp16=False)
            seal.unlink(missing_ok=True)  # that of a damaged one
            temporary.with_suffix(".bin").replace(path.with_suffix(".bin"))
            temporary.replace(path)
        files.seal(seal, (path, path.with_suffix(".bin")))
    except (
        RuntimeError,
        UserError,
    ) as error:  # OpenVINO raises the first for a full disk, and for a folder it may not write
        _tell(
            f"{path.parent}: the converted network cannot be written "
            f"({str(error).splitlines()[0][:100]})\n→ {files.CACHE_FIX}"
        )
        return False
    finally:
        with contextlib.suppress(OSError):
            temporary.with_suffix(".bin").unlink(missing_ok=True)
            temporary.unlink(missing_ok=True)
    return True
