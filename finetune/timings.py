"""Which way of doing a task is the fastest here: measured once, and remembered in the cache.

A way is an engine and a precision, or a precision, a layout and a number of threads. What a
processor says of itself does not tell which one is fast: bf16 is twice as fast as float32 on one
that has it, and slower on another one. So the ways take turns at a few batches, and what was found
is kept for this processor, these cores and versions, and this network at this input size.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import files, hardware
from finetune.errors import UserError

FORMAT = 1
# The first way (float32) is left only for one that is so many times as fast: timings are noisy,
# and the choice stays.
GAIN = 1.15
ROUNDS = 8
SECONDS = 1.0  # for all rounds of all ways, after one pass each

Work = Callable[[], int]  # does a part of the task, and says of how many images


@dataclass(frozen=True)
class Task:
    """What is timed: `name` is extract or train, `network` with the weights of `digest` at inputs
    of `size` pixels; `detail` says which part of it."""

    name: str
    network: str
    digest: str
    size: int
    detail: str = ""


def choose(task: Task, ways: Sequence[str], opened: Callable[[str], Work | None]) -> str:
    """The way to take of `ways`: as remembered, else measured now.

    `opened` makes a way ready, or gives None where it is not worth it now. A way that cannot be
    opened counts as none; the first one must.
    """
    if len(ways) == 1:
        return ways[0]
    found = recall(task)
    if ways[0] not in found:
        found = found | measure(ways, opened)
        _remember(task, found)
    return best(ways, found)


def best(ways: Sequence[str], rates: Mapping[str, float]) -> str:
    """The first way, unless another one's rate is clearly higher."""
    fastest = max((way for way in ways if way in rates), key=lambda way: rates[way])
    return fastest if rates[fastest] >= GAIN * rates[ways[0]] else ways[0]


def measure(ways: Sequence[str], opened: Callable[[str], Work | None]) -> dict[str, float]:
    """Images a second by each way, from its fastest round: whatever else the machine does makes a
    round slower, never faster. The ways take turns."""
    works: dict[str, Work] = {}
    least: dict[str, float] = {}
    for way in ways:
        try:
            work = opened(way)
            if work is not None:
                # the first pass pays for memory; it counts where there is no time for another one
                least[way] = _seconds(work)
                works[way] = work
        except (RuntimeError, UserError):
            if way == ways[0]:
                raise
    end = time.perf_counter() + SECONDS
    for _ in range(ROUNDS):
        if time.perf_counter() >= end:
            break
        for way, work in works.items():
            least[way] = min(least[way], _seconds(work))
    return {way: 1 / seconds for way, seconds in least.items()}


def _seconds(work: Work) -> float:
    """Seconds an image."""
    start = time.perf_counter()
    count = work()
    return max(1e-9, time.perf_counter() - start) / count


# ----------------------------------------------------------------------------------- what was found


def recall(task: Task) -> dict[str, float]:
    """Images a second by way, as measured before on this machine; empty where nothing is known."""
    with contextlib.suppress(UserError, OSError):
        found = _read(_place(task))
        if found is not None and found["about"] == _about(task):
            return dict(found["rates"])
    return {}


def _remember(task: Task, rates: Mapping[str, float]) -> None:
    content = {"about": _about(task), "rates": dict(rates), "when": time.time()}
    with contextlib.suppress(UserError, OSError):  # no cache: it is measured again
        files.write_json(_place(task), content | {"sha256": files.digest_json(content)})


def _about(task: Task) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "task": task.name,
        "network": task.network,
        "weights": task.digest,
        "size": task.size,
        "detail": task.detail,
        **machine(),
    }


def machine() -> dict[str, Any]:
    """What decides how fast the ways are, besides the task."""
    name, flags = hardware.processor()
    return {
        "processor": name,
        "flags": files.digest(flags)[:12],
        "cores": hardware.cores(),
        "threads": hardware.threads(),
        "gpu": hardware.gpu(),
        "versions": {name: _version(name) for name in ("openvino", "torch", "timm")},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _place(task: Task) -> Path:
    return files.cache_dir("timings") / f"{files.digest_json(_about(task))[:32]}.json"


def _read(path: Path) -> dict[str, Any] | None:
    """What a file of the cache holds; None where it is not what was written."""
    if not path.exists():
        return None
    try:
        found = files.read_json(path)
        seal = found.pop("sha256")
        return found if files.digest_json(found) == seal else None
    except (UserError, OSError, LookupError, TypeError, ValueError, AttributeError):
        return None


def overview() -> list[dict[str, Any]]:
    """What is remembered, the latest first: task, network, size, machine, rates and the choice."""
    rows = []
    for path in files.cache_dir("timings").glob("*.json"):
        if found := _read(path):
            about, rates = found["about"], found["rates"]
            here = {key: about.get(key) for key in machine()} == machine()
            ways = sorted(rates, key=lambda way: "float32" not in way)
            chosen = best(ways, rates) if ways else ""
            when = {"when": found["when"]}
            rows.append({**about, "rates": rates, "chosen": chosen, "here": here, **when})
    return sorted(rows, key=lambda row: -row["when"])


def table() -> list[str]:
    """The overview for a person: a line a task, with images a second by each way."""
    lines = []
    for row in overview():
        rates = ", ".join(
            f"{way} {rate:.3g}{' (taken)' if way == row['chosen'] else ''}"
            for way, rate in row["rates"].items()
        )
        other = "" if row["here"] else f"; another machine or version ({row['processor']})"
        lines.append(f"  {row['task']} {row['network']} at {row['size']} px: {rates}{other}")
    return ["  images a second, as timed here:", *lines] if lines else []


def forget() -> int:
    """Forget all of it, so that it is measured again; returns how many tasks were known."""
    folder = files.cache_dir("timings")
    with files.disk_errors(folder):
        known = list(folder.glob("*.json"))
        for path in known:
            path.unlink(missing_ok=True)
    return len(known)
