"""The command line: help that answers at once, examples, docs that are true, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from finetune.cli import cli as finetune
from retrieval.cli import cli as retrieve

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "torch",
    "timm",
    "torchvision",
    "sklearn",
    "faiss",
    "openvino",
    "numpy",
    "PIL",
    "pydantic",
    "rich",
    "matplotlib",
)


def commands(
    command: click.Command, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from commands(inner, (*path, name))


ALL = [*commands(finetune, ("finetune",)), *commands(retrieve, ("retrieve",))]


def run(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    package = "retrieval" if words[0] == "retrieve" else "finetune"
    script = f"import sys; sys.argv = {list(words)!r}; from {package}.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )

    assert code == done.returncode, done.stderr
    return done


@pytest.mark.parametrize(("path", "command"), ALL, ids=[" ".join(path) for path, _ in ALL])
def test_every_command_ends_its_help_with_a_real_example(
    path: tuple[str, ...], command: click.Command
) -> None:
    """Each docstring closes with `Example:` and a line that starts with the command's own words."""
    text = command.help or ""
    lines = [line.strip() for line in text.partition("Example:")[2].splitlines() if line.strip()]

    assert lines, f"{' '.join(path)} has no example"
    assert lines[0].startswith(" ".join(path[:1]))


def test_docs_hold_what_help_says() -> None:
    """docs/reference/cli.md is what `make docs` would write now. In its own process: click keeps
    the help option of a first caller."""
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'docs')!r}); import make_cli; "
        f"sys.stdout.write(make_cli.text())"
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", script],
        capture_output=True,
        encoding="utf-8",
        check=True,
    )

    assert (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8") == done.stdout


@pytest.mark.parametrize("home", ["finetune", "retrieval"])
def test_help_loads_no_heavy_library(home: str) -> None:
    """In a fresh process, every --help of a command leaves torch, numpy and their like alone."""
    script = (
        f"import sys, click\nfrom {home}.cli import cli\n"
        "def walk(c):\n"
        "    c.get_help(click.Context(c))\n"
        "    [walk(x) for x in getattr(c, 'commands', {}).values()]\n"
        f"walk(cli)\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert "[]" == done.stdout.strip()


def test_a_mistake_of_the_user_exits_1_with_where_what_and_how() -> None:
    """No traceback: the folder, what is wrong, and what to give."""
    done = run("finetune", "check", "nowhere/", code=1)

    assert "nowhere" in done.stderr
    assert "→" in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_usage_exits_2() -> None:
    """click's own errors keep their exit code."""
    assert "No such option" in run("finetune", "fit", "--nonsense", code=2).stderr


def test_check_prints_json_for_machines(shapes: Path) -> None:
    """--json is one JSON value on stdout, whatever stands on stderr."""
    found = json.loads(run("finetune", "check", str(shapes), "--json").stdout)

    assert 60 == found["images"]
    assert [] == found["faults"]


def test_recipes_are_listed_shown_copied_and_validated(tmp_path: Path) -> None:
    """ls names the shipped ones; cp refuses to overwrite; validate prints every default."""
    assert "smoke-digits" in run("finetune", "recipes", "ls").stdout
    target = tmp_path / "mine.yaml"
    run("finetune", "recipes", "cp", "smoke-digits", str(target))

    assert run("finetune", "recipes", "show", "smoke-digits").stdout == target.read_text(
        encoding="utf-8"
    )
    assert "already" in run("finetune", "recipes", "cp", "smoke-digits", str(target), code=1).stderr
    assert "label_smoothing" in run("finetune", "recipes", "validate", str(target)).stdout


def test_an_option_given_twice_is_told(shapes: Path) -> None:
    """The last one counts, and a line says so; once is no reason for a word."""
    said = CliRunner().invoke(finetune, ["check", str(shapes), "--seed", "1", "--seed", "2"])
    assert "note: --seed is given twice; the last one counts" in said.stderr
    assert "twice" not in CliRunner().invoke(finetune, ["check", str(shapes), "--seed", "1"]).stderr


def test_both_modules_run_the_command() -> None:
    """`python -m finetune` and `python -m finetune.cli` are the command."""
    for name in ("finetune", "finetune.cli"):
        found = subprocess.run(
            [sys.executable, "-m", name, "--version"], capture_output=True, text=True, check=True
        )
        assert found.stdout.startswith("finetune, version")
