"""Which way is taken, what is remembered of it, and what makes it be measured again."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from finetune import files, hardware, timings
from finetune.cli import cli

measure = timings.measure  # the real one: around every test it is put away
TASK = timings.Task("extract", "net", "0" * 64, 224)
WAYS = ("openvino float32", "openvino bf16", "torch float32")


def rated(monkeypatch: pytest.MonkeyPatch, **rates: float) -> list[Sequence[str]]:
    """Let the ways, by their last word, have these rates; the list gets what is measured."""
    asked: list[Sequence[str]] = []

    def found(ways: Sequence[str], _opened: object) -> dict[str, float]:
        asked.append(ways)
        return {way: rates[way.split()[1]] for way in ways}

    monkeypatch.setattr(timings, "measure", found)
    return asked


def chosen(ways: Sequence[str] = WAYS[:2], task: timings.Task = TASK) -> str:
    return timings.choose(task, ways, lambda way: None)


@pytest.mark.parametrize(
    ("bf16", "taken"), [(50.0, "float32"), (114.0, "float32"), (115.5, "bf16"), (200.0, "bf16")]
)
def test_float32_gives_way_to_what_is_clearly_faster(
    bf16: float, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timings are noisy and the choice stays: less than 1.15 times as fast is not enough."""
    rated(monkeypatch, float32=100.0, bf16=bf16)

    assert f"openvino {taken}" == chosen()


def test_what_was_measured_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time nothing is measured, also where fewer ways are open."""
    asked = rated(monkeypatch, float32=100.0, bf16=200.0)
    first = chosen(WAYS)

    assert first == chosen(WAYS) == chosen() == "openvino bf16"
    assert 1 == len(asked)


def test_one_way_alone_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who says which engine and precision to use waits for nothing."""
    asked = rated(monkeypatch, float32=100.0, bf16=200.0)

    assert "torch float32" == chosen(["torch float32"])
    assert [] == asked


@pytest.mark.parametrize("change", ["processor", "flags", "cores", "size", "weights", "version"])
def test_other_conditions_are_measured_anew(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another processor, fewer cores, another size, network or version of a library."""
    asked = rated(monkeypatch, float32=100.0, bf16=200.0)
    chosen()
    name, flags = hardware.processor()
    other = {"size": {"size": 128}, "weights": {"digest": "1" * 64}}.get(change, {})
    if change == "processor":
        monkeypatch.setattr(hardware, "processor", lambda: ("another", flags))
    elif change == "flags":
        monkeypatch.setattr(hardware, "processor", lambda: (name, "another"))
    elif change == "cores":
        monkeypatch.setattr(hardware, "cores", lambda: 77)
    elif change == "version":
        monkeypatch.setattr(timings, "_version", lambda name: "another")
    chosen(task=timings.Task(**{**TASK.__dict__, **other}))

    assert 2 == len(asked)


def test_a_damaged_memory_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that was changed in the cache decides nothing."""
    asked = rated(monkeypatch, float32=100.0, bf16=50.0)
    chosen()
    (path,) = files.cache_dir("timings").glob("*.json")
    found = json.loads(path.read_text())
    found["rates"]["openvino bf16"] = 1000.0
    path.write_text(json.dumps(found))

    assert "openvino float32" == chosen()
    assert 2 == len(asked)


def test_without_a_cache_the_choice_is_made_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is then made in every process."""
    rated(monkeypatch, float32=100.0, bf16=200.0)
    (tmp_path / "file").touch()
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "file"))

    assert "openvino bf16" == chosen()


def test_the_ways_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is measured by its fastest round; what cannot be opened, or is not worth it, counts as
    none, but for the first."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    order: list[str] = []
    took = {"a": iter([9, 2, 4] + 99 * [3]), "b": iter([1, 1] + 99 * [1])}

    def opened(way: str) -> timings.Work | None:
        if way == "broken":
            raise RuntimeError
        if way == "late":
            return None

        def work() -> int:
            order.append(way)
            now[0] += next(took[way]) / 100
            return 2

        return work

    found = measure(["a", "broken", "late", "b"], opened)

    assert {"a": pytest.approx(100), "b": pytest.approx(200)} == found
    assert ["a", "b"] * (timings.ROUNDS + 1) == order
    with pytest.raises(RuntimeError):
        measure(["broken", "a"], opened)


def test_slow_networks_are_not_timed_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one pass takes longer than all rounds may, that pass is the measurement."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def work() -> int:
        now[0] += 2.0
        return 1

    measure(["a", "b"], lambda way: work)

    assert 4.0 <= now[0] <= 8.0


def test_the_cache_shows_and_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """`finetune cache` has a line a network with all rates; --forget-timings makes it measured
    again."""
    asked = rated(monkeypatch, float32=100.0, bf16=200.0)
    chosen()
    text = CliRunner().invoke(cli, ["cache"]).output
    (row,) = json.loads(CliRunner().invoke(cli, ["cache", "--json"]).output)["timings"]

    assert "net at 224 px: openvino float32 100, openvino bf16 200 (taken)" in text
    assert ("openvino bf16", True) == (row["chosen"], row["here"])
    assert "1 timings forgotten" in CliRunner().invoke(cli, ["cache", "--forget-timings"]).output
    assert "net at" not in CliRunner().invoke(cli, ["cache"]).output
    chosen()
    assert 2 == len(asked)
    assert 2 == CliRunner().invoke(cli, ["cache", "--forget-timings", "--clear"]).exit_code
