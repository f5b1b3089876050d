"""The command that shows a gallery in a browser: serve."""

from __future__ import annotations

from pathlib import Path

import click

from retrieval.cli.options import index_argument


@click.command()
@index_argument
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="the address to listen on; another one needs --token",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--token", metavar="TEXT", help="what a visitor has to know")
def serve(index: Path, host: str, port: int, token: str | None) -> None:
    """A web page to search with, and its API.

    \b
    Example:
      retrieve serve photos.index --port 8000
    """
    from retrieval.web import app

    app.serve(index, host=host, port=port, token=token)
