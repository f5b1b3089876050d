"""What a report of a fault should say of the machine: versions, processor, engines and their speed,
cache, weights.

It fits one screen, asks nothing of the network, and names neither the user nor what the images are
called: the home folder is written `~`.
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any

from finetune import hardware, names, run
from finetune.backbones import catalog, device
from finetune.errors import UserError
from finetune.features import engine, store
from finetune.network import Tap

# what of a processor's flags decides how fast a network runs on it
TELLING = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16"),
    *("amx_int8", "asimd", "bf16", "i8mm", "sve"),
)
SETTINGS = ("REGRAFT_CACHE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")
SHOWN = 6  # names of weights


def examine(*, speed: bool = True) -> dict[str, Any]:
    """All of it as plain data; with `speed`, each engine runs for a moment."""
    name, flags = hardware.processor()
    free = hardware.available()
    found: dict[str, Any] = {
        "versions": run.versions(),
        "system": platform.platform(),
        "processor": name,
        "flags": [flag for flag in TELLING if flag in flags.split()],
        "cores": {"here": os.cpu_count(), "allowed": hardware.cores()},
        "threads": hardware.threads(),
        "memory": free,
        "gpu": hardware.gpu(),
        "settings": {key: _at_home(os.environ[key]) for key in SETTINGS if key in os.environ},
        "cache": _cache(),
        "weights": [row["name"] for row in catalog.here() if row["here"]],
        "engines": {},
    }
    if speed:
        found["engines"] = _speeds()
    return found


def _cache() -> dict[str, Any]:
    try:
        about = store.overview()
        folder = Path(about["folder"])
        free = shutil.disk_usage(folder).free
        size = sum(about["bytes"].values())
        return {"folder": _at_home(str(folder)), "bytes": size, "free": free}
    except (UserError, OSError) as error:
        return {"error": _at_home(_first_line(error))}


def _speeds() -> dict[str, Any]:
    """Images a second of the default network by each engine and precision, or why there are none:
    timed now, and not remembered."""
    try:
        named = catalog.open_named()
    except UserError as error:
        return {"error": _at_home(_first_line(error))}
    found: dict[str, Any] = {"network": named.network.name, "size": named.network.preprocess.size}
    taps = [Tap("pooled")]
    for name in ("openvino", "torch"):
        if name == "openvino" and not device.has_openvino():
            found[name] = "not installed"
            continue
        try:
            found[name] = engine.rates(named.network, taps, named.load, device.ways(name))
        except (UserError, RuntimeError, ImportError, OSError) as error:
            found[name] = _at_home(_first_line(error))
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _at_home(text: str) -> str:
    """A text without the name of the user's home folder."""
    home = os.path.expanduser("~")
    return names.shown(text.replace(home, "~") if len(home) > 1 else text)


def text(found: dict[str, Any]) -> str:
    """The findings for a person, who may paste them into a report."""
    versions = [f"{name} {number}" for name, number in found["versions"].items()]
    cores = found["cores"]
    cache = found["cache"]
    place = cache.get("error") or (
        f"{cache['folder']}: {cache['bytes'] / 1e6:.0f} MB, {cache['free'] / 1e9:.0f} GB free"
    )
    weights, count = found["weights"], len(found["weights"])
    more = f" and {count - SHOWN} more" if count > SHOWN else ""
    memory = f"{found['memory'] / 1e9:.1f} GB available" if found["memory"] else "unknown"
    settings = ", ".join(f"{key}={value}" for key, value in found["settings"].items())
    rows = [
        ("versions", ", ".join(versions[:6])),
        *([("", ", ".join(versions[6:]))] if versions[6:] else []),
        ("system", found["system"]),
        ("processor", f"{found['processor']} ({' '.join(found['flags']) or 'no known flags'})"),
        ("cores", f"{cores['allowed']} allowed of {cores['here']}, {found['threads']} threads"),
        ("memory", memory),
        ("gpu", found["gpu"] or "none"),
        ("settings", settings or "none"),
        ("cache", place),
        ("weights", ", ".join(weights[:SHOWN]) + more or "none: give --weights a file"),
        *_speed_rows(found["engines"]),
    ]
    return "\n".join(f"{label:<11}{value}" for label, value in rows)


def _speed_rows(engines: dict[str, Any]) -> list[tuple[str, str]]:
    if not engines:
        return []
    if "error" in engines:
        return [("engines", engines["error"])]
    rows = [("engines", f"images a second of {engines['network']} at {engines['size']} px")]
    for name in ("openvino", "torch"):
        rates = engines[name]
        words = rates
        if isinstance(rates, dict):
            words = ", ".join(f"{way.split()[1]} {rate:.3g}" for way, rate in rates.items())
        rows.append(("", f"{name}: {words}"))
    return rows
