"""Places that cannot be used: what needs no cache works without one, what needs one says which
variable gives it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from finetune.cli import cli
from finetune.errors import UserError
from retrieval.cli import cli as retrieve

# a run and a gallery of a small network
FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0.1.0"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run, a gallery and photos, and a file where the cache is to be."""
    shutil.copytree(FIXTURES, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "work" / "file").write_text("")
    return tmp_path / "work"


PLACES: dict[str, dict[str, str]] = {
    "a file": {"REGRAFT_CACHE": "file"},
    "below a file": {"REGRAFT_CACHE": "file/cache"},
    "a home that is a file": {"REGRAFT_CACHE": "", "HOME": "file"},
    "a folder for all that is a file": {"REGRAFT_CACHE": "", "XDG_CACHE_HOME": "file"},
}
WITHOUT = {
    "predict": (cli, "predict", "run-linear", "queries", "--engine", "openvino"),
    "evaluate": (cli, "evaluate", "run-linear", "photos", "--engine", "openvino"),
    "query": (retrieve, "query", "gallery", "queries"),
}
WITH = {
    "extract": (cli, "extract", "photos", "-o", "new.npz"),
    "fit": (cli, "fit", "photos", "--out", "new"),
    "advise": (cli, "advise", "photos"),
    "cache": (cli, "cache"),
    "add": (retrieve, "add", "gallery", "later"),
}


def at(place: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Move the cache to one of `PLACES`; returns the variable that says so."""
    for name, value in PLACES[place].items():
        monkeypatch.setenv(name, str(work / value) if value else "")
    return {"HOME": "the cache in the home folder"}.get(
        list(PLACES[place])[-1], f"${list(PLACES[place])[-1]}"
    )


def said(command: Any, *words: str) -> str:
    result = CliRunner().invoke(command, words, catch_exceptions=False)
    assert 0 == result.exit_code
    return result.stdout


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", WITHOUT)
def test_what_needs_no_cache_works_without_one(
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    place: str,
) -> None:
    """The same answer to the letter, and one line that says why it took longer, where it did."""
    expected = said(*WITHOUT[name])
    variable = at(place, work, monkeypatch)

    assert expected == said(*WITHOUT[name])
    lines = [record.getMessage() for record in caplog.records if record.name == "regraft"]
    # this gallery's network runs in torch, which keeps nothing
    assert len(lines) == (name != "query")
    for line in lines:
        assert variable in line
        assert "set $REGRAFT_CACHE to a folder that you may write to" in line


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", WITH)
def test_what_needs_a_cache_says_which_variable_gives_it(
    work: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    """One sentence, before anything is written."""
    variable = at(place, work, monkeypatch)

    with pytest.raises(UserError) as caught:
        CliRunner().invoke(*(WITH[name][0], WITH[name][1:]), catch_exceptions=False)
    assert variable in str(caught.value)
    assert "set $REGRAFT_CACHE to a folder that you may write to" == caught.value.fix
    assert not Path("new").exists()
    assert not Path("new.npz").exists()
