"""Names of files as text."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune import names


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("photo (1).jpg", "photo (1).jpg"),
        ("Größe 写真\u3000🧑‍🚀.png", "Größe 写真\u3000🧑‍🚀.png"),
        ("two\nlines\r.png", r"two\x0alines\x0d.png"),
        (os.fsdecode(b"caf\xe9.jpg"), r"caf\xe9.jpg"),
        ("a\\b", r"a\\b"),
        ("\x1b[31mred\u202egpj", r"\x1b[31mred\xe2\x80\xaegpj"),
        (" a b ", r"\x20a b\x20"),
        ("\u3000", r"\xe3\x80\x80"),
    ],
)
def test_a_name_is_shown_in_printable_text(name: str, text: str) -> None:
    """What can be read stays, what cannot is written byte by byte."""
    assert text == names.shown(name)


@given(st.binary(max_size=20))
def test_every_name_can_be_read_back(data: bytes) -> None:
    """Whatever the bytes of a name are, the text that is shown gives them back, and encodes as
    UTF-8."""
    name = data.decode("utf-8", "surrogateescape")

    text = names.shown(name)

    assert name == names.meant(text)
    assert text.encode().decode() == text
    assert "\n" not in text


def test_half_a_surrogate_pair_is_shown_too() -> None:
    """Text that no file system gives, but JSON can, breaks nothing."""
    assert r"\xed\xa0\xbd" == names.shown("\ud83d")


@pytest.mark.parametrize("text", ["C:\\pictures\\x1.png", "\\", "end\\"])
def test_a_lone_backslash_stands_for_itself(text: str) -> None:
    r"""Only `\\` and `\xNN` mean something: other text typed by a person is left as it is."""
    assert text == names.meant(text)


def test_what_somebody_wrote_is_a_file_of_that_name_first(tmp_path: Path) -> None:
    """A name that exists as it is written stays; else the written form is read; the same holds for
    absolute paths."""
    for name in (r"lit\x41.png", "two\nlines.png"):
        (tmp_path / name).touch()

    assert r"lit\x41.png" == names.written(r"lit\x41.png", tmp_path)
    assert "two\nlines.png" == names.written(r"two\x0alines.png", tmp_path)
    assert str(tmp_path / "two\nlines.png") == names.written(str(tmp_path / r"two\x0alines.png"))


@given(st.binary(max_size=12))
def test_a_spelled_name_can_be_read_back(data: bytes) -> None:
    """Names of classes are printable text, and as different as their folders."""
    name = data.decode("utf-8", "surrogateescape")

    text = names.spelled(name)

    assert name == names.meant(text)
    assert text.encode().decode() == text
    assert text == names.spelled(text) or "\\" in text


def test_a_class_that_can_be_printed_keeps_its_name() -> None:
    r"""Blanks and a backslash change no name; only what would be read back as another name is
    written out."""
    assert ["a\\b", " cat ", "Größe", r"lit\\xe9", r"caf\xe9"] == [
        names.spelled(name)
        for name in ("a\\b", " cat ", "Größe", r"lit\xe9", os.fsdecode(b"caf\xe9"))
    ]


@given(st.binary(max_size=20))
def test_a_database_gives_the_name_back(data: bytes) -> None:
    """Text stays text, as in older databases, and what is not UTF-8 comes back from its bytes."""
    name = data.decode("utf-8", "surrogateescape")

    kept = names.to_database(name)

    assert name == names.from_database(kept)
    assert isinstance(kept, str) == (name.encode(errors="replace").decode() == name)


@pytest.mark.skipif(os.name == "nt", reason="needs bash")
@pytest.mark.parametrize(
    "name", ["plain/a-b.png", "with space", "it's", "caf\udce9 '\\", "two\nlines\x1b", "$HOME `x`"]
)
def test_a_typed_path_means_the_same_to_a_shell(name: str) -> None:
    """Commands that are printed for copying name the very path."""
    result = subprocess.run(
        ["bash", "-c", f"printf %s {names.typed(name)}"], capture_output=True, check=True
    )

    assert os.fsencode(name) == result.stdout
