"""What the process may use of the machine, and what it asks of its allocator."""

from __future__ import annotations

import ctypes
import os
import types
from collections.abc import Iterator
from pathlib import Path

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


def groups(root: Path, monkeypatch: pytest.MonkeyPatch, own: str, **quotas: str) -> None:
    """Control groups below `root`: `own` is what the process is told of its groups; a folder's name
    has __ for /."""
    (root / "self").write_text(own)
    for name, text in quotas.items():
        path = root / "sys" / name.replace("__", "/")
        path.mkdir(parents=True, exist_ok=True)
        for file in text.split(";"):
            key, _, value = file.partition("=")
            (path / key).write_text(value)
    monkeypatch.setattr(hardware, "CGROUPS", root / "sys")
    monkeypatch.setattr(hardware, "OWN_GROUPS", root / "self")
    monkeypatch.setattr(hardware, "_affinity", lambda: 16)
    hardware.cores.cache_clear()


@pytest.fixture
def cores_again() -> Iterator[None]:
    yield
    hardware.cores.cache_clear()


@pytest.mark.usefixtures("cores_again")
@pytest.mark.parametrize(
    ("own", "quotas", "cores"),
    [
        ("0::/", {"": "cpu.max=200000 100000"}, 2),
        ("0::/", {"": "cpu.max=max 100000"}, 16),
        ("0::/", {"": "cpu.max=50000 100000"}, 1),
        ("0::/a/b", {"a": "cpu.max=300000 100000", "a__b": "cpu.max=max 100000"}, 3),
        ("0::/a/b", {"a": "cpu.max=max 100000", "a__b": "cpu.max=450000 100000"}, 4),
        ("4:cpu,cpuacct:/a", {"cpu__a": "cpu.cfs_quota_us=200000;cpu.cfs_period_us=100000"}, 2),
        ("4:cpu,cpuacct:/a", {"cpu__a": "cpu.cfs_quota_us=-1;cpu.cfs_period_us=100000"}, 16),
        ("nonsense", {"": "cpu.max="}, 16),
    ],
)
def test_a_quota_bounds_the_cores(
    own: str, quotas: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the process's own control group, of those around it, and of a container's root; of
    both versions."""
    groups(tmp_path, monkeypatch, own, **quotas)

    assert cores == hardware.cores()


@pytest.mark.usefixtures("cores_again")
def test_libraries_are_told_of_a_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They see the affinity alone; what the user has set stays, and without a quota nothing is
    set."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    groups(tmp_path, monkeypatch, "0::/", **{"": "cpu.max=max 100000"})
    hardware.limit_threads()
    assert (None, 16) == (hardware.fewer_threads(), hardware.threads())
    assert not set(names) & set(os.environ)
    groups(tmp_path, monkeypatch, "0::/", **{"": "cpu.max=300000 100000"})
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    hardware.limit_threads()

    assert ["3", "3", "1"] == [os.environ[name] for name in names]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert (2, 2) == (hardware.fewer_threads(), hardware.threads())


def test_the_processor_has_a_name() -> None:
    """Where the system tells it, with what it can do."""
    name, flags = hardware.processor()

    assert name
    assert not hardware.CPU_INFO.exists() or flags
