"""Folders as they come: one of each fault and oddity, through check, fit and predict as a user
meets them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import faults
import numpy as np
import pytest
from PIL import Image

from finetune import cli, job
from finetune.data import images
from finetune.errors import UserError
from finetune.features import extraction

TINY = (
    "--backbone",
    "test_efficientnet",
    "--weights",
    "random",
    "--engine",
    "torch",
    "--precision",
    "float32",
)
UNICODE = "Öl 木"  # the class of one image


class Ended(NamedTuple):
    """How a command ended: its exit code, and what it printed."""

    code: int
    out: str
    err: str


def command(where: Path, *words: object) -> Ended:
    """Run `finetune WORDS` in the working folder `where`. No command may crash, or show a
    traceback."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(where))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(
            "sys.argv", ["finetune", *map(str, words)]
        )
        end = stack.enter_context(pytest.raises(SystemExit))
        cli.main()
    assert isinstance(end.value.code, int)
    assert "Traceback" not in out.getvalue() + err.getvalue()
    assert not (where / "crash.log").exists(), (where / "crash.log").read_text(encoding="utf-8")
    return Ended(end.value.code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and test/ with four bad files, four odd ones, a class of one image, and a copy across
    the parts."""
    root = faults.make_fault_folder(tmp_path_factory.mktemp("pitfalls") / "photos")
    (root / "train" / "solo").rename(root / "train" / UNICODE)
    return root


class Fitted(NamedTuple):
    """A run that bad images stopped first, and that then went on without them."""

    where: Path
    stopped: Ended
    went: Ended

    @property
    def report(self) -> str:
        return (self.where / "run/report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def fitted(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    where = tmp_path_factory.mktemp("fitted")
    stopped = command(where, "fit", photos, "--out", "run", *TINY)
    assert not (where / "run/run.json").exists()
    return Fitted(
        where,
        stopped,
        command(where, "fit", photos, "--out", "run", *TINY, "--on-bad-image", "skip"),
    )


def test_check_names_every_fault(photos: Path, tmp_path: Path) -> None:
    """Each bad file with what is wrong, the copy across the parts and the small class; odd files
    are fine; it exits 1."""
    ended = command(tmp_path, "check", photos, "--json")
    found = json.loads(ended.out)

    assert 1 == ended.code
    assert {**faults.BAD, faults.IGNORED: "not an image extension"} == {
        f["path"]: f["kind"] for f in found["faults"]
    }
    assert [sorted(faults.COPIED)] == [sorted(group) for group in found["across_splits"]]
    assert 1 == found["few"][UNICODE]


def test_check_of_a_clean_folder_exits_0(shapes: Path, tmp_path: Path) -> None:
    """Where nothing is wrong the exit code says so."""
    assert 0 == command(tmp_path, "check", shapes).code


def test_fit_stops_and_names_every_bad_image(fitted: Fitted) -> None:
    """One error names all bad images, each with what is wrong, and the way to go on."""
    ended = fitted.stopped

    assert 1 == ended.code
    assert 1 == ended.err.count("error:")
    assert [] == [path for path, kind in faults.BAD.items() if f"{path} ({kind}: " not in ended.err]
    assert not any(path in ended.err for path in faults.ODD)
    assert "--on-bad-image skip" in ended.err


def test_fit_goes_on_without_the_bad_images_and_says_so(fitted: Fitted) -> None:
    """The advice of the error works in the same folder; what was left out is said on the way and in
    the report."""
    assert 0 == fitted.went.code, fitted.went.err
    assert "left out: 4 bad images" in fitted.went.err
    assert "4 unreadable images were left out" in fitted.report


def test_predict_stops_at_bad_images(fitted: Fitted, photos: Path) -> None:
    """Predicting the folder itself names all bad images and exits 1."""
    ended = command(fitted.where, "predict", "run", photos)

    assert 1 == ended.code
    assert [] == [path for path in faults.BAD if path not in ended.err]


def test_predict_skips_bad_images_and_names_them(fitted: Fitted, photos: Path) -> None:
    """Every other image has its row, the odd ones too, under names in Unicode; the bad ones are
    listed on stderr."""
    ended = command(
        fitted.where, "predict", "run", photos, "--on-bad-image", "skip", "-o", "all.csv"
    )
    with (fitted.where / "all.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))

    assert 0 == ended.code
    left_out = [
        line.split(": ")[1] for line in ended.err.splitlines() if line.startswith("left out: ")
    ]
    assert sorted(f"{photos}/{path}" for path in faults.BAD) == sorted(left_out)
    assert "1 file is left out, as no image extension announces them" in ended.err
    assert len(rows) == len(images.load_unlabelled(photos)) - len(faults.BAD)
    assert {f"{photos}/{path}" for path in (*faults.ODD, f"train/{UNICODE}/only.png")} <= {
        row["path"] for row in rows
    }
    assert f"p:{UNICODE}" in rows[0]


def test_a_copy_across_the_parts_is_said(fitted: Fitted) -> None:
    """Where the same bytes train and judge, the job warns on the way and in its report."""
    assert all(path in fitted.went.err for path in faults.COPIED)
    assert "flatters the accuracy" in fitted.report
    assert faults.COPIED[1] in fitted.report


def test_a_class_that_loses_all_its_images_is_named(photos: Path, tmp_path: Path) -> None:
    """A class whose only training image is left out cannot be learned: the error names it."""
    photos = shutil.copytree(photos, tmp_path / "photos")
    only = photos / "train" / UNICODE / "only.png"
    only.write_bytes(only.read_bytes()[:40])
    ended = command(tmp_path, "fit", photos, "--out", "run", *TINY, "--on-bad-image", "skip")

    assert 1 == ended.code
    assert UNICODE in ended.err


def test_a_test_part_that_loses_all_its_images_is_named(shapes: Path, tmp_path: Path) -> None:
    """Without one readable test image nothing can be judged: the error says so before training."""
    for kind in ("circle", "square"):
        shutil.copytree(shapes / kind, tmp_path / "photos/train" / kind)
        (tmp_path / "photos/test" / kind).mkdir(parents=True)
        (tmp_path / "photos/test" / kind / "broken.png").write_bytes(b"broken " + kind.encode())
    ended = command(
        tmp_path, "fit", tmp_path / "photos", "--out", "run", *TINY, "--on-bad-image", "skip"
    )

    assert 1 == ended.code
    assert "test" in ended.err


def test_a_folder_of_bad_images_alone_is_named(tmp_path: Path) -> None:
    """Where every image is bad there is nothing to go on with, skip or not."""
    for kind in ("a", "b"):
        for i in range(5):
            path = tmp_path / "photos" / kind / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"{kind} {i}".encode())
    for word in ("stop", "skip"):
        ended = command(
            tmp_path, "fit", tmp_path / "photos", "--out", "run", *TINY, "--on-bad-image", word
        )

        assert 1 == ended.code
        assert "error:" in ended.err


@pytest.mark.parametrize("name", ["one class", "empty", "flat", "missing"])
def test_what_cannot_be_learned_from_is_refused_in_words(
    name: str, shapes: Path, tmp_path: Path
) -> None:
    """A folder of one class, an empty one, one without classes and none at all: exit 1, with what
    to do."""
    root = tmp_path / name
    if name == "one class":
        shutil.copytree(shapes / "circle", root / "circle")
    elif name == "flat":
        shutil.copytree(shapes / "circle", root)
    elif name == "empty":
        root.mkdir()
    ended = command(tmp_path, "fit", root, "--out", "run", *TINY)

    assert 1 == ended.code
    assert name in ended.err
    assert "→" in ended.err


def test_a_tiny_folder_is_learned_from(shapes: Path, tmp_path: Path) -> None:
    """Two classes of two images: one image each is left for training or for the test, and the job
    ends with numbers."""
    for kind in ("circle", "square"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for i in range(2):
            shutil.copy(shapes / kind / f"{i:02d}.png", tmp_path / "photos" / kind)
    ended = command(tmp_path, "fit", tmp_path / "photos", "--out", "run", *TINY)

    assert 0 == ended.code, ended.err


def test_a_bomb_costs_no_memory(tmp_path: Path) -> None:
    """600 megapixels of one bit, 75 kB on the disk: check refuses them by their header, before a
    pixel is allocated."""
    path = tmp_path / "photos" / "a" / "bomb.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((1, 8), bool)).save(path.parent / "good.png")
    path.write_bytes(faults.png_header(30_000, 20_000))
    # what is imported and cached at first use is no part of the measurement
    command(tmp_path, "check", path.parent.parent)
    tracemalloc.start()
    try:
        ended = command(tmp_path, "check", path.parent.parent)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert "bomb.png: too large (30,000 × 20,000 pixels" in ended.out
    assert peak < 50_000_000


@pytest.mark.parametrize("word", ["ignore", "Skip", ""])
def test_unknown_words_for_bad_images_are_refused(word: str, shapes: Path, tmp_path: Path) -> None:
    """From Python, too, another word than stop and skip is an error and leaves no image out."""
    source = images.load_unlabelled(shapes)
    with pytest.raises(UserError, match="stop"):
        extraction.extract(source, None, (), lambda: pytest.fail("loaded"), on_bad=word)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="stop"):
        job.extract(
            shapes,
            tmp_path / "x.npz",
            on_bad_image=word,
            backbone=["test_efficientnet"],
            weights="random",
        )
