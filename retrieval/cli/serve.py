"""The command that shows a gallery in a browser: serve."""

from __future__ import annotations

from pathlib import Path

import click

from retrieval.cli.options import a_gallery


@click.command()
@a_gallery
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="address to listen on; another one needs --token",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="port to listen on; 0 takes a free one",
)
@click.option("--token", metavar="TEXT", help="access token required from clients")
def serve(folder: Path, host: str, port: int, token: str | None) -> None:
    """Serve a web page to search with, and its API.

    \b
    Example:
      retrieve serve photos.gallery --port 8000
    """
    from retrieval.web import app

    app.serve(folder, host=host, port=port, token=token)
