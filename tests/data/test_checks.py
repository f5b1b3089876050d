"""The check of a set: bad files, faults of the whole, and how a job would divide it."""

from __future__ import annotations

import json
from pathlib import Path

from faults import BAD, COPIED, IGNORED, ODD, draw, encode, make_fault_folder

from finetune.data import checks, csv_table, images
from finetune.data.images import Fault


def make(root: Path, *names: str) -> Path:
    """Files that all differ, with the names given; a name with = has the bytes of what follows
    it."""
    for entry in names:
        name, _, same = entry.partition("=")
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((same or name).encode())
    return root


def test_folder_of_faults(tmp_path: Path) -> None:
    """One of each fault: the bad files are named with their kinds, the odd ones are images, nothing
    raises."""
    found = images.load(make_fault_folder(tmp_path))
    report = checks.check(found)
    kinds = {fault.path: fault.kind for fault in report.faults}
    assert {**BAD, IGNORED: "not an image extension"} == kinds
    assert set(ODD) <= set(found.paths)
    assert (tuple(sorted(COPIED, reverse=True)),) == report.across_splits == report.duplicates
    assert {"cat": 12 + 4, "dog": 12 + 4, "solo": 1} == report.parts["train"]
    assert {"cat": 5, "dog": 4, "solo": 0} == report.parts["test"]
    assert {"cat": 21, "dog": 20, "solo": 1} == report.classes
    assert 21.0 == report.imbalance
    assert {"cat": 16, "dog": 16, "solo": 1} == report.few
    assert (len(found), str(tmp_path)) == (report.images, report.name)


def test_report_is_json(tmp_path: Path) -> None:
    """The report is plain data."""
    report = checks.check(images.load(make_fault_folder(tmp_path)))
    value = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert {"path": "train/cat/empty.jpg", "kind": "empty", "detail": "0 bytes"} in value["faults"]
    assert 21 == value["classes"]["cat"]


def test_check_names_what_the_splits_get_wrong(tmp_path: Path) -> None:
    """Two labels for one content, an empty class and a group on both sides are faults."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(encode(draw("cat", seed=1), "PNG"))
    (tmp_path / "c.png").write_bytes(encode(draw("dog", seed=2), "PNG"))
    table = tmp_path / "t.csv"
    table.write_text(
        "path,label,split,group\na.png,cat,train,\nb.png,dog,train,g\nc.png,dog,test,g\n",
        encoding="utf-8",
    )
    found = images.load(table)
    assert [
        Fault("a.png", "two labels", "a.png (cat) = b.png (dog)"),
        Fault("b.png", "group in several splits", "'g' is in test, train"),
    ] == list(checks.check(found).faults)
    folder = make(tmp_path / "folder", "fox/notes.txt", "cat/x.txt")
    (folder / "cat/1.png").write_bytes(encode(draw("cat", seed=1), "PNG"))
    report = checks.check(images.load(folder))
    assert Fault("fox", "empty class", "no training images") in report.faults
    assert (1.0, {"cat": 1}) == (report.imbalance, report.few)


def test_check_of_data_says_how_it_would_be_divided(tmp_path: Path) -> None:
    """`check_data` counts the parts that a job would make, in spite of bad files, or says why none
    can be made."""
    for i in range(20):
        path = tmp_path / "photos" / ("cat" if i % 2 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(draw("cat", seed=i), "PNG") if i else b"")
    report = checks.check_data(tmp_path / "photos", seed=1)
    assert ["empty"] == [fault.kind for fault in report.faults]
    assert {"train": {"cat": 8, "dog": 8}, "test": {"cat": 2, "dog": 2}} == report.parts
    one_class = checks.check_data(make(tmp_path / "one", "cat/1.txt", "cat/2.jpg"))
    assert "one class alone (cat)" in next(
        fault.detail for fault in one_class.faults if fault.kind == "cannot be split"
    )


def test_check_goes_on_past_a_missing_file(tmp_path: Path) -> None:
    """A file that cannot be read is a fault; given digests are used."""
    make_fault_folder(tmp_path)
    found = images.load(tmp_path)
    (tmp_path / "test/dog/01.png").unlink()
    kinds = {fault.path: fault.kind for fault in checks.check(found).faults}
    assert "unreadable" == kinds["test/dog/01.png"]
    assert 5 == len([kind for kind in kinds.values() if kind != "not an image extension"])
    given_ones = [f"digest {i // 2}" for i in range(len(found))]
    assert len(found) // 2 - 1 <= len(checks.check(found, given_ones).duplicates)


def test_check_of_unlabelled_images(tmp_path: Path) -> None:
    """Images without labels can be checked, too."""
    make_fault_folder(tmp_path)
    report = checks.check(images.load_unlabelled(tmp_path))
    assert {*BAD.values(), "not an image extension"} == {fault.kind for fault in report.faults}
    assert ({}, {}, 1) == (report.classes, report.parts, len(report.duplicates))


def test_check_tells_how_far_it_is(tmp_path: Path) -> None:
    """Progress counts up to the number of images."""
    seen: list[tuple[int, int]] = []
    found = images.load(make_fault_folder(tmp_path))
    checks.check(found, progress=lambda done, total: seen.append((done, total)))
    assert [(i + 1, len(found)) for i in range(len(found))] == seen


def test_check_lists_every_fault_of_a_table(tmp_path: Path) -> None:
    """Rows at fault do not stop the check: each is listed with its line, and with the options that
    leave them out."""
    names = [f"{word}/{i}.jpg" for word in ("cat", "dog") for i in range(6)]
    make(tmp_path, *names)
    rows = [f"{name},{name[:3]}" for name in names]
    rows += ["cat/0.jpg,dog", "no.jpg,cat", "cat/1.jpg", ",dog"]
    (tmp_path / "t.csv").write_text("path,label\n" + "\n".join(rows), encoding="utf-8")
    report = checks.check_data(tmp_path / "t.csv")
    found = [fault.detail for fault in report.faults if fault.kind == csv_table.ROW]
    assert ["line 2", "line 14", "line 15", "line 16", "line 17"] == [
        detail.partition(":")[0] for detail in found
    ]
    assert "--on-bad-image skip (images under two labels: --on-conflict skip, or first)" in (
        report.to_text()
    )


def test_check_says_each_thing_once(tmp_path: Path) -> None:
    """Copies under two labels are one line, not also duplicates and a reason against the split; a
    class without training images is one line; the option of each is named."""
    make(tmp_path, *(f"{p}/{c}/{i}.jpg" for p in ("train", "test") for c in "ab" for i in range(3)))
    make(tmp_path, "train/a/x.jpg=s", "train/b/y.jpg=s", *(f"test/fox/{i}.jpg" for i in range(9)))
    report = checks.check_data(tmp_path)
    text = report.to_text()
    assert 1 == text.count("x.jpg (a) = train/b/y.jpg (b)")
    assert "duplicates: none" in text
    assert 1 == text.count("empty class")
    assert "no training image of 'fox' is left for this image, nor for 8 more" in text
    assert "cannot be split" not in text
    assert "--on-empty-class skip; --on-conflict skip, or first" in text


def test_check_of_many_small_classes_is_short(tmp_path: Path) -> None:
    """Sixty classes are counted one by one, and the smallest of them named once more."""
    make(tmp_path, *(f"c{i:02d}/{n}.jpg" for i in range(60) for n in range(2)))
    lines = checks.check_data(tmp_path).to_text().splitlines()
    line = next(line for line in lines if "less than 20" in line)
    assert line.startswith("60 of 60 classes have less than 20 training images: ")
    assert line.endswith("and 52 more")
