"""What this process may use of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from pathlib import Path

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them


@functools.cache
def cores() -> int:
    """Cores that this process may use: its affinity, bounded by a container's quota where there is one; at least 1."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(usable, int(quota) // int(period)))
    except (OSError, ValueError):  # no such control group, or no quota ("max")
        return usable


@functools.cache
def keep_memory() -> None:
    """Let the process keep memory that it frees, for its next tensors. glibc alone; elsewhere nothing happens.

    glibc returns large blocks to the system and asks for them again, and the system hands out pages filled with zeros, one
    fault at a time. For a network on a CPU, whose every layer allocates its output, that can be half of the time
    (docs/log.md, 2026-11-25). Blocks of over 256 MB, which are no layer's output, still go back at once.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            if libc.mallopt(MMAP_THRESHOLD, 1 << 28) or libc.mallopt(MMAP_THRESHOLD, 1 << 25):  # some take no more
                libc.mallopt(TRIM_THRESHOLD, (1 << 31) - 1)
