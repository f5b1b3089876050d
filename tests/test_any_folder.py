"""Random folders, tables and rules: no traceback, no refusal without a way on, and every file used
or named as left out.

The suite tries some; `make bench` tries 2,000 through scan and check, and 100 through a whole
`fit`.
"""

from __future__ import annotations

import csv
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import faults
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune import analysis, job, options, recipe
from finetune.data import checks, images, omissions
from finetune.data.faults import Rules
from finetune.errors import UserError
from finetune.features.store import Store
from finetune.names import meant

CONTENTS: dict[str, bytes] = {
    **{f"cat {i}": faults.encode(faults.draw("cat", seed=i), "PNG") for i in range(6)},
    **{f"dog {i}": faults.encode(faults.draw("dog", seed=i), "JPEG") for i in range(6)},
    "one pixel": faults.encode(faults.draw("cat", seed=9).resize((1, 1)), "PNG"),
    "wide": faults.encode(faults.draw("dog", seed=9).resize((300, 2)), "PNG"),
    "empty": b"",
    "text": b"no image",
    "cut": faults.encode(faults.draw("cat", seed=7), "JPEG")[:300],
    "another cut": faults.encode(faults.draw("dog", seed=7), "PNG")[:200],
}
FOLDERS = (
    "",
    "a",
    "b",
    "a/deep",
    "c c",
    os.fsdecode(b"caf\xe9"),
    "line\nfeed",
    "train/a",
    "train/b",
    "test/a",
    "test/z",
    "val/b",
)
FILES = (
    "1.png",
    "2.jpg",
    "3.JPEG",
    "two.webp",
    os.fsdecode(b"\xff.png"),
    "-o.png",
    "tab\t.gif",
    "x.txt",
    "none",
    ".hidden.png",
    "y.ico",
)
RESULTS = {
    "run": ("runs/r/run.json", "runs/r/recipe.yaml"),
    "gallery": ("a/g/gallery.sqlite",),
    "note": ("runs/note.txt",),
}

a_file = st.tuples(
    st.sampled_from(FOLDERS), st.sampled_from(FILES), st.sampled_from(list(CONTENTS))
)
a_folder = st.lists(a_file, min_size=1, max_size=40, unique_by=lambda entry: entry[:2])


def a_set_of(
    places: tuple[str, ...], base: tuple[str, ...]
) -> st.SearchStrategy[list[tuple[str, str, str]]]:
    """A folder that can be fitted: twelve good images in two classes, and anything else in folders
    of the same layout."""
    good = [
        (base[i % len(base)], f"{i}.png", f"{kind} {i}")
        for i in range(6)
        for kind in ("cat", "dog")
    ]
    good = [
        (place if kind[:3] == "cat" else place[:-1] + "b", f"{kind[:3]}{name}", kind)
        for place, name, kind in good
    ]
    more = st.lists(
        st.tuples(st.sampled_from(places), st.sampled_from(FILES), st.sampled_from(list(CONTENTS))),
        max_size=12,
        unique_by=lambda e: e[:2],
    )
    return more.map(lambda entries: good + entries)


a_set = st.one_of(
    a_set_of(FOLDERS[1:7], ("a",)), a_set_of(FOLDERS[7:], ("train/a", "train/a", "test/a"))
)
some_results = st.sets(st.sampled_from(sorted(RESULTS)), max_size=2)
rules = st.fixed_dictionaries(
    {},
    optional={
        "on_bad_image": st.sampled_from(["stop", "skip"]),
        "on_conflict": st.sampled_from(["stop", "skip", "first"]),
        "on_leak": st.sampled_from(["tell", "stop", "skip"]),
        "on_empty_class": st.sampled_from(["stop", "skip"]),
        "on_stray": st.sampled_from(["stop", "skip"]),
        "test": st.just("none"),
        "seed": st.integers(0, 3),
    },
)
LENIENT = {
    "on_bad_image": "skip",
    "on_conflict": "first",
    "on_leak": "skip",
    "on_empty_class": "skip",
    "on_stray": "skip",
    "test": "none",
}


def make(root: Path, files: list[tuple[str, str, str]], results: set[str]) -> set[str]:
    """Write the folder; returns every file in it, as the folder sees it."""
    for place, name, kind in files:
        path = root / place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENTS[kind])
    for name in (name for kind in results for name in RESULTS[kind]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}", encoding="utf-8")
    return {
        os.path.relpath(Path(here) / name, root)
        for here, _, inside in os.walk(root)
        for name in inside
    }


def assert_way_on(error: UserError) -> None:
    """Where, what, and what to do, in text that any terminal takes."""
    assert error.what
    assert error.fix, str(error)
    str(error).encode()


def assert_account(there: set[str], used: set[str], named: list[str]) -> None:
    """The files on the disk are the used ones and the named ones, and none is both."""
    below = {
        path for path in there for name in named if name.endswith("/") and path.startswith(name)
    }
    left = (set(named) & there) | below
    assert there == used | left, f"dropped in silence: {sorted(there - used - left)}"
    assert not used & left


def scan_and_check(
    files: list[tuple[str, str, str]], results: set[str], rule: dict[str, Any]
) -> None:
    """One folder through the scan of a job and through the check."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        root.mkdir()
        there = make(root, files, results)
        opened = Store(Path(folder) / "store")
        told: list[str] = []
        try:
            settings_, _ = options.build(root, None, (), rule)
            found, ids = analysis.scan(settings_, opened, told.append)
            assert_account(
                there, set(found.paths), [fault.path for fault in omissions.account(found)]
            )
            assert len(ids) == len(found)
        except UserError as error:
            assert_way_on(error)
        finally:
            opened.close()
        try:
            report = checks.check_data(root)
        except UserError as error:
            assert_way_on(error)
            return
        broken = {
            f"{place}/{name}".lstrip("/")
            for place, name, kind in files
            if kind in ("empty", "text", "cut", "another cut")
        }
        lenient = Rules(on_empty_class="skip", on_stray="skip")
        seen = set(images.load(root, rules=lenient).paths)
        assert broken & seen <= {fault.path for fault in report.faults}
        report.to_text().encode()


def fit(files: list[tuple[str, str, str]], results: set[str], rule: dict[str, Any]) -> bool:
    """One folder through a whole job; whether a run came of it."""
    quick = ("backbone.frame=whole", "svm.kernels=[linear]", "svm.C=[1]", "svm.folds=2")
    tiny: dict[str, Any] = {
        "backbone": ["test_resnet"],
        "weights": "random",
        "engine": "torch",
        "precision": "float32",
    }
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "data", Path(folder) / "run"
        root.mkdir()
        there = make(root, files, results)
        try:
            job.fit(
                root,
                out=out,
                strategy="svm",
                taps=["pooled"],
                assignments=quick,
                **{**LENIENT, **rule},
                **tiny,
            )
        except UserError as error:
            assert_way_on(error)
            return False
        named: list[str] = []
        if (out / "left_out.csv").exists():
            with (out / "left_out.csv").open(encoding="utf-8", newline="") as file:
                named = [meant(row["path"]) for row in csv.DictReader(file)]
        below = {
            path for path in there for name in named if name.endswith("/") and path.startswith(name)
        }
        used = there - set(named) - below
        trained = job.load(out).predict([root / path for path in sorted(used)])
        # all that was not named can be read, and is predicted
        assert len(used) == len(trained.images)
        return True


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(a_folder, some_results, rules)
def test_any_folder_is_read_or_refused_with_a_way_on(files: Any, results: Any, rule: Any) -> None:
    """Whatever lies in a folder, scan and check end in an account of every file, or in a sentence
    that says what to do."""
    scan_and_check(files, results, rule)


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(a_set, some_results, rules)
def test_any_folder_is_fitted_or_refused_with_a_way_on(files: Any, results: Any, rule: Any) -> None:
    """A whole job makes a run and a list of what it left out, or says what to do."""
    fit(files, results, rule)


HEADERS = (
    "path",
    "filename",
    "image",
    "img_path",
    "label",
    "class",
    "target",
    "split",
    "is_valid",
    "group",
    "",
    "weight",
    "fold",
)
CELLS = (
    "1.png",
    "a/2.jpg",
    "no.png",
    "",
    "cat",
    "dog ",
    "Cat",
    "train",
    "test",
    "True",
    "0",
    "1",
    "a,b",
    'q"q',
    "x|y",
    "caf\\xe9.png",
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from(HEADERS), min_size=1, max_size=5),
    st.lists(st.lists(st.sampled_from(CELLS), min_size=0, max_size=6), max_size=8),
    st.sampled_from([",", ";", "\t"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]),
    st.sampled_from(["stop", "skip"]),
    st.sampled_from(["stop", "skip", "first"]),
    st.sampled_from([None, True]),
)
def test_any_table_is_read_or_refused_with_a_way_on(
    header: Any,
    rows: Any,
    mark: str,
    encoding: str,
    on_bad: str,
    on_conflict: str,
    no_header: bool | None,
) -> None:
    """Columns of any names, ragged rows, missing files, other encodings: images with labels, or
    what to do."""
    text = io.StringIO()
    csv.writer(text, delimiter=mark).writerows([header, *rows])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, kind in (
            ("1.png", "cat 1"),
            ("a/2.jpg", "dog 2"),
            (os.fsdecode(b"caf\xe9.png"), "cat 3"),
        ):
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(CONTENTS[kind])
        (root / "table.csv").write_bytes(text.getvalue().encode(encoding))
        try:
            said = {"on_bad_image": on_bad, "on_conflict": on_conflict, "no_header": no_header}
            about = options.build(root / "table.csv", None, (), said)[0].data
            layout, rule = recipe.layout(about), recipe.rules(about)
            found = images.load(root / "table.csv", layout=layout, rules=rule)
            assert len(found) == len(set(found.paths))
            written = [header, *rows] if no_header else rows
            filled = sum(any(cell.strip() for cell in row) for row in written)
            assert filled == len(found) + len(found.left_out)
            checks.check_data(root / "table.csv", layout=layout).to_text().encode()
        except UserError as error:
            assert_way_on(error)


@pytest.mark.slow
def test_two_thousand_folders() -> None:
    """The same for 2,000 random folders in one process."""
    many = settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
    many(given(a_folder, some_results, rules)(scan_and_check))()


@pytest.mark.slow
def test_a_hundred_whole_jobs() -> None:
    """The same for 100 whole jobs; most of them make a run, or the test would say little."""
    made: list[bool] = []

    def one(files: Any, results: Any, rule: Any) -> None:
        made.append(fit(files, results, rule))

    settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))(
        given(a_folder, some_results, rules)(one)
    )()
    assert sum(made) >= 25
