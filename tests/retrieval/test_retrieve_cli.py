"""The `retrieve` command as a user meets it: what it prints, how it fails, how quickly it
answers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import click
import galleries
import odd
import pytest
from click.testing import CliRunner, Result
from galleries import ENCODER, words, write
from PIL import Image

from finetune.errors import UserError
from finetune.names import meant
from retrieval import contact_sheet, maintenance
from retrieval.cli import cli
from retrieval.hits import Answer, Hit

HEAVY = (
    "numpy",
    "torch",
    "faiss",
    "sklearn",
    "openvino",
    "PIL",
    "timm",
    "rich",
    "scipy",
    "pandas",
    "matplotlib",
)


def run(*words: object) -> Result:
    """A command in this process; a `UserError` comes out as it is."""
    result = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    assert 0 == result.exit_code, result.output
    return result


def process(
    words: Sequence[object], code: str = "", **how: Any
) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own; `code` runs at its end."""
    script = (
        f"import sys\nfrom retrieval.cli import main\ntry:\n    "
        f"main()\nfinally:\n    pass\n    {code or 'pass'}"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        **how,
    )


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index without a network: see `galleries`."""
    galleries.install(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path / "photos",
        {f"a/{name}": word for name, word in words(12).items()} | {"b/copy.png": "word 0"},
    )
    maintenance.build([tmp_path / "photos"], tmp_path / "photos.index", ENCODER)
    return tmp_path / "photos.index"


# --------------------------------------------------------------------------------------------- help


def test_help_imports_nothing_heavy() -> None:
    """The help of every command comes without any heavy library."""
    code = (
        "import sys; from click.testing import CliRunner; from retrieval.cli import cli\n"
        "for words in ([], *([name] for name in cli.commands)):\n"
        "    result = CliRunner().invoke(cli, [*words, '--help']); assert result.exit_code "
        "== 0, result.output\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "[]" == done.stdout.strip()


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_help_ends_with_an_example(name: str) -> None:
    """Every command's help ends its text with a line that works."""
    example = (cli.commands[name].help or "").partition("Example:")[2].split("\n")[1].split()
    assert ["retrieve", name] == example[:2]
    command = cli.commands[name]
    assert isinstance(command.make_context(name, example[2:]), click.Context)


# ------------------------------------------------------------------------------------------- output


def test_query_as_text(texts: Path) -> None:
    """A line a hit with its score; further paths of the same bytes below it; several queries in
    order."""
    write(texts.parent, {"near.png": "near:word 0:q"})
    lines = run("query", texts, "near.png", "photos/a/0001.png", "-k", 2).output.splitlines()
    assert "near.png" == lines[0]
    assert ["a/0000.png", "b/copy.png"] == [lines[1].split()[1], lines[2].split()[1]]
    assert "photos/a/0001.png" == lines[5]


def test_query_as_json(texts: Path) -> None:
    """A list of queries as they were typed, each with its hits: path and score."""
    write(texts.parent, {"q/near.png": "near:word 3:q"})
    found = json.loads(
        run(
            "query", texts, "q", texts.parent / "photos" / "a" / "0001.png", "-k", 3, "--json"
        ).stdout
    )
    assert ["q/near.png", f"{texts.parent}/photos/a/0001.png"] == [
        answer["query"] for answer in found
    ]
    assert "a/0003.png" == found[0]["hits"][0]["path"]
    assert [3, 3] == [len(answer["hits"]) for answer in found]
    scores = [hit["score"] for hit in found[0]["hits"]]
    assert sorted(scores, reverse=True) == scores


def test_a_query_for_each_word(texts: Path) -> None:
    """An image that is named twice is answered twice, in order and as it was typed; an empty word
    is refused."""
    write(texts.parent, {"near.png": "near:word 0:q"})
    words = ["near.png", "./near.png", "photos/a/0001.png", "near.png"]
    found = json.loads(run("query", texts, *words, "-k", 1, "--json").stdout)
    with pytest.raises(UserError, match="empty text"):
        run("query", texts, "")

    assert words == [answer["query"] for answer in found]


def test_query_options(texts: Path) -> None:
    """Threshold, average, expansion, self and collapse reach the search."""
    write(texts.parent, {"near.png": "near:word 0:q"})
    assert "nothing found" in run("query", texts, "photos/a/0001.png", "--threshold", 0.99).output
    assert (
        "a/0001.png"
        in run("query", texts, "photos/a/0001.png", "--threshold", 0.99, "--keep-self").output
    )
    (average,) = json.loads(
        run("query", texts, "near.png", "photos/a/0001.png", "--average", "--json").stdout
    )
    assert ("near.png + photos/a/0001.png", 10) == (average["query"], len(average["hits"]))
    assert (
        "a/0000.png"
        in run("query", texts, "near.png", "--expand", 2, "--collapse", 0.9, "-k", 1).output
    )


def test_changes_are_counted(texts: Path) -> None:
    """add, remove, sync and compact say in a line what they did, and the same as JSON."""
    write(texts.parent, {"more/new.png": "new"})
    assert "1 added; 13 images" in run("add", texts, "more").output
    assert "1 removed; 12 images" in run("remove", texts, "more/new.png").output
    assert "1 added, 13 unchanged; 13 images" in run("sync", texts).output
    assert {"moved": 0, "added": 0, "images": 13}.items() <= json.loads(
        run("compact", texts, "--json").stdout
    ).items()


def test_very_many_left_out(texts: Path) -> None:
    """Of very many unreadable files the first are named and the others counted; --json names them
    all."""
    write(texts.parent, {f"photos/bad{i:02d}.png": "broken" for i in range(23)})
    result = run("sync", texts, "--on-bad-image", "skip")
    assert "23 left out" in result.stdout
    assert [
        "left out: bad19.png: damaged (for the test)",
        "left out: 3 more; --json lists them all",
    ] == (result.stderr.splitlines()[-2:])
    assert 23 == len(
        json.loads(run("sync", texts, "--on-bad-image", "skip", "--json").stdout)["faults"]
    )


def test_what_is_left_out_is_named(texts: Path) -> None:
    """With skip, unreadable files are listed on stderr, and stdout stays clean."""
    write(texts.parent, {"photos/bad.png": "broken"})
    with pytest.raises(UserError, match=r"bad\.png"):
        run("sync", texts)
    result = run("sync", texts, "--on-bad-image", "skip", "--json")
    assert "left out: bad.png: damaged" in result.stderr
    assert ["bad.png"] == [fault["path"] for fault in json.loads(result.stdout)["faults"]]


def test_evaluate_and_duplicates(texts: Path) -> None:
    """The figures with their intervals; groups of the same images; both as JSON."""
    text = run("evaluate", texts, "-k", "1,3").output
    assert "queries on 12 images" in text
    assert "recall@3" in text
    judged = json.loads(run("evaluate", texts, "--json").stdout)
    assert {"value", "low", "high", "n"} <= set(judged["metrics"]["mAP"])
    (texts.parent / "pairs.csv").write_text("query,match\na/0001.png,a/0002.png\n")
    assert (
        1 == json.loads(run("evaluate", texts, "--labels", "pairs.csv", "--json").stdout)["queries"]
    )
    assert [["a/0000.png", "b/copy.png"]] == [
        group["paths"] for group in json.loads(run("duplicates", texts, "--json").stdout)
    ]
    assert "a/0000.png" in run("duplicates", texts, "--threshold", 0.99).output


def test_info(texts: Path) -> None:
    """`info` says what is there; with --check every byte is read."""
    text = run("info", texts, "--check").output
    assert "every byte is as it was written" in text
    assert 12 == json.loads(run("info", texts, "--json").stdout)["images"]
    assert "every byte" in json.loads(run("info", texts, "--check", "--json").stdout)["check"]
    (texts / "segments" / "1.f32").write_bytes(b"x")
    with pytest.raises(UserError, match="damaged"):
        run("info", texts)


def test_options_that_have_no_effect_together_are_refused(texts: Path) -> None:
    """--limit and --seed draw from the index's own images: with other queries they would say
    nothing."""
    write(texts.parent, {"q/a/near.png": "near:word 0:q"})
    (texts.parent / "pairs.csv").write_text("query,match\na/0001.png,a/0002.png\n")
    with pytest.raises(
        UserError, match=r"--limit: it draws(.|\n)*leave out --limit and --seed, or QUERIES"
    ):
        run("evaluate", texts, "q", "--seed", 1, "--limit", 3)
    with pytest.raises(UserError, match=r"--seed: it draws(.|\n)*those of the CSV"):
        run("evaluate", texts, "--labels", "pairs.csv", "--seed", 1)
    assert 3 == json.loads(run("evaluate", texts, "--limit", 3, "--json").stdout)["queries"]


def test_json_and_a_sheet_are_both_made(texts: Path) -> None:
    """`query --json --html`: one JSON value on stdout, and the page."""
    write(texts.parent, {"near.png": "near:word 0:q"})
    found = json.loads(run("query", texts, "near.png", "--json", "--html", "found.html").stdout)
    assert "near.png" == found[0]["query"]
    assert "near.png" in (texts.parent / "found.html").read_text(encoding="utf-8")


def test_stale_is_said(tmp_path: Path, texts: Path) -> None:
    """A query on an index whose run was trained again warns on stderr and still answers."""
    from retrieval import encode

    write(tmp_path / "run", {"run.json": "{}"})
    encoder = encode.dataclasses.replace(ENCODER, run=(str(tmp_path / "run"), "0" * 64))
    maintenance.build([tmp_path / "photos"], texts, encoder, force=True)
    result = run("query", texts, "photos/a/0001.png", "--json")
    assert "warning: stale" in result.stderr
    assert 1 == len(json.loads(result.stdout))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "photos", "-o", "photos.index"], "a gallery is here already"),
        (["build", "nothing", "-o", "x.index"], "no such file or folder"),
        (["build", "photos", "-o", "x.index", "--scales", "1,x"], "--scales"),
        (["build", "photos", "-o", "x.index", "--taps", "stage"], "no tap is written"),
        (
            ["build", "photos", "-o", "x.index", "--backbone", "nonet"],
            "no backbone is called 'nonet'",
        ),
        (["build", "photos", "-o", "x.index", "--run", "photos"], "photos"),
        (
            ["build", "photos", "-o", "x.index", "--run", "r", "--size", "64"],
            "a run brings its own network",
        ),
        (["query", "nothing.index", "photos"], "no such folder"),
        (["query", "photos", "photos"], "no gallery here"),
        (["query", "photos.index", "nothing.png"], "no such file"),
        (["evaluate", "photos.index", "-k", "0"], "no number of results"),
        (["evaluate", "photos.index", "photos", "--labels", "pairs.csv"], "leave out QUERIES"),
        (["evaluate", "photos.index", "--labels", "none.csv"], "none.csv"),
        (["remove", "photos.index", "nothing.png"], "not in the gallery"),
    ],
)
def test_what_a_user_can_mend(texts: Path, words: list[str], message: str) -> None:
    """Every mistake ends in a sentence that names it."""
    with pytest.raises(UserError) as caught:
        run(*words)
    assert message in str(caught.value)
    assert ["photos", "photos.index"] == sorted(path.name for path in texts.parent.iterdir())


CHANGES = (
    ("build", "photos", "-o", "photos.index", "--force"), ("add", "photos.index", "photos"),
    ("remove", "photos.index", "a/0001.png"), ("sync", "photos.index"), ("compact", "photos.index"),
)  # fmt: skip


@pytest.mark.parametrize("words", CHANGES)
def test_a_change_waits_for_another(
    texts: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command that changes an index has --wait, says on stderr that it waits, and names no
    option that it lacks."""
    from finetune import lock

    monkeypatch.setattr("retrieval.public._encoder", lambda *_: ENCODER)
    held = lock.take(texts / "writer.lock", texts)
    with pytest.raises(UserError, match="another process is at work here") as caught:
        run(*words)
    assert ("--wait SECONDS" in caught.value.fix, "--out" in caught.value.fix) == (True, False)
    assert ("-o" in caught.value.fix.split()) == (words[0] == "build")
    monkeypatch.setattr("finetune.lock.time.sleep", lambda _: held.close())
    result = run(*words, "--wait", 60, "--json")
    assert 1 == result.stderr.count("waiting")
    assert "images" in json.loads(result.stdout)


def test_files_that_went_are_marked(texts: Path) -> None:
    """A word behind the path, a field in JSON, a mark in the page, and one line on stderr that says
    what helps."""
    import os

    (texts.parent / "photos" / "a" / "0003.png").unlink()
    os.truncate(texts.parent / "photos" / "b" / "copy.png", 1)
    near = write(texts.parent, {"near.png": "near:word 0:q"}) / "near.png"
    result = run("query", texts, near, "-k", 12, "--html", "found.html", "--json")
    assert (
        "warning: of the files shown, 1 missing and 1 changed since: `retrieve sync "
        in result.stderr
    )
    assert 1 == result.stderr.count("\n")
    hits = {hit["path"]: hit for hit in json.loads(result.stdout)[0]["hits"]}
    assert [True] == [hit["missing"] for hit in hits.values() if "missing" in hit]
    assert (["a/0003.png"], ["b/copy.png"]) == (
        hits["a/0003.png"]["missing_paths"],
        hits["a/0000.png"]["changed_paths"],
    )
    text = run("query", texts, near, "-k", 12).stdout
    assert "a/0003.png  (missing)\n" in text
    assert "= b/copy.png  (changed since)\n" in text
    page = (texts.parent / "found.html").read_text()
    assert (1, 1) == (page.count(">missing<"), page.count(">changed since<"))
    again = run("duplicates", texts)
    assert "b/copy.png  (changed since)" in again.stdout
    assert "1 changed since" in again.stderr
    run("sync", texts)
    assert "" == run("query", texts, near, "-k", 12).stderr


def test_a_copy_is_marked_everywhere(texts: Path) -> None:
    """A copy of an image is found above any threshold: marked in the text, in JSON, and in the
    page."""
    write(texts.parent, {"mine.png": "word 5"})
    assert (
        "  1.000  a/0005.png  (the same file)"
        in run("query", texts, "mine.png", "--threshold", 0.95).output
    )
    found = json.loads(
        run("query", texts, "mine.png", "--threshold", 1, "--html", "found.html", "--json").stdout
    )
    assert [{"path": "a/0005.png", "score": 1.0, "id": 6, "same": True}] == found[0]["hits"]
    assert ">the same file<" in (texts.parent / "found.html").read_text()


# -------------------------------------------------------------------------------------------- sheet


class Page(HTMLParser):
    """Collects what a page would load, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_contact_sheet_is_self_contained(shapes: Path, tmp_path: Path) -> None:
    """The page holds its thumbnails, loads nothing, escapes names, and says what it cannot show."""
    hits = (Hit(1, "circle/00.png", 0.9, ("x & y.png",)), Hit(2, "<script>gone.png", 0.5))
    answers = [Answer("q", hits, (str(shapes / "square" / "00.png"),)), Answer("empty", ())]
    page = Page(contact_sheet.page(answers, shapes, "a < b"))
    assert 2 == len(page.loads)
    assert all(load.startswith("data:image/jpeg;base64,") for load in page.loads)
    assert "script" not in page.tags
    assert all(
        text in page.text
        for text in (
            "a < b",
            "x & y.png",
            "<script>gone.png",
            "cannot be shown",
            "Nothing was found",
        )
    )
    assert tmp_path.exists()


def test_the_sheet_is_written(texts: Path) -> None:
    """--html writes the page and says where; with --json both come."""
    result = run("query", texts, "photos/a/0001.png", "--html", "found.html", "--json")
    assert 1 == len(json.loads(result.stdout))
    assert "a/0000.png" in (texts.parent / "found.html").read_text()
    assert (
        "written to found.html"
        in run("query", texts, "photos/a/0001.png", "--html", "found.html").output
    )


# ------------------------------------------------------------------------------------ real networks


def test_the_whole_way(shapes: Path, tmp_path: Path) -> None:
    """With the real network: build, query, add, remove, sync, judge, compact; a cold query imports
    no torch."""
    import shutil

    photos, index = tmp_path / "photos", tmp_path / "photos.index"
    for kind in ("circle", "square"):
        for i in range(6):
            (photos / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(shapes / kind / f"{i:02d}.png", photos / kind / f"{i:02d}.png")
    assert "12 added; 12 images" in run("build", photos, "-o", index).output
    turned = tmp_path / "turned.jpg"
    with Image.open(photos / "circle" / "03.png") as image:
        image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(turned, quality=90)
    absent = [name for name in HEAVY if name not in ("numpy", "openvino", "PIL")]
    code = f"print([name for name in {absent!r} if name in sys.modules], file=sys.stderr)"
    done = process(["query", index, turned, "-k", 1, "--json"], code)
    assert (0, "[]") == (done.returncode, done.stderr.strip().splitlines()[-1])
    assert "circle/03.png" == json.loads(done.stdout)[0]["hits"][0]["path"]
    assert "1 added" in run("add", index, turned).output
    (photos / "circle" / "03.png").rename(photos / "square" / "moved.png")
    assert "1 moved, 12 unchanged" in run("sync", index).output
    assert "1 removed" in run("remove", index, turned).output
    assert (
        0.5 < json.loads(run("evaluate", index, "--json").stdout)["metrics"]["precision@1"]["value"]
    )
    run("compact", index)
    assert 12 == json.loads(run("info", index, "--check", "--json").stdout)["images"]


def test_exit_codes(tmp_path: Path) -> None:
    """The process ends with 1 for what can be mended and 2 for wrong usage, and prints no
    traceback."""
    for words_, code in (
        (["query", tmp_path / "no.index", "x"], 1),
        (["query"], 2),
        (["--version"], 0),
    ):
        done = process(words_)
        assert (code, False) == (done.returncode, "Traceback" in done.stderr)


# -------------------------------------------------------------------------------------------- names


def test_no_name_is_printed_raw(texts: Path) -> None:
    """Text, JSON and the contact sheet show any name in one printable form; markup in a name stays
    text."""
    odd.need(texts.parent / "try")
    write(
        texts.parent / "photos",
        {f"o\n/{name}": f"near:odd:{i}" for i, name in enumerate(odd.NAMES)},
    )
    (texts.parent / "photos" / "o\n" / "dangl\x1b.png").symlink_to("nowhere")
    result = run("sync", texts, "--on-bad-image", "skip")
    assert r"left out: o\x0a/dangl\x1b.png: unreadable" in result.stderr
    query = ["query", texts, "-k", 30, f"photos/o\n/{odd.NAMES[0]}"]

    text = run(*query).stdout + run("duplicates", texts, "--threshold", 0.9).stdout
    assert all(line.isprintable() for line in text.splitlines())
    hits = json.loads(run(*query, "--keep-self", "--json").stdout)[0]["hits"]
    assert {f"o\n/{name}" for name in odd.NAMES} <= {meant(hit["path"]) for hit in hits}
    groups = json.loads(run("duplicates", texts, "--threshold", 0.9, "--json").stdout)
    assert {f"o\n/{name}" for name in odd.NAMES} <= {
        meant(path) for group in groups for path in group["paths"]
    }
    run(*query, "--html", "found.html")
    page = Path("found.html").read_text(encoding="utf-8")
    assert (r"o\x0a/\x1b[31mred.png" in page, "<script>" in page, "\x1b" in page) == (
        True,
        False,
        False,
    )


def test_duplicates_that_went_are_marked_under_any_name(texts: Path) -> None:
    """A file that is not there any more is marked as such, whatever its name; the command to run
    can be copied."""
    odd.need(texts.parent / "try")
    write(texts.parent / "photos", {"two\nlines.png": "the same", "b/x.png": "the same"})
    maintenance.sync(texts)
    (texts.parent / "photos" / "two\nlines.png").unlink()
    spaced = texts.rename(texts.with_name("my photos.index"))
    result = run("duplicates", spaced)
    assert r"  two\x0alines.png  (missing)" in result.stdout.splitlines()
    assert f"`retrieve sync '{spaced}'`" in result.stderr


def test_info_is_for_people(texts: Path) -> None:
    """The text of `info` is a few lines: images, folder, vectors, network, search, size, and what
    made it."""
    lines = run("info", texts).stdout.splitlines()
    assert ["images", "folder", "vectors", "network", "search", "size", "made"] == [
        line.split()[0] for line in lines[1:]
    ]
    assert "  images   12 in 13 files" in lines
    assert "  search   exact: every vector is compared" in lines
