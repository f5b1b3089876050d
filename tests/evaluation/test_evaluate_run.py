"""`finetune evaluate`: judged on what the run has not seen, and every image that does not count is
told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from finetune import cli, job
from finetune.data import images
from finetune.data.faults import Rules
from finetune.errors import UserError
from finetune.evaluation import evaluate

TINY: dict[str, Any] = {
    "backbone": ["test_efficientnet"],
    "weights": "random",
    "engine": "torch",
    "precision": "float32",
}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """A run fitted on all of `shapes`: 48 of its 60 images train, 12 are its test."""
    return job.fit(
        shapes, out=tmp_path_factory.mktemp("judge") / "run", strategy="svm", **TINY
    ).path


def told(*args: Any, **how: Any) -> tuple[dict[str, Any], str]:
    """What evaluate gives, and what it says."""
    said: list[str] = []
    return evaluate.evaluate(*args, **how, say=said.append), "\n".join(said)


def test_what_trained_is_left_out_and_the_rest_is_the_runs_own_test(
    fitted: Path, shapes: Path
) -> None:
    """On the images of the run, the 12 that it was not trained on remain: the accuracy is that of
    metrics.json."""
    result, said = told(fitted, shapes)

    assert (12, 48) == (result["n"], result["trained_on"])
    assert "48 of 60 images, as the run was trained on them (--seen keep" in said
    own = json.loads((fitted / "metrics.json").read_text(encoding="utf-8"))
    assert own["test/top1"]["value"] == result["metrics"]["top1"]["value"]
    assert "12 images, 48 others trained on" in evaluate.metrics_text(result)


def test_nothing_left_is_refused_with_the_way_on(
    fitted: Path, shapes: Path, tmp_path: Path
) -> None:
    """Renamed copies are known by their bytes, from a table, too; --seen keep judges on them, and
    warns."""
    trained = set(evaluate.trained_on(fitted) or ())
    source = images.load(shapes)
    seen = [i for i, digest in enumerate(images.contents(source)) if digest in trained]
    lines = ["path,label"]
    for i in seen:
        (tmp_path / f"{i}.png").write_bytes(source.read(i))
        lines.append(f"{i}.png,{source.classes[source.labels[i]]}")
    (tmp_path / "table.csv").write_text("\n".join(lines), encoding="utf-8")

    with pytest.raises(UserError, match=r"trained on all of these 48 images(.|\n)*--seen keep"):
        told(fitted, tmp_path / "table.csv")
    result, said = told(fitted, tmp_path / "table.csv", seen="keep")
    assert (48, 48) == (result["n"], result["trained_on"])
    assert "caution: 48 of 48 images were trained on: this flatters" in said
    assert "48 images, 48 of them trained on" in evaluate.metrics_text(result)


def test_new_images_are_judged_without_a_word(fitted: Path, shapes: Path, tmp_path: Path) -> None:
    """An image with other bytes is new; files that are no images by their names are counted,
    unreadable ones named."""
    from PIL import Image

    for file in sorted(shapes.glob("*/0[0-3].png")):
        (tmp_path / file.parent.name).mkdir(exist_ok=True)
        Image.open(file).rotate(90).save(tmp_path / file.parent.name / file.name)
    result, said = told(fitted, tmp_path)
    assert (12, 0, 0, 0, "") == (
        result["n"],
        result["trained_on"],
        result["left_out"],
        result["ignored"],
        said,
    )

    (tmp_path / "circle" / "bad.png").write_bytes(b"")
    (tmp_path / "circle" / "movie.xyz").touch()
    result, said = told(fitted, tmp_path, on_bad="skip")
    assert (12, 1, 1) == (result["n"], result["left_out"], result["ignored"])
    assert "left out: circle/bad.png: empty (0 bytes)" in said
    assert "1 file is left out, as no image extension announces them: 1 .xyz" in said


def test_a_run_without_the_record_says_that_it_cannot_be_known(
    fitted: Path, shapes: Path, tmp_path: Path
) -> None:
    """Runs of version 0.1.0 are judged as before, with a line of caution."""
    old = shutil.copytree(fitted, tmp_path / "old")
    (old / evaluate.TRAINED).unlink()
    about = json.loads((old / "run.json").read_text(encoding="utf-8"))
    del about["files"][evaluate.TRAINED]
    (old / "run.json").write_text(json.dumps(about), encoding="utf-8")
    result, said = told(old, shapes)

    assert (60, None) == (result["n"], result["trained_on"])
    assert "cannot be known" in said


def test_the_record_is_small_and_says_nothing_else(fitted: Path, shapes: Path) -> None:
    """32 bytes an image, sorted, and run.json knows the file."""
    ids = evaluate.trained_on(fitted)

    assert ids is not None
    assert sorted(ids) == list(ids)
    assert (fitted / evaluate.TRAINED).stat().st_size < 48 * 32 + 200
    assert (
        evaluate.TRAINED in json.loads((fitted / "run.json").read_text(encoding="utf-8"))["files"]
    )
    (fitted.parent / evaluate.TRAINED).write_bytes(b"x")
    with pytest.raises(UserError, match="not a table of digests"):
        evaluate.trained_on(fitted.parent)


def test_the_command_has_the_counts_as_json(fitted: Path, shapes: Path) -> None:
    """One JSON value on stdout, what was left out on stderr."""
    done = CliRunner().invoke(
        cli.cli, ["evaluate", str(fitted), str(shapes), "--seen", "keep", "--json"]
    )
    found = json.loads(done.stdout)

    assert (60, 48, "keep") == (found["n"], found["trained_on"], found["seen"])
    assert "caution" in done.stderr
    with pytest.raises(UserError, match="choose leave-out or keep"):
        evaluate.evaluate(fitted, shapes, seen="nonsense")


def test_classes_that_the_run_does_not_know_can_be_left_out(
    fitted: Path, shapes: Path, tmp_path: Path
) -> None:
    """An unknown class stops with an option that evaluate has, which leaves its images out; the
    run's classes decide, whether a training part is there or not."""
    shutil.copytree(shapes, tmp_path / "data")
    shutil.copytree(shapes / "circle", tmp_path / "data" / "oval")
    with pytest.raises(UserError, match="--on-empty-class skip"):
        told(fitted, tmp_path / "data", seen="keep")
    command = ["evaluate", str(fitted), str(tmp_path / "data"), "--seen", "keep", "--json"]
    result = CliRunner().invoke(cli.cli, [*command, "--on-empty-class", "skip"])
    assert (60, 20) == tuple(json.loads(result.stdout)[key] for key in ("n", "left_out_by_rules"))
    assert "20 images left out (empty class)" in result.stderr
    rows = [f"data/circle/{i:02d}.png,circle,test" for i in range(5)]
    (tmp_path / "t.csv").write_text("path,label,split\n" + "\n".join(rows), encoding="utf-8")
    assert 5 == told(fitted, tmp_path / "t.csv", seen="keep")[0]["n"]


def test_conflicts_and_strays_follow_their_rules(
    fitted: Path, shapes: Path, tmp_path: Path
) -> None:
    """One image under two labels in a table, copies under two labels, and images beside the class
    folders are left out where that was asked for."""
    rows = [f"{shapes}/circle/{i:02d}.png,circle" for i in range(5)]
    rows.append(rows[0].replace("circle", "square").replace("square/00", "circle/00"))
    (tmp_path / "t.csv").write_text("path,label\n" + "\n".join(rows), encoding="utf-8")
    with pytest.raises(UserError, match="--on-conflict skip"):
        told(fitted, tmp_path / "t.csv", seen="keep")
    skip = Rules(on_conflict="skip", on_stray="skip")
    assert 4 == told(fitted, tmp_path / "t.csv", seen="keep", rules=skip)[0]["n"]
    shutil.copytree(shapes, tmp_path / "data")
    shutil.copy(shapes / "circle/00.png", tmp_path / "data/square/copy.png")
    shutil.copy(shapes / "circle/00.png", tmp_path / "data/stray.png")
    with pytest.raises(UserError, match="--on-stray skip"):
        told(fitted, tmp_path / "data", seen="keep")
    result, said = told(fitted, tmp_path / "data", seen="keep", rules=skip)
    assert (59, 3) == (result["n"], result["left_out_by_rules"])
    assert "1 image left out (outside of the class folders): stray.png" in said


def test_unreadable_images_beside_known_ones_are_no_new_ones(
    fitted: Path, shapes: Path, tmp_path: Path
) -> None:
    """Where all that can be read was trained on, that is the reason, whatever else lies there."""
    trained = set(evaluate.trained_on(fitted) or ())
    found = images.load(shapes)
    keep = [i for i, digest in enumerate(images.digests(found)) if digest in trained][:3]
    (tmp_path / "circle").mkdir()
    for i in keep:
        shutil.copy(shapes / found.paths[i], tmp_path / "circle" / f"{i}.png")
    (tmp_path / "circle" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"all of these 3 images that can be read \(1 others"):
        told(fitted, tmp_path, rules=Rules(on_bad="skip"))
