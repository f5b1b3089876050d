"""What a command tells while it works: lines of text, and how far it is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

Progress = Callable[[int, int], None]  # how many are done, of how many
Say = Callable[[str], None]  # one line of what is done
Bar = Callable[[str], contextlib.AbstractContextManager[Progress]]


@contextlib.contextmanager
def no_bar(_label: str) -> Iterator[Progress]:
    """Progress for those who do not watch."""
    yield lambda done, total: None


def quiet(_text: str) -> None:
    """`say` for those who do not listen."""


@contextlib.contextmanager
def clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start
