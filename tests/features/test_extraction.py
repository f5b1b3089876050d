"""From images to features: every content once, faults named, files that change noticed, exact
neighbours."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from finetune.data import decode, images
from finetune.data.images import ImageSet, load, load_unlabelled
from finetune.errors import UserError
from finetune.features import engine, extraction, knn
from finetune.features.extraction import Features, extract
from finetune.features.store import Store
from finetune.network import Network, Preprocess, Tap

if TYPE_CHECKING:
    from finetune.backbones.stages import Backbone

POOLED, STAGE = Tap("pooled"), Tap("stage1")
PREPROCESS = Preprocess(8, 8, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
NETWORK = Network(
    "made-up", "0" * 64, "made for tests", "random", PREPROCESS, {"pooled": 8 * 8 * 3, "stage1": 3}
)


def no_torch() -> Any:
    raise AssertionError("no torch here")


class Counting:
    """In the place of the engine: a network whose features are the pixels themselves; it counts the
    images that it saw."""

    def __init__(self) -> None:
        self.opened = self.seen = 0
        self.after: Callable[[], None] = lambda: None  # called as each batch comes in
        self.nan_from = -1

    def open(
        self, _network: Network, taps: Iterable[Tap], _load: object, **_how: object
    ) -> engine.Runner:
        self.opened += 1
        wanted = tuple(taps)

        def stream(batches: Iterable[NDArray[np.uint8]]) -> Iterator[list[NDArray[np.float32]]]:
            for pixels in batches:
                flat = pixels.reshape(len(pixels), -1).astype(np.float32)
                if 0 <= self.nan_from < self.seen + len(pixels):
                    flat[self.nan_from - self.seen] = np.nan
                self.seen += len(pixels)
                self.after()
                yield [
                    flat if tap == POOLED else pixels.mean((1, 2), dtype=np.float32)
                    for tap in wanted
                ]

        return engine.Runner(wanted, "torch", "float32", 16, stream)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Counting:
    made = Counting()
    monkeypatch.setattr(engine, "open_runner", made.open)
    return made


@pytest.fixture
def folder(shapes: Path, tmp_path: Path) -> Path:
    """Three classes with 20 images each, to write into."""
    shutil.copytree(shapes, tmp_path / "shapes")
    return tmp_path / "shapes"


def read(source: ImageSet, taps: tuple[Tap, ...] = (POOLED,), **how: Any) -> Features:
    return extract(source, NETWORK, taps, no_torch, engine_name="torch", precision="float32", **how)


def own_rows(source: ImageSet) -> NDArray[np.float32]:
    """What the made-up network says of each image, computed one by one."""
    with extraction.decoding(source, range(len(source)), NETWORK) as pictures:
        pixels = [pixels for _, pixels in pictures]
    return np.stack([np.asarray(p, np.float32).reshape(-1) for p in pixels])


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


# ------------------------------------------------------------------------------------ content, once


def test_rows_follow_the_images(folder: Path, network: Counting) -> None:
    """Row i of every block belongs to path i, whatever order the images are asked in, and past what
    is stored already."""
    source = load(folder)
    mixed = source.subset(np.random.default_rng(0).permutation(len(source)))
    read(source.subset(range(7, 31)))
    found = read(mixed, (STAGE, POOLED))

    expected = own_rows(mixed)
    np.testing.assert_array_equal(expected, found.blocks[POOLED])
    np.testing.assert_array_equal(expected.reshape(60, 64, 3).mean(1), found.blocks[STAGE])
    assert mixed.paths == found.images.paths
    assert images.digests(mixed) == list(found.digests)
    assert 60 == len(found)


def test_the_second_call_runs_no_network(folder: Path, network: Counting) -> None:
    """What was read once comes from the store, bit by bit the same; not even a runner is opened."""
    first = read(load(folder))
    again = read(load(folder))

    assert (1, 60) == (network.opened, network.seen)
    np.testing.assert_array_equal(first.blocks[POOLED], again.blocks[POOLED])
    assert first.spaces == again.spaces


def test_the_same_bytes_under_two_names_are_one_row(folder: Path, network: Counting) -> None:
    """A copy is not run again, within one call and in a later one; it has the same features."""
    shutil.copy(folder / "circle" / "00.png", folder / "square" / "copy.png")
    found = read(load(folder))
    shutil.copytree(folder, folder.with_name("moved"))
    read(load(folder.with_name("moved")))
    store = Store()

    assert 61 == len(found)
    assert 60 == network.seen
    assert [60] == [space["rows"] for space in store.summary()]
    copy = found.images.paths.index("square/copy.png")
    np.testing.assert_array_equal(
        found.blocks[POOLED][found.images.paths.index("circle/00.png")], found.blocks[POOLED][copy]
    )
    store.close()


def test_only_new_images_are_run(folder: Path, network: Counting) -> None:
    """After a picture is added and another one is changed, two are run."""
    read(load(folder))
    shutil.move(folder / "circle" / "00.png", folder / "circle" / "renamed.png")
    (folder / "square" / "new.ppm").write_bytes(b"P6 2 2 255 " + bytes(range(12)))
    (folder / "circle" / "01.png").write_bytes((folder / "circle" / "02.png").read_bytes() + b"\0")
    found = read(load(folder))

    assert 62 == network.seen
    np.testing.assert_array_equal(own_rows(found.images), found.blocks[POOLED])


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_damaged_features_are_made_again(
    folder: Path, network: Counting, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """From their images and no others, with one line that says how many; the next call finds all of
    them whole."""
    first = read(load(folder), (POOLED, STAGE))
    (path,) = (Store().folder).glob(f"{first.spaces[POOLED][:32]}.f32")
    size = first.blocks[POOLED].shape[1] * 4
    first = Features(
        **{
            **first.__dict__,
            "blocks": {tap: np.array(block) for tap, block in first.blocks.items()},
        }
    )
    if damage == "changed":
        data = bytearray(path.read_bytes())
        data[5 * size + 7] ^= 1
        data[9 * size + 3] ^= 128
        path.write_bytes(data)
    elif damage == "cut":
        os.truncate(path, 58 * size + 5)
    else:
        path.unlink()
    count = 60 if damage == "gone" else 2
    network.seen = 0
    again = read(load(folder), (POOLED, STAGE))

    assert count == network.seen
    assert f"{count} damaged or missing rows in 1 file of features, made again" in caplog.text
    for tap in (POOLED, STAGE):
        np.testing.assert_array_equal(first.blocks[tap], again.blocks[tap])
    caplog.clear()
    np.testing.assert_array_equal(first.blocks[POOLED], read(load(folder)).blocks[POOLED])
    assert (count, "") == (network.seen, caplog.text)


def test_a_tap_that_is_missing_runs_the_images_again(folder: Path, network: Counting) -> None:
    """A new tap is another space: its rows are made, those of the known one stay."""
    read(load(folder))
    found = read(load(folder), (POOLED, STAGE))

    assert 120 == network.seen
    assert 2 == len(set(found.spaces.values()))
    assert 60 == len(found.blocks[STAGE])


@pytest.mark.parametrize("change", ["view", "precision", "weights", "frame"])
def test_what_decides_a_feature_names_its_space(
    folder: Path, network: Counting, change: str
) -> None:
    """Another view, precision, weights digest or frame never meets features of the first kind."""
    import dataclasses

    source = load(folder).subset(range(3))
    first = read(source)
    other = NETWORK
    how: dict[str, Any] = {"view": "flip" if change == "view" else "", "engine_name": "torch"}
    how["precision"] = "bf16" if change == "precision" else "float32"
    if change == "weights":
        other = dataclasses.replace(NETWORK, digest="1" * 64)
    if change == "frame":
        other = dataclasses.replace(
            NETWORK, preprocess=dataclasses.replace(PREPROCESS, squash=True)
        )
    second = extract(source, other, (POOLED,), no_torch, **how)

    assert first.spaces[POOLED] != second.spaces[POOLED]
    assert 6 == network.seen


def test_the_mirrored_view_is_mirrored(folder: Path, network: Counting) -> None:
    """`flip` turns left and right around before the network sees the image."""
    source = load(folder).subset(range(3))
    plain, flipped = (
        read(source, view=view).blocks[POOLED].reshape(3, 8, 8, 3) for view in ("", "flip")
    )

    np.testing.assert_array_equal(plain[:, :, ::-1], flipped)
    assert "diagonal" in refusal(lambda: read(source, view="diagonal"))


@pytest.mark.parametrize("how", ["torch", "auto"])
def test_features_do_not_depend_on_their_company(shapes: Path, tiny: Backbone, how: str) -> None:
    """One image alone, or among others in another order, gets the same bits: the engine's batches
    are static."""
    source = load(shapes).subset(range(0, 60, 3))
    taps = (POOLED, Tap("stage2"))

    def blocks(part: ImageSet, name: str) -> list[NDArray[np.float32]]:
        store = Store(Path(os.environ["REGRAFT_CACHE"]) / "features" / name)
        found = extract(
            part,
            tiny.network,
            taps,
            lambda: tiny,
            store=store,
            engine_name=how,
            precision="float32",
        )
        made = [np.array(found.blocks[tap]) for tap in taps]
        store.close()
        return made

    together = blocks(source, "all")
    order = np.random.default_rng(1).permutation(20)
    for tap, mixed, whole in zip(
        taps, blocks(source.subset(order), "mixed"), together, strict=True
    ):
        np.testing.assert_array_equal(whole[order], mixed, err_msg=str(tap))
    for whole, alone in zip(together, blocks(source.subset([13]), "alone"), strict=True):
        np.testing.assert_array_equal(whole[13:14], alone)


def test_names_may_be_any_text(tmp_path: Path, shapes: Path, network: Counting) -> None:
    """Letters of every script, blanks and quotes in folders and files."""
    for i, name in enumerate(
        ["Grüße/猫 один.png", "Grüße/it's 50%.png", 'ελ "λ"/😀.png', 'ελ "λ"/a.png']
    ):
        (tmp_path / "données" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shapes / "circle" / f"{i:02d}.png", tmp_path / "données" / name)
    found = read(load(tmp_path / "données"))

    assert "Grüße/猫 один.png" in found.images.paths
    np.testing.assert_array_equal(own_rows(found.images), found.blocks[POOLED])


def test_progress_reaches_the_end(folder: Path, network: Counting) -> None:
    """It never falls, counts images that have to be run, and ends at their number, also where the
    last ones are bad."""
    calls: list[tuple[int, int]] = []
    for name in ("y.png", "z.png"):
        (folder / "triangle" / name).write_bytes(b"no image" + name.encode())
    source = load(folder)
    read(source.subset(range(10)))
    read(
        source.subset(range(10, 62)),
        on_bad="skip",
        progress=lambda done, total: calls.append((done, total)),
    )

    assert (52, 52) == calls[-1]
    assert {52} == {total for _, total in calls}
    assert sorted(calls) == calls


def test_progress_reaches_the_end_where_all_are_bad(tmp_path: Path, network: Counting) -> None:
    """No batch at all is still an end."""
    calls: list[tuple[int, int]] = []
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(name.encode())
    found = read(
        load_unlabelled(tmp_path),
        on_bad="skip",
        progress=lambda done, total: calls.append((done, total)),
    )

    assert (2, 2) == calls[-1]
    assert (0, 2) == (len(found), len(found.faults))
    assert (0, 192) == found.blocks[POOLED].shape


def test_progress_counts_each_pass_for_itself(folder: Path, network: Counting) -> None:
    """A second view of the images that could be read does not begin with the faults of the
    first."""
    (folder / "circle" / "05.png").write_bytes(b"")
    source, faults = load(folder), dict[int, Any]()
    runner = network.open(NETWORK, [POOLED], None)
    calls: list[tuple[int, int]] = []
    for _view in range(2):
        todo = [i for i in range(len(source)) if i not in faults]
        calls.clear()
        list(
            extraction.stream(
                source,
                todo,
                NETWORK,
                lambda: runner,
                faults,
                progress=lambda *done: calls.append(done),
            )
        )

    assert (59, 59) == calls[-1]
    assert max(calls) == calls[-1]


# ------------------------------------------------------------------------------------------- faults


@pytest.fixture
def spoiled(folder: Path) -> ImageSet:
    """60 images; three files are bad, two of them with the same bytes."""
    (folder / "circle" / "05.png").write_bytes(b"")
    for name in ("circle/06.png", "square/07.png"):
        (folder / name).write_bytes((folder / "triangle" / "00.png").read_bytes()[:60])
    return load(folder)


def test_stop_names_all_bad_images_after_the_good_ones_are_safe(
    spoiled: ImageSet, network: Counting
) -> None:
    """One message for all three; once they are mended, the others are not run again."""
    message = refusal(lambda: read(spoiled))

    for words in (
        "3 bad images",
        "circle/05.png (empty",
        "circle/06.png",
        "square/07.png",
        "--on-bad-image skip",
    ):
        assert words in message
    assert 57 == network.seen
    read(spoiled, on_bad="skip")
    assert 57 == network.seen


def test_skip_leaves_bad_images_out_of_everything(spoiled: ImageSet, network: Counting) -> None:
    """Rows, paths, labels and digests stay together without them; the faults name them."""
    found = read(spoiled, on_bad="skip")

    assert ["circle/05.png", "circle/06.png", "square/07.png"] == [
        fault.path for fault in found.faults
    ]
    assert "empty" == found.faults[0].kind
    assert 57 == len(found) == len(found.digests) == len(found.blocks[POOLED])
    assert images.digests(found.images) == list(found.digests)
    np.testing.assert_array_equal(own_rows(found.images), found.blocks[POOLED])
    assert [path.split("/")[0] for path in found.images.paths] == [
        found.images.classes[i] for i in found.images.labels
    ]


def test_a_missing_file_is_named(folder: Path, network: Counting) -> None:
    """Files that went after they were listed are named before anything is run."""
    source = load(folder)
    (folder / "circle" / "05.png").unlink()

    assert "circle/05.png" in refusal(lambda: read(source))
    assert 0 == network.seen


def test_a_network_that_gives_no_number_is_named_with_the_image(
    folder: Path, network: Counting
) -> None:
    """NaN never reaches the store; batches before it stay."""
    network.nan_from = 20
    source = load(folder)
    message = refusal(lambda: read(source))
    network.nan_from = -1
    seen = network.seen
    read(source)

    assert f"NaN for {source.paths[20]}" in message
    assert "--precision float32" in message
    assert 44 == network.seen - seen


def test_images_are_decoded_while_the_network_opens(
    folder: Path, network: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening waits here for the first picture, and both get on."""
    begun = threading.Event()
    plain = decode.to_input

    def noticed(data: bytes, pre: Preprocess) -> NDArray[np.uint8]:
        begun.set()
        return plain(data, pre)

    def opening(*given: Any, **how: Any) -> engine.Runner:
        assert begun.wait(60)
        return network.open(*given, **how)

    monkeypatch.setattr(decode, "to_input", noticed)
    monkeypatch.setattr(engine, "open_runner", opening)

    assert 60 == len(read(load(folder)))


def test_a_network_that_cannot_be_opened_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own error comes out, though images are being decoded by then; the next call works."""

    def opening(*_given: Any, **_how: Any) -> engine.Runner:
        raise UserError("the disk is full", where="cache")

    monkeypatch.setattr(engine, "open_runner", opening)
    assert "the disk is full" in refusal(lambda: read(load(folder)))
    monkeypatch.setattr(engine, "open_runner", Counting().open)
    assert 60 == len(read(load(folder)))


def test_what_was_done_before_an_interrupt_stays(folder: Path, network: Counting) -> None:
    """Ctrl-C in the fourth batch: the three before it are not run again."""

    def interrupt() -> None:
        if network.seen > 48:
            raise KeyboardInterrupt

    network.after = interrupt
    with pytest.raises(KeyboardInterrupt):
        read(load(folder))
    network.after = lambda: None
    network.seen = 0
    read(load(folder))

    assert 12 == network.seen


# -------------------------------------------------------------------------------- files that change


def test_a_file_that_changes_after_its_digest_is_noticed(folder: Path, network: Counting) -> None:
    """Features of the new bytes are never stored under the old digest; the message names the file;
    the next run works."""
    source = load(folder)
    known = images.digests(source)
    other = (folder / "square" / "19.png").read_bytes()
    (folder / "circle" / "03.png").write_bytes(other)
    message = refusal(lambda: read(source, known=known))

    assert "circle/03.png" in message
    assert "changed" in message
    found = read(load(folder))
    np.testing.assert_array_equal(own_rows(found.images), found.blocks[POOLED])
    store = Store()
    assert [-1] == store.find(
        store.space(extraction.about(NETWORK, POOLED, "torch", "float32", ""), 192), [known[3]]
    ).tolist()
    store.close()


def test_a_file_that_changes_while_others_are_read_is_noticed(
    folder: Path, network: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last image is replaced as the first batch runs; what was run before is kept."""
    monkeypatch.setattr(extraction, "AHEAD", 1)
    source = load(folder)

    def replace_the_last() -> None:
        (folder / source.paths[-1]).write_bytes((folder / source.paths[0]).read_bytes())

    network.after = replace_the_last

    assert source.paths[-1] in refusal(lambda: read(source))
    store = Store()
    assert [16] <= [space["rows"] for space in store.summary()]
    store.close()


def test_a_change_that_keeps_size_and_time_is_noticed_and_forgotten(
    folder: Path, network: Counting
) -> None:
    """The digest remembered for a path is dropped when the bytes turn out to be others: the same
    command then goes on."""
    path = folder / "circle" / "03.png"
    long_ago = 1_600_000_000 * 10**9
    first = b"P6 2 2 255 " + bytes(range(12))
    path.write_bytes(first)
    os.utime(path, ns=(long_ago, long_ago))
    source = load(folder)
    store = Store()
    old = extraction.digests(source, store)[3]
    store.close()
    path.write_bytes(first[:-1] + b"\xff")
    os.utime(path, ns=(long_ago, long_ago))

    assert "circle/03.png" in refusal(lambda: read(source))
    found = read(source)
    assert old != found.digests[3]
    np.testing.assert_array_equal(own_rows(source), found.blocks[POOLED])


def test_known_files_are_not_read_for_their_digest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By path, size and time; files written this very moment are, since they may change within the
    clock's grain."""
    for path in folder.rglob("*.png"):
        os.utime(path, (1_600_000_000, 1_600_000_000))
    os.utime(folder / "circle" / "00.png")
    source, store = load(folder), Store()
    first = extraction.digests(source, store)
    reads: list[str] = []
    original = ImageSet.read

    def counted(self: ImageSet, i: int) -> bytes:
        reads.append(self.paths[i])
        return original(self, i)

    monkeypatch.setattr(ImageSet, "read", counted)
    again = extraction.digests(source, store)
    store.close()

    assert first == again
    assert ["circle/00.png"] == reads


def test_images_in_memory_are_read_like_files(network: Counting) -> None:
    """A named set has no files to remember; its bytes decide as well."""
    source = load("sklearn:digits").subset(range(20))
    found = read(source)

    np.testing.assert_array_equal(own_rows(source), found.blocks[POOLED])
    assert 20 == len(set(found.digests))


# --------------------------------------------------------------------------------------- neighbours


def by_hand(X: NDArray[np.float32], Q: NDArray[np.float32], k: int, own: bool) -> NDArray[np.int64]:
    """Positions by a full sort of all similarities, ties to the lower position."""

    def unit(Y: NDArray[np.float32]) -> NDArray[np.float32]:
        return Y / np.maximum(np.linalg.norm(Y, axis=1, keepdims=True), np.float32(1e-12))

    similarity = unit(Q) @ unit(X).T
    if own:
        np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1, kind="stable")[:, : min(k, len(X) - own)]


@settings(max_examples=60, deadline=None)
@given(
    X=arrays.arrays(
        np.float32,
        st.tuples(st.integers(2, 12), st.just(3)),
        elements=st.sampled_from([-2.0, -1.0, 0.0, 1.0]),
    ),
    k=st.integers(1, 15),
    block=st.sampled_from([1, 3, 1024]),
)
def test_neighbours_are_exact_whatever_the_ties(X: NDArray[np.float32], k: int, block: int) -> None:
    """Scores are those of a full sort; no row is its own neighbour; none comes twice; equal scores
    go by position."""
    scores, positions = knn.neighbours(X, k, block=block)
    n = len(X)

    assert (n, min(k, n - 1)) == positions.shape
    assert not (positions == np.arange(n)[:, None]).any()
    assert all(len(set(row)) == len(row) for row in positions.tolist())
    norm = np.maximum(np.linalg.norm(X, axis=1, keepdims=True), np.float32(1e-12))
    cosine = (X / norm) @ (X / norm).T
    np.testing.assert_allclose(np.take_along_axis(cosine, positions, 1), scores, atol=1e-6)
    np.testing.assert_allclose(
        np.take_along_axis(cosine, by_hand(X, X, k, own=True), 1), scores, atol=1e-6
    )
    assert (np.diff(scores, axis=1) <= 0).all()
    tied = np.diff(scores, axis=1) == 0
    assert (np.diff(positions, axis=1)[tied] > 0).all()


def test_neighbours_of_other_rows() -> None:
    """With queries nothing is left out: a row of the table is its own best neighbour."""
    random = np.random.default_rng(0)
    X, Q = (random.normal(size=(n, 16)).astype(np.float32) for n in (300, 40))
    Q[0] = 5 * X[17]
    scores, positions = knn.neighbours(X, 10, queries=Q, block=7)

    np.testing.assert_array_equal(by_hand(X, Q, 10, own=False), positions)
    assert 17 == positions[0, 0]
    assert 1 == pytest.approx(scores[0, 0], abs=1e-6)


def test_a_row_of_zeros_is_near_to_nothing() -> None:
    """Its scores are 0, no NaN; it is found behind what is nearer and before what points away."""
    X = np.array([[1, 0], [0, 0], [-1, 0], [2, 0]], np.float32)
    scores, positions = knn.neighbours(X, 3)

    assert [3, 1, 2] == positions[0].tolist()
    np.testing.assert_array_equal([1, 0, -1], scores[0])
    np.testing.assert_array_equal([0, 0, 0], scores[1])


# --------------------------------------------------------------------------------------------- save


@pytest.fixture
def labelled(tmp_path: Path) -> ImageSet:
    return ImageSet(
        "made", tmp_path, ("a/1.png", "猫/2.png", "x.png"), np.array([0, 1, -1]), ("a", "猫")
    )


def test_npz_holds_arrays_and_a_manifest_without_pickle(tmp_path: Path, labelled: ImageSet) -> None:
    """What is read back with `allow_pickle=False` is what was written."""
    X = np.arange(6, dtype=np.float32).reshape(3, 2)
    extraction.save(tmp_path / "new" / "f.npz", X, labelled, {"backbone": "größer"})

    with np.load(tmp_path / "new" / "f.npz", allow_pickle=False) as found:
        assert {"X", "y", "paths", "classes", "manifest"} == set(found.files)
        np.testing.assert_array_equal(X, found["X"])
        assert [0, 1, -1] == found["y"].tolist()
        assert list(labelled.paths) == found["paths"].tolist()
        assert ["a", "猫"] == found["classes"].tolist()
        assert {"backbone": "größer"} == json.loads(str(found["manifest"]))


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, labelled: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message in place of an ImportError, and no file."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = refusal(
        lambda: extraction.save(tmp_path / "f.parquet", np.zeros((3, 2), np.float32), labelled, {})
    )

    assert "pip install pyarrow" in message
    assert [] == list(tmp_path.iterdir())


def test_parquet_has_a_row_an_image(
    tmp_path: Path, labelled: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths, labels as words (none where there is none) and features of fixed width are handed to
    pyarrow."""
    written: dict[str, Any] = {}
    arrow, parquet = types.ModuleType("pyarrow"), types.ModuleType("pyarrow.parquet")

    class Table(dict[str, Any]):
        def replace_schema_metadata(self, about: dict[str, str]) -> Table:
            return Table(self, about=about)

    def write_table(table: Table, path: Path) -> None:
        written.update(table)
        path.write_bytes(b"PAR1")

    arrow.array = np.asarray  # type: ignore[attr-defined]
    arrow.FixedSizeListArray = types.SimpleNamespace(
        from_arrays=lambda flat, width: flat.reshape(-1, width)
    )  # type: ignore[attr-defined]
    arrow.table = Table  # type: ignore[attr-defined]
    parquet.write_table = write_table  # type: ignore[attr-defined]
    arrow.parquet = parquet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", arrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    X = np.arange(6, dtype=np.float32).reshape(3, 2)
    extraction.save(tmp_path / "f.parquet", X, labelled, {"n": 3})

    assert list(labelled.paths) == written["path"]
    assert ["a", "猫", None] == written["label"]
    np.testing.assert_array_equal(X, written["features"])
    assert {"n": 3} == json.loads(written["about"]["regraft"])
    assert ["f.parquet"] == [path.name for path in tmp_path.iterdir()]


def test_a_save_that_fails_leaves_the_old_file(
    tmp_path: Path, labelled: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a file is never seen: it is written beside the old one, and renamed when it is whole."""
    extraction.save(tmp_path / "f.npz", np.zeros((3, 2), np.float32), labelled, {})
    before = (tmp_path / "f.npz").read_bytes()

    def half(file: Any, **_arrays: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", half)
    assert "disk is full" in refusal(
        lambda: extraction.save(tmp_path / "f.npz", np.ones((3, 2), np.float32), labelled, {})
    )
    assert before == (tmp_path / "f.npz").read_bytes()
    assert ["f.npz"] == [path.name for path in tmp_path.iterdir()]
