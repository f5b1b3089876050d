"""Splits: stratified, seeded, groups whole, the test part untouched."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data import splits
from finetune.errors import UserError


def alone(n: int) -> np.ndarray:
    return np.arange(n)


def many(counts: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


def shares(labels: np.ndarray, split: np.ndarray, name: str) -> list[float]:
    return [float((split[labels == c] == name).mean()) for c in np.unique(labels)]


def test_class_numbers_come_from_the_training_part() -> None:
    """A class that val lacks keeps its number; one that only val has fails by name."""
    words, split = ["b", "c", "a", "c"], ["train", "train", "train", "val"]
    labels, classes = splits.class_numbers("set", words, split, ())
    assert (("a", "b", "c"), [1, 2, 0, 2]) == (classes, labels.tolist())
    with pytest.raises(UserError, match=r"without training images: 'x' \(1 image\)"):
        splits.class_numbers("set", ["a", "x"], ["train", "val"], ())


def test_known_classes_have_a_number_without_an_image() -> None:
    """An empty class folder is a class."""
    labels, classes = splits.class_numbers("set", ["c"], None, ["a", "c"])
    assert (("a", "c"), [1]) == (classes, labels.tolist())


def test_no_training_part_is_refused() -> None:
    """A set of which everything is validation or test cannot give class numbers."""
    with pytest.raises(UserError, match="no training images"):
        splits.class_numbers("set", ["a"], ["test"], ())


def test_components_join_over_both_keys() -> None:
    """a–b by content and b–c by group are one group; the empty text joins nothing."""
    found = splits.components(6, ["x", "x", "y", "z", "", ""], ["", "g", "g", "", "", ""])
    assert [0, 0, 0, 1, 2, 3] == found.tolist()


def test_components_of_a_long_chain() -> None:
    """A chain of pairs is one group, whatever the order of its links."""
    order = np.random.default_rng(0).permutation(2000)
    one = [str(i // 2) for i in order]
    two = [str((i + 1) // 2) for i in order]
    assert [0] == np.unique(splits.components(2000, one, two)).tolist()


def test_alike_lists_contents_that_come_again() -> None:
    """Positions with the same digest are listed together, positions without a digest never."""
    assert [[0, 2]] == splits.alike(["a", "b", "a", "", ""])


def test_torn_groups_are_found() -> None:
    """A group on both sides of a given split is named with its sides."""
    assert {"g": (1, "test, train")} == splits.torn(
        ["", "g", "g", "h", ""], np.array(["test", "train", "test", "val", "train"])
    )


def test_fractions_are_met_in_each_class() -> None:
    """20 % of each class is test, 15 % of the rest of each is validation."""
    labels = many([1000, 500, 300])
    split = splits.assign(labels, alone(1800), None, seed=0, test=0.2, val=0.15)
    assert [0.2] * 3 == shares(labels, split, "test")
    assert [0.12] * 3 == shares(labels, split, "val")


def test_small_validation_part_is_not_made() -> None:
    """Where 15 % are fewer than 100 images there is no validation part, and all of them train."""
    few = splits.assign(many([400, 420]), alone(820), None, seed=0, test=0.2, val=0.15)
    assert {"train": 656, "test": 164} == {
        name: int((few == name).sum()) for name in np.unique(few)
    }
    more = splits.assign(many([400, 440]), alone(840), None, seed=0, test=0.2, val=0.15)
    assert 101 == (more == "val").sum()


def test_seed_decides() -> None:
    """The same seed gives the same split, another one another; the test part does not depend on the
    validation part."""
    labels = many([600, 600])
    one, same, other, no_val = (
        splits.assign(labels, alone(1200), None, seed=seed, test=0.2, val=val)
        for seed, val in ((1, 0.15), (1, 0.15), (2, 0.15), (1, 0.0))
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert np.array_equal(one == "test", no_val == "test")


def test_given_parts_stay() -> None:
    """What came as test or val stays, and nothing is added to it."""
    given = np.array(["train"] * 1000 + ["val"] * 50 + ["test"] * 10)
    labels = np.arange(1060) % 2
    assert np.array_equal(
        given, splits.assign(labels, alone(1060), given, seed=0, test=0.2, val=0.15)
    )


def test_validation_is_carved_from_training_alone() -> None:
    """With a test part given, the validation images come from the training part."""
    given = np.array(["train"] * 1000 + ["test"] * 500)
    made = splits.assign(np.arange(1500) % 2, alone(1500), given, seed=0, test=0.2, val=0.15)
    assert ["test"] == np.unique(made[1000:]).tolist()
    assert 150 == (made == "val").sum()


def test_test_is_carved_from_training_alone() -> None:
    """With a validation part given, the test images come from the training part."""
    given = np.array(["train"] * 100 + ["val"] * 50)
    made = splits.assign(np.arange(150) % 2, alone(150), given, seed=0, test=0.2, val=0.15)
    assert ["val"] == np.unique(made[100:]).tolist()
    assert 20 == (made == "test").sum()


def test_small_classes_share_the_test_part() -> None:
    """With two images a class, a fifth of all is test: it does not round to nothing."""
    labels = many([2] * 50)
    split = splits.assign(labels, alone(100), None, seed=0, test=0.2, val=0.15)
    assert 20 == (split == "test").sum()
    assert all((split[labels == c] == "train").any() for c in range(50))


def test_single_image_trains() -> None:
    """A class of one image goes to the training part."""
    labels = many([1, 1, 1, 40])
    split = splits.assign(labels, alone(43), None, seed=3, test=0.5, val=0.0)
    assert ["train"] * 3 == split[:3].tolist()


def test_large_group_does_not_swallow_the_training_part() -> None:
    """A group with most of a class stays in training; small ones fill the test part."""
    groups = np.concatenate([np.zeros(80, dtype=int), np.arange(1, 21)])
    split = splits.assign(np.zeros(100, dtype=int), groups, None, seed=0, test=0.2, val=0.0)
    assert ["train"] == np.unique(split[:80]).tolist()
    assert 19 <= (split == "test").sum() <= 20


def test_thirds_are_tested_rather_than_nothing() -> None:
    """Where every group is too large for the fraction, one is taken as long as it brings the size
    nearer."""
    split = splits.assign(
        np.zeros(99, dtype=int), np.arange(99) // 33, None, seed=0, test=0.2, val=0.0
    )
    assert 33 == (split == "test").sum()


def test_class_in_one_group_trains() -> None:
    """A class whose images are all one group stays in the training part, however much the fraction
    wants."""
    labels, groups = many([3, 40]), np.concatenate([np.zeros(3, dtype=int), np.arange(1, 41)])
    for seed in range(5):
        assert ["train"] * 3 == splits.assign(labels, groups, None, seed=seed, test=0.6, val=0.0)[
            :3
        ].tolist()


def test_size_is_met_where_small_groups_can_meet_it() -> None:
    """A group that overshoots is left where smaller ones make up the fraction."""
    groups = np.concatenate([np.zeros(9, dtype=int), np.arange(1, 17)])
    for seed in range(20):
        assert (
            5
            == (
                splits.assign(np.zeros(25, dtype=int), groups, None, seed=seed, test=0.2, val=0.0)
                == "test"
            ).sum()
        )


def test_groups_are_drawn_whatever_their_size() -> None:
    """Large groups are not preferred: over seeds, the mean size of the groups in the test part is
    that of all groups."""
    sizes = np.array([1, 9] * 50)
    groups = np.repeat(np.arange(100), sizes)
    picked = [
        np.mean(
            sizes[
                np.unique(
                    groups[
                        splits.assign(
                            np.zeros(500, dtype=int), groups, None, seed=s, test=0.2, val=0.0
                        )
                        == "test"
                    ]
                )
            ]
        )
        for s in range(20)
    ]
    assert abs(np.mean(picked) - 5) < 1


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=120),
    st.integers(0, 5),
    st.sampled_from([0.1, 0.2, 0.5]),
)
def test_groups_stay_whole_and_classes_keep_training_images(
    items: list[tuple[int, int]], seed: int, fraction: float
) -> None:
    """Whatever the labels and groups: no group is torn, every class keeps a training image, the
    test part is not too large."""
    labels, groups = (np.array(column) for column in zip(*items, strict=True))
    split = splits.assign(labels, groups, None, seed=seed, test=fraction, val=0.15)
    assert all(len(np.unique(split[groups == g])) == 1 for g in np.unique(groups))
    assert all((split[labels == c] == "train").any() for c in np.unique(labels))
    largest = np.bincount(groups).max()
    assert (split == "test").sum() <= round(fraction * len(items)) + largest


def test_shots_are_nested_and_keep_the_test_part() -> None:
    """K images a class of the training part, those of a smaller K among them; all test images; no
    validation image."""
    labels = many([30, 30, 2])
    split = np.array((["train"] * 20 + ["val"] * 5 + ["test"] * 5) * 2 + ["train"] * 2)
    five, ten = (splits.shots(labels, split, k, seed=0) for k in (5, 10))
    assert {"train": 12, "test": 10} == {
        name: int((split[five] == name).sum()) for name in np.unique(split[five])
    }
    assert set(five) <= set(ten)
    assert [5, 5, 2] == np.bincount(labels[five][split[five] == "train"]).tolist()
    assert not np.array_equal(five, splits.shots(labels, split, 5, seed=1))


def test_hold_out_takes_from_the_pool_alone() -> None:
    """Positions held out are of the pool, the fraction of it, with whole groups."""
    labels, groups = many([100, 100]), np.arange(200) // 2
    pool = np.arange(40, 200)
    found = splits.hold_out(labels, groups, pool, 0.25, seed=0)
    assert set(found) <= set(pool)
    assert 36 <= len(found) <= 44
    assert all(2 == (groups[found] == g).sum() for g in groups[found])
