"""Run a frozen network by OpenVINO or torch, in float32 or bf16: whichever is fastest here.

One function, `open_runner`, gives the same thing for all: static batches of uint8 pixels in,
float32 features out. What is fastest is timed when a network is first used (`timings`). A network
is converted for OpenVINO once, with all its taps, and kept in the cache; a later process opens the
converted copy without importing torch, and cuts it down to the taps that it wants.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune import device, files, hardware, names, timings
from finetune.device import Way, _core, _openvino
from finetune.errors import UserError
from finetune.network import Network, Tap

if TYPE_CHECKING:
    from finetune.backbones.stages import Backbone

# Batches are static: an image then gets the same bits whatever comes with it (`Runner` says how
# far).
OPENVINO_BATCH = 4  # more would fall out of a CPU's cache
# with 4, oneDNN computes a row of a small map in another way where it stands last: other bits
TORCH_BATCH = 8
GPU_BATCH = 64  # there, the more the better; not measured
# of what its largest operation reads and writes in float32, a stream of OpenVINO takes
HELD = {"bf16": 0.4, "float32": 0.8}
# seconds after OpenVINO was ready, in which torch may begin to be timed beside it
BESIDE = 1.5
FORMAT = 4  # of the converted networks, and of how they are run; a change makes the old ones unused

Pixels = NDArray[np.uint8]
Blocks = list[NDArray[np.float32]]


@dataclass(frozen=True)
class Runner:
    """A network ready to run. `stream` takes batches of at most `batch` images, and keeps their
    order.

    `engine` is openvino or torch, `precision` bf16 or float32: what is really used.

    An image gets the same bits alone and in any batch with OpenVINO, and with torch in 1, 2 or 4
    threads. Another number of threads (that of the cores, or $OMP_NUM_THREADS) does not divide a
    batch evenly, and oneDNN computes the rows at the seams in another order: measured up to 6e-7 of
    the largest feature in float32, and 5e-3 in bf16 (in a network with GroupNorm; most differ in no
    bit). Several threads may stream with OpenVINO at once; with torch, one at a time.
    """

    taps: tuple[Tap, ...]
    engine: str
    precision: str
    batch: int
    stream: Callable[[Iterable[Pixels]], Iterator[Blocks]]

    def __call__(self, pixels: Pixels) -> Blocks:
        """Features of any number of images `(n, size, size, 3)` uint8: one `(n, width)` float32
        array a tap."""
        batches = (pixels[i : i + self.batch] for i in range(0, max(len(pixels), 1), self.batch))
        parts = list(self.stream(batches))
        return [np.concatenate(blocks) for blocks in zip(*parts, strict=True)]


def open_runner(
    network: Network,
    taps: Sequence[Tap],
    load: Callable[[], Backbone],
    *,
    engine: str = "auto",
    precision: str = "auto",
) -> Runner:
    """Open `network` for reading `taps`; `load` gives its torch backbone, and is called only where
    that is needed. What `auto` means is timed where it is not known yet."""
    runners: dict[str, Runner] = {}
    way = _fastest(network, tuple(taps), load, device.ways(engine, precision, taps), runners)
    return runners.get(str(way)) or _open(network, tuple(taps), load, way)


def fastest(
    network: Network,
    taps: Sequence[Tap],
    load: Callable[[], Backbone],
    engine: str = "auto",
    precision: str = "auto",
) -> Way:
    """The way in which `open_runner` would run `network`; opened only where it has to be timed."""
    return _fastest(network, tuple(taps), load, device.ways(engine, precision, taps), {})


def task(network: Network) -> timings.Task:
    """What is remembered of a network's speed goes by this."""
    return timings.Task("extract", network.name, network.digest, network.preprocess.size)


def rates(
    network: Network, taps: Sequence[Tap], load: Callable[[], Backbone], ways: Sequence[Way]
) -> dict[str, float]:
    """Images a second by each of `ways`, timed now."""
    return timings.measure([str(way) for way in ways], _works(network, tuple(taps), load, ways, {}))


def _fastest(
    network: Network,
    taps: tuple[Tap, ...],
    load: Callable[[], Backbone],
    ways: Sequence[Way],
    runners: dict[str, Runner],
) -> Way:
    """The fastest of `ways`; `runners` gets those that were opened for it."""
    for tap in taps:
        network.width(tap)
    named = {str(way): way for way in ways}
    works = _works(network, taps, load, ways, runners)
    return named[timings.choose(task(network), list(named), works)]


def _works(
    network: Network,
    taps: tuple[Tap, ...],
    load: Callable[[], Backbone],
    ways: Sequence[Way],
    runners: dict[str, Runner],
) -> Callable[[str], timings.Work | None]:
    """What opens a way, by its words, and gives a few batches of work for it."""
    named = {str(way): way for way in ways}
    ready: list[float] = []  # when the first way was: converting a network is no part of timing it

    def opened(words: str) -> timings.Work | None:
        way = named[words]
        if way.engine != ways[0].engine and (
            "torch" not in sys.modules or time.perf_counter() - ready[0] > BESIDE
        ):
            return None  # importing it, or waiting longer, would cost more than it can bring
        runner = runners[words] = _open(network, taps, load, way)
        ready.append(time.perf_counter())
        side = network.preprocess.size
        count = runner.batch * (max(2, hardware.threads()) if way.engine == "openvino" else 1)
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)

        def work() -> int:
            runner(pixels)
            return count

        return work

    return opened


def _open(
    network: Network, taps: tuple[Tap, ...], load: Callable[[], Backbone], way: Way
) -> Runner:
    if way.engine == "openvino":
        return _open_openvino(network, taps, load, way.precision)
    return _open_torch(load(), taps, way.precision)


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


# -------------------------------------------------------------------------------------------- torch


def _open_torch(backbone: Backbone, taps: tuple[Tap, ...], precision: str) -> Runner:
    import torch

    from finetune.backbones import memory
    from finetune.backbones.extractor import Reader
    from finetune.features import fuse_bn

    hardware.keep_memory()
    place = torch.device(device.torch_device())
    batch = TORCH_BATCH if place.type == "cpu" else GPU_BATCH
    if place.type == "cpu":
        memory.check(
            backbone.module,
            backbone.network.name,
            backbone.network.preprocess.size,
            memory.RUN * batch,
        )
    reader: Any = Reader(backbone, taps).eval()
    # those are read before BatchNorm
    if precision == "float32" and all(tap.stage != "moments" for tap in taps):
        # In bf16 folding gains nothing, and would have to be rounded in another way than below.
        reader = fuse_bn.folded(reader, _noise(backbone.network))
    reader = reader.to(place).to(memory_format=torch.channels_last)
    half = torch.autocast(place.type, dtype=torch.bfloat16, enabled=precision == "bf16")
    rounded = {}
    if precision == "bf16":
        for name, value in reader.named_parameters():
            if value.ndim == 4:
                # A 1 × 1 kernel has nothing to carry to: there the sum over its inputs is kept.
                # (OpenVINO folds BatchNorm into the weights before they are rounded, and comes out
                # better without.)
                order = (0, 1, 2, 3) if value.shape[-2:] != (1, 1) else (0, 2, 3, 1)
                back = (0, 1, 2, 3) if value.shape[-2:] != (1, 1) else (0, 3, 1, 2)
                kernels = torch.from_numpy(
                    round_kernels(value.detach().cpu().permute(order).numpy())
                )
                rounded[name] = (
                    kernels.permute(back).to(place).to(memory_format=torch.channels_last)
                )

    def stream(batches: Iterable[Pixels]) -> Iterator[Blocks]:
        for pixels in batches:
            if backbone.module.training:
                raise RuntimeError(
                    "the backbone is in train mode: its features would depend on the batch"
                )
            with torch.inference_mode(), half:
                outputs = torch.func.functional_call(
                    reader, rounded, (torch.from_numpy(_padded(pixels, batch)).to(place),)
                )
            yield [output[: len(pixels)].float().cpu().numpy() for output in outputs]

    return Runner(taps, "torch", precision, batch, stream)


def _noise(network: Network) -> Any:
    """One image of noise for the network, the same each time: what it gives decides how it is
    run."""
    import torch

    side = network.preprocess.size
    return torch.randint(
        0, 256, (1, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def _padded(pixels: Pixels, batch: int) -> Pixels:
    if len(pixels) == batch:
        return np.ascontiguousarray(pixels)
    return np.concatenate(
        [pixels, np.zeros((batch - len(pixels), *pixels.shape[1:]), dtype=np.uint8)]
    )


# ----------------------------------------------------------------------------------------- OpenVINO


def _open_openvino(
    network: Network, taps: tuple[Tap, ...], load: Callable[[], Backbone], precision: str
) -> Runner:
    model, name = _converted(network, taps, load)
    results = {name: output.get_node() for output in model.outputs for name in output.get_names()}
    # two taps may be one output
    wanted = {results[str(tap)].get_friendly_name(): results[str(tap)] for tap in taps}
    model = _openvino().Model(list(wanted.values()), model.get_parameters(), "cut")
    if precision == "bf16":
        _round_weights(model)
    options = {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
    }
    if count := hardware.fewer_threads():
        options["INFERENCE_NUM_THREADS"] = str(count)
    if one := _one_stream(model, network, precision):
        options["NUM_STREAMS"] = one
    compiled = _compiled(
        model, options, f"{name}-{files.digest_json([precision, list(map(str, taps))])[:12]}"
    )
    # More than there are streams: the next batch is there when one ends, however late this thread
    # is woken.
    requests = int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")) + 2
    order = [
        compiled.output(list(wanted).index(results[str(tap)].get_friendly_name())) for tap in taps
    ]

    def stream(batches: Iterable[Pixels]) -> Iterator[Blocks]:
        free = [compiled.create_infer_request() for _ in range(requests)]
        running: list[
            tuple[Any, int]
        ] = []  # the oldest first, so that results keep the order of the batches
        for pixels in batches:
            if not free:
                yield finish(running, free)
            request = free.pop()
            # a copy: the array need not outlive the call
            request.start_async({0: _padded(pixels, OPENVINO_BATCH)}, share_inputs=False)
            running.append((request, len(pixels)))
        while running:
            yield finish(running, free)

    def finish(running: list[tuple[Any, int]], free: list[Any]) -> Blocks:
        request, count = running.pop(0)
        request.wait()
        free.append(request)
        return [
            np.array(request.get_tensor(output).data[:count], dtype=np.float32) for output in order
        ]

    return Runner(taps, "openvino", precision, OPENVINO_BATCH, stream)


def _one_stream(model: Any, network: Network, precision: str) -> str:
    """`1` where the memory is short of two batches at a time, else no text; refused where one does
    not fit."""
    side = network.preprocess.size
    batch = HELD[precision] * OPENVINO_BATCH * side**2
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


def _round_weights(model: Any) -> None:
    for node in model.get_ops():
        if node.get_type_name() in ("Convolution", "GroupConvolution"):
            weight = node.input_value(1).get_node()
            if weight.get_type_name() == "Constant" and tuple(weight.shape)[-2:] != (1, 1):
                rounded = _openvino().op.Constant(round_kernels(weight.data))
                node.input(1).replace_source_output(rounded.output(0))


def standard(network: Network) -> tuple[Tap, ...]:
    """All the taps of a network that its `widths` name: they are converted together, once."""
    return tuple(Tap.parse(text) for text in network.widths if text != "moments")


def _compiled(model: Any, options: dict[str, str], name: str) -> Any:
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


def _converted(
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
        OPENVINO_BATCH,
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
    memory.check(backbone.module, backbone.network.name, side, memory.CONVERTED * OPENVINO_BATCH)
    reader = Reader(backbone, taps).eval()
    example = torch.zeros(OPENVINO_BATCH, side, side, 3, dtype=torch.uint8)
    shape = [(openvino.PartialShape([OPENVINO_BATCH, side, side, 3]), openvino.Type.u8)]
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
