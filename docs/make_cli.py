"""Write docs/reference/cli.md from the commands' own --help: `python docs/make_cli.py`.

A test holds the two together.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

HEAD = "# The commands\n\nGenerated from `--help` by `make docs`; do not edit.\n"


def commands(group: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """Every command and group below `group`, in the order of their names, with the words that call
    it."""
    yield path, group
    if isinstance(group, click.Group):
        for name, command in sorted(group.commands.items()):
            yield from commands(command, f"{path} {name}")


def text() -> str:
    """The whole page."""
    from finetune.cli import cli as finetune
    from retrieval.cli import cli as retrieve

    parts = [HEAD]
    for group, name in ((finetune, "finetune"), (retrieve, "retrieve")):
        for words, command in commands(group, name):
            context = click.Context(
                command, info_name=words, max_content_width=100, help_option_names=["-h", "--help"]
            )
            context.terminal_width = 100
            parts.append(f"## {words}\n\n```\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (Path(__file__).parent / "reference" / "cli.md").write_text(text(), encoding="utf-8")
