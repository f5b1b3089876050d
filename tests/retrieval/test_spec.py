"""Which type of index serves: decided on numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import UserError
from retrieval.index.spec import Spec, choose


def test_choose_takes_the_most_exact_kind_that_fits() -> None:
    """By size first, then by memory, down to codes alone; where nothing fits, the message says how
    much would."""
    assert "Flat" == choose(20_000, 1280)
    assert "SQfp16" == choose(60_000, 1280)
    assert choose(1_000_000, 1280).startswith("IVF4096,PQ256x4fs,Refine(SQfp16)")
    assert "Flat" == choose(20_000, 1280, 103)
    assert "SQfp16" == choose(20_000, 1280, 60)
    sizes = [choose(2_000_000, 128, memory) for memory in (None, 400, 200)]
    assert ["Refine(SQfp16)", "Refine(SQ8)", "PQ64x4fs"] == [name.split(",")[-1] for name in sizes]
    assert "SQ8" == choose(5000, 1280, 7)
    with pytest.raises(UserError, match="do not fit 10 MB") as caught:
        choose(1_000_000, 1280, 10)
    needed = float(str(caught.value).split("allow ")[1].split(" MB")[0])
    assert "PQ256x4fs" == choose(1_000_000, 1280, needed + 0.1).split(",")[-1]


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 10_000_000), d=st.integers(1, 4096), memory=st.none() | st.floats(0.01, 1e5)
)
def test_choose_never_exceeds_the_memory(n: int, d: int, memory: float | None) -> None:
    """Codes of the chosen kind fit; without a limit something is always chosen; PQ parts divide the
    width."""
    try:
        name = choose(n, d, memory)
    except UserError:
        assert memory is not None
        return
    parts = int(name.split("PQ")[1].split("x")[0]) if "PQ" in name else 0
    assert not parts or d % parts == 0
    per = {
        "Flat": 4.0 * d,
        "SQfp16": 2.0 * d,
        "SQ8": d,
        "Refine(SQfp16)": 2.0 * d,
        "Refine(SQ8)": d,
    }.get(name.split(",")[-1], 0)
    assert memory is None or n * per <= memory * 1e6


def test_files_keep_the_names_of_their_fields() -> None:
    """An index file holds the description under the names of version 0.1.0, and gives it back."""
    one = Spec("HNSW16", 9, 2, 3, 0.9, recall=0.95, search_parameters={"ef": 32})
    written = one.to_json()

    assert (0.9, {"ef": 32}) == (written["asked"], written["effort"])
    assert not {"target_recall", "search_parameters"} & set(written)
    assert one == Spec.from_json(written)
