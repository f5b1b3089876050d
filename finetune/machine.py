"""What this process may use of the machine."""

from __future__ import annotations

import functools
import os
from pathlib import Path


@functools.cache
def cores() -> int:
    """Cores that this process may use: its affinity, bounded by a container's quota where there is one; at least 1."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(usable, int(quota) // int(period)))
    except (OSError, ValueError):  # no such control group, or no quota ("max")
        return usable
