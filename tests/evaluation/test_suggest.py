"""What to label next: unsure, unlike one another, and new to the run."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from finetune import cli, job
from finetune.data import csv_table
from finetune.errors import UserError
from finetune.evaluation import suggest
from finetune.evaluation.suggest import METHODS, Method

SURE, UNSURE = [0.98, 0.01, 0.01], [0.4, 0.35, 0.25]
TINY: dict[str, Any] = {
    "backbone": ["test_efficientnet"],
    "weights": "random",
    "engine": "torch",
    "precision": "float32",
    "taps": "pooled",
}


def test_badge_takes_one_of_each_heap_of_unsure_images() -> None:
    """Two heaps of equal unsure images: the first two are one of each heap."""
    x = np.eye(4, dtype=np.float32)[[0] * 10 + [1] * 10]
    p = np.array([UNSURE] * 20)
    for seed in range(5):
        chosen = suggest.pick(p, x, 2, method="badge", seed=seed)
        assert [0, 1] == sorted((chosen // 10).tolist())


def test_margin_takes_the_least_sure() -> None:
    """In order, whatever they look like."""
    p = np.array([SURE, UNSURE, [0.5, 0.49, 0.01], SURE])

    assert [2, 1] == suggest.pick(p, np.ones((4, 2), np.float32), 2, method="margin").tolist()


@pytest.mark.parametrize("method", METHODS)
def test_no_image_is_named_twice_and_no_more_than_there_are(method: Method) -> None:
    """Asked for more than there are, all are given once; the same seed gives the same."""
    x = np.ones((7, 2), np.float32)  # all alike: nothing is diverse
    p = np.array([SURE] * 4 + [UNSURE] * 3)
    chosen = suggest.pick(p, x, 50, method=method, seed=3)

    assert list(range(7)) == sorted(chosen.tolist())
    assert np.array_equal(chosen, suggest.pick(p, x, 50, method=method, seed=3))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """A run on all but the 12 test images of `shapes`."""
    out = tmp_path_factory.mktemp("suggest") / "run"
    return job.fit(shapes, out=out, strategy="svm", **TINY).path


def test_what_was_trained_on_and_copies_are_left_out(
    fitted: Path, shapes: Path, tmp_path: Path
) -> None:
    """Of the run's own folder, twice, the 12 images that are new to it remain, each once, under
    names that can be read as a table of labels."""
    shutil.copytree(shapes, tmp_path / "copies")
    table = tmp_path / "next.csv"
    words = ["suggest", str(fitted), str(shapes), str(tmp_path / "copies"), "-n", "50"]
    done = CliRunner().invoke(cli.cli, [*words, "-o", str(table), "--json"])
    rows = json.loads(done.stdout)

    assert 12 == len({row["path"] for row in rows}) == len(rows)
    assert list(range(1, 13)) == [row["rank"] for row in rows]
    assert all(Path(row["path"]).is_file() for row in rows)
    with table.open(encoding="utf-8", newline="") as file:
        told = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [row["path"] for row in told]
    files_written = table.read_text(encoding="utf-8").replace(",\n", ",circle\n")
    table.write_text(files_written, encoding="utf-8")
    assert 12 == len(csv_table.read(table).rows)


def test_nothing_new_is_refused(fitted: Path, shapes: Path) -> None:
    """A folder of training images alone holds nothing to label, and the way on is named."""
    new = {row["path"] for row in suggest.suggest(fitted, [shapes]).rows()}
    known = [path for path in sorted(shapes.glob("*/*.png")) if str(path) not in new]

    with pytest.raises(UserError, match="trained on all 48"):
        suggest.suggest(fitted, known)
