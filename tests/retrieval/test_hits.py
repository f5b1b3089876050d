"""What is said of a hit: its marks in text and JSON, and what has become of its files."""

from __future__ import annotations

import os
from pathlib import Path

from retrieval import hits
from retrieval.hits import Answer, Hit


def test_files_are_compared_by_size_and_time(tmp_path: Path) -> None:
    """A file that is gone, or a folder in its place, is missing; another size or time is a change,
    an unknown time is none."""
    for name in ("kept", "grown", "touched", "young"):
        (tmp_path / name).write_bytes(b"12345")
        os.utime(tmp_path / name, ns=(7_000_000_000, 7_000_000_000))
    (tmp_path / "folder").mkdir()
    known = dict.fromkeys(("kept", "touched", "gone", "folder", "kept/below"), (5, 7000000000)) | {
        "young": (5, -1)
    }
    os.utime(tmp_path / "touched", ns=(8_000_000_000, 8_000_000_000))
    missing, changed = hits.gone(tmp_path, known | {"grown": (4, 7_000_000_000)})
    assert (["gone", "folder", "kept/below"], ["touched", "grown"]) == (missing, changed)


def test_marks_stand_behind_the_path_that_they_are_about() -> None:
    """The text marks each path by itself; what is only similar is never called the same; names are
    printable."""
    hit = Hit(1, "a.png", 1.0, ("b\n.png",), ("c.png",), True, ("b\n.png", "c.png"), ("a.png",))
    lines = Answer("q", (hit,)).to_text().splitlines()
    assert ["q", "   1.000  a.png  (the same file, changed since)"] == lines[:2]
    assert [r"= b\x0a.png  (the same file, missing)", "≈ c.png  (missing)"] == [
        line.strip() for line in lines[2:]
    ]
    about = hit.to_json()
    assert (True, True, False, [r"b\x0a.png", "c.png"]) == (
        about["same"], about["changed"], "missing" in about, about["missing_paths"],
    )  # fmt: skip


def test_the_advice_counts_each_file_once() -> None:
    """One line with the command that helps; none where nothing is amiss."""
    assert () == hits.advice([], [], Path("photos.index"))
    (line,) = hits.advice(["a", "a", "b"], [], Path("photos.index"))
    assert (
        "of the files shown, 2 missing: `retrieve sync photos.index` brings the gallery up to date"
        == line
    )
