"""The tutorial works: its programs and commands, in their order, on a part of its images with a
small network."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
SMALL = ["--backbone", "test_efficientnet", "--weights", "random"]
MODULES = {"finetune": "finetune", "retrieve": "retrieval"}


def blocks(page: str) -> list[tuple[str, str]]:
    """The programs and commands of a page, in their order: (`python` or `sh`, text)."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```(python|sh)\n(.*?)^```$", text, re.M | re.S)


def run(words: list[str], folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=300,
    )

    assert 0 == done.returncode, f"{' '.join(words)}\n{done.stdout}{done.stderr}"


def command(line: str) -> list[str]:
    """A command of a page as Python's arguments; what opens a network by name opens a small one."""
    program, *words = shlex.split(line)
    opens = words[0] in ("advise", "fit", "extract") or (
        words[0] == "build" and "--run" not in words
    )
    quick = ["--epochs", "1"] if words[0] == "fit" else []
    return ["-m", MODULES[program], *words, *(SMALL if opens else []), *quick]


def test_the_tutorial_has_what_is_run() -> None:
    """Its blocks are found: a program, and commands of each step."""
    lines = [
        line for kind, text in blocks("tutorial.md") if kind == "sh" for line in text.split("\n")
    ]
    steps = {" ".join(line.split()[:2]) for line in lines if line}

    assert "python" == blocks("tutorial.md")[0][0]
    assert {"finetune check", "finetune advise", "finetune fit", "finetune predict"} <= steps
    assert {"finetune evaluate", "retrieve build", "retrieve query", "retrieve evaluate"} <= steps


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path) -> None:
    """Every program and command of the tutorial ends well, one after the other."""
    whole, part = (
        "zip(digits.images, digits.target)",
        "zip(digits.images[:300], digits.target[:300])",
    )
    for kind, text in blocks("tutorial.md"):
        if kind == "python":
            assert whole in text
            run(["-c", text.replace(whole, part)], tmp_path)
            continue
        for line in text.splitlines():
            run(command(line), tmp_path)

    assert (tmp_path / "runs" / "digits" / "report.html").is_file()
    assert (tmp_path / "found.html").is_file()
    assert 1 + 34 == len((tmp_path / "new-digits.csv").read_text(encoding="utf-8").splitlines())


@pytest.mark.slow
def test_features_reach_scikit_learn(shapes: Path, tmp_path: Path) -> None:
    """The page about scikit-learn works as it stands, on another folder and a small network."""
    page = "how-to/features-in-scikit-learn.md"
    text = (DOCS / page).read_text(encoding="utf-8")
    (line,) = re.findall(r"^    (finetune extract .*)$", text, re.M)
    ((_, program),) = blocks(page)
    run(command(line.replace("photos/", str(shapes))), tmp_path)
    run(["-c", program], tmp_path)
