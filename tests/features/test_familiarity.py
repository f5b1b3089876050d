"""How unlike the training images an image is: percentiles that are honest, bounded and durable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.features import familiarity
from finetune.features.familiarity import Familiarity


def draw(n: int, seed: int, width: int = 40) -> NDArray[np.float32]:
    """Features of three kinds of images, which vary in ten directions of `width`."""
    rng = np.random.default_rng(seed)
    x = np.eye(3, width)[rng.integers(0, 3, n)] * 5 + 0.01 * rng.normal(size=(n, width))
    x[:, 3:13] += rng.normal(size=(n, 10))
    return x.astype(np.float32)


@pytest.fixture(scope="module")
def known() -> Familiarity:
    found = familiarity.fit([draw(400, 0)])
    assert found is not None
    return found


def test_new_images_of_the_same_kind_are_as_far_as_training_images(known: Familiarity) -> None:
    """At level p a share of about 1 − p is above, or a little less, though the components were
    fitted on the training images: they are held out of their own."""
    fresh = known.percentile([draw(2000, 1)])

    assert float((fresh > 0.9).mean()) == pytest.approx(0.1, abs=0.05)
    assert 0.3 < float((fresh > 0.5).mean()) < 0.55


def test_another_direction_counts_although_the_cosine_is_high(known: Familiarity) -> None:
    """A step where no training image varies is noticed; the same step where all vary is not."""
    x = draw(100, 2)
    off, along = x.copy(), x.copy()
    off[:, 30] += 2
    along[:, 5] += 0.5
    cosine = np.einsum("ij,ij->i", x, off) / np.linalg.norm(x, axis=1) / np.linalg.norm(off, axis=1)

    assert cosine.mean() > 0.9
    assert (known.percentile([off]) > familiarity.LEVEL).mean() > 0.95
    assert (known.percentile([along]) > familiarity.LEVEL).mean() < 0.15


def test_copies_of_training_images_do_not_make_all_others_strange() -> None:
    """With every image there twice, and the pairs as groups, new images are no stranger than
    before."""
    twice = np.repeat(draw(200, 0), 2, axis=0)
    found = familiarity.fit([twice], np.arange(400) // 2)
    assert found is not None

    assert float((found.percentile([draw(2000, 1)]) > 0.9).mean()) < 0.2


def test_nothing_to_hold_out_is_nothing_known() -> None:
    """One group, or one image: None."""
    assert familiarity.fit([draw(5, 0)], np.zeros(5, np.int64)) is None
    assert familiarity.fit([draw(1, 0)]) is None


@pytest.mark.parametrize("n", [2, 3, 7])
def test_few_images_are_enough(n: int) -> None:
    """Two are the least; percentiles are finite."""
    found = familiarity.fit([draw(n, 0)])
    assert found is not None

    assert np.isfinite(found.percentile([draw(5, 1)])).all()


def test_equal_images_are_no_fault() -> None:
    """Features without any variance give numbers, too."""
    found = familiarity.fit([np.ones((10, 4), np.float32)])
    assert found is not None

    assert np.isfinite(found.percentile([np.zeros((5, 4), np.float32)])).all()


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more images a seeded draw is kept, the same every time."""
    monkeypatch.setattr(familiarity, "MOST_ROWS", 50)
    monkeypatch.setattr(familiarity, "MOST_COMPONENTS", 8)
    one, two = (familiarity.fit([draw(400, 0)]) for _ in range(2))
    assert one is not None and two is not None  # noqa: PT018 (for the types)

    assert (50, 8) == one.rows.shape
    assert np.array_equal(one.rows, two.rows)


def test_it_comes_back_from_its_file(known: Familiarity, tmp_path: Path) -> None:
    """The same percentiles; None where there is no file; damage and another width are named."""
    familiarity.save(tmp_path, known)
    again = familiarity.load(tmp_path, 40)
    assert again is not None

    assert np.array_equal(known.percentile([draw(9, 3)]), again.percentile([draw(9, 3)]))
    assert familiarity.load(tmp_path / "none", 40) is None
    with pytest.raises(UserError, match="another shape"):
        familiarity.load(tmp_path, 41)
    (tmp_path / familiarity.FILE).write_bytes(b"no tensors")
    with pytest.raises(UserError, match="--force"):
        familiarity.load(tmp_path, 40)
