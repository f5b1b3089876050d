"""`finetune check --labels`: real images with turned labels, the page, the tables, and the way back
into `finetune fit --labels`."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import finetune
from finetune import cli, files
from finetune.errors import UserError
from finetune.report import suspects
from finetune.report.suspects import Doubts

HOW: dict[str, Any] = {
    "backbone": ["test_efficientnet"],
    "weights": "random",
    "engine": "torch",
    "precision": "float32",
    "taps": "pooled",
}
TURNED = "dark/<b>turned.png"


@pytest.fixture(scope="module")
def turned(shades: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark and light pictures, of which a light one lies among the dark, under a name that HTML
    must escape."""
    root = Path(shutil.copytree(shades, tmp_path_factory.mktemp("turned") / "shades"))
    (root / "light" / "00.png").rename(root / TURNED)
    return root


@pytest.fixture(scope="module")
def doubts(turned: Path) -> Doubts:
    return suspects.examine(turned, **HOW)


@pytest.fixture(scope="module")
def page(doubts: Doubts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page; the tables lie beside it."""
    return suspects.write(doubts, tmp_path_factory.mktemp("page") / "suspects.html")[0]


def test_the_turned_label_is_the_first_suspect(doubts: Doubts) -> None:
    """It is found, in whichever part it is, with the right class, and its neighbours prove it."""
    told = suspects.to_json(doubts)
    first = (told["suspects"] + told["test"])[0]

    assert (TURNED, "dark", "light") == (first["path"], first["given"], first["proposed"])
    assert {"light"} == {one["label"] for one in first["neighbours"]}
    assert {"training": 32, "test": 8} == told["looked_at"]


def test_the_page_stands_alone_and_escapes_names(page: Path) -> None:
    """Pictures are inside, nothing is loaded, and no name becomes markup."""
    html = page.read_text(encoding="utf-8")

    assert "&lt;b&gt;turned.png" in html
    assert "<b>turned.png" not in html
    assert html.count("data:image/jpeg;base64,") >= 1 + suspects.suspects.NEIGHBOURS
    assert "http" not in html.replace("http-equiv", "")


def test_the_table_comes_back_as_corrected_labels(page: Path, turned: Path, tmp_path: Path) -> None:
    """Filled in, it changes the job's digest, its labels, run.json, the table of the run and the
    report; a test label is told with both figures."""
    rows = [list(suspects.COLUMNS)]
    for name in ("suspects.csv", "suspects-test.csv"):
        if (path := page.with_name(name)).exists():
            with path.open(encoding="utf-8", newline="") as file:
                rows += [row for row in list(csv.reader(file))[1:] if row[0] == TURNED]
    assert [TURNED, "dark", "light", ""] == [*rows[1][:3], rows[1][4]]
    rows[1][4] = "light"
    table = tmp_path / "corrected.csv"
    files.write_csv(table, rows[0], rows[1:])
    said: list[str] = []
    small = {**HOW, "strategy": "svm", "say": said.append}
    after = finetune.fit(turned, out=tmp_path / "after", labels=table, **small)
    about = files.read_json(after.path / "run.json")

    with pytest.raises(UserError, match="other settings or other images"):
        finetune.fit(turned, out=after.path, **small)
    assert 1 == sum(about["labels_corrected"].values())
    assert str(table) == about["recipe"]["data"]["labels"]
    part = next(part for part, count in about["labels_corrected"].items() if count)
    text = (after.path / "corrections.csv").read_text(encoding="utf-8")
    assert f"path,given,corrected,part\n{TURNED},dark,light,{part}\n" == text
    assert "(corrections.csv)" in (after.path / "report.html").read_text(encoding="utf-8")
    assert any(line.startswith("labels     1 corrected") for line in said)
    assert ("test/top1_as_given" in after.metrics) == (part == "test")


def test_the_command_checks_and_doubts(
    doubts: Doubts, turned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`check --labels` prints what `check` does, then the suspects; --json holds both in one
    value."""
    monkeypatch.setattr(suspects, "examine", lambda *_, **__: doubts)
    words = ["check", str(turned), "--labels", "-o", str(tmp_path / "a.html")]
    text = CliRunner().invoke(cli.cli, words, catch_exceptions=False)
    told = json.loads(CliRunner().invoke(cli.cli, [*words, "--json"]).stdout)

    assert 0 == text.exit_code
    assert "faults: none" in text.stdout
    assert f"{TURNED}: given dark" in text.stdout
    assert {"faults", "duplicates", "labels"} <= set(told)
    assert (tmp_path / "a.csv").exists()


def test_the_page_needs_the_question() -> None:
    """-o without --labels is refused, and so is a page that is no HTML."""
    for words in (["-o", "x.html"], ["--labels", "-o", "x.csv"]):
        done = CliRunner().invoke(cli.cli, ["check", "photos", *words])
        assert 2 == done.exit_code
