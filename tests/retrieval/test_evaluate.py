"""Judging a gallery: folder names or pairs as truth, the query left out, intervals; and groups of
near-duplicates."""

from __future__ import annotations

from pathlib import Path

import galleries
import numpy as np
import odd
import pytest
from galleries import ENCODER, Asked, vector_of, words, write

from finetune.errors import UserError
from finetune.names import shown
from retrieval import evaluate, frame, maintenance
from retrieval.gallery import Gallery


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return galleries.install(monkeypatch.setattr)


def opened(photos: Path) -> Gallery:
    index = photos.with_name("photos.index")
    maintenance.build([photos], index, ENCODER, force=True)
    return Gallery(index)


def two_classes(root: Path) -> Path:
    """Six cats that are alike, six dogs that are alike, and one dog that looks like a cat."""
    files = {f"cat/{i}.png": f"near:cat:{i}" for i in range(6)} | {
        f"dog/{i}.png": f"near:dog:{i}" for i in range(6)
    }
    return write(root / "photos", files | {"dog/odd.png": "near:cat:odd"})


def refusal(call: object, *args: object, **how: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **how)  # type: ignore[operator]
    return str(caught.value)


def test_folders_as_classes(tmp_path: Path) -> None:
    """Recall, precision, AP and reciprocal rank are those counted one by one, with the query left
    out."""
    judged = evaluate.by_folder(opened(two_classes(tmp_path)), ks=(1, 5))
    assert (13, 13, 0, 13) == (judged.queries, judged.images, judged.left_out, judged.depth)
    expected = counted(tmp_path / "photos", k=5)
    assert expected == {name: pytest.approx(judged.metrics[name].value) for name in expected}
    one = judged.metrics["recall@5"]
    assert 0 <= one.low <= one.value <= one.high <= 1
    assert f"({one.low:.3f}–{one.high:.3f}, {one.method}, n = 13)" in judged.to_text()
    assert "wilson" == judged.metrics["success@1"].method
    names = {f"{name}@{k}" for name in ("recall", "precision", "success") for k in (1, 5)}
    assert names | {"mAP", "MRR"} == set(judged.metrics)


def counted(photos: Path, k: int) -> dict[str, float]:
    """The definitions in plain loops."""
    files = sorted(photos.rglob("*.png"))
    vectors = {file: vector_of(file.read_text()) for file in files}
    sums = {f"recall@{k}": 0.0, f"precision@{k}": 0.0, "mAP": 0.0, "MRR": 0.0}
    for query in files:
        others = sorted(
            (file for file in files if file != query),
            key=lambda file: -float(vectors[query] @ vectors[file]),
        )
        hits = [file.parent == query.parent for file in others]
        sums[f"recall@{k}"] += sum(hits[:k]) / sum(hits)
        sums[f"precision@{k}"] += sum(hits[:k]) / k
        sums["mAP"] += sum(sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits) if hit) / sum(
            hits
        )
        sums["MRR"] += 1 / (hits.index(True) + 1)
    return {name: value / len(files) for name, value in sums.items()}


def test_images_without_a_class(tmp_path: Path) -> None:
    """Images outside of folders, and contents in two, are no queries and no positives; they are
    counted."""
    photos = two_classes(tmp_path)
    write(
        photos,
        {
            "loose.png": "near:cat:loose",
            "cat/both.png": "near:cat:both",
            "dog/both.png": "near:cat:both",
        },
    )
    judged = evaluate.by_folder(opened(photos))
    assert (13, 15, 2) == (judged.queries, judged.images, judged.left_out)


def test_added_folders_have_their_own_classes(tmp_path: Path) -> None:
    """In a folder that was added from elsewhere, the class is the first folder below it."""
    gallery = opened(two_classes(tmp_path))
    write(tmp_path, {"more/cat/7.png": "near:cat:7"})
    maintenance.add(gallery.folder, [tmp_path / "more"])
    gallery.refresh()
    assert ("cat", "more") == (
        frame.first_folder("../more/cat/7.png", ["../more", "."]),
        frame.first_folder("more/cat/7.png", ["."]),
    )
    assert 14 == evaluate.by_folder(gallery).queries


def test_other_images_as_queries(tmp_path: Path) -> None:
    """A folder of queries is judged by its own folder names; a class that the gallery lacks has
    nothing to find."""
    gallery = opened(two_classes(tmp_path))
    write(
        tmp_path / "q",
        {"dog/a.png": "near:dog:a", "fox/b.png": "near:fox:b", "cat/copy.png": "near:cat:0"},
    )
    judged = evaluate.by_folder(gallery, tmp_path / "q", ks=(5,))
    assert (3, 2, 1) == (judged.queries, judged.metrics["mAP"].n, judged.metrics["mAP"].left_out)
    assert 1.0 == judged.metrics["success@5"].value


def test_a_limit_draws_by_the_seed(tmp_path: Path) -> None:
    """At most `limit` queries are drawn, the same ones for a seed."""
    gallery = opened(two_classes(tmp_path))
    first, second = (evaluate.by_folder(gallery, limit=5, seed=1) for _ in range(2))
    assert (5, first) == (first.queries, second)


def test_pairs(tmp_path: Path) -> None:
    """Pairs of paths are the truth: of the gallery, or relative to the table; a query need not be
    in the gallery."""
    gallery = opened(two_classes(tmp_path))
    write(tmp_path, {"new.png": "near:dog:new"})
    table = tmp_path / "pairs.csv"
    table.write_text(
        "query,match\ncat/0.png,cat/1.png\ncat/0.png,photos/cat/2.png\nnew.png,dog/3.png\n"
    )
    judged = evaluate.by_pairs(gallery, table, ks=(6,))
    assert (2, 1.0) == (judged.queries, judged.metrics["success@6"].value)


def test_pairs_as_they_are_shown(tmp_path: Path) -> None:
    """Pairs may be written as answers show paths, for images of the gallery and for others."""
    odd.need(tmp_path / "try")
    photos = write(
        tmp_path / "photos", {f"cat/{name}": f"near:cat:{i}" for i, name in enumerate(odd.NAMES)}
    )
    write(tmp_path, {"new\n.png": "near:cat:new"})
    rows = [f'"cat/{shown(name)}","cat/a.png"\n'.replace('quo"', 'quo""') for name in odd.NAMES]
    table = tmp_path / "pairs.csv"
    table.write_text("query,match\n" + "".join(rows) + r"new\x0a.png,cat/caf\xe9.png" + "\n")
    assert len(odd.NAMES) + 1 == evaluate.by_pairs(opened(photos), table).queries


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\nx,y\n", "query,match"),
        ("query,match\n", "no pairs"),
        ("query,match\ncat/0.png\n", "line 2"),
        ("query,match\ncat/0.png,nothing.png\n", "'nothing.png' is not in the gallery"),
        ("query,match\nnothing.png,cat/0.png\n", "nothing.png"),
        ("query,match\n\xff", "UTF-8"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    """A table that cannot be used says what is wrong, and in which line."""
    gallery = opened(two_classes(tmp_path))
    table = tmp_path / "pairs.csv"
    table.write_bytes(text.encode("latin-1"))
    assert message in refusal(evaluate.by_pairs, gallery, table)


def test_no_classes_at_all(tmp_path: Path) -> None:
    """A gallery without folders cannot be judged by folders, and says so."""
    assert "no image lies in a folder" in refusal(
        evaluate.by_folder, opened(write(tmp_path / "p", words(3)))
    )


def test_the_search_is_judged_beside_exact_search(tmp_path: Path) -> None:
    """The recall of an approximate search against exact search is measured on the same queries;
    exact search has 1."""
    photos = write(
        tmp_path / "photos",
        {f"{i % 3}/{name}": word for i, (name, word) in enumerate(words(200).items())},
    )
    exact = evaluate.by_folder(opened(photos))
    assert ("exact", 1.0) == (exact.search, exact.search_recall)
    maintenance.build(
        [photos], tmp_path / "photos.index", ENCODER, factory="PQ2x4", recall=0.1, force=True
    )
    with Gallery(tmp_path / "photos.index") as gallery:
        judged = evaluate.by_folder(gallery)
    assert ("PQ2x4", exact.metrics) == (judged.search, judged.metrics)
    assert 0.1 < judged.search_recall < 1


def test_large_galleries_are_judged_to_a_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond `FULL` images the ranking is cut, and the names of mAP and MRR say where; the first
    results are the same."""
    gallery = opened(two_classes(tmp_path))
    whole = evaluate.by_folder(gallery, ks=(5,))
    monkeypatch.setattr(evaluate, "FULL", 10)
    monkeypatch.setattr(evaluate, "DEPTH", 7)
    monkeypatch.setattr(evaluate, "SCORES", 1)
    cut = evaluate.by_folder(gallery, ks=(5,))
    assert (7, whole.metrics["recall@5"]) == (cut.depth, cut.metrics["recall@5"])
    assert {"mAP@7", "MRR@7"} <= set(cut.metrics)


# --------------------------------------------------------------------------------------- duplicates


def test_groups_of_near_duplicates(tmp_path: Path) -> None:
    """Near-duplicates and files of the same bytes are groups, each with its weakest link; others
    are left out."""
    files = {
        "a/1.png": "near:x:1",
        "a/2.png": "near:x:2",
        "b/3.png": "near:x:3",
        "c/1.png": "y",
        "c/2.png": "y",
    }
    groups = evaluate.duplicates(opened(write(tmp_path / "photos", files | words(20))), 0.95)
    assert [["c/1.png", "c/2.png"], ["a/1.png", "a/2.png", "b/3.png"]] == [
        group["paths"] for group in groups
    ]
    table = np.stack([vector_of(f"near:x:{i}") for i in (1, 2, 3)])
    links = sorted((table @ table.T)[np.triu_indices(3, 1)])
    assert [1.0, pytest.approx(links[1], abs=1e-5)] == [group["score"] for group in groups]


def test_removed_images_are_no_duplicates(tmp_path: Path) -> None:
    """What was removed is in no group."""
    photos = write(tmp_path / "photos", {"1.png": "near:x:1", "2.png": "near:x:2"} | words(20))
    gallery = opened(photos)
    maintenance.remove(gallery.folder, ["1.png"])
    gallery.refresh()
    assert gallery.now.dead.any()
    assert [] == evaluate.duplicates(gallery, 0.9)
