"""Names of files as text."""

from __future__ import annotations

import os

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
    ],
)
def test_a_name_is_shown_in_printable_text(name: str, text: str) -> None:
    """What can be read stays, what cannot is written byte by byte."""
    assert text == names.shown(name)


@given(st.binary(max_size=20))
def test_every_name_can_be_read_back(data: bytes) -> None:
    """Whatever the bytes of a name are, the text that is shown gives them back, and encodes as UTF-8."""
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
