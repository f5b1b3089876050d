"""The file of an index: any damage is refused before a reader interprets it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import UserError
from retrieval.index import file, nearest
from retrieval.index.build import build
from retrieval.vectors import prepare


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a small index."""
    path = tmp_path_factory.mktemp("small") / "x.index"
    build(prepare(np.random.default_rng(0).normal(size=(200, 8))), factory="IVF4,Flat").save(path)
    return path.read_bytes()


@settings(max_examples=60, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused(
    small: bytes, tmp_path_factory: pytest.TempPathFactory, at: float, bit: int
) -> None:
    """Wherever it is, the file is not opened, and the message names it."""
    data = bytearray(small)
    data[int(at * len(data))] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped.index"
    path.write_bytes(data)

    assert "flipped.index" in refusal(lambda: nearest.load(path))


@settings(max_examples=30, deadline=None)
@given(left=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_short_is_refused(
    small: bytes, tmp_path_factory: pytest.TempPathFactory, left: float
) -> None:
    """At any length, with or without a check of the whole content."""
    path = tmp_path_factory.getbasetemp() / "short.index"
    path.write_bytes(small[: int(left * len(small))])

    for verify in (True, False):
        assert "short.index" in refusal(lambda verify=verify: nearest.load(path, verify=verify))  # type: ignore[misc]


def test_foreign_and_missing_files_are_refused(tmp_path: Path) -> None:
    """Nothing there, a folder, a text, and a file that faiss itself wrote without our
    description."""
    import faiss

    (tmp_path / "text").write_text("hello" * 100)
    faiss.write_index(faiss.IndexFlatIP(4), str(tmp_path / "faiss"))

    assert "no such index file" in refusal(lambda: nearest.load(tmp_path / "nothing"))
    assert "no such index file" in refusal(lambda: nearest.load(tmp_path))
    for name in ("text", "faiss"):
        assert ("no index file") in refusal(lambda name=name: nearest.load(tmp_path / name))  # type: ignore[misc]


@pytest.mark.parametrize("field", ["spec", "held", "payload bytes"])
def test_a_description_that_lacks_something_is_refused(
    small: bytes, tmp_path: Path, field: str
) -> None:
    """Also where its digest is right: another version may have written it."""
    path = tmp_path / "x.index"
    path.write_bytes(small)
    about = file.read(path)
    payload = small[: about["payload bytes"]]
    del about[field]
    text = json.dumps(about).encode()
    path.write_bytes(
        payload
        + text
        + hashlib.sha256(text).digest()
        + len(text).to_bytes(8, "little")
        + file.MAGIC
    )

    assert "damaged" in refusal(lambda: nearest.load(path))
