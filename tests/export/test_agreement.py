"""The comparison of an export with its run."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.export import agreement


@pytest.mark.parametrize(
    ("precision", "shift", "status"),
    [
        ("float32", 0.0, "pass"),
        ("float32", 9e-4, "pass"),
        ("float32", 2e-3, "fail"),
        ("bf16", 2e-3, "pass"),
    ],
)
def test_probabilities_have_to_be_the_same_in_float32(
    precision: str, shift: float, status: str
) -> None:
    """Beyond 1e-3 an export in float32 fails; a run in bf16 is rounded itself."""
    said = np.tile([0.7, 0.3], (10, 1))
    found = agreement.compare(said, said - [shift, -shift], precision)

    assert status == found.check().status


@pytest.mark.parametrize(("precision", "status"), [("float32", "fail"), ("bf16", "warn")])
def test_labels_have_to_be_equal(precision: str, status: str) -> None:
    """One of a hundred labels that differs fails, or warns and says what to do in bf16."""
    said = np.tile([0.5001, 0.4999], (100, 1))
    own = said.copy()
    own[7] = own[7, ::-1]
    check = agreement.compare(said, own, precision).check()

    assert status == check.status
    assert "99.0% of 100" in check.value
