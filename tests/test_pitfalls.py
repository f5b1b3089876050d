"""Folders as they come: one of each fault and oddity, through check, fit and predict as a user meets them."""

from __future__ import annotations

import csv
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import faults
import numpy as np
import pytest
from PIL import Image

from finetune import cli, features, images, job
from finetune.errors import UserError

TINY = ("--backbone", "test_efficientnet", "--weights", "random", "--engine", "torch", "--precision", "float32")
UNICODE = "Öl 木"  # the class of one image


class Ended(NamedTuple):
    """How a command ended: its exit code, and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `finetune WORDS` in an own working folder. No command may crash, or show a traceback."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def call(*words: object) -> Ended:
        monkeypatch.setattr("sys.argv", ["finetune", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capfd.readouterr()
        assert isinstance(end.value.code, int)
        assert "Traceback" not in out + err
        assert not Path("crash.log").exists(), Path("crash.log").read_text(encoding="utf-8")
        return Ended(end.value.code, out, err)

    return call


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = faults.make_fault_folder(tmp_path_factory.mktemp("pitfalls") / "photos")
    (root / "train" / "solo").rename(root / "train" / UNICODE)
    return root


@pytest.fixture
def photos(template: Path, tmp_path: Path) -> Path:
    """train/ and test/ with four bad files, four odd ones, a class of one image, and a copy across the parts."""
    return shutil.copytree(template, tmp_path / "photos")


def test_check_names_every_fault(photos: Path, command: Command) -> None:
    """Each bad file with what is wrong, the copy across the parts and the small class; odd files are fine; it exits 1."""
    ended = command("check", photos, "--json")
    found = json.loads(ended.out)

    assert 1 == ended.code
    assert {**faults.BAD, faults.IGNORED: "not an image extension"} == {f["path"]: f["kind"] for f in found["faults"]}
    assert [sorted(faults.COPIED)] == [sorted(group) for group in found["across_splits"]]
    assert 1 == found["few"][UNICODE]


def test_check_of_a_clean_folder_exits_0(shapes: Path, command: Command) -> None:
    """Where nothing is wrong the exit code says so."""
    assert 0 == command("check", shapes).code


def test_fit_stops_and_names_every_bad_image(photos: Path, command: Command) -> None:
    """One error names all bad images, each with what is wrong, and the way to go on; nothing looks finished."""
    ended = command("fit", photos, "--out", "run", *TINY)

    assert 1 == ended.code
    assert 1 == ended.err.count("error:")
    for path, kind in faults.BAD.items():
        assert f"{path} ({kind}: " in ended.err
    assert not any(path in ended.err for path in faults.ODD)
    assert "--on-bad-image skip" in ended.err
    assert not Path("run/run.json").exists()


def test_fit_goes_on_without_the_bad_images_and_says_which(photos: Path, command: Command) -> None:
    """The advice of the error works in the same folder; what was left out is said, in the report too; the rest predicts."""
    command("fit", photos, "--out", "run", *TINY)
    ended = command("fit", photos, "--out", "run", *TINY, "--on-bad-image", "skip")

    assert 0 == ended.code, ended.err
    assert "left out: 4 bad images" in ended.err
    report = Path("run/report.html").read_text(encoding="utf-8")
    assert "4 unreadable images were left out" in report

    stopped = command("predict", "run", photos)
    assert 1 == stopped.code
    assert all(path in stopped.err for path in faults.BAD)

    went = command("predict", "run", photos, "--on-bad-image", "skip", "-o", "all.csv")
    with Path("all.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert 0 == went.code
    assert 4 == went.err.count("left out: ")
    assert len(rows) == len(images.load_unlabelled(photos)) - 4
    assert {*faults.ODD, f"train/{UNICODE}/only.png"} <= {row["path"] for row in rows}
    assert f"p:{UNICODE}" in rows[0]


def test_a_copy_across_the_parts_is_said(photos: Path, command: Command) -> None:
    """Where the same bytes train and judge, the job warns on the way and in its report."""
    ended = command("fit", photos, "--out", "run", *TINY, "--on-bad-image", "skip")

    assert all(path in ended.err for path in faults.COPIED)
    report = Path("run/report.html").read_text(encoding="utf-8")
    assert "flatters the accuracy" in report
    assert faults.COPIED[1] in report


def test_a_class_that_loses_all_its_images_is_named(photos: Path, command: Command) -> None:
    """A class whose only training image is left out cannot be learned: the error names it."""
    only = photos / "train" / UNICODE / "only.png"
    only.write_bytes(only.read_bytes()[:40])
    ended = command("fit", photos, "--out", "run", *TINY, "--on-bad-image", "skip")

    assert 1 == ended.code
    assert UNICODE in ended.err


def test_a_test_part_that_loses_all_its_images_is_named(shapes: Path, tmp_path: Path, command: Command) -> None:
    """Without one readable test image nothing can be judged: the error says so before training."""
    for kind in ("circle", "square"):
        shutil.copytree(shapes / kind, tmp_path / "photos/train" / kind)
        (tmp_path / "photos/test" / kind).mkdir(parents=True)
        (tmp_path / "photos/test" / kind / "broken.png").write_bytes(b"broken " + kind.encode())
    ended = command("fit", tmp_path / "photos", "--out", "run", *TINY, "--on-bad-image", "skip")

    assert 1 == ended.code
    assert "test" in ended.err


def test_a_folder_of_bad_images_alone_is_named(tmp_path: Path, command: Command) -> None:
    """Where every image is bad there is nothing to go on with, skip or not."""
    for kind in ("a", "b"):
        for i in range(5):
            path = tmp_path / "photos" / kind / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"{kind} {i}".encode())
    for word in ("stop", "skip"):
        ended = command("fit", tmp_path / "photos", "--out", "run", *TINY, "--on-bad-image", word)

        assert 1 == ended.code
        assert "error:" in ended.err


@pytest.mark.parametrize("name", ["one class", "empty", "flat", "missing"])
def test_what_cannot_be_learned_from_is_refused_in_words(name: str, shapes: Path, tmp_path: Path, command: Command) -> None:
    """A folder of one class, an empty one, one without classes and none at all: exit 1, with what to do."""
    root = tmp_path / name
    if name == "one class":
        shutil.copytree(shapes / "circle", root / "circle")
    elif name == "flat":
        shutil.copytree(shapes / "circle", root)
    elif name == "empty":
        root.mkdir()
    ended = command("fit", root, "--out", "run", *TINY)

    assert 1 == ended.code
    assert name in ended.err
    assert "→" in ended.err


def test_a_tiny_folder_is_learned_from(shapes: Path, tmp_path: Path, command: Command) -> None:
    """Two classes of two images: one image each is left for training or for the test, and the job ends with numbers."""
    for kind in ("circle", "square"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for i in range(2):
            shutil.copy(shapes / kind / f"{i:02d}.png", tmp_path / "photos" / kind)
    ended = command("fit", tmp_path / "photos", "--out", "run", *TINY)

    assert 0 == ended.code, ended.err


def test_a_bomb_costs_no_memory(tmp_path: Path, command: Command) -> None:
    """600 megapixels of one bit, 75 kB on the disk: check refuses them by their header, before a pixel is allocated."""
    path = tmp_path / "photos" / "a" / "bomb.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((1, 8), bool)).save(path.parent / "good.png")
    path.write_bytes(faults.png_header(30_000, 20_000))
    command("check", path.parent.parent)  # what is imported and cached at first use is no part of the measurement
    tracemalloc.start()
    try:
        ended = command("check", path.parent.parent)
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
        features.extract(source, None, (), lambda: pytest.fail("loaded"), on_bad=word)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="stop"):
        job.extract(shapes, tmp_path / "x.npz", on_bad_image=word, backbone=["test_efficientnet"], weights="random")
