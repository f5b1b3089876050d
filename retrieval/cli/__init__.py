"""The `retrieve` command: declare options, import inside, call one function, print.

Results go to stdout (`--json` for machines), progress and warnings to stderr. Nothing heavy is
imported at the top, so that every `--help` answers at once.
"""

from __future__ import annotations

from typing import NoReturn

import click

from finetune import console
from retrieval.cli import maintain, query, serve


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="regraft", prog_name="retrieve")
def cli() -> None:
    """Find the images most similar to a query image.

    \b
    Example:
      retrieve build photos/ -o photos.gallery
      retrieve query photos.gallery cat.jpg
    """


for command in (
    maintain.build, maintain.add, maintain.remove, maintain.sync, maintain.compact,
    query.query, query.evaluate, query.duplicates, query.info, serve.serve,
):  # fmt: skip
    cli.add_command(command)


def main() -> NoReturn:
    """The console script."""
    console.guarded(cli, "retrieve")
