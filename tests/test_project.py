"""Guards of the whole project: who may import whom, that nothing runs from data, that the README
tells the truth."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from finetune.cli import cli as finetune
from retrieval.cli import cli as retrieve

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("finetune", "retrieval")
FOLDERS = (*PACKAGES, "benchmarks", "docs", "tests")
ANYWHERE = {"numpy", "safetensors"}  # third-party libraries that every module may import
IMPORTED_AS = {"Pillow": "PIL", "scikit-learn": "sklearn", "ruamel.yaml": "ruamel"}
HEAVY = (
    "torch",
    "timm",
    "torchvision",
    "sklearn",
    "scipy",
    "faiss",
    "openvino",
    "pydantic",
    "ruamel",
    "numpy",
    "PIL",
    "rich",
    "jinja2",
    "safetensors",
    "huggingface_hub",
    "pyarrow",
    "fastapi",
    "uvicorn",
    "starlette",
    "matplotlib",
    "pandas",
)
MALICIOUS = (
    "tests/backbones/test_weights.py"  # makes a pickle that would run code, to see it refused
)


# --------------------------------------------------------------------------------- import direction


@dataclass(frozen=True)
class Line:
    """A line of the tables of docs/design.md: a module, or a package (`name/`)."""

    package: str
    name: str
    row: int
    job: str
    libraries: frozenset[str]


@functools.cache
def lines() -> tuple[Line, ...]:
    """The lines of the tables of docs/design.md, in their order."""
    found: list[Line] = []
    package = ""
    for text in (ROOT / "docs" / "design.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in text.strip().strip("|").split("|")]
        if heading := re.match(r"\| row \| of `(\w+)/`", text):
            package = heading.group(1)
        elif not text.startswith("|"):
            package = ""
        elif package and cells[0].isdigit():
            libraries = [name.strip() for name in cells[3].split(",")] if len(cells) > 3 else []
            named = frozenset(IMPORTED_AS.get(name, name) for name in libraries if name)
            found += [
                Line(package, name, int(cells[0]), cells[2], named)
                for name in re.findall(r"`(\w+/?)`", cells[1])
            ]
    return tuple(found)


@functools.cache
def modules() -> dict[str, Path]:
    """The modules of both packages, by dotted name; the `__init__` of a package goes by the
    package's name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if not name.endswith("__main__")}


def box(module: str) -> tuple[str, str]:
    """The line of the design's tables that a module belongs to: `finetune.data.images` is of
    `finetune`, `data/`."""
    package, _, rest = module.partition(".")
    first, _, inside = rest.partition(".")
    is_folder = inside or (ROOT / package / first).is_dir()
    return package, f"{first}/" if is_folder else first


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of what a file imports, at the top, inside functions and for types:
    `finetune.files`, `torch.nn`."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno} imports by dots"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in modules() else str(node.module)


BOXES = sorted({box(name) for name in modules() if "." in name})
MODULES = sorted(name for name in modules() if "." in name)
each_module = pytest.mark.parametrize("name", MODULES)


def test_the_tables_of_the_design_were_read() -> None:
    """Both tables are there, with their rows in order, a job in every line, and libraries where
    they are known to be."""
    home = {(line.package, line.name): line for line in lines()}

    assert {"openvino", "torch", "timm", "torchvision", "huggingface_hub"} == home[
        "finetune", "backbones/"
    ].libraries
    assert {"faiss"} == home["retrieval", "index/"].libraries
    for package in PACKAGES:
        rows = [line.row for line in lines() if line.package == package]
        assert sorted(rows) == rows
    assert all(line.job for line in lines())


def test_every_package_and_module_has_one_line_in_the_design() -> None:
    """A new one is put into its row, with its one job, in the commit that brings it; a line goes
    with its module."""
    counts = Counter((line.package, line.name) for line in lines())

    assert dict.fromkeys(BOXES, 1) == dict(counts)


@each_module
def test_imports_go_upwards(name: str) -> None:
    """A module imports from smaller rows alone, wherever in the file; `finetune` knows nothing of
    `retrieval`."""
    rows = {(line.package, line.name): line.row for line in lines()}
    for imported in imports(modules()[name]):
        if imported in PACKAGES or imported not in modules():
            continue
        assert (name.split(".")[0], imported.split(".")[0]) != ("finetune", "retrieval"), (
            f"{name} imports {imported}"
        )
        if imported.split(".")[0] == name.split(".")[0] and box(imported) != box(name):
            assert rows[box(imported)] < rows[box(name)], (
                f"{name} imports {imported}, which is not above it"
            )


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_of_imports(package: str) -> None:
    """Modules of one package, too, can be put in an order in which each imports only earlier
    ones."""
    wanted = {
        name: {i for i in imports(path) if i in modules() and i != name}
        for name, path in modules().items()
    }
    wanted = {
        name: {i for i in found if "." in i}
        for name, found in wanted.items()
        if name.startswith(f"{package}.")
    }

    # raises CycleError, which names the circle
    tuple(graphlib.TopologicalSorter(wanted).static_order())


def test_no_folder_is_full() -> None:
    """At most 20 modules stand side by side: what is more becomes a package."""
    counts = Counter(path.parent for path in modules().values() if path.name != "__init__.py")

    assert {} == {short(folder): count for folder, count in counts.items() if count > 20}


def test_packages_hold_words_alone() -> None:
    """The `__init__` of a sub-package imports nothing, so that one of its modules brings no other
    (but for the commands)."""
    inits = [
        path
        for name, path in modules().items()
        if path.name == "__init__.py" and "." in name and not name.endswith(".cli")
    ]

    assert [] == [short(path) for path in inits if len(parsed(path).body) > 1]
    assert all(ast.get_docstring(parsed(path)) for path in inits)


@each_module
def test_heavy_libraries_stay_in_their_homes(name: str) -> None:
    """What is neither of Python nor small is imported only where the design says."""
    allowed = {
        library
        for line in lines()
        if (line.package, line.name) == box(name)
        for library in line.libraries
    }
    found = {imported.split(".")[0] for imported in imports(modules()[name])}

    assert set() == found - set(sys.stdlib_module_names) - set(PACKAGES) - ANYWHERE - allowed


# ---------------------------------------------------------------------------------------- doorsteps


def loaded_by(script: str) -> set[str]:
    """Heavy libraries that a fresh process has loaded after `script`."""
    code = (
        f"import sys\n{script}\nprint()\nprint(*(name for name "
        f"in {HEAVY!r} if sys.modules.get(name)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )

    assert 0 == done.returncode, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "script", ["import finetune, finetune.cli", "import retrieval, retrieval.cli"]
)
def test_the_commands_are_imported_without_any_heavy_library(script: str) -> None:
    """What `--help` needs is click and the standard library."""
    assert set() == loaded_by(script)


@pytest.mark.parametrize("package", PACKAGES)
def test_help_answers_without_any_heavy_library(package: str) -> None:
    """`finetune --help` and `retrieve --help`, through the door that users take."""
    script = (
        f"sys.argv = ['x', '--help']\nfrom {package}.cli import main\ntry: main()\nexcept "
        f"SystemExit as e: assert not e.code"
    )

    assert set() == loaded_by(script)


def test_what_serves_predictions_is_imported_without_torch() -> None:
    """`predict` and `query` through a converted network never pay for torch, timm or
    scikit-learn."""
    script = (
        "import finetune.evaluation.predict, finetune.classifier, finetune.features.engine, "
        "retrieval.gallery, retrieval.encode"
    )

    assert set() == loaded_by(script) & {"torch", "timm", "torchvision", "sklearn", "scipy"}


# ------------------------------------------------------------------------------- data is never code


def sources() -> list[Path]:
    """The project's own Python files."""
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Calls of a file with the dotted name of what is called, as far as it is one."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_is_pickled() -> None:
    """No module imports pickle or a library that pickles; one test makes a malicious pickle, to see
    it refused."""
    picklers = {
        "pickle",
        "cPickle",
        "_pickle",
        "dill",
        "cloudpickle",
        "joblib",
        "shelve",
        "marshal",
    }
    found = {
        short(path)
        for path in sources()
        for name in imports(path)
        if name.split(".")[0] in picklers
    }

    assert {MALICIOUS} == found


def test_nothing_is_evaluated() -> None:
    """No eval, exec, compile or __import__: text never becomes code."""
    words = {"eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"}

    assert [] == [
        f"{short(path)}:{call.lineno}"
        for path in sources()
        for name, call in calls(path)
        if name in words
    ]


def test_numpy_and_torch_read_data_only() -> None:
    """`torch.load` says weights_only=True every time, and no `allow_pickle` is anything but
    False."""
    wrong = []
    for path in sources():
        for name, call in calls(path):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            unsafe = name in (
                "torch.load",
                "load_state_dict_from_url",
                "torch.hub.load_state_dict_from_url",
            )
            if unsafe and given.get("weights_only") != "True":
                wrong.append(f"{short(path)}:{call.lineno}")
            if given.get("allow_pickle", "False") != "False":
                wrong.append(f"{short(path)}:{call.lineno}")

    assert [] == wrong


# ------------------------------------------------------------------------------------------- README


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def command_exists(words: list[str]) -> bool:
    """Whether the words lead to a command of the two CLIs; what comes after a command is its
    arguments."""
    command: click.Command = {"finetune": finetune, "retrieve": retrieve}[words[0]]
    for word in words[1:]:
        if not isinstance(command, click.Group):
            return True
        if word.startswith("-"):
            return True
        if word not in command.commands:
            return False
        command = command.commands[word]
    return True


def commands_of_the_readme() -> Iterator[list[str]]:
    """Command lines in code spans and blocks; in the table of commands, bare words after one are
    its siblings."""
    for line in readme().splitlines():
        spans = re.findall(r"`([^`]+)`", line)
        if re.match(r"\s{4}(finetune|retrieve) ", line):
            spans.append(line.strip())
        program = ""
        for span in spans:
            words = span.split()
            if words[0] in ("finetune", "retrieve") and len(words) > 1:
                program = words[0]
                yield words
            elif line.startswith("|") and program and re.fullmatch(r"[a-z]+", span):
                yield [program, span]


def test_commands_of_the_readme_exist() -> None:
    """Every `finetune X` and `retrieve X`, and the words listed after one in the table, are
    commands."""
    found = list(commands_of_the_readme())

    assert ["finetune", "fit", "photos/"] in found
    assert ["retrieve", "serve"] in found
    assert [] == [" ".join(words) for words in found if not command_exists(words)]


def test_targets_of_the_readme_exist() -> None:
    """Every `make X` of the README and of the tree's line about the Makefile is a target."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    (listed,) = re.findall(r"^Makefile\s+([a-z, ]+):", readme(), re.M)
    named = set(re.findall(r"(?:^    |`)make ([a-z]+)", readme(), re.M)) | set(listed.split(", "))

    assert "demo" in named
    assert set() == named - targets


def test_paths_of_the_readme_exist() -> None:
    """Everything in `Where things are` is there."""
    tree = readme().partition("## Where things are")[2].partition("```\n")[2].partition("```")[0]
    paths = [line.split()[0] for line in tree.splitlines() if line.strip()]

    assert "finetune/" in paths
    assert [] == [
        path
        for path in paths
        if not (ROOT / path).exists() or (ROOT / path).is_dir() != path.endswith("/")
    ]


def test_the_tree_of_the_readme_is_whole() -> None:
    """Every folder that holds sources stands in the README's tree."""
    tree = readme().partition("## Where things are")[2]

    assert [] == [name for name in (*FOLDERS, "recipes") if f"\n{name}/ " not in tree]


# -------------------------------------------------------------------------------------- any machine


def test_no_file_knows_the_machine_that_it_was_written_on() -> None:
    """Sources, tests, docs and recipes name no folder of one machine; documented places such as
    /dev and /sys may be."""
    places = re.compile(r"(?<![\w.\]/~$}-])/(?:tmp|work|home|root|Users|mnt|var|opt)\b(?:/\w|\b)")
    kinds = ("*.py", "*.md", "*.yaml", "*.html", "*.css", "*.js", "*.txt")
    files = [
        path
        for folder in (*FOLDERS, "recipes")
        for kind in kinds
        for path in (ROOT / folder).rglob(kind)
    ]
    files += [
        path
        for path in ROOT.iterdir()
        if path.suffix in (".md", ".cfg", ".toml") or path.name == "Makefile"
    ]
    wrong = [
        f"{short(path)}:{number}: {line.strip()[:80]}"
        for path in sorted(files)
        if path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if places.search(line)
    ]

    assert [] == wrong
