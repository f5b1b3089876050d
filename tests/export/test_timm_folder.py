"""A run that timm opens alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import exports
import numpy as np
import pytest

from finetune.backbones.stages import Backbone
from finetune.data.images import load
from finetune.errors import UserError
from finetune.evaluation.ensemble import AnyModel
from finetune.export import agreement, card, timm_folder
from finetune.export.agreement import Asked

REFUSED: dict[str, Callable[[Backbone], AnyModel]] = {
    "kernel machine": lambda b: exports.model(b, exports.kernel(b)),
    "pooled end alone": lambda b: exports.model(b, exports.linear(b, normalize=False)),
    "length 1": lambda b: exports.model(b, exports.linear(b, exports.POOLED)),
    "mirror image": lambda b: exports.model(
        b, exports.linear(b, exports.POOLED, normalize=False), views=("", "flip")
    ),
    "average of 1": lambda b: exports.average(exports.model(b, exports.linear(b))),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_timm_has_no_room_for_is_refused(why: str, tiny: Backbone, tmp_path: Path) -> None:
    """The refusal says what is in the way, and which formats hold the run."""
    with pytest.raises(UserError, match=rf"{why}[\s\S]*onnx"):
        timm_folder.plain(REFUSED[why](tiny), tmp_path)


def test_timm_alone_says_what_the_run_says(tiny: Backbone, shapes: Path, tmp_path: Path) -> None:
    """Calibrated probabilities to 1e-4 here; in a process without Regraft, the same class by
    timm's own preparation."""
    own = exports.model(tiny, exports.linear(tiny, exports.POOLED, normalize=False))
    timm_folder.write(*timm_folder.plain(own, tmp_path), tmp_path)
    pictures = load(shapes).subset(np.arange(0, 60, 9))
    _, ask = timm_folder.opened(tmp_path)
    answers = agreement.answers(
        pictures, [Asked(own.network.preprocess, 1.0, ask)], lambda *_: None
    )
    said = own.predict(pictures)
    shutil.copy(shapes / pictures.paths[0], tmp_path / "photo.jpg")
    label, score = exports.without_regraft(card.code("timm", 1), tmp_path).rsplit(" ", 1)

    assert said.probabilities == pytest.approx(answers, abs=1e-4)
    assert own.classes[said.best[0]] == label
    assert said.probabilities[0].max() == pytest.approx(float(score), abs=1e-3)
