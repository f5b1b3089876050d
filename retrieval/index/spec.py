"""Which type of index serves, and the description of one: decided on numbers, without an index
library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from finetune.errors import UserError

SearchParameters = dict[str, int]

FLAT_NUMBERS = 32_000_000  # a query reads all of them: some 10 ms of one core
HALF_NUMBERS = 128_000_000
IVF_ROWS = 10_000  # fewer do not fill the lists
MOST_LISTS = 16_384
WHERE = "index factory"
# names of `Spec` in files
OLD_NAMES = {"target_recall": "asked", "search_parameters": "effort"}


@dataclass(frozen=True)
class Spec:
    """What an index is and what was measured of it.

    `search_parameters` are those in use (`nprobe`, `ef`, `k_factor`); none where every vector is
    compared. `recall` is the share of the true `k` nearest that were found for `queries`
    held-out queries, ties counted as found, and `recall_low` the lower end of its 95 % interval
    (Wilson, each query taken as one draw, which is cautious); 1 without queries for an exact index,
    None where too few rows exist to measure it. `note` says what is short of `target_recall`.
    """

    factory: str
    n: int
    d: int
    k: int
    target_recall: float
    recall: float | None = None
    recall_low: float | None = None
    queries: int = 0
    search_parameters: SearchParameters = field(default_factory=dict)
    note: str = ""
    metric: str = "ip"
    normalised: bool = True

    def __str__(self) -> str:
        parameters = "".join(f", {name} {value}" for name, value in self.search_parameters.items())
        if self.recall is None:
            said = "recall not measured"
        elif not self.queries:
            said = "exact"
        else:
            low = f"at least {self.recall_low:.3f}"
            said = f"recall@{self.k} {self.recall:.4f} ({low}) on {self.queries} held-out queries"
        return f"{self.factory}{parameters}: {said}" + (f"; {self.note}" if self.note else "")

    def to_json(self) -> dict[str, Any]:
        """As index files hold it; two fields go by the names of version 0.1.0."""
        return {OLD_NAMES.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Spec:
        """What `to_json` gave. Raises `TypeError` where something is missing or foreign."""
        names = {old: name for name, old in OLD_NAMES.items()}
        return cls(**{names.get(name, name): value for name, value in values.items()})


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
