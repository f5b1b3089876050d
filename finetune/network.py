"""The description of a frozen network in plain data: where features are read, how pixels become
input, whose weights.

Nothing here imports torch, so `predict` and `query` can serve a converted network without it.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from finetune.errors import UserError

POOLS = ("mean", "gem", "rmac")


@dataclass(frozen=True, order=True)
class Tap:
    """A place to read features: after `stage`, pooled by `pool` on a `grid` × `grid` raster.

    `stage` is `pooled` (the network's own pooled end, what its classifier reads), `stageK` (after
    the K-th stage), `fc6`, `fc7` (4096-d, after the ReLU) or `fc6-pre`, `fc7-pre` (before it).
    Written as text: `pooled`, `stage6`, `stage6/3x3`, `stage6/gem`, `stage6/rmac`, `fc7-pre`. The
    features of a grid are flattened channel-last: `(grid * grid * channels,)`, row by row.
    """

    stage: str
    grid: int = 1
    pool: str = "mean"

    def __post_init__(self) -> None:
        if self.grid != 1 and self.pool != "mean":
            raise ValueError(f"a tap has a grid or a pool: {self.stage}, {self.grid}, {self.pool}")

    def __str__(self) -> str:
        if self.grid != 1:
            return f"{self.stage}/{self.grid}x{self.grid}"
        return self.stage if self.pool == "mean" else f"{self.stage}/{self.pool}"

    @classmethod
    def parse(cls, text: str) -> Tap:
        """Read the written form; anything else is refused with the forms that exist."""
        stage, _, how = text.strip().partition("/")
        known = re.fullmatch(r"pooled|stem|stage[1-9]\d*|neck|fc[67](-pre)?|moments", stage)
        grid = re.fullmatch(r"([1-9])x\1", how)
        if known and not how and "/" not in text:
            return cls(stage)
        if known and grid:
            return cls(stage, grid=int(grid.group(1)))
        if known and how in POOLS:
            return cls(stage, pool=how)
        raise UserError(
            f"no tap is written {text!r}",
            where="tap",
            fix="write pooled, stage6, stage6/3x3, stage6/gem, stage6/rmac, fc7 or fc7-pre",
        )


@dataclass(frozen=True)
class Preprocess:
    """How a decoded RGB image becomes network input: the weights' own evaluation transform.

    The short side is resized to `resize` pixels with `interpolation`, the centre `size` × `size` is
    cut out, and `(x / 255 - mean) / std` is applied inside the network's graph. `squash` resizes
    both sides to `size` instead (timm's crop_mode `squash`).
    """

    size: int
    resize: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    squash: bool = False


@dataclass(frozen=True)
class Network:
    """A frozen network, as data: enough to name its features in the store and to run a converted
    copy of it.

    `digest` covers the tensors as they are loaded (names, shapes, values). `source` says in words
    where the weights came from; `pretraining` is `imagenet` where the similarity ruler applies,
    `other`, or `random`. `widths` maps the text of every tap (`str(tap)`) that the network offers
    to the number of features; `stages` names the freeze points from stem to end.
    """

    name: str
    digest: str
    source: str
    pretraining: str
    preprocess: Preprocess
    widths: dict[str, int]
    stages: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Network:
        shape = dict(value["preprocess"])
        shape["mean"], shape["std"] = tuple(shape["mean"]), tuple(shape["std"])
        return cls(
            **{**value, "preprocess": Preprocess(**shape), "stages": tuple(value.get("stages", ()))}
        )

    def width(self, tap: Tap) -> int:
        """The number of features at `tap`, or a `UserError` that lists the taps of this network."""
        base = self.widths.get(str(tap))
        # a map: every grid and pool can be read from it
        if base is None and f"{tap.stage}/3x3" in self.widths:
            base = self.widths[tap.stage] * tap.grid**2
        if base is None:
            raise UserError(
                f"{self.name} has no tap {tap}",
                where="tap",
                fix=f"it has: {', '.join(self.widths)}",
            )
        return base
