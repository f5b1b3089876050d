"""Several classifiers that answer as one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from finetune.backbones import create
from finetune.backbones.stages import Backbone
from finetune.classifier import Classifier
from finetune.data.images import ImageSet, load
from finetune.errors import UserError
from finetune.evaluation import ensemble
from finetune.evaluation.ensemble import Ensemble
from finetune.features import familiarity
from finetune.heads.head import Head
from finetune.network import Tap


@pytest.fixture
def pictures(shapes: Path) -> ImageSet:
    return load(shapes).subset(np.arange(0, 60, 6))


@pytest.fixture
def pair(tiny: Backbone) -> Ensemble:
    """Two heads of random weights on one small network."""
    members = {}
    for seed, name in enumerate(("svm", "fine-tuned")):
        rng = np.random.default_rng(seed)
        weight = rng.normal(size=(3, tiny.network.width(Tap("pooled")))).astype(np.float32)
        head = Head((Tap("pooled"),), ("a", "b", "c"), weight, np.zeros(3, np.float32))
        head = dataclasses.replace(head, temperature=1.0 + seed)
        members[name] = Classifier(tiny.network, head, lambda: tiny, "torch", "float32")
    return Ensemble(members, {"svm": 0.25, "fine-tuned": 0.75})


def test_it_is_the_average_computed_by_hand(pair: Ensemble, pictures: ImageSet) -> None:
    """The weighted geometric mean of the members' probabilities, normalised, to 1e-6."""
    first, second = (m.predict(pictures).probabilities for m in pair.members.values())
    product = first.astype(np.float64) ** 0.25 * second.astype(np.float64) ** 0.75
    found = pair.predict(pictures)

    assert product / product.sum(1, keepdims=True) == pytest.approx(found.probabilities, abs=1e-6)
    assert found.images.paths == pictures.paths


def test_the_svm_says_how_unfamiliar_an_image_is(pair: Ensemble, pictures: ImageSet) -> None:
    """The answer is that of the member `svm`; where none knows, None."""
    assert pair.predict(pictures).unfamiliar is None
    x = np.random.default_rng(0).normal(
        size=(30, len(pair.members["svm"].head.arrays()["weight"].T))
    )
    known = familiarity.fit([x.astype(np.float32)])
    other = familiarity.fit([5 * x.astype(np.float32)])
    members = {
        "svm": dataclasses.replace(pair.members["svm"], known=known),
        "fine-tuned": dataclasses.replace(pair.members["fine-tuned"], known=other),
    }
    told = Ensemble(members, pair.weights).predict(pictures).unfamiliar

    assert np.array_equal(told, members["svm"].predict(pictures).unfamiliar)


def test_it_comes_back_from_its_folder(
    pair: Ensemble, pictures: ImageSet, tiny: Backbone, tmp_path: Path
) -> None:
    """Saved and loaded it says the same; its folder holds one for each member."""
    for folder in ensemble.save(tmp_path, pair):
        create.save(tiny, folder / "model.safetensors")
    with ensemble.load(tmp_path) as again:
        same = again.predict(pictures)

    assert np.array_equal(pair.predict(pictures).probabilities, same.probabilities)
    assert ["fine-tuned", "svm"] == sorted(path.name for path in (tmp_path / "members").iterdir())
    assert tmp_path / "members" / "fine-tuned" == ensemble.backbone_folder(tmp_path)


@pytest.mark.parametrize("members", [{"../elsewhere": 1.0}, None, {"a/b": 1.0}])
def test_a_damaged_description_is_refused(members: object, tmp_path: Path) -> None:
    """No name leads out of the folder, and what is no table of members is named."""
    text = json.dumps({"format": 1, "members": members})
    (tmp_path / "ensemble.json").write_text(text, encoding="utf-8")

    with pytest.raises(UserError, match=r"ensemble.json"):
        ensemble.load(tmp_path)


def test_progress_goes_once_from_start_to_end(pair: Ensemble, pictures: ImageSet) -> None:
    """Over all members together."""
    steps: list[tuple[int, int]] = []
    pair.predict(pictures, progress=lambda done, total: steps.append((done, total)))

    assert (2 * len(pictures), 2 * len(pictures)) == steps[-1]
    assert steps == sorted(steps)
