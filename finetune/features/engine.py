"""Run a frozen network by OpenVINO or torch, in float32 or bf16: whichever is fastest here.

One function, `open_runner`, gives the same thing for all: static batches of uint8 pixels in,
float32 features out. What is fastest is timed when a network is first used (`timings`). A network
is converted for OpenVINO once, with all its taps, and kept in the cache; a later process opens the
converted copy without importing torch, and cuts it down to the taps that it wants.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune import files, hardware, timings
from finetune.backbones import device
from finetune.backbones.device import Way, _openvino
from finetune.features import conversion
from finetune.network import Network, Tap

if TYPE_CHECKING:
    from finetune.backbones.stages import Backbone

# with 4, oneDNN computes a row of a small map in another way where it stands last: other bits
TORCH_BATCH = 8
GPU_BATCH = 64  # there, the more the better; not measured
# seconds after OpenVINO was ready, in which torch may begin to be timed beside it
BESIDE = 1.5

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
                    conversion.round_kernels(value.detach().cpu().permute(order).numpy())
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
    model, name = conversion.converted(network, taps, load)
    results = {name: output.get_node() for output in model.outputs for name in output.get_names()}
    # two taps may be one output
    wanted = {results[str(tap)].get_friendly_name(): results[str(tap)] for tap in taps}
    model = _openvino().Model(list(wanted.values()), model.get_parameters(), "cut")
    if precision == "bf16":
        conversion.round_weights(model)
    options = {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
    }
    if count := hardware.fewer_threads():
        options["INFERENCE_NUM_THREADS"] = str(count)
    if one := conversion.one_stream(model, network, precision):
        options["NUM_STREAMS"] = one
    compiled = conversion.compiled(
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
            request.start_async({0: _padded(pixels, conversion.BATCH)}, share_inputs=False)
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

    return Runner(taps, "openvino", precision, conversion.BATCH, stream)
