"""What every benchmark shares: rounds of A B A B …, their ratio with minimum, median and maximum, and results.md.

Each side is a process of its own that prints one JSON line with what it measured; the two take turns, so that a machine
that drifts drifts for both.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.md"
PEERS = HERE.parent / ".peers"
Measured = dict[str, Any]


def peer_python() -> Path:
    """The interpreter of the peers' environment, made on first use from peers.txt (several GB)."""
    python = PEERS / "bin" / "python"
    if not (PEERS / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", str(HERE / "peers.txt")], check=True)
        (PEERS / ".installed").touch()
    return python


def side(command: Sequence[str | Path], env: dict[str, str] | None = None) -> Callable[[], Measured]:
    """A process that prints a JSON line last; its wall time is added as `wall`."""

    def run() -> Measured:
        start = time.perf_counter()
        done = subprocess.run(
            [str(c) for c in command], capture_output=True, text=True, env={**os.environ, **(env or {})}, check=False
        )
        wall = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{command}: {done.stderr[-2000:]}")
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        return {**(json.loads(lines[-1]) if lines else {}), "wall": wall}

    return run


def rounds(ours: Callable[[], Measured], theirs: Callable[[], Measured], n: int = 3) -> tuple[list[Measured], list[Measured]]:
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
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "n": len(values)}


def words(r: dict[str, float]) -> str:
    return f"{r['median']:.1f}× ({r['min']:.1f}–{r['max']:.1f}, n = {r['n']:.0f})"


def record(name: str, work: str, peer: str, bar: str, result: str, detail: str = "") -> None:
    """Put one row into results.md: a benchmark's row is replaced, the others stay."""
    rows = {}
    if RESULTS.exists():
        for line in RESULTS.read_text(encoding="utf-8").splitlines():
            if re.match(r"\| (?!benchmark|---)", line):
                rows[line.split("|")[1].strip()] = line
    when = datetime.now(UTC).date().isoformat()
    rows[name] = f"| {name} | {work} | {peer} | {bar} | {result} | {detail} | {when} |"
    head = (
        "# Benchmarks: results\n\nEach row: ours and the peer in the same run, in turn; the ratio with minimum, median and\n"
        "maximum over the rounds. Written by the scripts in this folder.\n\n"
        f"Machine: {machine()}\n\nVersions: {versions()}\n\n"
        "| benchmark | work | peer | bar | result | detail | date |\n|---|---|---|---|---|---|---|\n"
    )
    RESULTS.write_text(head + "\n".join(rows[key] for key in sorted(rows)) + "\n", encoding="utf-8")
    print(rows[name])


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
    return f"{os.cpu_count()} cores, {name}{flags}, {memory:.0f} GiB, {platform.system()}"


def versions() -> str:
    names = ("torch", "timm", "openvino", "scikit-learn", "faiss-cpu", "numpy", "pillow")
    return ", ".join([f"Python {platform.python_version()}", *(f"{n} {importlib.metadata.version(n)}" for n in names)])


def make_jpegs(folder: Path, count: int, size: tuple[int, int], seed: int = 0) -> Path:
    """`count` different JPEGs of `size`: crops (and enlargements) of scikit-learn's two photographs, quality 90."""
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
        left, top = int(rng.integers(0, photo.width - width + 1)), int(rng.integers(0, photo.height - height + 1))
        image = photo.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        target = folder / ("china" if i % 2 == 0 else "flower") / f"{i:05}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=90)
        target.write_bytes(buffer.getvalue())
    return folder
