"""What the process may use of the machine, and what it asks of its allocator."""

from __future__ import annotations

import ctypes
import os
import types

import pytest

from finetune import hardware


@pytest.mark.parametrize(
    ("most", "asked"), [(1 << 30, [(-3, 1 << 28)]), (1 << 25, [(-3, 1 << 28), (-3, 1 << 25)])]
)
def test_freed_memory_is_kept(
    monkeypatch: pytest.MonkeyPatch, most: int, asked: list[tuple[int, int]]
) -> None:
    """Some glibc take no threshold of more than 32 MB: those get that."""
    calls: list[tuple[int, int]] = []

    def mallopt(option: int, value: int) -> int:
        calls.append((option, value))
        return int(option != -3 or value <= most)

    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace(mallopt=mallopt))
    hardware.keep_memory.__wrapped__()

    assert [*asked, (-1, (1 << 31) - 1)] == calls


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    """Other systems have other allocators, and other libraries none of these functions."""

    def missing(name: str) -> None:
        raise OSError(f"{name}: no such file")

    monkeypatch.setattr("sys.platform", platform)
    for library in (missing, lambda name: types.SimpleNamespace()):
        monkeypatch.setattr(ctypes, "CDLL", library)
        hardware.keep_memory.__wrapped__()


def test_cores_are_at_least_one_and_at_most_those_of_the_machine() -> None:
    """Whatever a container's quota says."""

    assert 1 <= hardware.cores() <= (os.cpu_count() or 1)
