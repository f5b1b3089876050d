"""`finetune forgetting`: what a fine-tuned run forgot, and the line between old and new weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import combined
import numpy as np
import pytest
from click.testing import CliRunner

import finetune
from finetune import classifier, cli, files
from finetune.backbones import architectures, original, weights
from finetune.backbones.original import OriginalHead
from finetune.combining import forgetting, soup
from finetune.combining.forgetting_told import Study
from finetune.combining.members import open_members
from finetune.combining.weight_line import INTERPOLATED
from finetune.errors import UserError
from finetune.evaluation import evaluate, predictions
from finetune.report import soups, weight_lines
from finetune.training import replay

REAL = original.original_head
OLD = OriginalHead(
    np.random.default_rng(3).normal(size=(50, 256)).astype(np.float32), np.zeros(50, np.float32)
)


@pytest.fixture(scope="module")
def made(combined_runs: combined.Runs) -> Iterator[combined.Runs]:
    """Runs whose network of random weights is given a classifier that it came with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(original, "original_head", lambda name, origin, size: OLD)
        yield combined_runs


@pytest.fixture(scope="module")
def found(made: combined.Runs) -> Study:
    """The study of a run on its own images."""
    return forgetting.study(made.sharper)


@pytest.fixture(scope="module")
def kitchen(made: combined.Runs) -> soup.Kitchen:
    return soup.Kitchen(open_members([made.sharper, made.tuned]), lambda text: None)


def test_without_refit_the_images_that_chose_stay_unseen(made: combined.Runs, shapes: Path) -> None:
    """What was trained on and what chose have no image in common; with it, all of them are."""
    sets = {}
    for run in (made.sharper, made.refitted):
        table = predictions.read_predictions(run / "predictions-selection.csv")
        chose = {files.file_digest(shapes / path) for path in table.paths}
        sets[run] = len(chose), len(chose & set(evaluate.trained_on(run) or ()))

    assert sets[made.sharper][0] > 5
    assert 0 == sets[made.sharper][1]
    assert sets[made.refitted][0] == sets[made.refitted][1]


def test_a_run_of_which_nothing_moved_forgot_nothing(made: combined.Runs) -> None:
    """To the last bit, in a sentence."""
    done = CliRunner().invoke(cli.cli, ["forgetting", str(made.first)])

    assert "nothing moved, and nothing is forgotten" in done.stdout
    assert 0 == done.exit_code


def test_the_line_ends_at_the_run_and_begins_at_the_original(
    made: combined.Runs, found: Study
) -> None:
    """The new end says of the images that chose what the run said; the old end agrees with the
    original on all of them; the frozen stages did not drift."""
    own = predictions.read_predictions(made.sharper / "predictions-selection.csv")
    rows = [own.paths.index(path) for path in found.names]
    old, new = (p for p in found.line if p.norms == INTERPOLATED and p.alpha in (0, 1))
    kept = [None if p.retention is None else p.retention.value for p in (old, new)]

    assert own.probabilities[rows].argmax(1).tolist() == new.scores.argmax(1).tolist()
    assert [1.0, found.agreement.value if found.agreement else None] == kept
    assert {one.alike for one in found.drift if not one.moved} <= {1.0, None}
    assert all(one.weights > 0 for one in found.drift if one.moved)
    assert 11 == len({p.alpha for p in found.line})
    assert found.chosen in found.line


def test_the_old_end_has_the_head_that_training_began_with(
    made: combined.Runs, found: Study
) -> None:
    """Two trainings that began alike have the same old end, and other new ends."""
    other = forgetting.study(made.tuned)
    ends = [
        [p.scores for p in one.line if p.norms == INTERPOLATED and p.alpha in (0, 1)]
        for one in (found, other)
    ]

    assert ends[0][0] == pytest.approx(ends[1][0], abs=1e-4)
    assert float(np.abs(ends[0][1] - ends[1][1]).max()) > 1e-2


def test_without_reference_images_it_is_called_a_change_of_behaviour(
    made: combined.Runs, found: Study, photographs: Path
) -> None:
    """And forgetting with them."""
    told = forgetting.study(made.sharper, reference=str(photographs), limit=4)

    assert "change of behaviour" == found.checks[0].name
    assert "forgetting" == told.checks[0].name
    assert 4 == (told.agreement.n if told.agreement else 0)


def test_the_chosen_point_is_saved_as_a_run(made: combined.Runs, tmp_path: Path) -> None:
    """It opens, predicts what its predictions.csv holds, carries its picture, and says where it
    comes from; the picture is whole XML."""
    weight_lines.forgetting(made.sharper, save=tmp_path / "line", picture=tmp_path / "line.svg")
    about = json.loads((tmp_path / "line" / "run.json").read_text(encoding="utf-8"))
    written = predictions.read_predictions(tmp_path / "line" / "predictions.csv")
    root = Path(about["recipe"]["data"]["data"])
    with finetune.load(tmp_path / "line") as model:
        again = model.predict([root / path for path in written.paths]).probabilities
    picture = ElementTree.parse(tmp_path / "line.svg").getroot()

    assert again == pytest.approx(written.probabilities, abs=1e-6)
    assert "line" == about["derived"]["kind"]
    assert (tmp_path / "line" / "line.svg").exists()
    assert len(picture.findall(".//{*}circle")) >= 22


def test_a_run_that_saw_the_images_which_chose_is_not_judged_by_them(
    made: combined.Runs, tmp_path: Path
) -> None:
    """No point is chosen, and none is saved: the way on is named."""
    assert forgetting.study(made.refitted).chosen is None
    with pytest.raises(UserError, match="no point was chosen") as caught:
        weight_lines.forgetting(made.refitted, save=tmp_path / "line")
    assert "policy.refit=false" in caught.value.fix
    assert not (tmp_path / "line").exists()


def test_random_weights_knew_nothing() -> None:
    """There is no classifier to ask: said, not computed."""
    assert "it knew nothing before" in str(REAL("test_efficientnet", "random", 64))


def test_the_old_classifier_is_the_one_that_the_network_came_with() -> None:
    """Its logits are those of the whole pretrained network."""
    import torch

    found = REAL("tf_efficientnet_lite0", "auto", 96)
    assert isinstance(found, OriginalHead)
    whole = architectures.create("tf_efficientnet_lite0", weights.find("tf_efficientnet_lite0"))
    sample = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = whole.module.eval()(sample).numpy()
        architectures.strip(whole)
        pooled = whole.module(sample).numpy()

    assert expected == pytest.approx(found.scores(pooled), abs=1e-3)


def test_only_synsets_name_the_classes_of_imagenet() -> None:
    """Classes of the user's own may be called 0 to 9."""
    assert [0, 1] == original.class_numbers(["n01440764", "n01443537"])
    assert original.class_numbers(["0", "1"]) is None
    assert original.class_numbers(["n99999999"]) is None


# ------------------------------------------------------------------------------------------- soups


def test_a_soup_is_the_mean_of_weights_and_heads(
    made: combined.Runs, kitchen: soup.Kitchen
) -> None:
    """Computed by hand: trunk and head; counters are whole numbers as they were."""
    model = kitchen.classifier(kitchen.mix(kitchen.runs))
    runs = [classifier.load(run) for run in (made.sharper, made.tuned)]
    states = [replay.tensors(run.load()) for run in runs]
    found = replay.tensors(kitchen.backbone)

    for key, value in found.items():
        if value.is_floating_point():
            mean = (states[0][key].double() + states[1][key].double()) / 2
            assert mean.float().numpy() == pytest.approx(value.numpy(), abs=1e-6)
        else:
            assert value.equal(states[0][key])
    heads = [run.head.arrays()["weight"] for run in runs]
    assert np.mean(heads, axis=0) == pytest.approx(model.head.arrays()["weight"], abs=1e-6)


def test_a_soup_is_chosen_on_unseen_images_and_saved_as_a_run(
    made: combined.Runs,
    kitchen: soup.Kitchen,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No image that chooses was trained on or is a test image; both treatments of BatchNorm stand
    beside it."""
    runs = (made.sharper, made.tuned)
    trained = {digest for run in runs for digest in evaluate.trained_on(run) or ()}
    choose = {files.file_digest(shapes / path) for path in kitchen.images.paths}
    test = predictions.read_predictions(made.tuned / "predictions.csv").paths
    monkeypatch.setattr(soup.Mix, "worth", property(lambda mix: (1.0, 0.0)))  # every run joins
    made_of = soups.mix(runs, tmp_path / "soup")

    assert not trained & choose
    assert not set(test) & set(kitchen.images.paths)
    assert any("BatchNorm" in row["name"] for row in made_of["contenders"][1:])
    assert 22 == evaluate.evaluate(tmp_path / "soup", shapes)["n"]  # 38 were trained on


def mix_of(worth: float, *names: str) -> soup.Mix:
    return soup.Mix(names, INTERPOLATED, None, 1.0, worth, 0.0)


@pytest.mark.parametrize(("both", "names"), [(0.9, ("a", "c")), (0.7, None)])
def test_a_run_joins_where_accuracy_does_not_fall(both: float, names: tuple[str] | None) -> None:
    """And where none does, a soup of one is refused."""
    worth = {"a": 0.8, "b": 0.7, "c": 0.6, "ab": 0.75, "ac": both}
    runs = {name: SimpleNamespace(member=SimpleNamespace(name=name, path=name)) for name in "abc"}
    kitchen: Any = SimpleNamespace(
        images=range(10),
        of=lambda mix: [runs[name] for name in mix.names],
        mix=lambda inside: mix_of(
            worth["".join(one.member.name for one in inside)], *(one.member.name for one in inside)
        ),
    )
    singles = [mix_of(worth[name], name) for name in "abc"]
    if names:
        assert names == soup.greedy(kitchen, singles).names
        return
    with pytest.raises(UserError, match="the soup would be this run alone"):
        soup.greedy(kitchen, singles)


@pytest.mark.parametrize(
    ("name", "words"),
    [("first", "nothing was fine-tuned"), ("refitted", "other training images")],
)
def test_weights_that_did_not_begin_as_the_same_are_not_mixed(
    made: combined.Runs, tmp_path: Path, name: str, words: str
) -> None:
    """An SVM has none that moved; other training images give another starting head."""
    with pytest.raises(UserError, match=words) as caught:
        soups.mix([made.sharper, getattr(made, name)], tmp_path / "soup")
    assert "--soup" in caught.value.fix
    assert not (tmp_path / "soup").exists()
