"""The main job cut short: kill -9, Ctrl-C, a full disk, two at once. The same command again ends as
if nothing had been.

A small process (the *nursery*) imports everything once and forks a child for each command, which
goes through the console script's own door. A child may carry a trap: before or after the n-th call
of a function it is killed or interrupted, or the function fails.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from children import HEARS_CTRL_C
from safetensors import safe_open

from finetune.features import store

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks, and kills by POSIX signals")

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
SMALL = ("train.patience=0", "train.batch_size=8", "train.input_size=64")
FIT = (
    *TINY,
    "--strategy",
    "scratch",
    "--epochs",
    "3",
    *(word for one in SMALL for word in ("--set", one)),
)

NURSERY = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import openvino, sklearn.svm, timm, torch
from finetune import cli, console, job, policy
from finetune.backbones import create
from finetune.data import augment
from finetune.features import engine, store
from finetune.report import collect, render
from finetune.training import loop, optim
import test_interrupted as home

torch.set_num_threads(1)
for line in sys.stdin:
    children = []
    for order in json.loads(line):
        children.append(os.fork())
        if children[-1] == 0:
            home.live(order)
    print(json.dumps([home.ending(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


def live(order: dict[str, Any]) -> None:
    """A child's whole life: its own streams, cache and trap, then one command."""
    import resource  # not on Windows

    from finetune import cli, similarity
    from finetune.evaluation import contenders

    with open(order["text"], "wb", buffering=0) as text:
        os.dup2(text.fileno(), 1)
        os.dup2(text.fileno(), 2)
    os.environ["REGRAFT_CACHE"] = order["cache"]
    os.chdir(order["where"])
    sys.argv = ["finetune", *order["words"]]
    # The moved model ships, however good it is: only then is it fitted a second time.
    choose = contenders.choose
    contenders.choose = lambda all_, on, _: choose(all_, on, "fine-tuned")  # type: ignore[assignment]
    # The distance to photographs costs more than all the rest, and nothing follows from it here.
    similarity.measure = lambda *images, **how: similarity.unknown("not measured")  # type: ignore[assignment]
    if order["limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
    if order["trap"]:
        set_trap(**order["trap"])
    code: object = 1
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    finally:
        os._exit(code if isinstance(code, int) else 99)


def set_trap(target: str, at: int, does: str, after: bool = False) -> None:
    """Let the `at`-th call of `target` (`module:name` or `module:class.name`) kill, interrupt or
    fail."""
    import importlib

    module, _, names = target.partition(":")
    *path, name = names.split(".")
    owner: Any = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    calls = 0

    def spring() -> None:
        if does == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), signal.SIGKILL if does == "kill" else signal.SIGINT)

    def trapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and not after:
            spring()
        result = original(*args, **kwargs)
        if calls == at and after:
            spring()
        return result

    setattr(owner, name, trapped)


def ending(status: int) -> int:
    """The exit code of a child, or minus the signal that ended it."""
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HEARS_CTRL_C + NURSERY, str(Path(__file__).parent)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


class Ward:
    """A working folder, a cache, and commands that are run there by children of the nursery."""

    def __init__(self, nursery: subprocess.Popen[str], base: Path) -> None:
        self.nursery, self.base = nursery, base
        self.runs = base / "runs"
        self.runs.mkdir(parents=True)

    def all(
        self, *commands: Sequence[object], trap: dict[str, Any] | None = None, limit: int = 0
    ) -> list[int]:
        """Run commands side by side, with `limit` bytes as the largest file (0: any); their
        endings."""
        orders = [
            {
                "words": [str(word) for word in words],
                "where": str(self.runs),
                "cache": str(self.base / "cache"),
                "text": str(self.base / f"text{i}"),
                "trap": trap,
                "limit": limit,
            }
            for i, words in enumerate(commands)
        ]
        assert self.nursery.stdin is not None
        assert self.nursery.stdout is not None
        self.nursery.stdin.write(json.dumps(orders) + "\n")
        self.nursery.stdin.flush()
        endings: list[int] = json.loads(self.nursery.stdout.readline())
        return endings

    def __call__(self, *words: object, **how: Any) -> int:
        return self.all(words, **how)[0]

    def text(self, i: int = 0) -> str:
        """What the i-th command printed."""
        return (self.base / f"text{i}").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def primed(
    nursery: subprocess.Popen[str], shades: Path, tmp_path_factory: pytest.TempPathFactory
) -> Ward:
    """An undisturbed run, `runs/whole`. Its cache is where the others get what has nothing to do
    with the images."""
    ward = Ward(nursery, tmp_path_factory.mktemp("primed"))
    assert 0 == ward("fit", shades, "--out", "whole", *FIT), ward.text()
    assert "Ship the fine-tuned model" in ward.text()
    return ward


@pytest.fixture
def ward(primed: Ward, tmp_path: Path) -> Ward:
    """An empty working folder, and a cache without features."""
    made = Ward(primed.nursery, tmp_path / "ward")
    for part in ("compiled", "networks"):
        if (primed.base / "cache" / part).exists():
            shutil.copytree(primed.base / "cache" / part, made.base / "cache" / part)
    return made


def results(run: Path) -> dict[str, Any]:
    """What a run says that has nothing to do with time: predictions, metrics and weights to the
    byte, and the head."""
    found: dict[str, Any] = {
        name: (run / name).read_bytes()
        for name in ("predictions.csv", "metrics.json", "model.safetensors", "config.json")
    }
    with safe_open(
        run / "head.safetensors", framework="numpy"
    ) as file:  # it writes its metadata in any order
        return (
            found
            | {"about": file.metadata()}
            | {key: file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118
        )


def told(run: Path) -> list[Any]:
    """The log without what is measured in seconds."""
    rows = [
        json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def leftovers(folder: Path) -> list[str]:
    """Temporary files, and what only an unfinished run has."""
    return [
        path.name
        for path in folder.rglob("*")
        if path.name.endswith(".tmp") or path.name == "checkpoints"
    ]


MOMENTS = {
    "features, rows written and not committed": {
        "target": "finetune.features.store:Store._write_rows",
        "at": 3,
        "after": True,
    },
    "the SVM": {"target": "finetune.heads.svm:choose", "at": 1},
    "fine-tuning, after the first checkpoint": {
        "target": "finetune.training.checkpoints:save",
        "at": 1,
        "after": True,
    },
    "fine-tuning, before the third checkpoint": {
        "target": "finetune.training.checkpoints:save",
        "at": 3,
    },
    "the refit, after its first checkpoint": {
        "target": "finetune.training.checkpoints:save",
        "at": 4,
        "after": True,
    },
    "the model being written": {"target": "finetune.classifier:save", "at": 1},
    "the judgement": {
        "target": "finetune.evaluation.predictions:write_predictions",
        "at": 1,
        "after": True,
    },
    "before run.json": {"target": "finetune.run:RunDir.finish", "at": 1},
    "after run.json": {"target": "finetune.run:_remove_checkpoints", "at": 1},
}
SELDOM = ("fine-tuning, before the third checkpoint", "the model being written", "before run.json")


@pytest.mark.parametrize(
    "moment", [pytest.param(one, marks=[pytest.mark.slow] * (one in SELDOM)) for one in MOMENTS]
)
def test_a_killed_fit_goes_on_and_ends_the_same(
    moment: str, ward: Ward, primed: Ward, shades: Path
) -> None:
    """kill -9, then the same command: results and log are those of an uninterrupted run, to the
    byte."""
    whole = primed.runs / "whole"
    killed = ward("fit", shades, "--out", "cut", *FIT, trap={"does": "kill", **MOMENTS[moment]})
    was_complete = (ward.runs / "cut/run.json").exists()
    again = ward("fit", shades, "--out", "cut", *FIT)

    assert (-signal.SIGKILL, 0) == (killed, again), ward.text()
    assert was_complete == (moment == "after run.json")
    assert results(whole) == results(ward.runs / "cut")
    assert told(whole) == told(ward.runs / "cut")
    assert [] == leftovers(ward.runs)


@pytest.mark.parametrize("moment", ["the SVM", "fine-tuning, after the first checkpoint"])
def test_ctrl_c_leaves_a_run_that_goes_on(
    moment: str, ward: Ward, primed: Ward, shades: Path
) -> None:
    """SIGINT exits 130 without a traceback; `predict` says what to do; the same command ends the
    same."""
    stopped = ward(
        "fit", shades, "--out", "cut", *FIT, trap={"does": "interrupt", **MOMENTS[moment]}
    )

    assert 130 == stopped
    assert ward.text().endswith("interrupted\n")
    assert "Traceback" not in ward.text()
    assert not (ward.runs / "crash.log").exists()
    assert 1 == ward("predict", "cut", next(shades.glob("*/*.png")))
    assert "same `finetune fit` command again" in ward.text()
    assert 0 == ward("fit", shades, "--out", "cut", *FIT), ward.text()
    assert results(primed.runs / "whole") == results(ward.runs / "cut")


def test_two_fits_at_once_share_one_store(ward: Ward, primed: Ward, shades: Path) -> None:
    """Two processes that start together on an empty store, with different folders, both end right;
    each row is there once."""
    endings = ward.all(("fit", shades, "--out", "one", *FIT), ("fit", shades, "--out", "two", *FIT))

    assert [0, 0] == endings, ward.text(0) + ward.text(1)
    assert (
        results(primed.runs / "whole") == results(ward.runs / "one") == results(ward.runs / "two")
    )
    with contextlib.closing(store.Store(ward.base / "cache" / "features")) as opened:
        rows = {row["rows"] for row in opened.summary() if row["backbone"] == "test_efficientnet"}
    assert {32, 40} == rows  # the frame that was not taken was seen on the training images alone


def test_two_fits_in_one_folder(ward: Ward, shades: Path) -> None:
    """Of two that start together in the same folder, one works and the other is told so, or finds
    the finished run."""
    endings = ward.all(("fit", shades, "--out", "one", *FIT), ("fit", shades, "--out", "one", *FIT))

    assert 0 in endings
    assert {0, 1} >= set(endings), ward.text(0) + ward.text(1)
    assert [] == leftovers(ward.runs)


FULL = {
    "the cache": {"target": "os:write", "at": 2},
    "a checkpoint": {"target": "safetensors.torch:save_file", "at": 2},
    "the weights": {"target": "finetune.files:write_bytes", "at": 1},
    "the log": {"target": "finetune.run:RunDir.log", "at": 2},
    **{f"flush {at}": {"target": "os:fsync", "at": at} for at in (2, 14)},
}


@pytest.mark.parametrize("moment", FULL)
def test_a_full_disk_is_said_and_leaves_a_run_that_goes_on(
    moment: str, ward: Ward, primed: Ward, shades: Path
) -> None:
    """No space left, wherever: exit 1 with what to do, no half-written file, and the same command
    ends the same."""
    full = ward("fit", shades, "--out", "cut", *FIT, trap={"does": "full", **FULL[moment]})

    assert 1 == full, ward.text()
    assert "free some space" in ward.text()
    assert not (ward.runs / "crash.log").exists()
    assert not (ward.runs / "cut/run.json").exists()
    assert [] == list(ward.base.rglob("*.tmp"))
    assert 0 == ward("fit", shades, "--out", "cut", *FIT), ward.text()
    assert results(primed.runs / "whole") == results(ward.runs / "cut")


@pytest.mark.parametrize("limit", [20_000, 200_000, 1_200_000])
def test_a_limit_on_the_size_of_files_is_said(
    limit: int, ward: Ward, primed: Ward, shades: Path
) -> None:
    """What the system really says where a file cannot grow (`ulimit -f`): words and exit 1, no half
    file, and it goes on."""
    code = ward("fit", shades, "--out", "cut", *FIT, limit=limit)

    assert 1 == code, ward.text()
    assert "→" in ward.text()
    assert not (ward.runs / "crash.log").exists()
    assert [] == list(ward.base.rglob("*.tmp"))
    assert 0 == ward("fit", shades, "--out", "cut", *FIT), ward.text()
    assert results(primed.runs / "whole") == results(ward.runs / "cut")


def test_a_file_in_the_place_of_the_output(ward: Ward, shades: Path) -> None:
    """Where --out, or a folder above it, is a file: exit 1 by name, and the file stays as it is."""
    (ward.runs / "taken").write_text("mine", encoding="utf-8")
    for out in ("taken", "taken/below"):
        assert 1 == ward("fit", shades, "--out", out, *FIT), ward.text()
        assert "taken" in ward.text()
        assert "→" in ward.text()
    assert "mine" == (ward.runs / "taken").read_text(encoding="utf-8")
