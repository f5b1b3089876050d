"""What this process may use of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from pathlib import Path

from finetune.errors import UserError

SHARE = 0.9  # of what is available: the rest is for what is not reckoned
# bytes a pixel that no network's largest operation was seen to reach: what fits with it needs no
# closer look
MANY = 2000
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them


@functools.cache
def cores() -> int:
    """Cores that this process may use: its affinity, bounded by a container's quota where there is
    one; at least 1."""
    usable = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(usable, int(quota) // int(period)))
    except (OSError, ValueError):  # no such control group, or no quota ("max")
        return usable


def available() -> int | None:
    """Bytes of memory that this process can still take: the system's, bounded by a container's
    limit; None if unknown."""
    found = _numbers("/proc/meminfo").get("MemAvailable:")
    free = [found * 1024] if found is not None else []
    for folder, most, now in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such control group, or no limit ("max")
            limit, used = (int(Path(folder, name).read_text()) for name in (most, now))
            # files in memory make way
            cached = _numbers(f"{folder}/memory.stat").get("inactive_file", 0)
            free.append(max(0, limit - used + cached))
    return min(free, default=None)


def _numbers(path: str) -> dict[str, int]:
    """The lines of one of the system's tables: a name and a number each."""
    try:
        lines = [line.split() for line in Path(path).read_text().splitlines()]
        return {words[0]: int(words[1]) for words in lines if len(words) > 1}
    except (OSError, ValueError):
        return {}


def fits(need: float) -> bool:
    """Whether so many bytes can be had here; yes where nobody knows."""
    free = available()
    return free is None or need <= free * SHARE


def afford(need: float, what: str, *, where: object, fix: str) -> None:
    """Raise a `UserError` where `what` needs more bytes of memory than can be had: the system would
    end the process."""
    if not fits(need):
        room = f"{(available() or 0) / 1e9:.1f} GB are free"
        raise UserError(
            f"{what} needs some {need / 1e9:.1f} GB of memory, and {room}", where=where, fix=fix
        )


@functools.cache
def keep_memory() -> None:
    """Let the process keep memory that it frees, for its next tensors. glibc alone; elsewhere
    nothing happens.

    glibc returns large blocks to the system and asks for them again, and the system hands out pages
    filled with zeros, one fault at a time. For a network on a CPU, whose every layer allocates its
    output, that can be half of the time (docs/log.md, 2026-11-25). Blocks of over 256 MB, which are
    no layer's output, still go back at once.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            # some take no more
            if libc.mallopt(MMAP_THRESHOLD, 1 << 28) or libc.mallopt(MMAP_THRESHOLD, 1 << 25):
                libc.mallopt(TRIM_THRESHOLD, (1 << 31) - 1)
