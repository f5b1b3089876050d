"""The documentation tells the truth: generated pages, commands, options, keys, links and files."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import click
import pytest

from finetune import recipe
from finetune.cli import cli as finetune
from retrieval.cli import cli as retrieve

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
COMMANDS = {"finetune": finetune, "retrieve": retrieve}
# of the architecture, and dated: they name functions, and commands as these once were
NOT_FOR_USERS = ("design.md", "performance.md", "log.md")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(path for path in sorted(DOCS.rglob("*.md")) if path.name not in NOT_FOR_USERS),
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
KEYS = set(recipe.all_keys())
SECTION = re.compile(r"(?:data|backbone|policy|train|svm)\.(?!py\b|md\b)[A-Za-z_0-9]+")


@functools.cache
def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def spans(page: Path) -> Iterator[str]:
    """Code of a page: lines of blocks, and the inline spans between them."""
    inside = False
    for line in text(page).splitlines():
        if line.startswith("```"):
            inside = not inside
        elif inside or line.startswith("    "):
            yield line.strip().removeprefix("$ ")
        else:
            yield from re.findall(r"`([^`]+)`", line)


def command_lines(page: Path) -> list[list[str]]:
    """The words of each `finetune …` and `retrieve …` of a page."""
    found = []
    for span in spans(page):
        span = span.partition("  #")[0].replace("…", "")
        if re.match(r"(finetune|retrieve) [a-z-]", span):
            found.append(shlex.split(span))
    return found


def options_of(command: click.Command) -> set[str]:
    names = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    return {name for name in names if name.startswith("-")} | {"-h", "--help", "--version"}


def wrong(words: list[str]) -> str:
    """What does not exist of a command line, or nothing."""
    command: click.Command = COMMANDS[words[0]]
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            return f"no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    known = options_of(command)
    for i, word in enumerate(rest):
        name = word.partition("=")[0]
        if name.startswith("-") and name not in known:
            return f"{command.name} has no option {name}"
        if name == "--set" and rest[i + 1].partition("=")[0] not in KEYS:
            return f"no key {rest[i + 1]}"
    return ""


@each_page
def test_commands_and_options_exist(page: Path) -> None:
    """Every command line of a page has commands and options that exist, and keys after --set."""
    found = {" ".join(words): wrong(words) for words in command_lines(page)}

    assert {} == {line: fault for line, fault in found.items() if fault}


@each_page
def test_bare_options_and_keys_exist(page: Path) -> None:
    """An option in a span of its own is one of some command; a dotted key is one of the recipe."""
    known = {name for cli in COMMANDS.values() for name in all_options(cli)} | {"--"}
    bare = [span for span in spans(page) if span.startswith("--") and page.name != "cli.md"]
    keys = {key for span in spans(page) for key in SECTION.findall(span) if span.startswith(key)}

    assert [] == [span for span in bare if re.split(r"[ =]", span)[0] not in known]
    assert set() == keys - KEYS


def all_options(command: click.Command) -> set[str]:
    inner = command.commands.values() if isinstance(command, click.Group) else ()
    return options_of(command).union(*(all_options(one) for one in inner))


def test_command_lines_are_found() -> None:
    """The tests above look at something."""
    assert ["finetune", "fit", "digits/", "--out", "runs/digits"] in command_lines(
        DOCS / "tutorial.md"
    )
    assert "fit has no option --no-such" == wrong(["finetune", "fit", "x", "--no-such"])
    assert "no key train.rate=1" == wrong(["finetune", "fit", "--set", "train.rate=1"])
    assert "no command fix" == wrong(["finetune", "fix"])


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    """Relative links name files that exist."""
    found = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text(page))

    assert [] == [link for link in found if not (page.parent / unquote(link)).exists()]


def test_every_page_is_linked() -> None:
    """Each page of docs/ can be reached from the README."""
    seen, todo = set[Path](), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text(page))
        todo += [(page.parent / link).resolve() for link in links]

    assert set() == set(DOCS.rglob("*.md")) - seen


@pytest.mark.parametrize("name", ["recipe.md", "policy.md", "python.md"])
def test_generated_pages_hold_what_the_code_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages of docs/reference are what `make docs` would write now."""
    monkeypatch.syspath_prepend(str(DOCS))
    made = importlib.import_module("make_reference").PAGES[name]()

    assert (DOCS / "reference" / name).read_text(encoding="utf-8") == made


@pytest.mark.parametrize("package", ["finetune", "retrieval"])
def test_the_python_page_has_every_public_name(package: str) -> None:
    """All of `__all__` stands in docs/reference/python.md."""
    titles = re.findall(r"^## (\S+)$", text(DOCS / "reference" / "python.md"), re.M)

    assert set() == {
        f"{package}.{name}" for name in importlib.import_module(package).__all__
    } - set(titles)


def test_every_recipe_key_has_a_row() -> None:
    """docs/reference/recipe.md explains each key."""
    rows = re.findall(r"^\| `(\w+)` \|", text(DOCS / "reference" / "recipe.md"), re.M)

    assert [key.rpartition(".")[2] for key in recipe.all_keys()] == rows


def test_contributing_names_files_that_exist() -> None:
    """Whatever CONTRIBUTING.md calls a file or a folder of the project is there."""
    places = r"(?:finetune|retrieval|tests|docs|benchmarks|recipes)/[\w./-]*"
    named = set(re.findall(rf"`({places})`", text(ROOT / "CONTRIBUTING.md")))

    assert "finetune/policy.py" in named
    assert [] == sorted(name for name in named if not (ROOT / name).exists())


def test_contributing_names_tests_and_functions_that_exist() -> None:
    """A test that is to be copied is in its file, and a function or table in its module."""
    pairs = re.findall(
        r"`(\w+)`(?: and `(\w+)`)? (?:in|of) `((?:finetune|retrieval|tests)/[\w./-]+\.py)`",
        text(ROOT / "CONTRIBUTING.md"),
    )
    named = [(name, file) for *names, file in pairs for name in names if name]

    assert named
    assert [] == [
        f"{name} in {file}"
        for name, file in named
        if not re.search(rf"\b{name}\b", (ROOT / file).read_text(encoding="utf-8"))
    ]
