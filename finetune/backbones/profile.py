"""What each layer of a network makes, holds and computes: counted from shapes, measured on
request.

Counting runs the network on tensors that have shapes and no values, so that it takes neither
weights nor memory. Every operation is given to the innermost module that runs it; a module that
computes something of its own (a sum, attention) has a row as layers have.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F  # noqa: N812 (the field's name)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.backbones import architectures, memory, stages

FLOAT = 4  # bytes of a number in float32
PASSES = 5  # of a measurement
ROOT = "(network)"  # what the network computes outside of its modules
CLASSIFIER = "classifier"
OWN_WORDS = {
    "convolution": "conv",
    "mm": "product",
    "addmm": "product",
    "bmm": "product",
    "baddbmm": "product",
    "native_batch_norm": "batch norm",
    "_native_batch_norm_legit_no_training": "batch norm",
    "native_layer_norm": "layer norm",
    "native_group_norm": "group norm",
    "max_pool2d_with_indices": "max pool",
    "avg_pool2d": "average pool",
    "_adaptive_avg_pool2d": "average pool",
    "_softmax": "softmax",
    "clone": "copy",
    "_to_copy": "copy",
    "cat": "concatenation",
}
KINDS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Linear,), "linear"),
    (stages.BATCH_NORMS, "batch norm"),
    ((nn.LayerNorm,), "layer norm"),
    ((nn.MaxPool2d,), "max pool"),
    ((nn.AvgPool2d, nn.AdaptiveAvgPool2d), "average pool"),
)


@dataclass(frozen=True)
class Layer:
    """One row: what a module computes itself. Bytes and multiply-adds are for one image."""

    name: str
    kind: str
    stage: str
    kernel: str
    stride: str
    padding: str
    output: tuple[int, ...]
    output_bytes: int
    parameters: int
    multiply_adds: int
    milliseconds: float | None = None


@dataclass(frozen=True)
class Profile:
    """A network in numbers, for one image of `size` pixels in float32.

    `kept_bytes` are the activations that a training of all stages keeps for the way back, with
    fixed BatchNorm statistics. `peak_bytes` are the most that lives at once in inference beside the
    parameters, in the module `peak_at`. `uncounted` names operations that are no multiply-adds
    here.
    """

    name: str
    size: int
    layers: tuple[Layer, ...]
    kept_bytes: int
    peak_bytes: int
    peak_at: str
    uncounted: tuple[str, ...]
    milliseconds: float | None = None

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def multiply_adds(self) -> int:
        return sum(layer.multiply_adds for layer in self.layers)

    @property
    def flops(self) -> int:
        """Floating-point operations: a multiply-add is two."""
        return 2 * self.multiply_adds


def profile(name: str, size: int | None = None, *, measure: bool = False) -> Profile:
    """Count the layers of the timm or torchvision model `name`, its classifier included.

    `size` overrides the model's own input size. `measure` also runs it with random weights on this
    machine and gives each layer its milliseconds.
    """
    whole = architectures.shapes(name, size)
    own = int(architectures.input_config(whole)["input_size"][-1])
    side = size or own
    module = whole.module.eval()
    try:
        watch = _watched(module, side)
        kept = _kept_for_training(module, side)
    except (RuntimeError, AssertionError) as error:
        raise memory.unfit(module, name, side, own, error) from error
    found = Profile(
        name=name,
        size=side,
        layers=_layers(whole, watch),
        kept_bytes=kept,
        peak_bytes=watch.peak,
        peak_at=watch.peak_at or ROOT,
        uncounted=tuple(sorted(watch.uncounted)),
    )
    return _measured(found, size) if measure else found


# ------------------------------------------------------------------------------------------ counted


def _layers(whole: architectures.Whole, watch: _Watch) -> tuple[Layer, ...]:
    """A row for each module that computed something, and for parameters that nothing used."""
    module: nn.Module = whole.module
    parts = dict(module.named_modules())
    parameters = _parameters_of(module, watch)
    stage_of = stages.position_of(module)
    rows = []
    for path in [*watch.work, *(parameters.keys() - watch.work.keys())]:
        part, work = parts[path], watch.work.get(path, _Work())
        rows.append(
            Layer(
                name=path or ROOT,
                kind=_kind(part, work),
                stage=CLASSIFIER if f"{path}.".startswith(whole.classifier) else stage_of(path),
                kernel=_pair(getattr(part, "kernel_size", None)),
                stride=_pair(getattr(part, "stride", None)),
                padding=_padding(part),
                output=work.output,
                output_bytes=work.output_bytes,
                parameters=parameters[path],
                multiply_adds=work.multiply_adds,
            )
        )
    return tuple(rows)


def _parameters_of(module: nn.Module, watch: _Watch) -> Counter[str]:
    """Numbers in parameters, by the row they belong to: their module's, or that of the nearest
    module around it."""
    found: Counter[str] = Counter()
    for key, parameter in module.named_parameters():
        own = path = key.rpartition(".")[0]
        while path not in watch.work and path:
            path = path.rpartition(".")[0]
        found[path if path in watch.work else own] += parameter.numel()
    return found


def _kind(part: nn.Module, work: _Work) -> str:
    if isinstance(part, nn.Conv2d):
        depthwise = part.groups == part.in_channels > 1
        grouped = f"conv in {part.groups} groups" if part.groups > 1 else "conv"
        kind = "depthwise conv" if depthwise else grouped
    elif known := next((word for types, word in KINDS if isinstance(part, types)), None):
        kind = known
    elif "attention" in work.operations:
        kind = "attention"
    elif next(part.children(), None) is None:
        kind = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", type(part).__name__).lower()
    else:
        kind = " + ".join(list(work.operations)[:3])
    return f"{kind} ×{work.calls}" if work.calls > 1 else kind or "not run"


def _pair(value: Any) -> str:
    """`3` for three by three, `1×7` for what is no square."""
    if not isinstance(value, (tuple, list)):
        return "" if value is None else str(value)
    return str(value[0]) if len(set(value)) == 1 else "×".join(map(str, value))


def _padding(part: nn.Module) -> str:
    if type(part).__name__.endswith("Same"):  # timm's: as TensorFlow pads, by the input's size
        return "same"
    return _pair(getattr(part, "padding", None)) if hasattr(part, "kernel_size") else ""


@dataclass
class _Work:
    """What a module computed itself."""

    operations: dict[str, None] = field(default_factory=dict)  # in their order
    output: tuple[int, ...] = ()
    output_bytes: int = 0
    multiply_adds: int = 0
    calls: int = 0


class _Watch(TorchDispatchMode):
    """Gives every operation to the innermost module that runs it, and follows what is alive."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.work: dict[str, _Work] = {}
        self.uncounted: set[str] = set()
        self.peak, self.peak_at = 0, ""
        self._stack = [""]
        self._last: dict[str, int] = {}  # bytes of the last output in this call
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._given = {
            tensor.untyped_storage()._cdata for tensor in memory.tensors_of(module).values()
        }

    def enter(self, path: str) -> None:
        self._stack.append(path)
        self._last[path] = 0

    def leave(self, output: Any) -> None:
        self.close(self._stack.pop(), output)

    def close(self, path: str, output: Any) -> None:
        """The module `path` gave `output`: where that is what it made, its shape is known now."""
        work, made = self.work.get(path), self._last.pop(path, 0)
        if work and made:
            work.calls += 1
            work.output_bytes += made
            if isinstance(output, Tensor) and output.numel() * FLOAT == made:
                work.output = _shape(output)

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        seen = {tensor.untyped_storage()._cdata for tensor in inputs}
        made = [t for t in outputs if t.untyped_storage()._cdata not in seen]
        if inputs and made and name != "new_empty":  # neither a view, nor a constant
            products = _products(name, args, made[0])
            word = OWN_WORDS.get(name, name.strip("_").replace("_", " "))
            self.note(word, made[0], products)
            if not products:
                self.uncounted.add(word)
        self.live(outputs)
        return result

    def note(self, operation: str, output: Tensor, multiply_adds: int = 0) -> None:
        """The innermost module made `output`."""
        path = self._stack[-1]
        work = self.work.pop(path, None) or _Work()
        self.work[path] = work  # in the order in which modules end
        work.operations[operation] = None
        work.output = _shape(output)
        work.multiply_adds += multiply_adds
        self._last[path] = output.numel() * FLOAT

    def live(self, tensors: list[Tensor]) -> None:
        """Add tensors to what is alive, and note where that is the most so far."""
        self._alive = {key: one for key, one in self._alive.items() if not one[0].expired()}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._given:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        total = sum(size for _, size in self._alive.values())
        if total > self.peak:
            self.peak, self.peak_at = total, self._stack[-1]


def _shape(output: Tensor) -> tuple[int, ...]:
    """The shape for one image; with the first axis where that counts windows of it."""
    return tuple(output.shape[1:] if output.shape[0] == 1 else output.shape)


def _products(name: str, args: Any, output: Tensor) -> int:
    """Multiply-adds of a convolution or a product of matrices; 0 for anything else."""
    if name == "convolution":
        weight, transposed = args[1], args[6]
        each = weight.shape[1:].numel()
        return int((args[0].numel() if transposed else output.numel()) * each)
    if name in ("mm", "bmm"):
        return output.numel() * int(args[0].shape[-1])
    if name in ("addmm", "baddbmm"):
        return output.numel() * int(args[1].shape[-1])
    return 0


class _Attention(TorchFunctionMode):
    """Attention as processors do it, without the matrix of all pairs of tokens; counted as its two
    products."""

    def __init__(self, watch: _Watch | None = None) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, key, value = args[:3]
        output: Tensor = _Fused.apply(query, key, value)
        if self.watch:
            pairs = query.shape[:-1].numel() * key.shape[-2]
            self.watch.note("attention", output, pairs * (query.shape[-1] + value.shape[-1]))
        return output


class _Fused(torch.autograd.Function):
    """In place of attention: its output's shape, and what its kernels keep for the way back."""

    @staticmethod
    def forward(context: Any, *inputs: Tensor) -> Tensor:
        query, _, value = inputs
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        context.save_for_backward(*inputs, output)
        return output


def _image(side: int) -> Tensor:
    return torch.empty(1, 3, side, side, device="meta")


def _watched(module: nn.Module, side: int) -> _Watch:
    watch = _Watch(module)
    with torch.no_grad(), _hooked(module, watch.enter, watch.leave), _Attention(watch), watch:
        image = _image(side)
        watch.live([image])
        watch.close("", module(image))
    return watch


def _kept_for_training(module: nn.Module, side: int) -> int:
    """Bytes that autograd keeps of one image, where every parameter is trained."""
    given = {tensor.untyped_storage()._cdata for tensor in memory.tensors_of(module).values()}
    kept: dict[int, Tensor] = {}  # held, so that no storage's number is given to another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in given:
            kept[storage] = tensor
        return tensor

    saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.enable_grad(), saving, _Attention():
        module(_image(side))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@contextlib.contextmanager
def _hooked(module: nn.Module, enter: Any, leave: Any) -> Iterator[None]:
    """Call `enter(path)` and `leave()` around each module's forward."""
    hooks = []
    for path, part in module.named_modules():
        if path:
            hooks.append(part.register_forward_pre_hook(lambda *_, path=path: enter(path)))
            hooks.append(part.register_forward_hook(lambda _part, _inputs, out: leave(out)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ----------------------------------------------------------------------------------------- measured


def _measured(found: Profile, size: int | None) -> Profile:
    """The same with milliseconds: medians of a few passes of one image in torch, on this
    machine."""
    source = architectures.weights.find(found.name, "random")
    module = architectures.create(found.name, source, size).module.eval()
    memory.check(module, found.name, found.size, memory.LOADED)
    passes = [_timed(module, found.size) for _ in range(1 + PASSES)][1:]  # the first one allocates
    layers = [
        replace(
            layer,
            milliseconds=statistics.median(
                one.get("" if layer.name == ROOT else layer.name, 0.0) for one in passes
            ),
        )
        for layer in found.layers
    ]
    total = statistics.median(sum(one.values()) for one in passes)
    return replace(found, layers=tuple(layers), milliseconds=total)


def _timed(module: nn.Module, side: int) -> dict[str, float]:
    """Milliseconds that each module takes itself, without the modules inside it."""
    own: dict[str, float] = defaultdict(float)
    stack = [""]
    since = time.perf_counter()

    def turn() -> None:
        nonlocal since
        now = time.perf_counter()
        own[stack[-1]] += 1000 * (now - since)
        since = now

    def enter(path: str) -> None:
        turn()
        stack.append(path)

    def leave(_output: Any) -> None:
        turn()
        stack.pop()

    image = torch.zeros(1, 3, side, side)
    with torch.inference_mode(), _hooked(module, enter, leave):
        since = time.perf_counter()
        module(image)
        turn()
    return dict(own)
