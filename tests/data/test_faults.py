"""Faults and the report of a check: in one line, in full, and as data."""

from __future__ import annotations

import dataclasses

from finetune.data.faults import Fault, Report, list_faults

REPORT = Report(
    name="photos/",
    images=1203,
    faults=(
        Fault("cat/1.jpg", "empty", "0 bytes"),
        Fault("dog/2.jpg", "truncated", "JPEG of 10 bytes"),
    ),
    classes={"cat": 1200, "lynx": 3},
    parts={"train": {"cat": 1000, "lynx": 3}, "test": {"cat": 200, "lynx": 0}},
    duplicates=(("a.jpg", "b.jpg"), ("train/c.jpg", "test/c.jpg")),
    across_splits=(("train/c.jpg", "test/c.jpg"),),
    imbalance=400.0,
    few={"lynx": 3},
)


def test_faults_in_one_line() -> None:
    """The list of faults counts them all and names three."""
    faults = [Fault(f"{i}.jpg", "empty", "0 bytes") for i in range(5)]
    assert "1 bad image: 0.jpg (empty: 0 bytes)" == list_faults(faults[:1])
    assert (
        "5 bad images: 0.jpg (empty: 0 bytes); 1.jpg (empty: 0 bytes); 2.jpg (empty: 0 "
        "bytes); and 2 more" == list_faults(faults)
    )


def test_report_in_words() -> None:
    """Every fault, class and group of duplicates has its line; those across splits are not listed
    twice."""
    assert [
        "photos/: 1,203 images in 2 classes",
        "  train: 1,003 images",
        "  test: 200 images",
        "  cat   1,200",
        "  lynx  3",
        "largest class over smallest: 400.0",
        "1 of 2 classes have less than 20 training images: lynx (3)",
        "faults: 2",
        "  cat/1.jpg: empty (0 bytes)",
        "  dog/2.jpg: truncated (JPEG of 10 bytes)",
        "duplicates across splits: 1",
        "  train/c.jpg = test/c.jpg",
        "duplicates: 1",
        "  a.jpg = b.jpg",
    ] == REPORT.to_text().splitlines()


def test_report_without_classes_and_faults() -> None:
    """Where nothing is wrong the report says so; images without labels have no classes to count."""
    report = dataclasses.replace(
        REPORT, images=2, faults=(), classes={}, parts={}, duplicates=(), across_splits=(), few={}
    )
    assert [
        "photos/: 2 images",
        "faults: none",
        "duplicates across splits: none",
        "duplicates: none",
    ] == report.to_text().splitlines()


def test_report_as_data() -> None:
    """The JSON form holds every field as plain data."""
    value = REPORT.to_json()
    assert {"path": "cat/1.jpg", "kind": "empty", "detail": "0 bytes"} == value["faults"][0]
    assert [field.name for field in dataclasses.fields(Report)] == list(value)
