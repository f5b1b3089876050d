"""Every file of a gallery, deleted, cut or changed: each command answers as before, or says what is
damaged and what helps."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import galleries
import pytest
from click.testing import CliRunner
from galleries import ENCODER, vector_of, words, write
from webs import ask

from finetune.errors import UserError
from retrieval import maintenance
from retrieval.cli import cli
from retrieval.gallery import Gallery
from retrieval.web import api, app
from retrieval.web.batching import QueryBatcher

NEEDED = (
    "gallery.sqlite",
    "segments/1.f32",
    "search/1.faiss",
    "network/model-1.safetensors",
    "network/whitening-1.safetensors",
)
READERS = (["query", "q.png"], ["info"], ["evaluate"], ["duplicates"])
WRITERS = (["add", "new.png"], ["sync"], ["remove", "a/0002.png"], ["compact"])


def flip(path: Path) -> None:
    """Change one byte that matters: in a database, of a path; elsewhere, in the middle."""
    data = bytearray(path.read_bytes())
    at = data.find(b"b/0003.png")
    data[len(data) // 2 if at < 0 else at + 5] ^= 1
    path.write_bytes(bytes(data))


HARMS: dict[str, Callable[[Path], None]] = {
    "deleted": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "changed": flip,
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a gallery that has every kind of file, its images, and others to ask with and
    to add."""
    base = tmp_path_factory.mktemp("damage")
    encoder = dataclasses.replace(
        ENCODER, save_weights=lambda path: path.write_bytes(b"weights" * 99)
    )
    with pytest.MonkeyPatch.context() as patch:
        galleries.install(patch.setattr)
        write(
            base,
            {
                f"photos/{'ab'[i % 2]}/{name}": word
                for i, (name, word) in enumerate(words(40).items())
            },
        )
        write(base, {"q.png": "near:word 3:q", "new.png": "brand new"})
        maintenance.build(
            [base / "photos"], base / "p.index", encoder, whiten=8, factory="PQ2x4", recall=0.1
        )
        yield base


@pytest.fixture
def base(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(template, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def run(command: list[str], *more: str) -> str:
    """What a command prints. Only a `UserError` may come out of it."""
    result = CliRunner().invoke(
        cli, [command[0], "p.index", *command[1:], *more], catch_exceptions=False
    )
    assert 0 == result.exit_code, result.output
    return result.output


def refusal(call: Callable[..., object], *args: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    return str(caught.value)


def test_the_template_has_every_file(template: Path) -> None:
    """No file of a gallery is left out of these tests."""
    found = {
        path.relative_to(template / "p.index").as_posix()
        for path in (template / "p.index").rglob("*")
        if path.is_file()
    }
    assert {*NEEDED, "manifest.json", "writer.lock"} == found


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", NEEDED)
def test_a_needed_file(base: Path, name: str, harm: str) -> None:
    """Every command refuses, names the file and what helps, and changes nothing; a build with
    --force mends it."""
    before = run(["query", "q.png"])
    HARMS[harm](base / "p.index" / name)
    harmed = {path: path.read_bytes() for path in (base / "p.index").rglob("*") if path.is_file()}
    for command in (*READERS, ["info", "--check"], *WRITERS):
        message = refusal(run, command)
        assert all(
            text in message
            for text in (f"p.index/{name}", "damaged", "retrieve build IMAGES -o GALLERY --force")
        ), command
    assert f"p.index/{name}" in refusal(app.serve, Path("p.index"))
    assert {path: data for path, data in harmed.items() if path.name != "writer.lock"} == {
        path: path.read_bytes() for path in harmed if path.name != "writer.lock"
    }
    encoder = dataclasses.replace(
        ENCODER, save_weights=lambda path: path.write_bytes(b"weights" * 99)
    )
    maintenance.build(
        ["photos"], Path("p.index"), encoder, whiten=8, factory="PQ2x4", recall=0.1, force=True
    )
    assert before == run(["query", "q.png"])
    run(["info", "--check"])


@pytest.mark.parametrize("harm", HARMS)
def test_the_copy_of_the_manifest(base: Path, harm: str) -> None:
    """Nothing depends on it: `info --check` says that it is missing or another one, and every
    change writes it again."""
    copy = base / "p.index" / "manifest.json"
    data, before = copy.read_bytes(), run(["duplicates"])
    for command in WRITERS:
        HARMS[harm](copy)
        message = refusal(run, ["info", "--check"])
        assert "the copy of the manifest is " in message
        assert "retrieve compact GALLERY" in message
        assert before == run(["duplicates"])
        run(["info"])
        run(["query", "q.png"])
        run(command)
        assert data == copy.read_bytes()


@pytest.mark.parametrize("harm", HARMS)
def test_the_lock(base: Path, harm: str) -> None:
    """Readers need no lock; a writer makes a new one, or says which file to remove."""
    lock = base / "p.index" / "writer.lock"
    before = run(["query", "q.png"])
    HARMS[harm](lock)
    assert before == run(["query", "q.png"])
    run(["info", "--check"])
    if harm in ("cut", "changed"):
        for command in WRITERS:
            message = refusal(run, command)
            assert all(
                text in message
                for text in (
                    str(lock.relative_to(base)),
                    "remove it while no other process is at work",
                )
            )
        lock.unlink()
    for command in WRITERS:
        run(command)


def test_a_byte_of_the_database(base: Path) -> None:
    """Whatever byte is changed, the answers are the same or there is a `UserError`: never a
    traceback or a wrong answer."""
    chance, path = random.Random(0), base / "p.index" / "gallery.sqlite"
    data = path.read_bytes()
    refused = 0
    expected = answers()
    for _ in range(120):
        at = chance.randrange(len(data))
        path.write_bytes(
            data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]
        )
        try:
            assert expected == answers(), at
        except UserError:
            refused += 1
        for end in ("-wal", "-shm"):
            path.with_name(path.name + end).unlink(missing_ok=True)
    assert refused > 10


def answers() -> object:
    with Gallery(Path("p.index")) as gallery:
        near = gallery.search(vector_of("word 3")[None, :8], 40)[0]
        about = gallery.info()
        ids = gallery.ids()
        return (
            [(hit.path, hit.score) for hit in near],
            [gallery.digest(n) for n in ids],
            about["root"],
            about["vector"],
        )


def test_a_database_that_goes_while_it_is_served(base: Path) -> None:
    """The page answers in words when its database is taken away, and again when it is back."""
    path = base / "p.index" / "gallery.sqlite"
    with Gallery(Path("p.index")) as gallery, QueryBatcher(gallery) as batcher:
        served = api.create(batcher)
        data = path.read_bytes()
        path.unlink()
        answer = ask(served, "GET", "/api/info")
        assert (503, True) == (
            answer.status_code,
            "damaged: this file is missing" in answer.json()["detail"],
        )
        path.write_bytes(data)
        assert 200 == ask(served, "GET", "/api/info").status_code


def test_an_index_without_images(base: Path) -> None:
    """An index whose images were all removed says so, with what fills it: it is not called damaged,
    or without classes."""
    run(["remove", "photos"])
    for more in ([], ["--labels", "none.csv"]):
        message = refusal(run, ["evaluate", *more])
        assert all(
            text in message
            for text in ("this gallery holds no images", "retrieve add", "retrieve sync")
        )
    assert "warning: this gallery holds no images" in run(["query", "q.png"])
    run(["compact"])
    run(["info", "--check"])
    assert "1 added; 1 images" in run(["add", "new.png"])
