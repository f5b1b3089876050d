"""The graph of a run says what the run says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import exports
import numpy as np
import pytest
import torch

from finetune.backbones.stages import Backbone
from finetune.data.images import ImageSet, load
from finetune.evaluation.ensemble import AnyModel
from finetune.export import agreement, graph
from finetune.export.agreement import Asked
from finetune.export.formats import Floats
from finetune.export.graph import Part

Make = Callable[[Backbone], AnyModel]

FORMS: dict[str, Make] = {
    "pooled, as fine-tuned": lambda b: exports.model(
        b, exports.linear(b, exports.POOLED, normalize=False)
    ),
    "several taps, normalised": lambda b: exports.model(b, exports.linear(b)),
    "kernel machine": lambda b: exports.model(b, exports.kernel(b)),
    "an image and its mirror image": lambda b: exports.model(
        b, exports.linear(b), views=("", "flip")
    ),
    "average on one trunk": lambda b: exports.average(
        exports.model(b, exports.linear(b)), exports.model(b, exports.kernel(b, exports.POOLED))
    ),
    "average, normalised otherwise": lambda b: exports.average(
        exports.model(b, exports.linear(b)),
        exports.model(b, exports.kernel(b), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
    ),
    "average, other sizes": lambda b: exports.average(
        exports.model(b, exports.linear(b)),
        exports.model(b, exports.kernel(b), size=96, resize=110),
        exports.model(b, exports.kernel(b, exports.POOLED)),
    ),
}


@pytest.fixture
def pictures(shapes: Path) -> ImageSet:
    return load(shapes).subset(np.arange(0, 60, 9))


def asked(part: Part) -> Asked:
    def ask(x: Floats) -> Floats:
        with torch.inference_mode():
            return np.asarray(part.graph(torch.from_numpy(x)))

    return Asked(part.preprocess, part.weight, ask)


@pytest.mark.parametrize("form", FORMS)
def test_it_says_what_the_run_says(form: str, tiny: Backbone, pictures: ImageSet) -> None:
    """Every kind of head, view and average, to 1e-4."""
    model = FORMS[form](tiny)
    parts = graph.parts(model)
    own = agreement.answers(pictures, [asked(part) for part in parts], lambda *_: None)
    said = model.predict(pictures).probabilities

    assert said == pytest.approx(own, abs=1e-4)
    assert np.ptp(said, axis=0).max() > 0.01  # images are told apart: something is compared


def test_members_share_what_they_can(tiny: Backbone) -> None:
    """Members on one trunk run it once; another size is a part of its own, with its share."""
    (one,) = graph.parts(FORMS["average on one trunk"](tiny))
    several = graph.parts(FORMS["average, other sizes"](tiny))

    assert 1 == len(one.graph.get_submodule("trunks")._modules)
    assert ["m0", "m1"] == [part.name for part in several]
    assert [4 / 6, 2 / 6] == pytest.approx([part.weight for part in several])
