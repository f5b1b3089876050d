"""The screen that a user pastes into a report of a fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from finetune.backbones import catalog, device
from finetune.cli import cli
from finetune.errors import UserError
from finetune.report import doctor


def test_one_screen_says_what_a_report_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions, system, processor, cores, memory, cache, weights and each engine's speed, in few
    lines."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    result = CliRunner().invoke(cli, ["doctor"], catch_exceptions=False)
    lines = result.output.splitlines()
    labels = [line.split()[0] for line in lines if not line.startswith(" ")]

    assert 0 == result.exit_code
    assert len(lines) <= 24
    assert {"versions", "system", "processor", "cores", "memory", "cache", "weights"} <= {*labels}
    assert "torch" in result.output
    assert "float32 100" in result.output  # as conftest times it
    assert "OMP_NUM_THREADS=2" in result.output


def test_the_home_folder_and_secrets_stay_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name is often the user's; other settings of the environment are not shown at all."""
    home = tmp_path / "jane.doe"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("REGRAFT_CACHE", str(home / "cache"))
    monkeypatch.setenv("HF_TOKEN", "a-secret")
    output = CliRunner().invoke(cli, ["doctor", "--no-speed", "--json"]).output
    found = json.loads(output)

    assert "jane.doe" not in output
    assert "a-secret" not in output
    assert "~/cache" == found["cache"]["folder"] == found["settings"]["REGRAFT_CACHE"]


def test_what_does_not_work_is_said_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without OpenVINO, a cache or weights the rest is still told."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(device, "has_openvino", lambda: False)
    without = doctor.text(doctor.examine())
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "file"))

    def none_here() -> None:
        raise UserError("no weights here")

    monkeypatch.setattr(catalog, "open_named", none_here)
    broken = doctor.text(doctor.examine())

    assert "openvino: not installed" in without
    assert "torch: float32 100" in without
    assert "no weights here" in broken
    assert "a file stands where a folder of the cache is needed" in broken
