"""What every benchmark shares: rounds of A B A B …, their ratio with minimum, median and maximum,
and results.md.

Each side is a process of its own that prints one JSON line with what it measured; the two take
turns, so that a machine that drifts drifts for both.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

from finetune.hardware import cores

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.md"
PEERS = HERE.parent / ".peers"
SCRATCH = Path(tempfile.gettempdir()) / "regraft-benchmarks"
COMMANDS = Path(sys.executable).parent  # where `finetune` and `retrieve` are
Measured = dict[str, Any]


def peer_python() -> Path:
    """The interpreter of the peers' environment, made on first use from peers.txt (several GB)."""
    python = PEERS / "bin" / "python"
    if not (PEERS / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "-q", "-r", str(HERE / "peers.txt")], check=True
        )
        (PEERS / ".installed").touch()
    return python


def side(
    command: Sequence[str | Path], env: dict[str, str] | None = None
) -> Callable[[], Measured]:
    """A process that prints a JSON line last; its wall time is added as `wall`."""

    def run() -> Measured:
        start = time.perf_counter()
        done = subprocess.run(
            [str(c) for c in command],
            capture_output=True,
            text=True,
            env={**os.environ, **(env or {})},
            check=False,
        )
        wall = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{command}: {done.stderr[-2000:]}")
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        return {**(json.loads(lines[-1]) if lines else {}), "wall": wall}

    return run


def rounds(
    ours: Callable[[], Measured], theirs: Callable[[], Measured], n: int = 3
) -> tuple[list[Measured], list[Measured]]:
    """`n` rounds of ours, theirs, ours, theirs, …"""
    a, b = [], []
    for i in range(n):
        a.append(ours())
        b.append(theirs())
        print(f"  round {i + 1}: ours {a[-1]}  theirs {b[-1]}", file=sys.stderr, flush=True)
    return a, b


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times faster ours is: theirs / ours, round by round."""
    values = [t / o for t, o in zip(theirs, ours, strict=True)]
    return {
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
        "n": len(values),
    }


def words(r: dict[str, float]) -> str:
    return f"{r['median']:.1f}× ({r['min']:.1f}–{r['max']:.1f}, n = {r['n']:.0f})"


def spread(values: Sequence[float], unit: str = "s", digits: int = 2) -> str:
    """Median, minimum and maximum of values that are no ratio."""
    low, middle, high = (
        f"{v:.{digits}f}" for v in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} {unit} ({low}–{high}, n = {len(values)})"


def record(
    name: str, work: str, peer: str, bar: str, result: str, detail: str = "", *, quick: bool = False
) -> None:
    """Print one row, and put it into results.md: a benchmark's row is replaced, the others stay.
    The quick form, whose work is smaller than that of the bar, is printed alone."""
    print(
        f"{name}: {result} [{bar}] {work}; "
        f"{peer}{f'; {detail}' if detail else ''}{'; quick' if quick else ''}",
        flush=True,
    )
    if quick:
        return
    rows = {}
    if RESULTS.exists():
        for line in RESULTS.read_text(encoding="utf-8").splitlines():
            if re.match(r"\| (?!benchmark|---)", line):
                rows[line.split("|")[1].strip()] = line
    when = datetime.now(UTC).date().isoformat()
    rows[name] = f"| {name} | {work} | {peer} | {bar} | {result} | {detail} | {when} |"
    head = (
        "# Benchmarks: results\n\nEach row: ours and the peer in the same run, in turn; the "
        "ratio with minimum, median and\n"
        "maximum over the rounds. Written by the scripts in this folder.\n\n"
        f"Machine: {machine()}\n\nVersions: {versions()}\n\n"
        "| benchmark | work | peer | bar | result | detail | date "
        "|\n|---|---|---|---|---|---|---|\n"
    )
    RESULTS.write_text(head + "\n".join(rows[key] for key in sorted(rows)) + "\n", encoding="utf-8")


def machine() -> str:
    """Cores, processor, memory."""
    name, flags = platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text()
        found = re.search(r"model name\s*: (.*)", text)
        name = found.group(1) if found else name
        flags = ", AVX-512 bf16" if "avx512_bf16" in text else ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cores()} cores, {name}{flags}, {memory:.0f} GiB, {platform.system()}"


def versions() -> str:
    names = ("torch", "timm", "openvino", "scikit-learn", "faiss-cpu", "numpy", "pillow")
    own = ", ".join(
        [
            f"Python {platform.python_version()}",
            *(f"{n} {importlib.metadata.version(n)}" for n in names),
        ]
    )
    found = importlib.metadata.distributions(
        path=[str(path) for path in PEERS.glob("lib/python*/site-packages")]
    )
    peers = {
        d.name.lower(): f"{d.name} {d.version}"
        for d in found
        if d.name.lower() in ("fastai", "imagededup", "timm", "torch")
    }
    return own + (f"; peers: {', '.join(peers[key] for key in sorted(peers))}" if peers else "")


def peak() -> int:
    """Bytes of memory that this process has held at most. (The kernel's `ru_maxrss` would count the
    parent's, too.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def use_cache(name: str = "cache") -> Path:
    """Let this process and its children keep their cache in the scratch folder."""
    folder = SCRATCH / name
    os.environ["REGRAFT_CACHE"] = str(folder)
    return folder


def cold_cache(folder: Path, networks_from: Path | None) -> Path:
    """An empty cache in `folder`, or one that holds only the descriptions and converted networks of
    another."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for part in ("networks", "compiled") if networks_from else ():
        if (networks_from / part).exists():
            shutil.copytree(networks_from / part, folder / part)
    return folder


def dataset(name: str) -> Path:
    """One of the image sets of data.py, made on first use in $REGRAFT_BENCH_DATA or the scratch
    folder."""
    folder = Path(os.environ.get("REGRAFT_BENCH_DATA", SCRATCH / "data")) / name
    if not folder.exists():
        subprocess.run(
            [sys.executable, str(HERE / "data.py"), name, str(folder)],
            check=True,
            stdout=sys.stderr,
        )
    return folder


def make_jpegs(folder: Path, count: int, size: tuple[int, int], seed: int = 0) -> Path:
    """`count` different JPEGs of `size`: crops (and enlargements) of scikit-learn's two
    photographs, quality 90."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    if folder.exists() and len(list(folder.glob("*/*.jpg"))) == count:
        return folder
    photographs = [Image.fromarray(photo) for photo in load_sample_images().images]
    rng = np.random.default_rng(seed)
    for i in range(count):
        photo = photographs[i % 2]
        share = rng.uniform(0.7, 0.95)
        width, height = int(photo.width * share), int(photo.width * share * size[1] / size[0])
        height = min(height, photo.height)
        left, top = (
            int(rng.integers(0, photo.width - width + 1)),
            int(rng.integers(0, photo.height - height + 1)),
        )
        image = photo.resize(
            size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
        )
        target = folder / ("china" if i % 2 == 0 else "flower") / f"{i:05}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=90)
        target.write_bytes(buffer.getvalue())
    return folder


def copies(folder: Path, count: int) -> Path:
    """`count` files of different bytes that show one 500×375 photograph: a JPEG (about 60 KB) with
    its number as a comment. 100 files a folder."""
    if (folder / f"{(count - 1) // 100:03}" / f"{count - 1:05}.jpg").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    (source,) = make_jpegs(SCRATCH / "one", 1, (500, 375)).rglob("*.jpg")
    data = source.read_bytes()
    for i in range(count):
        target = folder / f"{i // 100:03}" / f"{i:05}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        text = f"{i:08}".encode()
        target.write_bytes(
            data[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + data[2:]
        )
    return folder
