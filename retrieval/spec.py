"""Which kind of index serves, how hard it must search, and what is said of it: decided on numbers,
without an index library."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune import hardware
from finetune.errors import UserError
from retrieval.vectors import ROUNDING, Ints, Rows

Effort = dict[str, int]

FLAT_NUMBERS = 32_000_000  # a query reads all of them: some 10 ms of one core
HALF_NUMBERS = 128_000_000
IVF_ROWS = 10_000  # fewer do not fill the lists
MOST_LISTS = 16_384
USELESS = 2e-4  # a doubled effort that gains less recall than this gains nothing
WHERE = "index factory"


@dataclass(frozen=True)
class Spec:
    """What an index is and what was measured of it.

    `effort` are the search parameters in use (`nprobe`, `ef`, `k_factor`); empty where every vector
    is compared. `recall` is the share of the true `k` nearest that were found for `queries`
    held-out queries, ties counted as found, and `recall_low` the lower end of its 95 % interval
    (Wilson, each query taken as one draw, which is cautious); 1 without queries for an exact index,
    None where too few rows exist to measure it. `note` says what is short of `asked`.
    """

    factory: str
    n: int
    d: int
    k: int
    asked: float
    recall: float | None = None
    recall_low: float | None = None
    queries: int = 0
    effort: Effort = field(default_factory=dict)
    note: str = ""
    metric: str = "ip"
    normalised: bool = True

    def __str__(self) -> str:
        effort = "".join(f", {name} {value}" for name, value in self.effort.items())
        if self.recall is None:
            said = "recall not measured"
        elif not self.queries:
            said = "exact"
        else:
            low = f"at least {self.recall_low:.3f}"
            said = f"recall@{self.k} {self.recall:.4f} ({low}) on {self.queries} held-out queries"
        return f"{self.factory}{effort}: {said}" + (f"; {self.note}" if self.note else "")


def choose(n: int, d: int, memory_mb: float | None = None) -> str:
    """The faiss factory string for n vectors of d numbers: the most exact kind that answers quickly
    and fits the memory.

    `memory_mb` bounds the codes, in millions of bytes. Raises `UserError` where no kind fits.
    """
    kinds: list[tuple[str, float]] = []
    if n * d <= FLAT_NUMBERS:
        kinds.append(("Flat", 4.0 * n * d))
    if n * d <= HALF_NUMBERS:
        kinds.append(("SQfp16", 2.0 * n * d))
    if n >= IVF_ROWS:
        coarse = inverted(n, d)
        parts = int(coarse.split("PQ")[1].split("x")[0])
        rest = n * (parts / 2 + 8) + 4.0 * d * int(coarse[3:].split(",")[0])
        kinds += [
            (f"{coarse},Refine(SQfp16)", 2.0 * n * d + rest),
            (f"{coarse},Refine(SQ8)", n * d + rest),
            (coarse, rest),
        ]
    else:
        kinds += [("SQfp16", 2.0 * n * d), ("SQ8", n * d)]
    for name, size in kinds:
        if memory_mb is None or size <= memory_mb * 1e6:
            return name
    least = min(size for _, size in kinds) / 1e6
    what = f"{n} vectors of {d} numbers do not fit {memory_mb:g} MB"
    raise UserError(
        what, where="memory", fix=f"allow {least:.1f} MB, or whiten to fewer dimensions"
    )


def inverted(n: int, d: int) -> str:
    """Inverted lists of 4-bit codes for n vectors of d numbers: about 4 √n lists, one code for 2
    numbers or more."""
    lists = min(MOST_LISTS, 2 ** round(np.log2(4 * np.sqrt(n))))
    divisors = [m for m in range(1, d + 1) if d % m == 0 and m <= max(1, min(d // 2, 256))]
    parts = divisors[-1] if divisors[-1] * 16 >= d else d
    return f"IVF{lists},PQ{parts}x4fs"


def refuse(name: str, n: int) -> None:
    """Refuse a faiss factory string that cannot work on n vectors, before faiss tries (and takes
    the memory for it)."""
    for pattern, limit in ((r"IVF(\d+)", n), (r"HNSW(\d+)", 512), (r"NSG(\d+)", 512)):
        for number in re.findall(pattern, name):
            if not 1 <= int(number) <= limit:
                raise UserError(
                    f"{name!r}: {pattern[:-5]} of {number} on {n} vectors",
                    where=WHERE,
                    fix=f"use 1 to {limit}",
                )
    for bits in re.findall(r"\d+x(\d+)", name):
        if int(bits) > 16 or 2 ** int(bits) > n:
            raise UserError(
                f"{name!r}: codes of {bits} bits need 2^{bits} vectors, not {n}",
                where=WHERE,
                fix="use fewer bits: x4",
            )
    if "IDMap" in name:
        raise UserError(
            f"{name!r}: ids are the gallery's business", where=WHERE, fix="leave IDMap out"
        )


# --- effort -------------------------------------------------------------------------------------


def threads() -> int:
    """Threads for a search; 0 where `$OMP_NUM_THREADS` has decided."""
    return 0 if os.environ.get("OMP_NUM_THREADS") else hardware.threads()


Shares = Callable[[Effort], NDArray[np.float64]]


def tune(
    choosing: Shares, judging: Shares, effort: Effort, limits: Effort, asked: float
) -> tuple[Effort, NDArray[np.float64]]:
    """The effort that holds the asked recall, and what was then found for other queries than those
    that chose it.

    Both functions give, for an effort, each query's share of its true neighbours. Where the second
    set falls short the effort goes on rising while that helps.
    """
    effort = climb(choosing, effort, limits, asked)
    seen = judging(effort)
    while seen.mean() < asked and effort != limits:
        more = doubled(effort, limits)
        better = judging(more)
        if better.mean() < seen.mean() + USELESS:
            break
        effort, seen = more, better
    return effort, seen


def doubled(effort: Effort, limits: Effort, only: str | None = None) -> Effort:
    return {
        name: min(2 * value, limits[name]) if only in (None, name) else value
        for name, value in effort.items()
    }


def widened(effort: Effort, limits: Effort, factor: float) -> Effort:
    """The effort for a search in which only one row in `factor` counts: as many that count are
    looked at as before."""
    return {
        name: value if name == "k_factor" else min(math.ceil(value * factor), limits[name])
        for name, value in effort.items()
    }


def climb(shares: Shares, effort: Effort, limits: Effort, asked: float) -> Effort:
    """The first effort at which the mean share, less its standard error, is at least `asked`; else
    where more is useless.

    Each step doubles the one parameter that gains most, or all where none gains alone.
    """
    now = shares(effort)
    while (
        now.mean() - now.std() / np.sqrt(len(now)) < asked and now.mean() < 1 and effort != limits
    ):
        alone = [doubled(effort, limits, name) for name in effort if effort[name] < limits[name]]
        tried = [(trial, shares(trial)) for trial in alone]
        best, values = max(tried, key=lambda one: one[1].mean())
        if values.mean() < now.mean() + USELESS:
            best = doubled(effort, limits)
            values = shares(best)
            if values.mean() < now.mean() + USELESS:
                break
        effort, now = best, values
    return effort


def shares_found(X: Rows, Q: Rows, found: Ints, last: NDArray[Any]) -> NDArray[np.float64]:
    """Of every line of `found`, the share that is as near as the last of the true neighbours:
    `(q,)`."""
    near = (cosines(X, Q, found) >= last[:, None] - ROUNDING) & (found >= 0)
    return near.mean(axis=1)


def cosines(X: Rows, Q: Rows, rows: Ints) -> NDArray[np.float64]:
    return np.stack(
        [X[np.maximum(line, 0)].astype(np.float64) @ q for line, q in zip(rows, Q, strict=True)]
    )
