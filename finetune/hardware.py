"""What this process may use of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import sys
from pathlib import Path

from finetune.errors import UserError

SHARE = 0.9  # of what is available: the rest is for what is not reckoned
# bytes a pixel that no network's largest operation was seen to reach: what fits with it needs no
# closer look
MANY = 2000
CGROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
CPU_INFO = Path("/proc/cpuinfo")
GPU_DEVICE, GPU_INFO = Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/gpus")
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them


@functools.cache
def cores() -> int:
    """Cores that this process may use: its affinity, bounded by a container's quota where there is
    one; at least 1."""
    return max(1, min(_affinity(), int(_quota())))


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota() -> float:
    """Cores' worth of time that the control groups of this process allow together; no group counts
    as very many."""
    allowed = [1e9]
    for folder in _groups():
        with contextlib.suppress(OSError, ValueError):  # no such group, or no quota ("max")
            quota, period = map(int, (folder / "cpu.max").read_text().split())
            allowed.append(quota / period)
        with contextlib.suppress(OSError, ValueError):
            quota = int((folder / "cpu.cfs_quota_us").read_text())
            if quota > 0:  # -1: none
                allowed.append(quota / int((folder / "cpu.cfs_period_us").read_text()))
    return min(allowed)


def _groups() -> list[Path]:
    """Folders of the control groups that hold this process, inner and outer ones, of both
    versions."""
    roots, inside = (CGROUPS, CGROUPS / "cpu", CGROUPS / "cpu,cpuacct"), ["/"]
    with contextlib.suppress(OSError, ValueError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if not kinds or "cpu" in kinds.split(","):
                inside += [path, *map(str, Path(path).parents)]
    return [root / path.lstrip("/") for root in roots for path in dict.fromkeys(inside)]


def threads() -> int:
    """Threads for a library's arithmetic: `$OMP_NUM_THREADS` where the user has decided, else the
    cores allowed."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(asked) if asked.isdigit() and int(asked) else cores()


def fewer_threads() -> int | None:
    """The number of threads that a library has to be told; None where it finds the right one.

    BLAS, torch, OpenVINO and faiss see the affinity, and leave out threads that share a core; what
    none of them sees is a quota.
    """
    return threads() if cores() < _affinity() else None


def limit_threads() -> None:
    """Tell the libraries that read it from the environment: to be called before they are
    imported."""
    if count := fewer_threads():
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, str(count))


def processor() -> tuple[str, str]:
    """The processor's name and what it can do (its flags), as the system tells them."""
    name, flags = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError):
        for line in CPU_INFO.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = value.strip()
            elif not key.strip() and flags:
                break  # the other cores are like the first
    return name, flags


def gpu() -> str | None:
    """The graphics processor as its driver names it, without any library; None where there is
    none."""
    if not GPU_DEVICE.exists():
        return None
    for path in sorted(GPU_INFO.glob("*/information")):
        with contextlib.suppress(OSError):
            for line in path.read_text().splitlines():
                if line.startswith("Model:"):
                    return line.partition(":")[2].strip()
    return "unknown"


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
