"""The main job end to end, small: what it writes, what it ships, and what happens when it is cut
short."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import odd
import pytest

import finetune
from finetune import analysis, classifier, files, job, names, run
from finetune.data import images
from finetune.errors import UserError
from finetune.evaluation import fitting, predictions
from finetune.heads import head
from finetune.network import Tap
from finetune.report import runs

TINY: dict[str, Any] = {
    "backbone": ["test_efficientnet"],
    "weights": "random",
    "engine": "torch",
    "precision": "float32",
}


@pytest.fixture(scope="module")
def fitted(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made once."""
    out = tmp_path_factory.mktemp("fitted") / "run"
    return job.fit(shapes, out=out, strategy="svm", **TINY).path


@pytest.fixture
def done(fitted: Path, tmp_path: Path) -> job.Outcome:
    """A finished run of one's own."""
    return job.outcome(Path(shutil.copytree(fitted, tmp_path / "run")))


def test_a_run_holds_everything_that_the_design_names(done: job.Outcome) -> None:
    """Recipe, plan, metrics, predictions, weights, head, report, and run.json; no checkpoints
    stay."""
    names = {path.name for path in done.path.iterdir()}

    assert {
        "recipe.yaml",
        "plan.json",
        "metrics.json",
        "predictions.csv",
        "model.safetensors",
        "config.json",
        "head.safetensors",
        "report.html",
        "run.json",
    } <= names
    assert "checkpoints" not in names


def test_predict_reproduces_the_runs_predictions_bit_for_bit(
    done: job.Outcome, shapes: Path
) -> None:
    """The probabilities in predictions.csv are those that `load(run).predict` gives for the same
    files."""
    written = predictions.read_predictions(done.path / "predictions.csv")
    again = finetune.load(done.path).predict([shapes / path for path in written.paths])

    assert np.array_equal(written.probabilities, again.probabilities.astype(np.float64))


def test_the_other_engine_agrees_within_a_tolerance(done: job.Outcome, shapes: Path) -> None:
    """A run made by torch in float32 predicts the same with OpenVINO in float32, to 1e-3 in
    probability."""
    pytest.importorskip("openvino")
    written = predictions.read_predictions(done.path / "predictions.csv")
    again = finetune.load(done.path, engine_name="openvino").predict(
        [shapes / path for path in written.paths]
    )

    assert float(np.abs(written.probabilities - again.probabilities).max()) < 1e-3


def test_anyone_can_recompute_the_accuracy(done: job.Outcome) -> None:
    """predictions.csv holds what metrics.json says."""
    told = predictions.read_predictions(done.path / "predictions.csv")
    best = [told.classes[i] for i in told.probabilities.argmax(1)]

    assert done.metrics["test/top1"]["value"] == pytest.approx(
        np.mean([a == b for a, b in zip(best, told.labels, strict=True)])
    )
    assert len(told.paths) == done.metrics["test/top1"]["n"]


def test_random_weights_are_said_loudly(done: job.Outcome) -> None:
    """The verdict and the report both say that the weights are random."""
    assert "RANDOM" in done.verdict
    assert "RANDOM" in (done.path / "report.html").read_text(encoding="utf-8")


def test_the_same_seed_gives_the_same_run(shapes: Path, tmp_path: Path, done: job.Outcome) -> None:
    """A second run elsewhere has the same predictions, to the bit."""
    again = job.fit(shapes, out=tmp_path / "again", strategy="svm", **TINY)

    assert (done.path / "predictions.csv").read_bytes() == (
        again.path / "predictions.csv"
    ).read_bytes()


def test_a_finished_run_is_returned_and_not_made_again(done: job.Outcome, shapes: Path) -> None:
    """Asking again prints the verdict that stands there; run.json is not touched."""
    before = (done.path / "run.json").stat().st_mtime_ns
    again = job.fit(shapes, out=done.path, strategy="svm", **TINY)

    assert done.verdict == again.verdict
    assert before == (done.path / "run.json").stat().st_mtime_ns


def test_other_settings_do_not_overwrite_a_run(done: job.Outcome, shapes: Path) -> None:
    """The same folder with another seed is refused, naming --force."""
    with pytest.raises(UserError, match="--force"):
        job.fit(shapes, out=done.path, strategy="svm", seed=1, **TINY)


def test_the_recipe_of_a_run_makes_the_run_again(done: job.Outcome, tmp_path: Path) -> None:
    """recipe.yaml feeds back into fit and gives the same predictions."""
    again = job.fit(source=done.path / "recipe.yaml", out=tmp_path / "from-recipe")

    assert (done.path / "predictions.csv").read_bytes() == (
        again.path / "predictions.csv"
    ).read_bytes()


def test_a_run_can_be_moved(done: job.Outcome, shapes: Path, tmp_path: Path) -> None:
    """A run is self-contained: it predicts from another folder."""
    moved = done.path.rename(tmp_path / "moved")
    image = next((shapes).glob("*/*.png"))

    assert 1 == len(finetune.load(moved).predict([image]).probabilities)


def test_one_shot_is_fitted_with_the_default_and_says_so(shapes: Path, tmp_path: Path) -> None:
    """--shots 1 leaves nothing to cross-validate: the policy's default is used, in words."""
    said: list[str] = []
    outcome = job.fit(
        shapes, out=tmp_path / "one", shots=1, strategy="svm", say=said.append, **TINY
    )

    assert (outcome.path / "run.json").exists()
    assert any("cross-valid" in line for line in said)


def test_fine_tuning_writes_curves_and_a_comparison(shapes: Path, tmp_path: Path) -> None:
    """With stages:1 the log holds the epochs, and plan.json the paired comparison on unseen
    images."""
    outcome = job.fit(shapes, out=tmp_path / "tuned", strategy="stages:1", epochs=2, **TINY)
    lines = [
        json.loads(line)
        for line in (outcome.path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    plan = files.read_json(outcome.path / "plan.json")

    assert any("train/loss" in line for line in lines)
    assert {"difference", "standard_error", "p_value"} <= set(plan["choice"])
    assert "stages:1" == plan["plan"]["strategy"]


@pytest.mark.usefixtures("one_thread")
def test_a_fine_tuned_model_that_ships_opens_in_timm(shades: Path, tmp_path: Path) -> None:
    """A run with one pooled, unnormalised head is in timm's own local layout, and scores the same
    there."""
    import timm
    import torch

    from finetune.data import decode

    quick = (
        "policy.ship=fine-tuned",
        "train.patience=0",
        "train.batch_size=8",
        "train.input_size=64",
    )
    outcome = job.fit(
        shades, out=tmp_path / "tuned", strategy="scratch", epochs=3, assignments=quick, **TINY
    )
    assert "fine-tuned (scratch)" == outcome.shipped
    model = timm.create_model(f"local-dir:{outcome.path}", pretrained=True).eval()
    opened = classifier.load(outcome.path)
    picture = next(shades.glob("*/*.png"))
    pre = opened.network.preprocess
    pixels = (
        torch.from_numpy(decode.to_input(picture.read_bytes(), pre)).permute(2, 0, 1)[None].float()
        / 255
    )
    with torch.inference_mode():
        scores = model(
            (pixels - torch.tensor(pre.mean).view(3, 1, 1)) / torch.tensor(pre.std).view(3, 1, 1)
        )
    ours = opened.predict(images.load_unlabelled([picture])).probabilities

    assert np.allclose(head.softmax(scores.numpy(), opened.head.temperature), ours, atol=1e-4)


def test_an_unfinished_run_is_refused_by_predict(done: job.Outcome) -> None:
    """Without run.json there is no run to predict with."""
    (done.path / "run.json").unlink()

    with pytest.raises(UserError, match="run"):
        finetune.load(done.path)


def test_a_damaged_run_is_refused_by_name(done: job.Outcome) -> None:
    """A changed byte in the head is found before anything is predicted."""
    path = done.path / "head.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    with pytest.raises(UserError, match="head"):
        finetune.load(done.path)


def test_the_test_part_is_judged_once_and_chooses_nothing(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other labels on the test images change the metrics and not one number of the model; each is
    predicted once a run."""
    seen: list[str] = []
    predict = classifier.Classifier.predict

    def counted(
        self: classifier.Classifier, pictures: images.ImageSet, **how: Any
    ) -> classifier.Predictions:
        seen.extend(pictures.paths)
        return predict(self, pictures, **how)

    monkeypatch.setattr(classifier.Classifier, "predict", counted)
    kinds = sorted(path.name for path in shapes.iterdir())
    rows = [
        (path, path.parent.name, "test" if path.stem > "14" else "train")
        for path in sorted(shapes.glob("*/*.png"))
    ]
    outcomes = []
    for name, turn in (("right", 0), ("wrong", 1)):
        labels = [
            kinds[(kinds.index(label) + turn * (part == "test")) % 3] for _, label, part in rows
        ]
        lines = [
            f"{path},{label},{part}\n" for (path, _, part), label in zip(rows, labels, strict=True)
        ]
        (tmp_path / f"{name}.csv").write_text(
            "path,label,split\n" + "".join(lines), encoding="utf-8"
        )
        outcomes.append(
            job.fit(tmp_path / f"{name}.csv", out=tmp_path / name, strategy="svm", **TINY)
        )
        assert sorted(seen) == sorted(
            os.path.relpath(path, tmp_path) for path, _, part in rows if part == "test"
        )
        seen.clear()
    one, other = (
        predictions.read_predictions(outcome.path / "predictions.csv") for outcome in outcomes
    )

    assert outcomes[0].metrics["test/top1"] != outcomes[1].metrics["test/top1"]
    assert one.labels != other.labels
    assert np.array_equal(one.probabilities, other.probabilities)


@pytest.mark.parametrize(
    "options",
    [{"strategy": "probe"}, {"strategy": "svm", "assignments": ("backbone.taps=[pooled]",)}],
)
def test_a_default_that_was_not_read_gives_way(
    options: dict[str, Any], shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the policy's default tap is not among those read (a probe, or --taps), the pooled end
    is taken."""
    monkeypatch.setattr(analysis, "default_taps", lambda network, word: (Tap("stage3", 3),))
    outcome = job.fit(shapes, out=tmp_path / "run", shots=2, **options, **TINY)

    assert (Tap("pooled"),) == classifier.load(outcome.path).head.taps


def test_the_svm_reads_the_taps_that_were_asked_for() -> None:
    """Pooled features are always extracted, but an SVM that was asked for other taps does not
    choose from them."""
    blocks = {tap: np.zeros((2, 3), np.float32) for tap in (Tap("pooled"), Tap("stage3"))}
    for taps, expected in (
        (("stage3",), [Tap("stage3")]),
        ("auto", list(blocks)),
        (("pooled", "stage3"), list(blocks)),
    ):
        seen: Any = SimpleNamespace(
            plan=SimpleNamespace(strategy="svm"),
            recipe=SimpleNamespace(backbone=SimpleNamespace(taps=taps)),
        )
        assert expected == list(fitting._asked(seen, blocks))


def test_names_of_any_kind_go_through_a_job(shapes: Path, tmp_path: Path) -> None:
    """Images, classes, data and run may have names that are not UTF-8: the run is whole, and its
    recipe finds them again."""
    odd.need(tmp_path / "try")
    folder, out = tmp_path / os.fsdecode(b"d\xe9"), tmp_path / os.fsdecode(b"r\xe9")
    for path in sorted(shapes.rglob("*.png")):
        kind = {"circle": os.fsdecode(b"\xe9"), "square": "\x1b[31m\n"}.get(
            path.parent.name, path.parent.name
        )
        (folder / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind / f"{os.fsdecode(path.stem.encode() + bytes([0xE9, 10]))}.png").write_bytes(
            path.read_bytes()
        )

    quick = ("backbone.frame=whole", "svm.kernels=[linear]", "svm.C=[1]")
    done = job.fit(folder, out=out, strategy="svm", taps=["pooled"], assignments=quick, **TINY)

    told = predictions.read_predictions(out / "predictions.csv")
    assert [r"\x1b[31m\x0a", r"\xe9", "triangle"] == sorted(told.classes)
    assert all((folder / path).is_file() for path in told.paths)
    again = finetune.load(done.path).predict([folder / path for path in told.paths])
    assert np.array_equal(told.probabilities, again.probabilities.astype(np.float64))
    assert done == job.fit(source=out / "recipe.yaml")
    written = [
        path.read_text(encoding="utf-8") for path in out.iterdir() if path.suffix != ".safetensors"
    ]
    assert not any("\x1b" in text for text in written)


def test_features_are_saved_under_the_names_that_are_shown(shapes: Path, tmp_path: Path) -> None:
    """The paths of an .npz can be printed, and lead back to the files."""
    odd.need(tmp_path / "try")
    for path, name in zip(sorted(shapes.rglob("*.png")), odd.NAMES, strict=False):
        (tmp_path / "flat").mkdir(exist_ok=True)
        (tmp_path / "flat" / name).write_bytes(path.read_bytes())

    job.extract(tmp_path / "flat", tmp_path / "f.npz", **TINY)

    paths = np.load(tmp_path / "f.npz")["paths"].tolist()
    assert sorted(odd.NAMES) == sorted(map(names.meant, paths))
    assert all(path.isprintable() for path in paths)


def test_without_a_test_part_the_images_that_chose_judge(shapes: Path, tmp_path: Path) -> None:
    """--test none trains on all images; the accuracy out of fold is given under its own name, and
    anyone can recompute it."""
    outcome = job.fit(shapes, out=tmp_path / "run", strategy="svm", test="none", **TINY)
    told = predictions.read_predictions(outcome.path / "predictions-cv.csv")
    best = [told.classes[i] for i in told.probabilities.argmax(1)]
    page = (outcome.path / "report.html").read_text(encoding="utf-8")
    assert not [key for key in outcome.metrics if key.startswith("test/")]
    assert 60 == outcome.metrics["cv/top1"]["n"] == len(told.paths)
    assert outcome.metrics["cv/top1"]["value"] == pytest.approx(
        np.mean([a == b for a, b in zip(best, told.labels, strict=True)])
    )
    assert "out of fold on 60 training images" in outcome.verdict
    assert "there are no test images" in page
    assert 0 == run.load_run(outcome.path)["test_evaluations"]
    assert outcome.metrics["cv/top1"] == runs.list_runs(tmp_path)[0]["cv/top1"]


def test_one_image_a_class_can_be_trained(shapes: Path, tmp_path: Path) -> None:
    """Three images of three classes make a run that predicts and claims no accuracy; without --test
    none it is named."""
    for kind in ("circle", "square", "triangle"):
        (tmp_path / "few" / kind).mkdir(parents=True)
        (tmp_path / "few" / kind / "0.png").write_bytes((shapes / kind / "00.png").read_bytes())
    with pytest.raises(UserError, match="--test none"):
        job.fit(tmp_path / "few", out=tmp_path / "run", **TINY)
    outcome = job.fit(tmp_path / "few", out=tmp_path / "run", test="none", **TINY)
    assert {} == outcome.metrics
    assert "no accuracy is known" in outcome.verdict
    assert 1 == len(finetune.load(outcome.path).predict([shapes / "circle/01.png"]).probabilities)
    assert runs.list_runs(tmp_path)[0]["test/top1"] is None


def test_fine_tuning_needs_an_image_that_chooses(shapes: Path, tmp_path: Path) -> None:
    """Where no image can be held out to choose, fine-tuning is left out in words, though it was
    asked for."""
    outcome = job.fit(shapes, out=tmp_path / "run", shots=1, strategy="stages:1", **TINY)

    assert "svm" == outcome.shipped
    assert "no image can be held out that would choose" in outcome.verdict


@pytest.mark.parametrize("kind", ["fine-tuned", "average"])
def test_a_fine_tuned_model_without_a_test_part(kind: str, shapes: Path, tmp_path: Path) -> None:
    """Where the fine-tuned model ships, or the average, the images that chose it judge it, and the
    name says so; the run opens and predicts."""
    asked = (f"policy.ship={kind}",)
    outcome = job.fit(
        *(shapes,), out=tmp_path / "run", strategy="stages:1", epochs=1, test="none",
        assignments=asked, **TINY,
    )  # fmt: skip
    with finetune.load(outcome.path) as model:
        found = model.predict([shapes / "circle" / "00.png"])
    rows = json.loads((outcome.path / "contenders.json").read_text(encoding="utf-8"))

    assert (1, 3) == found.probabilities.shape
    assert ["svm", "fine-tuned", "average"] == [row["kind"] for row in rows]
    assert [kind] == [row["kind"] for row in rows if row["shipped"]]
    assert 12 == outcome.metrics["choice/top1"]["n"]
    assert "when they chose it" in outcome.verdict


def test_what_is_left_out_is_written_down(shapes: Path, tmp_path: Path) -> None:
    """An image under two labels, an empty class and a note are in left_out.csv, the terminal and
    the report."""
    shutil.copytree(shapes, tmp_path / "data")
    shutil.copy(tmp_path / "data/circle/00.png", tmp_path / "data/square/copy.png")
    (tmp_path / "data/empty").mkdir()
    (tmp_path / "data/circle/notes.txt").write_text("round", encoding="utf-8")
    rules: dict[str, Any] = {"on_conflict": "skip", "on_empty_class": "skip"}
    said: list[str] = []
    outcome = job.fit(
        tmp_path / "data", out=tmp_path / "run", strategy="svm", say=said.append, **rules, **TINY
    )
    rows = (outcome.path / "left_out.csv").read_text(encoding="utf-8").splitlines()
    assert "path,kind,detail" == rows[0]
    assert ["circle/00.png", "square/copy.png", "circle/notes.txt"] == [
        row.partition(",")[0] for row in rows[1:]
    ]
    assert any("left out 1 class without training images: empty" in line for line in said)
    assert "2 images left out (two labels)" in (outcome.path / "report.html").read_text(
        encoding="utf-8"
    )


def test_a_class_of_bad_images_goes_with_them(shapes: Path, tmp_path: Path) -> None:
    """Where bad images are skipped and nothing is left of a class, the job stops with the option,
    or leaves the class out."""
    shutil.copytree(shapes, tmp_path / "data")
    (tmp_path / "data/bad").mkdir()
    for i in range(4):
        (tmp_path / f"data/bad/{i}.png").write_bytes(f"no image {i}".encode())
    (tmp_path / "data/circle/gone.png").symlink_to(tmp_path / "nowhere.png")
    how: dict[str, Any] = {"out": tmp_path / "run", "strategy": "svm", **TINY}
    with pytest.raises(UserError, match="--on-bad-image skip"):
        job.fit(tmp_path / "data", **how)
    with pytest.raises(UserError, match="--on-empty-class skip"):
        job.fit(tmp_path / "data", on_bad_image="skip", **how)
    job.fit(tmp_path / "data", on_bad_image="skip", on_empty_class="skip", **how)
    assert ("circle", "square", "triangle") == finetune.load(tmp_path / "run").classes
    assert "circle/gone.png,unreadable" in (tmp_path / "run/left_out.csv").read_text(
        encoding="utf-8"
    )


def test_a_training_that_would_not_fit_stops_before_it_begins(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch of a training is reckoned with before the first step: the job names what to make
    smaller."""
    from finetune.backbones import memory
    from finetune.training import loop

    monkeypatch.setattr(memory, "of_training", lambda *_, **__: 1e15)
    monkeypatch.setattr(loop, "fit", lambda *_, **__: pytest.fail("it was trained"))
    with pytest.raises(
        UserError, match=r"(?s)on batches of \d+ images.*train\.batch_size|--strategy"
    ):
        job.fit(shapes, out=tmp_path / "run", strategy="stages:1", epochs=1, **TINY)
