"""Settings of fine-tuning, in plain data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.errors import UserError


@dataclass(frozen=True)
class Training:
    """How to fine-tune: everything that the loop needs, decided before it starts.

    `trainable` names stages from stem to end; `lr` is the head's learning rate, every trainable
    stage gets `lr * trunk_lr_scale * layer_decay ** (stages between it and the head)`, written into
    its own parameter group. `warmup` is a share of all steps. `views` is the number of augmented
    copies of each image whose activations are stored at the freeze boundary. `l2_sp` pulls
    trainable trunk weights to where they started (Li et al. 2018).

    `decay_norms` decays vectors and scalars (norms, biases, tokens), too; `drop_path` is the
    probability with which the last residual branch is left out in a step.

    The head reads `taps`: the pooled end as it is, or several taps side by side, each
    L2-normalised (Head2Toe, Evci et al. 2022). `head_init` probe starts it from a logistic
    regression on them (LP-FT, Kumar et al. 2022), for several taps with the inverse strength
    `head_strength`.
    """

    trainable: tuple[str, ...]
    head_init: str = "probe"  # probe | zero
    optimizer: str = "adamw"  # adamw | sgd
    lr: float = 1e-3
    trunk_lr_scale: float = 0.1
    layer_decay: float = 0.8
    epochs: int = 10
    batch_size: int = 32
    schedule: str = "cosine"  # one of schedules.SCHEDULES
    warmup: float = 0.1
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    mixup: float = 0.0
    clip: float = 1.0
    ema: bool = False
    patience: int = 5
    l2_sp: float = 0.0
    augment: str = "light"  # none | light | medium | strong
    flip: bool = True
    views: int = 4
    input_size: int = 224
    class_weight: str = "auto"  # auto | none | balanced
    norm_moves: bool = False
    taps: tuple[str, ...] = ("pooled",)
    head_strength: float = 10.0
    decay_norms: bool = False
    drop_path: float = 0.0

    @property
    def normalize(self) -> bool:
        """Whether the head reads L2-normalised taps."""
        return self.taps != ("pooled",)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def check_strategy(strategy: str) -> str:
    """The strategy itself where it exists, else a `UserError` that lists those that do."""
    if strategy in ("svm", "probe", "half", "full", "scratch") or re.fullmatch(
        r"stages:[1-9]\d*", strategy
    ):
        return strategy
    raise UserError(
        f"no strategy is called {strategy!r}",
        where="--strategy",
        fix="choose auto, svm, probe, stages:K, half, full or scratch",
    )


def trainable(strategy: str, stages: Sequence[str]) -> tuple[str, ...]:
    """Names of the stages that may move, from stem to end; the neck belongs to the last stage."""
    numbered = [name for name in stages if name.startswith("stage")]
    if strategy in ("svm", "probe"):
        return ()
    if strategy in ("full", "scratch"):
        return tuple(stages)
    count = (len(numbered) + 1) // 2 if strategy == "half" else int(strategy.partition(":")[2])
    if count > len(numbered):
        raise UserError(
            f"{strategy}: the backbone has {len(numbered)} stages",
            where="--strategy",
            fix=f"choose stages:1 … stages:{len(numbered)}",
        )
    keep = set(numbered[len(numbered) - count :])
    return tuple(name for name in stages if name in keep or name == "neck")
