"""How large the rooms of the house are: lines, tokens and parameters of functions, comments, import
depth, for each package.

    python benchmarks/structure.py          # the table
    python benchmarks/structure.py --worst  # and the longest functions and files

Aims (docs/design.md): median function ≤ 70 tokens, p90 ≤ 200, comments towards 5 % of the lines.
Bounds that `tests/test_project.py` holds: files ≤ 400 lines, folders ≤ 20 modules, functions with
more than six parameters ≤ 1 %.
"""

from __future__ import annotations

import argparse
import ast
import functools
import io
import statistics
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("finetune", "retrieval")
SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True)
class Function:
    """A function's place and size; `positional` parameters are those that may be given without
    their name, but for self."""

    where: str
    tokens: int
    lines: int
    parameters: int
    positional: int
    is_command: bool


def modules(package: str) -> dict[str, Path]:
    """Dotted names of a package's modules, its sub-packages' own files included, and their
    paths."""
    paths = sorted((ROOT / package).rglob("*.py"))
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in paths
    }


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def functions(name: str, path: Path) -> Iterator[Function]:
    """Every function and method of a module; tokens count without comments and docstrings."""
    tokens = [
        t
        for t in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        if t.type not in SILENT
    ]
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        own = node.args.posonlyargs + node.args.args
        is_method = bool(own) and own[0].arg in ("self", "cls")
        end = node.end_lineno or node.lineno
        docstring = ast.get_docstring(node) is not None
        yield Function(
            where=f"{name}.{node.name}:{node.lineno}",
            tokens=sum(node.lineno <= t.start[0] <= end for t in tokens) - docstring,
            lines=end - node.lineno + 1,
            parameters=len(own) + len(node.args.kwonlyargs) - is_method,
            positional=len(own) - is_method,
            is_command=any(
                "command" in ast.unparse(mark) or "option" in ast.unparse(mark)
                for mark in node.decorator_list
            ),
        )


def imports(path: Path, known: set[str]) -> set[str]:
    """The project's modules that a file imports, at the top, inside functions and for types."""
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & known) or ({node.module} & known)
    return found


def depth(graph: dict[str, set[str]]) -> int:
    """Floors of a graph of imports: the longest way down. Raises `ValueError` for a circle."""
    floors: dict[str, int] = {}

    def floor(name: str, above: tuple[str, ...]) -> int:
        if name in above:
            raise ValueError(f"a circle of imports: {' → '.join((*above, name))}")
        if name not in floors:
            floors[name] = 1 + max(
                (floor(other, (*above, name)) for other in graph[name]), default=0
            )
        return floors[name]

    return max(floor(name, ()) for name in graph)


def by_package(package: str) -> dict[str, set[str]]:
    """Imports between the rooms of a package: its sub-packages, and its modules that lie in
    none."""
    known = modules(package)
    packages = {name for name, path in known.items() if path.name == "__init__.py"}

    def room(name: str) -> str:
        return next(
            (p for p in (name, name.rpartition(".")[0]) if p in packages and p != package), name
        )

    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        graph.setdefault(room(name), set()).update(
            room(other) for other in imports(path, set(known) - {package})
        )
    return {name: others - {name} for name, others in graph.items() if name != package}


def table() -> list[dict[str, object]]:
    """A row of figures for each package."""
    rows = []
    for package in PACKAGES:
        known = modules(package)
        texts = [path.read_text(encoding="utf-8").splitlines() for path in known.values()]
        found = [function for name, path in known.items() for function in functions(name, path)]
        folders = [path.parent for path in known.values() if path.name != "__init__.py"]
        sizes = sorted(function.tokens for function in found)
        lines = [line for text in texts for line in text if line.strip()]
        many = sum(f.parameters > 6 and not f.is_command for f in found)
        comments = sum(line.lstrip().startswith("#") for line in lines)
        rows.append(
            {
                "package": package,
                "files": len(texts),
                "lines": sum(map(len, texts)),
                "longest file": max(map(len, texts)),
                "fullest folder": max(map(folders.count, folders)),
                "functions": len(found),
                "tokens, median": statistics.median(sizes),
                "tokens, p90": sizes[int(0.9 * len(sizes))],
                "tokens, most": sizes[-1],
                "over six parameters": f"{many / len(found):.1%}",
                "over five positional": sum(f.positional > 5 and not f.is_command for f in found),
                "comments": f"{comments / len(lines):.1%}",
                "line, p90": sorted(map(len, lines))[int(0.9 * len(lines))],
                "floors": depth(by_package(package)),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--worst", action="store_true", help="list the longest functions and files, too"
    )
    parser.add_argument("--quick", action="store_true", help="the same: it takes a second")
    asked = parser.parse_args()
    rows = table()
    for key in rows[0]:
        print(f"{key:<22}" + "".join(f"{row[key]!s:>14}" for row in rows))
    if asked.worst:
        found = [
            f
            for package in PACKAGES
            for name, path in modules(package).items()
            for f in functions(name, path)
        ]
        for function in sorted(found, key=lambda f: -f.tokens)[:25]:
            print(
                f"{function.tokens:>6} tokens {function.lines:>4} lines {function.parameters:>3} "
                f"parameters  {function.where}"
            )
        for function in found:
            if (function.parameters > 6 or function.positional > 5) and not function.is_command:
                print(
                    f"{function.parameters:>3} parameters, "
                    f"{function.positional} positional  {function.where}"
                )
        for path in (path for package in PACKAGES for path in modules(package).values()):
            if (count := len(path.read_text(encoding="utf-8").splitlines())) > 400:
                print(f"{count:>6} lines  {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
