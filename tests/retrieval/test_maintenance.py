"""Making and changing galleries: identity by content, work for what is new alone, one commit,
merging."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import galleries
import numpy as np
import odd
import pytest
from galleries import ENCODER, Asked, vector_of, words, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune import names
from finetune.errors import UserError
from retrieval import maintenance
from retrieval.gallery import Gallery
from retrieval.index import spec
from retrieval.search import Corpus
from retrieval.storage import compaction, diff, segments, writer
from retrieval.storage.commit import ChangeSummary


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return galleries.install(monkeypatch.setattr)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four files of three contents, two of them of one base name."""
    return write(
        tmp_path / "photos",
        {"a/1.png": "one", "b/1.png": "two", "c.png": "three", "copy.png": "one"},
    )


@pytest.fixture
def index(photos: Path, tmp_path: Path) -> Path:
    maintenance.build([photos], tmp_path / "photos.index", ENCODER)
    return tmp_path / "photos.index"


def counts(change: ChangeSummary) -> dict[str, int]:
    """The counts that are not zero, `images` aside."""
    names = ("added", "changed", "moved", "removed", "unchanged", "encoded")
    return {name: getattr(change, name) for name in names if getattr(change, name)}


def held(index: Path) -> dict[str, int]:
    """Path → id."""
    with Gallery(index) as gallery:
        return {path: number for number in gallery.ids() for path in gallery.paths(number)}


def contents(index: Path) -> list[tuple[tuple[str, ...], list[float]]]:
    """What a gallery holds, ids aside: the paths of every image and its vector."""
    with Gallery(index) as gallery:
        gallery.now.verify()
        positions, ids = gallery.now.everything()
        paths = gallery.now.paths(ids.tolist())
        assert sum(map(len, paths.values())) == gallery.info()["paths"]
        vectors = gallery.now.vectors(positions).round(5).tolist()
        return sorted(
            (paths[number], vector) for number, vector in zip(ids.tolist(), vectors, strict=True)
        )


def refusal(call: object, *args: object, **how: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **how)  # type: ignore[operator]
    return str(caught.value)


# -------------------------------------------------------------------------------------------- build


def test_one_content_is_one_image_with_its_paths(index: Path) -> None:
    """The same bytes twice are one vector with two paths; equal base names in two folders are two
    images."""
    expected = [(("a/1.png", "copy.png"), "one"), (("b/1.png",), "two"), (("c.png",), "three")]
    assert [paths for paths, _ in expected] == [paths for paths, _ in contents(index)]
    for (_, word), (_, vector) in zip(expected, contents(index), strict=True):
        np.testing.assert_allclose(vector_of(word), vector, atol=1e-5)


def test_each_content_is_looked_at_once(asked: Asked, index: Path) -> None:
    """The network sees a content once, however many files hold it."""
    assert ["one", "three", "two"] == sorted(asked.contents)
    assert index.exists()


def test_the_manifest_says_what_made_it(index: Path) -> None:
    """The manifest, and its copy as a file, name network, weights, preprocessing, tap, pooling,
    normalisation, versions."""
    with Gallery(index) as gallery:
        manifest = gallery.manifest
    vector = {
        "backbone",
        "weights",
        "preprocess",
        "taps",
        "pooling",
        "normalisation",
        "engine",
        "precision",
        "whitening",
    }
    assert vector <= set(manifest["vector"])
    assert ("tiny", ["pooled"], "l2") == tuple(
        manifest["vector"][key] for key in ("backbone", "taps", "normalisation")
    )
    assert "numpy" in manifest["versions"]
    assert (index / "manifest.json").exists()


def test_an_index_is_not_overwritten_unasked(index: Path, photos: Path) -> None:
    """A second build at the same place needs `force`; then it replaces the first, and contents keep
    their ids."""
    assert "--force" in refusal(maintenance.build, [photos], index, ENCODER)
    before = held(index)
    (photos / "c.png").unlink()
    maintenance.build([photos], index, ENCODER, force=True)
    assert {path: number for path, number in before.items() if path != "c.png"} == held(index)
    assert ["2.f32"] == [path.name for path in (index / "segments").iterdir()]


def test_a_failed_rebuild_leaves_the_index(index: Path, photos: Path) -> None:
    """`force` replaces in one moment: when the new build fails, the old index still answers."""
    write(photos, {"new.png": "broken"})
    assert "new.png" in refusal(maintenance.build, [photos], index, ENCODER, force=True)
    assert 3 == len(contents(index))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    """A build of nothing says so and leaves nothing behind."""
    (tmp_path / "nothing").mkdir()
    assert "no images" in refusal(
        maintenance.build, [tmp_path / "nothing"], tmp_path / "x.index", ENCODER
    )
    assert not (tmp_path / "x.index").exists()


def test_an_index_inside_its_folder_is_not_scanned(photos: Path) -> None:
    """Pictures inside the index, such as thumbnails, are no part of it."""
    index = photos / "photos.index"
    maintenance.build([photos], index, ENCODER)
    write(index, {"thumbnails/1.png": "thumb"})
    assert {"unchanged": 4} == counts(maintenance.sync(index))


def test_several_folders_and_files(tmp_path: Path) -> None:
    """Folders and files given together have their common folder as root, and only the given folders
    are scanned later."""
    write(tmp_path, {"x/1.png": "one", "y/2.png": "two", "z/3.png": "three", "z/4.png": "four"})
    index = tmp_path / "all.index"
    maintenance.build([tmp_path / "x", tmp_path / "y", tmp_path / "z" / "3.png"], index, ENCODER)
    assert ["x/1.png", "y/2.png", "z/3.png"] == sorted(held(index))
    write(tmp_path, {"x/new.png": "five"})
    assert {"added": 1, "unchanged": 3, "encoded": 1} == counts(maintenance.sync(index))


# --------------------------------------------------------------------------------------------- sync


def test_a_renamed_file_keeps_its_id(asked: Asked, index: Path, photos: Path) -> None:
    """A moved or renamed file is found by its content: same id, no work for the network."""
    number = held(index)["c.png"]
    asked.contents.clear()
    (photos / "d").mkdir()
    (photos / "c.png").rename(photos / "d" / "renamed.png")
    assert {"moved": 1, "unchanged": 3} == counts(maintenance.sync(index))
    assert (number, []) == (held(index)["d/renamed.png"], asked.contents)
    assert "c.png" not in held(index)


def test_changed_content_is_another_image(index: Path, photos: Path) -> None:
    """New content under an old path gets a new id, and the old one goes when no path is left."""
    before = held(index)
    write(photos, {"c.png": "changed!"})
    assert {"changed": 1, "unchanged": 3, "encoded": 1} == counts(maintenance.sync(index))
    after = held(index)
    assert after["c.png"] not in before.values()
    with Gallery(index) as gallery:
        assert (3, ()) == (len(gallery), gallery.paths(before["c.png"]))


def test_two_files_change_places(asked: Asked, index: Path, photos: Path) -> None:
    """Two files that swap their names swap their ids; nothing is encoded."""
    before = held(index)
    asked.contents.clear()
    (photos / "c.png").rename(photos / "x")
    (photos / "b" / "1.png").rename(photos / "c.png")
    (photos / "x").rename(photos / "b" / "1.png")
    assert {"changed": 2, "unchanged": 2} == counts(maintenance.sync(index))
    after = held(index)
    assert (before["c.png"], before["b/1.png"], []) == (
        after["b/1.png"],
        after["c.png"],
        asked.contents,
    )


def test_a_path_of_two_goes(index: Path, photos: Path) -> None:
    """An image with two paths stays while one of them is left."""
    number = held(index)["copy.png"]
    (photos / "a" / "1.png").unlink()
    assert {"removed": 1, "unchanged": 3} == counts(maintenance.sync(index))
    assert number == held(index)["copy.png"]


def test_an_image_that_comes_back_keeps_its_id(asked: Asked, index: Path, photos: Path) -> None:
    """What was removed and comes back before its segment was merged is the same image, without the
    network."""
    number = held(index)["c.png"]
    write(photos, words(5))
    maintenance.sync(index)
    (photos / "c.png").unlink()
    assert 7 == maintenance.sync(index).images
    asked.contents.clear()
    write(photos, {"back.png": "three"})
    change = maintenance.sync(index)
    assert ({"added": 1, "unchanged": 8}, 8) == (counts(change), change.images)
    assert (number, []) == (held(index)["back.png"], asked.contents)


def test_only_files_that_differ_are_read(
    index: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files whose size and time are as before are not read; a touched one is read and stays what it
    is."""
    for path in photos.rglob("*.png"):
        os.utime(path, (1e9, 1e9))
    maintenance.sync(index)
    read: list[str] = []
    digests = diff.extraction.digests
    monkeypatch.setattr(
        diff.extraction,
        "digests",
        lambda source, store: read.extend(source.paths) or digests(source, store),
    )
    assert {"unchanged": 4} == counts(maintenance.sync(index))
    assert [] == read
    os.utime(photos / "c.png", (2e9, 1.1e9))
    assert {"unchanged": 4} == counts(maintenance.sync(index))
    assert ["c.png"] == read


def test_a_change_within_the_clock_s_grain_is_seen(index: Path, photos: Path) -> None:
    """A file that was just written is read again, since its size and time may hide another
    change."""
    info = (photos / "c.png").stat()
    write(photos, {"c.png": "THREE"})
    os.utime(photos / "c.png", ns=(info.st_atime_ns, info.st_mtime_ns))
    assert {"changed": 1, "unchanged": 3, "encoded": 1} == counts(maintenance.sync(index))


def test_a_folder_that_is_not_mounted_empties_nothing(index: Path, photos: Path) -> None:
    """A missing folder, and one without any image, are errors and not removals; `allow_empty` says
    that it is right."""
    photos.rename(photos.with_name("away"))
    assert "not there" in refusal(maintenance.sync, index)
    photos.mkdir()
    assert "all 4 would be removed" in refusal(maintenance.sync, index)
    assert 4 == len(held(index))
    assert {"removed": 4} == counts(maintenance.sync(index, allow_empty=True))
    with Gallery(index) as gallery:
        assert (0, [()]) == (len(gallery), gallery.search(vector_of("one")[None]))


def test_one_emptied_folder_of_several_is_not_a_removal(tmp_path: Path) -> None:
    """Where the other folders still have images, too, the empty one is named: its disk may not be
    mounted."""
    photos, more = write(tmp_path / "photos", words(4)), write(tmp_path / "more", words(3, start=9))
    index = tmp_path / "photos.gallery"
    maintenance.build([photos], index, ENCODER)
    maintenance.add(index, [more])
    for path in more.iterdir():
        path.unlink()

    assert "more: no image is left in this folder: its 3" in refusal(maintenance.sync, index)
    assert {"removed": 3} == {
        key: value
        for key, value in counts(maintenance.sync(index, allow_empty=True)).items()
        if key == "removed"
    }


def test_a_moved_folder_is_told(index: Path, photos: Path) -> None:
    """`root` says where the folder is now; from then on the gallery knows."""
    photos.rename(photos.with_name("away"))
    assert {"unchanged": 4} == counts(maintenance.sync(index, root=photos.with_name("away")))
    assert {"unchanged": 4} == counts(maintenance.sync(index))


def test_index_and_folder_move_together(index: Path, photos: Path, tmp_path: Path) -> None:
    """A gallery that is moved together with its images finds them beside it; moved alone, where
    they were."""
    (tmp_path / "new").mkdir()
    shutil.copytree(photos, tmp_path / "new" / "photos")
    shutil.move(index, tmp_path / "new" / "photos.index")
    with Gallery(tmp_path / "new" / "photos.index") as gallery:
        assert tmp_path / "new" / "photos" == gallery.root
    shutil.rmtree(tmp_path / "new" / "photos")
    with Gallery(tmp_path / "new" / "photos.index") as gallery:
        assert photos == gallery.root


# ----------------------------------------------------------------------------------- add and remove


def test_add_costs_what_is_new(asked: Asked, index: Path, tmp_path: Path) -> None:
    """Files and folders elsewhere are added by their way from the root; known contents cost
    nothing."""
    more = write(tmp_path / "more", {"new.png": "four", "known.png": "one"})
    asked.contents.clear()
    assert {"added": 2, "encoded": 1} == counts(maintenance.add(index, [more]))
    assert ["four"] == asked.contents
    assert {"../more/new.png", "../more/known.png"} <= set(held(index))
    assert held(index)["copy.png"] == held(index)["../more/known.png"]
    assert {"unchanged": 2} == counts(maintenance.add(index, [more]))


def test_sync_scans_added_folders_and_keeps_added_files(index: Path, tmp_path: Path) -> None:
    """After `add`, sync knows the new folder, and a single file outside of all folders as long as
    it exists."""
    write(tmp_path, {"more/1.png": "four", "single/2.png": "five", "single/3.png": "six"})
    maintenance.add(index, [tmp_path / "more", tmp_path / "single" / "2.png"])
    write(tmp_path, {"more/4.png": "seven"})
    assert {"added": 1, "unchanged": 6, "encoded": 1} == counts(maintenance.sync(index))
    (tmp_path / "single" / "2.png").unlink()
    assert {"removed": 1, "unchanged": 6} == counts(maintenance.sync(index))


def test_remove_by_path_file_and_folder(
    index: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths as answers show them, files as the shell gives them, and folders; what is not there is
    an error."""
    assert "not in the gallery" in refusal(maintenance.remove, index, ["nothing.png"])
    assert {"removed": 1} == counts(maintenance.remove(index, ["c.png"]))
    monkeypatch.chdir(photos / "b")
    assert {"removed": 1} == counts(maintenance.remove(index, ["1.png"]))
    assert {"removed": 1} == counts(maintenance.remove(index, ["../a/"]))
    assert ["copy.png"] == list(held(index))
    assert (photos / "c.png").exists()


def test_remove_is_all_or_nothing(index: Path) -> None:
    """One unknown path among several: nothing is removed."""
    refusal(maintenance.remove, index, ["c.png", "nothing.png"])
    assert 4 == len(held(index))


def test_a_dot_is_the_working_folder(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`.` means where the user stands, not the root of the gallery."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "not in the gallery" in refusal(maintenance.remove, index, ["."])


def test_a_removed_folder_is_no_longer_scanned(index: Path, tmp_path: Path) -> None:
    """Removing an added folder forgets it, also when its files are gone already."""
    more = write(tmp_path / "more [x]", {"new.png": "four"})
    maintenance.add(index, [more])
    shutil.rmtree(more)
    assert "not there" in refusal(maintenance.sync, index)
    assert {"removed": 1} == counts(maintenance.remove(index, [more]))
    assert {"unchanged": 4} == counts(maintenance.sync(index))


def test_removed_files_come_back_with_sync(index: Path) -> None:
    """`sync` makes the gallery equal to its folders, removed files included."""
    maintenance.remove(index, ["a/1.png"])
    assert {"added": 1, "unchanged": 3} == counts(maintenance.sync(index))


# ------------------------------------------------------------------------------------------- faults


def test_unreadable_files_stop_or_are_named(index: Path, photos: Path) -> None:
    """By default an unreadable file stops the command and nothing changes; with skip it is listed,
    and the rest goes on."""
    write(photos, {"bad.png": "broken", "new.png": "four"})
    assert "bad.png" in refusal(maintenance.sync, index)
    assert 4 == len(held(index))
    change = maintenance.sync(index, on_bad="skip")
    assert ({"added": 1, "unchanged": 4, "encoded": 1}, ["bad.png"]) == (
        counts(change),
        [fault.path for fault in change.faults],
    )
    assert "bad.png" not in held(index)


def test_a_skipped_file_is_not_decoded_again(asked: Asked, index: Path, photos: Path) -> None:
    """An unreadable file that has not changed is listed again without work; when it is mended, it
    comes in."""
    write(photos, {"bad.png": "broken"})
    os.utime(photos / "bad.png", (1e9, 1e9))
    maintenance.sync(index, on_bad="skip")
    asked.contents.clear()
    assert ["bad.png"] == [fault.path for fault in maintenance.sync(index, on_bad="skip").faults]
    assert [] == asked.contents
    write(photos, {"bad.png": "mended"})
    change = maintenance.sync(index, on_bad="skip")
    assert ({"added": 1, "unchanged": 4, "encoded": 1}, ()) == (counts(change), change.faults)


def test_a_file_that_breaks_leaves_the_gallery(index: Path, photos: Path) -> None:
    """A known path whose new content cannot be read is no longer in the gallery under its old
    content."""
    write(photos, {"c.png": "broken"})
    change = maintenance.sync(index, on_bad="skip")
    assert ({"removed": 1, "unchanged": 3}, ["c.png"]) == (
        counts(change),
        [fault.path for fault in change.faults],
    )
    assert "c.png" not in held(index)


def test_every_bad_file_is_counted_and_named(photos: Path, index: Path, tmp_path: Path) -> None:
    """Five files of one broken content are five bad images, all of them named: in build, add and
    sync, with stop and skip."""
    bad = [f"bad{i}.png" for i in range(5)]
    more = write(tmp_path / "more", {**dict.fromkeys(bad, "broken"), "good.png": "good"})
    for said in (
        refusal(maintenance.build, [more], tmp_path / "new.index", ENCODER),
        refusal(maintenance.add, index, [more]),
    ):
        assert "5 bad images" in said
        assert all(name in said for name in bad)
    change = maintenance.build([more], tmp_path / "new.index", ENCODER, on_bad="skip")
    assert (bad, 1) == ([fault.path for fault in change.faults], change.images)
    write(photos, dict.fromkeys(bad, "broken"))
    assert "5 bad images" in refusal(maintenance.sync, index)
    assert bad == [fault.path for fault in maintenance.sync(index, on_bad="skip").faults]


def test_a_folder_without_images(index: Path, tmp_path: Path) -> None:
    """A folder without a known image name is refused; what lies there instead is named, and what
    images are called."""
    write(tmp_path / "notes", {"one.txt": "text", "two.webp2": "text"})
    (tmp_path / "empty").mkdir()
    calls = (
        lambda folder: maintenance.build([folder], tmp_path / "x.index", ENCODER),
        lambda folder: maintenance.add(index, [folder]),
    )
    for call in calls:
        said = refusal(call, tmp_path / "notes")
        assert "holds no images; 2 files are left out" in said
        assert all(kind in said for kind in (".txt", ".webp2"))
        assert ".jpg" in said
        assert "holds no images\n" in refusal(call, tmp_path / "empty")


def test_only_broken_images(tmp_path: Path) -> None:
    """Of a folder without one readable image, all files are named, whatever an unreadable image is
    to do."""
    bad = write(tmp_path / "bad", {"1.png": "broken", "2.png": "broken"})
    for on_bad in ("stop", "skip"):
        said = refusal(maintenance.build, [bad], tmp_path / "x.index", ENCODER, on_bad=on_bad)
        assert "2 bad images: 1.png (damaged: for the test); 2.png (damaged: for the test)" in said
        assert not (tmp_path / "x.index").exists()


def test_features_of_zeros_are_refused_by_name(index: Path, photos: Path) -> None:
    """An image whose features are all zero has no direction: it is a fault like any other."""
    write(photos, {"black.png": "zero"})
    assert "black.png" in refusal(maintenance.sync, index)
    assert ["black.png"] == [fault.path for fault in maintenance.sync(index, on_bad="skip").faults]


def test_a_dangling_link_is_named(index: Path, photos: Path) -> None:
    """A link to nothing is an unreadable file, and no crash."""
    (photos / "link.png").symlink_to("nowhere.png")
    assert "link.png" in refusal(maintenance.sync, index)
    assert ["link.png"] == [fault.path for fault in maintenance.sync(index, on_bad="skip").faults]


# ------------------------------------------------------------------------------------------ merging


def test_many_small_additions_are_merged(index: Path, photos: Path) -> None:
    """More than `MOST_SEGMENTS` segments are merged; nothing else changes."""
    for name, word in words(compaction.MOST_SEGMENTS).items():
        write(photos, {name: word})
        before = len(list((index / "segments").iterdir()))
        maintenance.sync(index)
    assert compaction.MOST_SEGMENTS == before
    assert 1 == len(list((index / "segments").iterdir()))
    fresh = index.with_name("fresh.index")
    maintenance.build([photos], fresh, ENCODER)
    assert contents(fresh) == contents(index)


def test_merging_leaves_large_segments(
    index: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A segment much larger than the small ones together is not copied for their sake."""
    monkeypatch.setattr(compaction, "MOST_SEGMENTS", 3)
    write(photos, words(60))
    maintenance.sync(index)
    for i in range(3):
        write(photos, words(1, start=100 + i))
        maintenance.sync(index)
    with Gallery(index) as gallery:
        assert 60 in [len(table) for table in gallery.now.tables]
        assert 66 == len(gallery)


def test_dead_rows_are_dropped(photos: Path, tmp_path: Path) -> None:
    """When a fifth of the rows is dead, they are dropped; below that they stay."""
    write(photos, words(17))
    index = tmp_path / "photos.index"
    maintenance.build([photos], index, ENCODER)
    maintenance.remove(index, [f"{i:04d}.png" for i in range(4)])
    with Gallery(index) as gallery:
        assert (20, 16) == (len(gallery.now.dead), len(gallery))
    ids = held(index)
    maintenance.remove(index, ["0004.png"])
    with Gallery(index) as gallery:
        assert (15, 15) == (len(gallery.now.dead), len(gallery))
    assert {path: number for path, number in ids.items() if path != "0004.png"} == held(index)


def test_compact_by_hand(index: Path, photos: Path) -> None:
    """`compact` leaves one segment without dead rows, the same ids and the same vectors."""
    write(photos, words(3))
    maintenance.sync(index)
    maintenance.remove(index, ["0001.png"])
    before, ids = contents(index), held(index)
    assert 5 == maintenance.compact(index).images
    assert (before, ids) == (contents(index), held(index))
    with Gallery(index) as gallery:
        assert (1, 5) == (len(gallery.now.tables), len(gallery.now.dead))
    generation = segments_generation(index)
    maintenance.compact(index)
    assert generation == segments_generation(index)


def segments_generation(index: Path) -> int:
    with contextlib.closing(segments.read(index)) as now:
        return now.generation


def test_everything_removed_and_compacted(index: Path, photos: Path) -> None:
    """A gallery without images has no segment, and can be filled again with new ids."""
    last = max(held(index).values())
    maintenance.remove(index, [photos])
    maintenance.compact(index)
    assert [] == list((index / "segments").iterdir())
    assert {} == counts(maintenance.sync(index))
    assert {"added": 4, "encoded": 3} == counts(maintenance.add(index, [photos]))
    assert last < min(held(index).values())


def test_a_damaged_segment_is_not_merged(
    index: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge reads every byte that it copies, so that damage never gets a new digest."""
    monkeypatch.setattr(segments, "VERIFIED_BYTES", 0)
    write(photos, words(1))
    maintenance.sync(index)
    path = index / "segments" / "1.f32"
    path.write_bytes(b"\x01" + path.read_bytes()[1:])
    assert str(path) in refusal(maintenance.compact, index)


def test_a_failed_merge_is_a_note(
    index: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change is safe before the merge begins: when that fails, the command has not failed."""

    def full(*_: object) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(compaction, "_merge", full)
    change = maintenance.remove(index, ["c.png"])
    assert ({"removed": 1}, 1) == (counts(change), len(change.notes))
    assert "c.png" not in held(index)
    assert photos.exists()


# ------------------------------------------------------------------------------------- search index


@pytest.fixture
def graph(photos: Path, tmp_path: Path) -> Path:
    """A gallery of 304 files that is searched through a graph."""
    write(photos, words(300))
    maintenance.build([photos], tmp_path / "graph.index", ENCODER, factory="HNSW16", recall=0.9)
    return tmp_path / "graph.index"


def search_file(index: Path) -> str | None:
    with contextlib.closing(segments.read(index)) as now:
        search = now.meta["search"]
        return search and search["file"]


def share_of_exact(index: Path) -> float:
    """The share of the ten results that comparing everything gives, for every image, which the
    gallery's search gives."""
    with Gallery(index) as gallery:
        positions, _ = gallery.now.everything()
        asked = gallery.now.vectors(positions)
        own = [[int(position)] for position in positions]
        found = gallery.ranked(asked, 10, own)
        gallery.corpus = Corpus(gallery.now)
        exact = gallery.ranked(asked, 10, own)
    return float(
        np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, exact, strict=True)])
    )


def test_an_index_beside_the_vectors(graph: Path) -> None:
    """A search index that was asked for is built, measured, described and used; scores are exact
    all the same."""
    assert ["1.faiss"] == [path.name for path in (graph / "search").iterdir()]
    with Gallery(graph) as gallery:
        assert gallery.index is not None
        assert "HNSW16" in gallery.info()["search"]
        assert "held-out queries" in gallery.info()["search"]
        (hits,) = gallery.search(vector_of("word 7")[None], 1)
        assert ("0007.png", pytest.approx(1.0, abs=1e-6)) == (hits[0].path, hits[0].score)
    assert share_of_exact(graph) > 0.9


def test_new_images_are_searched_beside_the_index(graph: Path, photos: Path) -> None:
    """Images that were added after the index are compared one by one; removed ones do not come up;
    neither rebuilds it."""
    write(photos, words(20, start=1000))
    maintenance.sync(graph)
    maintenance.remove(graph, [f"{i:04d}.png" for i in range(30)])
    assert "search/1.faiss" == search_file(graph)
    with Gallery(graph) as gallery:
        assert "1003.png" == gallery.search(vector_of("word 1003")[None], 1)[0][0].path
        shown = {hit.path for hit in gallery.search(vector_of("word 7")[None], 400)[0]}
        assert (len(gallery), False) == (len(shown), "0007.png" in shown)
    assert share_of_exact(graph) > 0.9


def test_an_index_that_falls_behind_is_made_again(graph: Path, photos: Path) -> None:
    """When a quarter as many rows stand beside the index as in it, it is made again over all of
    them."""
    write(photos, words(100, start=1000))
    maintenance.sync(graph)
    assert search_file(graph) not in (None, "search/1.faiss")
    with Gallery(graph) as gallery:
        assert (403, 1) == (gallery.info()["search rows"], len(gallery.now.tables))
    assert 1 == len(list((graph / "search").iterdir()))
    assert share_of_exact(graph) > 0.9


def test_merging_makes_the_index_again(graph: Path, photos: Path) -> None:
    """When the rows that an index covers move, it is made again; small segments beside it are
    merged without it."""
    maintenance.compact(graph)
    assert "search/1.faiss" == search_file(graph)
    for i in range(compaction.MOST_SEGMENTS + 1):
        write(photos, words(1, start=1000 + i))
        maintenance.sync(graph)
    with Gallery(graph) as gallery:
        assert ("search/1.faiss", True) == (
            search_file(graph),
            len(gallery.now.tables) < compaction.MOST_SEGMENTS,
        )
    maintenance.remove(graph, [f"{i:04d}.png" for i in range(100)])
    assert search_file(graph) not in (None, "search/1.faiss")
    with Gallery(graph) as gallery:
        assert (220, 220, 0) == (
            len(gallery),
            gallery.info()["search rows"],
            gallery.info()["removed rows"],
        )
    assert share_of_exact(graph) > 0.9


def test_all_images_that_the_index_covers_are_gone(
    graph: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index of dead rows alone finds nothing and breaks nothing."""
    monkeypatch.setattr(compaction, "DEAD_SHARE", 1.0)
    maintenance.remove(graph, [photos])
    write(photos, {"last.png": "last"})
    maintenance.add(graph, [photos / "last.png"])
    with Gallery(graph) as gallery:
        assert ["last.png"] == [
            hit.path for hit in gallery.search(vector_of("word 7")[None], 10)[0]
        ]


@pytest.mark.parametrize("harm", ["cut", "changed", "missing"])
def test_a_damaged_search_index_is_refused(
    graph: Path, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search index that is not what was written is refused by name, also in a large gallery."""
    monkeypatch.setattr(segments, "VERIFIED_BYTES", 0)
    path = graph / "search" / "1.faiss"
    data = path.read_bytes()
    path.unlink()
    if harm != "missing":
        path.write_bytes(data[:-9] if harm == "cut" else data[:500] + b"\xff" + data[501:])
    assert str(path) in refusal(Gallery, graph)
    maintenance.build([graph.with_name("photos")], graph, ENCODER, force=True)
    assert 303 == len(contents(graph))


def test_the_kind_follows_the_size(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small galleries have no search index, and no second copy of their vectors; larger ones get
    theirs as they grow."""
    index = tmp_path / "x.index"
    write(photos, words(97))
    maintenance.build([photos], index, ENCODER)
    assert search_file(index) is None
    maintenance.build([photos], index, ENCODER, factory="Flat", force=True)
    assert search_file(index) is None
    maintenance.build([photos], index, ENCODER, force=True)
    monkeypatch.setattr(spec, "FLAT_NUMBERS", 110 * galleries.WIDTH)
    assert (maintenance.compact(index).images, None) == (100, search_file(index))
    write(photos, words(30, start=1000))
    maintenance.sync(index)
    with Gallery(index) as gallery:
        assert "SQfp16" in gallery.info()["search"]
    assert share_of_exact(index) > 0.9


def test_an_impossible_index_is_refused(photos: Path, tmp_path: Path) -> None:
    """A factory string that faiss does not know fails the build, and leaves nothing behind."""
    assert "nonsense" in refusal(
        maintenance.build, [photos], tmp_path / "x.index", ENCODER, factory="nonsense"
    )
    assert not (tmp_path / "x.index").exists()


# ----------------------------------------------------------------------------- a history or a build

NAMES = ("a.png", "b.png", "d/a.png", "d/b.png", "../more/a.png")
STEPS = st.one_of(
    st.tuples(
        st.just("write"), st.sampled_from(NAMES), st.sampled_from(("one", "two", "three", "four"))
    ),
    st.tuples(st.just("delete"), st.sampled_from(NAMES), st.just("")),
    st.tuples(st.just("rename"), st.sampled_from(NAMES), st.sampled_from(NAMES)),
    st.tuples(st.just("add"), st.sampled_from(NAMES), st.just("")),
    st.tuples(st.just("remove"), st.sampled_from(NAMES), st.just("")),
    st.tuples(st.just("sync"), st.just(""), st.just("")),
    st.tuples(st.just("compact"), st.just(""), st.just("")),
)


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(STEPS, max_size=10))
def test_any_history_equals_a_fresh_build(
    tmp_path: Path, steps: list[tuple[str, str, str]]
) -> None:
    """After any sequence of changes, a sync leaves what a build from nothing would: the same paths
    and vectors."""
    base = tmp_path / "history"
    shutil.rmtree(base, ignore_errors=True)
    photos = write(base / "photos", {"always.png": "always"})
    write(base / "more", {"always.png": "more"})
    index = base / "x.index"
    maintenance.build([photos], index, ENCODER)
    maintenance.add(index, [base / "more"])
    for step, name, other in steps:
        _take(step, photos, index, name, other)
    maintenance.sync(index)
    maintenance.build([photos], base / "fresh.index", ENCODER)
    maintenance.add(base / "fresh.index", [base / "more"])
    assert contents(base / "fresh.index") == contents(index)


def _take(step: str, photos: Path, index: Path, name: str, other: str) -> None:
    path = Path(os.path.normpath(photos / name))
    if step == "write":
        write(photos, {name: other})
    elif step == "delete":
        path.unlink(missing_ok=True)
    elif step == "rename" and path.exists():
        target = Path(os.path.normpath(photos / other))
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    elif step == "add" and path.exists():
        maintenance.add(index, [path])
        assert name in held(index)
    elif step == "remove" and name in held(index):
        maintenance.remove(index, [name])
        assert name not in held(index)
    elif step == "sync":
        maintenance.sync(index)
        assert {"always.png", "../more/always.png"} <= set(held(index))
    elif step == "compact":
        maintenance.compact(index)


def test_writers_wait_for_nobody(index: Path, photos: Path) -> None:
    """While one process writes, every other change is refused at once, and queries go on."""
    with writer.writing(index):
        for call in (maintenance.sync, maintenance.compact):
            assert "another process" in refusal(call, index)
        assert "another process" in refusal(maintenance.add, index, [photos])
        assert "another process" in refusal(maintenance.build, [photos], index, ENCODER, force=True)
        with Gallery(index) as gallery:
            assert 1 == len(gallery.search(vector_of("two")[None], 1)[0])


# -------------------------------------------------------------------------------- names of any kind


def test_names_are_bytes(tmp_path: Path) -> None:
    """Files and folders of any name are built, found again, moved, removed and brought back under
    their exact names."""
    odd.need(tmp_path / "try")
    folder = os.fsdecode(b"p\xe9\nx")
    photos = write(
        tmp_path / folder, {f"{folder}/{name}": f"word {i}" for i, name in enumerate(odd.NAMES)}
    )
    index = tmp_path / os.fsdecode(b"i\xe9.index")
    maintenance.build([photos], index, ENCODER, factory="HNSW8")
    everything = {f"{folder}/{name}" for name in odd.NAMES}
    assert everything == set(held(index))
    assert {"unchanged": len(odd.NAMES)} == counts(maintenance.sync(index))

    maintenance.remove(index, [f"{names.shown(folder)}/{names.shown(odd.NAMES[0])}"])
    assert everything - {f"{folder}/{odd.NAMES[0]}"} == set(held(index))
    assert {"added": 1} == {
        key: value for key, value in counts(maintenance.sync(index)).items() if key == "added"
    }
    (photos / folder).rename(photos / os.fsdecode(b"\xff"))
    assert {"moved": len(odd.NAMES)} == counts(maintenance.sync(index))
    assert {os.fsdecode(b"\xff/") + name for name in odd.NAMES} == set(held(index))
    assert {"removed": len(odd.NAMES)} == counts(
        maintenance.remove(index, [photos / os.fsdecode(b"\xff")])
    )


def test_a_folder_is_removed_with_all_that_is_below_it_alone(tmp_path: Path) -> None:
    """Names with signs of patterns, and neighbours of nearly the same name, are not taken for what
    lies in a folder."""
    files = {
        "a*/1.png": "one",
        "ab/2.png": "two",
        "a*0.png": "three",
        "a*.png": "four",
        "a*/b/3.png": "five",
    }
    maintenance.build([write(tmp_path / "photos", files)], tmp_path / "photos.index", ENCODER)
    maintenance.remove(tmp_path / "photos.index", ["a*"])
    assert {"ab/2.png", "a*0.png", "a*.png"} == set(held(tmp_path / "photos.index"))


@pytest.mark.skipif(os.name == "nt", reason="needs pipes")
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(index: Path, photos: Path) -> None:
    """A pipe is unreadable, as any other fault: the command names it, or goes on without it."""
    (photos / "c.png").unlink()
    os.mkfifo(photos / "c.png")
    with pytest.raises(UserError, match=r"c\.png \(unreadable: a pipe"):
        maintenance.sync(index)
    change = maintenance.sync(index, on_bad="skip")
    assert (1, ["c.png"]) == (change.removed, [fault.path for fault in change.faults])
