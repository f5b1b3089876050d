"""What a gallery answers: exact cosines, the query left out by its digest, k results whatever is
left out."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import galleries
import numpy as np
import pytest
from galleries import ENCODER, Asked, features_of, vector_of, words, write

from finetune.backbones import device
from finetune.data import decode
from finetune.data.images import ImageSet, load_unlabelled
from finetune.errors import UserError
from retrieval import maintenance, search
from retrieval.encoder import check_manifest, run_digest
from retrieval.gallery import Gallery
from retrieval.hits import Answer


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return galleries.install(monkeypatch.setattr)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Forty files that all differ, one of them with near-duplicates and a copy."""
    near = {"near/1.png": "near:word 0:1", "near/2.png": "near:word 0:2", "copy.png": "word 0"}
    return write(tmp_path / "photos", words(40) | near)


@pytest.fixture
def index(photos: Path, tmp_path: Path) -> Path:
    maintenance.build([photos], tmp_path / "photos.index", ENCODER)
    return tmp_path / "photos.index"


@pytest.fixture
def opened(index: Path) -> Gallery:
    return Gallery(index)


def ask(gallery: Gallery, *files: Path, k: int = 10, **how: object) -> list[Answer]:
    return gallery.query(load_unlabelled(files), k, **how)[0]  # type: ignore[arg-type]


def paths(answer: Answer) -> list[str]:
    return [hit.path for hit in answer.hits]


def refusal(call: object, *args: object, **how: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **how)  # type: ignore[operator]
    return str(caught.value)


# ------------------------------------------------------------------------------------------ ranking


def test_answers_are_those_of_numpy(opened: Gallery, photos: Path, tmp_path: Path) -> None:
    """The ten best are those that numpy finds by comparing everything, with their cosines, best
    first."""
    query = write(tmp_path, {"query.png": "near:word 3:q"}) / "query.png"
    contents = {
        file.name if file.parent == photos else f"near/{file.name}": file.read_text()
        for file in photos.rglob("*.png")
    }
    table = np.stack([vector_of(content) for content in contents.values()]).astype(np.float64)
    scores = dict(zip(contents, table @ vector_of("near:word 3:q").astype(np.float64), strict=True))
    del scores["copy.png"]  # the same image as 0000.png
    expected = sorted(scores, key=lambda name: -scores[name])[:10]
    (answer,) = ask(opened, query)
    assert expected == paths(answer)
    np.testing.assert_allclose(
        [scores[name] for name in expected], [hit.score for hit in answer.hits], atol=1e-6
    )


def test_one_image_is_one_hit_with_its_paths(opened: Gallery, tmp_path: Path) -> None:
    """An image with two paths is one hit that names both."""
    query = write(tmp_path, {"query.png": "near:word 0:q"}) / "query.png"
    (answer,) = ask(opened, query, k=1)
    assert ("0000.png", ("copy.png",)) == (answer.hits[0].path, answer.hits[0].also)
    assert {"path", "score", "id", "also"} == set(answer.to_json()["hits"][0])


def test_scores_do_not_depend_on_company(opened: Gallery, photos: Path) -> None:
    """A query asked alone and among others has the same scores, to the bit."""
    files = sorted(photos.glob("00*.png"))
    together = ask(opened, *files, k=5)
    assert together[7].hits == ask(opened, files[7], k=5)[0].hits


def test_removed_images_are_never_shown(index: Path, photos: Path) -> None:
    """Tombstones do not come up, and do not cost places among the k."""
    maintenance.remove(index, ["near/1.png"])
    with Gallery(index) as gallery:
        assert gallery.now.dead.any()
        (answer,) = ask(gallery, photos / "0001.png", k=41)
    assert (40, False) == (len(answer.hits), "near/1.png" in paths(answer))


def test_more_than_there_are(opened: Gallery, photos: Path) -> None:
    """A k beyond the gallery gives all of it, and no empty places."""
    (answer,) = ask(opened, photos / "0001.png", k=1000)
    assert len(opened) - 1 == len(answer.hits)
    assert all(-1 <= hit.score <= 1 for hit in answer.hits)


@pytest.mark.parametrize(
    "bad", [np.zeros((1, 16)), np.full((1, 16), np.nan), np.ones((1, 15)), np.ones(16)]
)
def test_queries_without_direction_are_refused(opened: Gallery, bad: np.ndarray) -> None:
    """Zero, NaN and vectors of another width are refused, and answer nothing."""
    refusal(opened.search, bad)


def test_blocks_do_not_show(opened: Gallery, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact search in small blocks finds the same."""
    files = sorted(photos.rglob("*.png"))
    expected = ask(opened, *files, k=7)
    monkeypatch.setattr(search, "BLOCK", 1)
    monkeypatch.setattr(search, "LEAST_ROWS", 3)
    assert expected == ask(opened, *files, k=7)


# ---------------------------------------------------------------------------------------- the query


def test_a_copy_of_the_query_comes_first_and_is_marked(
    asked: Asked, opened: Gallery, photos: Path, tmp_path: Path
) -> None:
    """The same bytes under another name are the first hit, with all paths, also above a threshold;
    no network is asked."""
    query = write(tmp_path, {"renamed.png": "word 0"}) / "renamed.png"
    asked.contents.clear()
    for how in ({"k": 1}, {"k": 3, "threshold": 1.0}, {"k": 3, "keep_self": True}):
        (answer,) = ask(opened, query, **how)
        best = answer.hits[0]
        assert ("0000.png", ("copy.png",), True, 1.0) == (
            best.path,
            best.also,
            best.same,
            best.score,
        )
        assert {"same": True}.items() <= best.to_json().items()
        assert not any(hit.same for hit in answer.hits[1:])
    assert "0000.png  (the same file)\n          = copy.png  (the same file)" in answer.to_text()
    assert [] == asked.contents


def test_only_the_very_path_is_left_out(opened: Gallery, photos: Path, tmp_path: Path) -> None:
    """A query that is in the gallery leaves out its own path alone, on whatever way it is reached;
    its copy comes first."""
    (tmp_path / "linked").symlink_to(photos)
    for query in (
        photos / "0000.png",
        tmp_path / "linked" / "0000.png",
        photos / "near" / ".." / "0000.png",
    ):
        (answer,) = ask(opened, query, k=3)
        assert ["copy.png", "near/1.png", "near/2.png"] == [
            answer.hits[0].path,
            *sorted(paths(answer)[1:]),
        ]
        assert ((), True, "0000.png" in answer.to_text().partition("\n")[2]) == (
            answer.hits[0].also,
            answer.hits[0].same,
            False,
        )
    (own,) = ask(opened, photos / "0000.png", k=1, keep_self=True)
    assert ("0000.png", ("copy.png",), True) == (
        own.hits[0].path,
        own.hits[0].also,
        own.hits[0].same,
    )
    (alone,) = ask(opened, photos / "0001.png", k=50)
    assert (41, False) == (len(alone.hits), any(hit.same for hit in alone.hits))


def test_a_copy_comes_first_whatever_the_search_proposes(
    opened: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An approximate search that misses the copy, a tie with it and an expansion do not keep it
    from the first place."""
    query = write(tmp_path, {"renamed.png": "word 0"}) / "renamed.png"
    assert opened.query(load_unlabelled(query), 2, expand=2)[0][0].hits[0].same
    nearest = search.nearest
    monkeypatch.setattr(
        search, "nearest", lambda *asked: [row[row != 0] for row in nearest(*asked)]
    )
    (answer,) = ask(opened, query, k=2, collapse=0.9)
    assert ("0000.png", {"near/1.png", "near/2.png"}) == (
        answer.hits[0].path,
        set(answer.hits[0].similar),
    )


def test_a_tie_with_the_query_is_not_the_query(index: Path, photos: Path) -> None:
    """Another file with the same vector is a result, also when it stands before the query
    itself."""
    features_of.cache_clear()
    write(photos, {"tie.png": "near:word 0:1 "})
    maintenance.sync(index)
    with Gallery(index) as gallery:
        (answer,) = ask(gallery, photos / "near" / "1.png", k=3)
    assert {"tie.png"} == {"near/1.png", "tie.png"} & set(paths(answer))


def test_several_images_are_one_query(opened: Gallery, photos: Path) -> None:
    """With `together` the vectors are averaged, and all the query's own images are left out."""
    (answer,) = ask(
        opened, photos / "0001.png", photos / "0002.png", k=3, together=True, names=["x", "y"]
    )
    mean = (vector_of("word 1") + vector_of("word 2")) / 2
    (expected,) = opened.search(mean[None], 5)
    assert [hit.path for hit in expected if hit.path not in ("0001.png", "0002.png")] == paths(
        answer
    )
    assert ("x + y", ("x", "y")) == (answer.query, answer.parts)


def test_copies_of_several_images(opened: Gallery, photos: Path, tmp_path: Path) -> None:
    """With `together`, a path of any of the query's files is left out, and copies of them come
    first."""
    copy = write(tmp_path, {"renamed.png": "word 1"}) / "renamed.png"
    (answer,) = ask(opened, photos / "0000.png", copy, k=3, together=True)
    assert [{"copy.png", "0001.png"}, True, False] == [
        set(paths(answer)[:2]),
        answer.hits[1].same,
        answer.hits[2].same,
    ]
    assert answer.hits[0].score < 1
    (both,) = ask(opened, photos / "0000.png", photos / "copy.png", k=3, together=True)
    assert not {"0000.png", "copy.png"} & set(paths(both))
    (one,) = ask(opened, photos / "0001.png", copy, k=3, together=True)
    assert not any(hit.same for hit in one.hits)


def test_unreadable_queries(opened: Gallery, tmp_path: Path) -> None:
    """An unreadable query stops, or is left out and named."""
    write(tmp_path, {"q/bad.png": "broken", "q/good.png": "good"})
    source = load_unlabelled(tmp_path / "q")
    assert "bad.png" in refusal(opened.query, source)
    answers, faults = opened.query(source, on_bad="skip")
    assert (["good.png"], ["bad.png"]) == (
        [answer.query for answer in answers],
        [fault.path for fault in faults],
    )


def test_bytes_in_memory(opened: Gallery) -> None:
    """An image need not be a file: a page's upload is a query like any other."""
    upload = ImageSet(
        "upload", Path(), ("upload",), np.array([-1]), (), source=lambda _: b"near:word 9:upload"
    )
    assert "0009.png" == opened.query(upload, 1)[0][0].hits[0].path


# ----------------------------------------------------------------------------------- better matches


def test_threshold(opened: Gallery, photos: Path) -> None:
    """Only scores of at least the threshold are shown, and all of them up to k."""
    (answer,) = ask(opened, photos / "0000.png", threshold=0.9)
    assert ["copy.png", "near/1.png", "near/2.png"] == sorted(paths(answer))
    assert () == ask(opened, photos / "0005.png", threshold=0.99)[0].hits


def test_collapse(opened: Gallery, tmp_path: Path) -> None:
    """Near-duplicates are put under the best of them, and k others come back."""
    query = write(tmp_path, {"query.png": "near:word 0:q"}) / "query.png"
    (plain,) = ask(opened, query, k=6)
    (answer,) = ask(opened, query, k=4, collapse=0.9)
    assert 3 == sum(path.startswith(("near", "0000")) for path in paths(plain))
    assert (4, 2) == (len(answer.hits), len(answer.hits[0].similar))
    assert paths(plain)[3:] == paths(answer)[1:]


def test_everything_collapses(tmp_path: Path) -> None:
    """When all candidates of the first round collapse into one, more are asked for until k are
    left."""
    near = {f"near/{i:03d}.png": f"near:word 0:{i}" for i in range(100)}
    photos = write(tmp_path / "p", near | words(3))
    maintenance.build([photos], tmp_path / "p.index", ENCODER)
    with Gallery(tmp_path / "p.index") as gallery:
        (answer,) = ask(gallery, photos / "0000.png", k=3, collapse=0.9)
    assert (3, 99) == (len(answer.hits), len(answer.hits[0].similar))


def test_query_expansion(opened: Gallery, photos: Path) -> None:
    """Average query expansion searches with the mean of the query and its first hits, the query's
    own image left out."""
    near = [vector_of("near:word 0:1"), vector_of("near:word 0:2")]
    mean = vector_of("word 0") + near[0] + near[1]
    (expected,) = opened.search(mean[None], 6)
    (answer,) = ask(opened, photos / "0000.png", k=6, expand=2)
    others = [hit for hit in expected if hit.path != "0000.png"]
    assert ["copy.png", *(hit.path for hit in others)] == paths(answer)
    np.testing.assert_allclose(
        [hit.score for hit in others], [hit.score for hit in answer.hits[1:]], atol=1e-6
    )
    assert ask(opened, photos / "0000.png", k=6)[0].hits[1].score < answer.hits[1].score


# --------------------------------------------------------------------------- the truth of the match


def test_other_vectors_are_refused_by_field(opened: Gallery) -> None:
    """Vectors that were made otherwise are refused, and the message names the field and both
    values."""
    about = opened.manifest["vector"]
    check_manifest(about, opened.manifest["vector"])
    for field, value in {
        "weights": "1" * 64,
        "taps": ["stage1"],
        "precision": "bf16",
        "normalisation": "none",
    }.items():
        message = refusal(check_manifest, about, about | {field: value})
        assert f"{field} differs" in message
        assert str(about[field])[:20].strip("[]'") in message


def test_a_newer_decoder_is_refused(
    opened: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version of this program that decodes otherwise refuses to mix its vectors with the old
    ones."""
    query = write(tmp_path, {"query.png": "new"}) / "query.png"
    monkeypatch.setattr(decode, "FORMAT", 99)
    assert "decoder differs" in refusal(ask, opened, query)


def test_a_missing_engine_is_refused(
    index: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index made with OpenVINO says how to get it where it is not installed; stored vectors are
    still searched."""
    maintenance.build(
        [photos], tmp_path / "v.index", dataclasses.replace(ENCODER, engine="openvino")
    )
    monkeypatch.setattr(device, "has_openvino", lambda: False)
    query = write(tmp_path, {"query.png": "new"}) / "query.png"
    with Gallery(tmp_path / "v.index") as gallery:
        message = refusal(ask, gallery, query)
        assert "engine differs" in message
        assert "pip install openvino" in message
        assert 1 == len(ask(gallery, photos / "0000.png", k=1)[0].hits)


def test_a_retrained_run_makes_the_index_stale(photos: Path, tmp_path: Path) -> None:
    """When the run at its path was trained again, the gallery says so; a run that is gone is no
    fault."""
    run = tmp_path / "run"
    write(run, {"run.json": "{}"})
    encoder = dataclasses.replace(ENCODER, run=(str(run), run_digest(run)))
    maintenance.build([photos], tmp_path / "r.index", encoder)
    with Gallery(tmp_path / "r.index") as gallery:
        assert () == gallery.warnings()
        write(run, {"run.json": '{"again": 1}'})
        assert "trained again" in gallery.warnings()[0]
        assert "trained again" in gallery.info()["warnings"][0]
        (run / "run.json").unlink()
        assert () == gallery.warnings()


# --------------------------------------------------------------------------------- a long-lived one


def test_refresh(index: Path, photos: Path) -> None:
    """An open gallery shows its moment until it is refreshed; then the present."""
    with Gallery(index) as gallery:
        assert not gallery.refresh()
        write(photos, {"new.png": "near:word 7:x"})
        maintenance.sync(index)
        assert "new.png" not in paths(ask(gallery, photos / "0007.png")[0])
        assert gallery.refresh()
        assert "new.png" == paths(ask(gallery, photos / "0007.png")[0])[0]
        assert not gallery.refresh()


def test_only_files_of_the_registry(opened: Gallery, photos: Path) -> None:
    """A file is found by the id of its image alone; a file that is gone, and an unknown id, give
    nothing."""
    number = ask(opened, photos / "0000.png", k=1, keep_self=True)[0].hits[0].id
    assert (photos / "0000.png", None) == (opened.file(number), opened.file(10**6))
    (photos / "0000.png").unlink()
    assert photos / "copy.png" == opened.file(number)
    (photos / "copy.png").unlink()
    assert opened.file(number) is None


def test_position_of_an_id(index: Path, opened: Gallery) -> None:
    """The vector of an image can be asked for by id; a removed one has none."""
    _, ids = opened.now.everything()
    for number in ids.tolist()[:5]:
        position = opened.position(number)
        assert [number] == opened.now.ids(np.array([position]))
    maintenance.remove(index, ["0001.png"])
    removed = next(number for number in ids.tolist() if opened.paths(number) == ("0001.png",))
    opened.refresh()
    assert opened.position(removed) is None


def test_threads_share_a_gallery(opened: Gallery, photos: Path) -> None:
    """Queries from several threads get their own answers."""
    files = sorted(photos.glob("00*.png"))
    expected = {file: ask(opened, file, k=5) for file in files}
    wrong: list[Path] = []

    def work(mine: list[Path]) -> None:
        wrong.extend(file for file in mine if ask(opened, file, k=5) != expected[file])

    threads = [threading.Thread(target=work, args=(files[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [] == wrong


def test_info(opened: Gallery, photos: Path) -> None:
    """`info` counts images, paths and bytes, and says where they come from and how they are
    searched."""
    about = opened.info()
    assert (42, 43, "exact", str(photos), ["."]) == tuple(
        about[key] for key in ("images", "paths", "search", "root", "folders")
    )
    assert 42 * 16 * 4 == about["bytes"]
