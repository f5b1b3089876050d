"""Metrics: by hand, against scikit-learn, and by what must hold for any input."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics as reference

from finetune import metrics
from finetune.errors import UserError

# Ten images of three classes, small enough for paper.
#   class 0: 4 images, 3 right, 1 taken for class 1
#   class 1: 4 images, 2 right, 2 taken for class 0
#   class 2: 2 images, both right
Y = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
PREDICTED = np.array([0, 0, 0, 1, 1, 1, 0, 0, 2, 2])


def random_case(
    seed: int, n: int = 200, n_classes: int = 7
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, n_classes, n)
    scores = rng.normal(size=(n, n_classes)) + 1.5 * np.eye(n_classes)[y]
    e = np.exp(scores)
    return y, e / e.sum(axis=1, keepdims=True)


def test_the_confusion_matrix_counts_true_rows_and_predicted_columns() -> None:
    """Rows are the true class, columns the predicted one."""
    expected = [[3, 1, 0], [2, 2, 0], [0, 0, 2]]

    assert expected == metrics.confusion(Y, PREDICTED, 3).tolist()


def test_per_class_rates_by_hand() -> None:
    """Precision, recall, F1, support and predictions of the ten images, computed on paper."""
    rates = metrics.per_class(metrics.confusion(Y, PREDICTED, 3))

    assert [3 / 5, 2 / 3, 1.0] == rates.precision.tolist()
    assert [3 / 4, 2 / 4, 1.0] == rates.recall.tolist()
    assert pytest.approx([6 / 9, 4 / 7, 1.0]) == rates.f1.tolist()
    assert [4, 4, 2] == rates.support.tolist()
    assert [5, 3, 2] == rates.predicted.tolist()


def test_averages_by_hand() -> None:
    """Balanced accuracy is the mean recall, macro-F1 the mean F1, the majority baseline the most
    common class."""
    assert pytest.approx((3 / 4 + 2 / 4 + 1) / 3) == metrics.balanced_accuracy(Y, PREDICTED, 3)
    assert pytest.approx((6 / 9 + 4 / 7 + 1) / 3) == metrics.macro_f1(Y, PREDICTED, 3)
    assert 0.4 == metrics.majority(Y)


def test_a_class_without_images_does_not_move_the_averages() -> None:
    """A class absent from the labels leaves the averages alone, even where the model predicts
    it."""
    predicted = PREDICTED.copy()
    predicted[0] = 5  # a class that no image has

    rates = metrics.per_class(metrics.confusion(Y, predicted, 9))

    assert metrics.balanced_accuracy(Y, PREDICTED, 3) == metrics.balanced_accuracy(Y, PREDICTED, 9)
    assert metrics.macro_f1(Y, PREDICTED, 3) == metrics.macro_f1(Y, PREDICTED, 9)
    assert pytest.approx((2 / 4 + 2 / 4 + 1) / 3) == metrics.balanced_accuracy(Y, predicted, 9)
    assert (0, 1, 0.0, 0.0) == (rates.support[5], rates.predicted[5], rates.recall[5], rates.f1[5])


@pytest.mark.parametrize("seed", range(5))
def test_class_averages_agree_with_scikit_learn(seed: int) -> None:
    """On random cases with missing classes every per-class number is scikit-learn's."""
    y, probabilities = random_case(seed, n=60, n_classes=12)
    y = y % 9  # classes 9, 10, 11 are predicted at times, and never true
    predicted, present = probabilities.argmax(axis=1), np.unique(y)

    counts = metrics.confusion(y, predicted, 12)
    rates = metrics.per_class(counts)
    wanted = reference.precision_recall_fscore_support(
        y, predicted, labels=range(12), zero_division=0
    )

    assert reference.confusion_matrix(y, predicted, labels=range(12)).tolist() == counts.tolist()
    for expected, actual in zip(
        wanted, (rates.precision, rates.recall, rates.f1, rates.support), strict=True
    ):
        np.testing.assert_allclose(actual, expected)
    assert pytest.approx(
        reference.recall_score(y, predicted, labels=present, average="macro")
    ) == metrics.balanced_accuracy(y, predicted, 12)
    assert pytest.approx(
        reference.f1_score(y, predicted, labels=present, average="macro")
    ) == metrics.macro_f1(y, predicted, 12)


@pytest.mark.parametrize("seed", range(5))
def test_probability_metrics_agree_with_scikit_learn(seed: int) -> None:
    """The log loss and top-k accuracy on random cases are scikit-learn's."""
    y, probabilities = random_case(seed)

    assert (
        pytest.approx(reference.log_loss(y, probabilities, labels=range(7)))
        == metrics.log_losses(y, probabilities).mean()
    )
    for k in (1, 2, 3, 7):
        expected = (
            reference.top_k_accuracy_score(y, probabilities, k=k, labels=range(7)) if k < 7 else 1.0
        )

        assert pytest.approx(expected) == metrics.top_k(y, probabilities, k).mean()


def test_top_one_is_argmax_where_probabilities_tie() -> None:
    """Ties are ranked by class index, so that top-1 never disagrees with the prediction."""
    probabilities = np.full((3, 3), 1 / 3)

    assert [True, False, False] == metrics.top_k(np.array([0, 1, 2]), probabilities, 1).tolist()
    assert [True, True, False] == metrics.top_k(np.array([0, 1, 2]), probabilities, 2).tolist()


def test_a_probability_of_zero_costs_a_finite_loss() -> None:
    """A true class with probability 0 costs −ln 1e-12, not infinity."""
    losses = metrics.log_losses(
        np.array([0, 1]), np.array([[0.0, 1.0], [0.0, 1.0]], dtype=np.float32)
    )

    assert pytest.approx([12 * math.log(10), 0.0]) == losses.tolist()


def test_calibration_error_by_hand() -> None:
    """Two bins in use: (0.6 … 0.667] holds 0.64, right half the time; (0.867 … 0.933] holds 0.9,
    always right."""
    probabilities = np.array([[0.64, 0.36], [0.64, 0.36], [0.9, 0.1], [0.9, 0.1]])
    y = np.array([0, 1, 0, 0])

    expected = 2 / 4 * abs(1 / 2 - 0.64) + 2 / 4 * abs(1 - 0.9)

    assert pytest.approx(expected) == metrics.calibration_error(y, probabilities)


def test_calibration_error_is_zero_for_certain_and_right() -> None:
    """Confidence 1 and always right is perfect calibration; confidence 1 and always wrong is the
    worst."""
    certain = np.eye(3)[[0, 1, 2]]

    assert 0.0 == metrics.calibration_error(np.array([0, 1, 2]), certain)
    assert 1.0 == metrics.calibration_error(np.array([1, 2, 0]), certain)


def test_a_confidence_on_a_bin_edge_falls_into_the_lower_bin() -> None:
    """Bins are open below and closed above, so 0.5 of 10 bins lies in (0.4, 0.5] together with
    0.45."""
    probabilities = np.array([[0.5, 0.3, 0.2], [0.45, 0.3, 0.25]])

    # In one bin the two gaps cancel to |1 − 0.95| / 2; in two bins they would add up to (0.5 +
    # 0.45) / 2.
    assert pytest.approx(0.05 / 2) == metrics.calibration_error(
        np.array([0, 1]), probabilities, bins=10
    )


def test_the_temperature_is_the_best_of_a_fine_grid() -> None:
    """No temperature on a grid gives a smaller log loss than the fitted one, and scaled scores
    scale it."""
    rng = np.random.default_rng(2)
    y = rng.integers(0, 4, 300)
    scores = 6 * (rng.normal(size=(300, 4)) + np.eye(4)[y])

    def loss(temperature: float) -> float:
        e = np.exp(scores / temperature)
        return float(metrics.log_losses(y, e / e.sum(axis=1, keepdims=True)).mean())

    fitted = metrics.fit_temperature(scores, y)

    assert loss(fitted) <= min(loss(t) for t in np.geomspace(0.1, 100, 200)) + 1e-5
    assert pytest.approx(10 * fitted, rel=1e-6) == metrics.fit_temperature(10 * scores, y)
    assert (
        metrics.calibration_error(
            y, np.exp(scores / fitted) / np.exp(scores / fitted).sum(axis=1, keepdims=True)
        )
        < 0.06
    )


def test_the_temperature_of_faultless_scores_stays_above_zero() -> None:
    """Where every image is right the doubt of one image remains: the confidence is near n / (n +
    1), not 1."""
    y = np.arange(50) % 2
    temperature = metrics.fit_temperature(np.eye(2)[y], y)

    assert pytest.approx(50.5 / 51, abs=1e-6) == 1 / (1 + math.exp(-1 / temperature))


def test_the_temperature_of_scores_that_know_nothing_is_large() -> None:
    """Scores without any relation to the labels are flattened."""
    rng = np.random.default_rng(3)

    assert metrics.fit_temperature(rng.normal(size=(2000, 3)), rng.integers(0, 3, 2000)) > 10


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (8, 10, 0.490162, 0.943318),
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (1, 1, 0.206549, 1.0),
    ],
)
def test_wilson_by_hand(hits: int, n: int, low: float, high: float) -> None:
    """The Wilson interval: 8 of 10 from the formula; at the ends z²/(n + z²), with z² =
    3.841459."""
    estimate = metrics.share(np.arange(n) < hits)

    assert (hits / n, n, "wilson") == (estimate.value, estimate.n, estimate.method)
    assert pytest.approx((low, high), abs=1e-6) == (estimate.low, estimate.high)


@given(st.lists(st.booleans(), min_size=1, max_size=80), st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_an_interval_holds_its_value_and_stays_in_range(right: list[bool], n_groups: int) -> None:
    """With or without groups: 0 ≤ low ≤ value ≤ high ≤ 1, and never without width."""
    groups = [i % n_groups for i in range(len(right))]
    for estimate in (metrics.share(np.array(right)), metrics.share(np.array(right), groups)):
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
        assert estimate.low < estimate.high


def test_groups_of_one_image_are_no_groups() -> None:
    """Where every image is its own group, the interval and the test are those without groups."""
    names = [f"g{i}" for i in range(10)]

    assert metrics.accuracy(Y, PREDICTED) == metrics.accuracy(Y, PREDICTED, names)
    assert metrics.paired(Y, PREDICTED, Y) == metrics.paired(Y, PREDICTED, Y, names)


def test_groups_widen_the_interval() -> None:
    """Images saved ten times over say as much as one: the interval is near that of the groups, not
    of the images."""
    right = np.repeat(np.arange(20) < 15, 10)
    groups = np.repeat(np.arange(20), 10)

    alone, grouped, few = (
        metrics.share(right),
        metrics.share(right, groups),
        metrics.share(np.arange(20) < 15),
    )

    assert 0.75 == alone.value == grouped.value
    assert grouped.high - grouped.low > 2.5 * (alone.high - alone.low)
    assert pytest.approx(few.high - few.low, rel=0.2) == grouped.high - grouped.low
    assert ("bootstrap over 20 groups", 200) == (grouped.method, grouped.n)


def test_one_group_admits_that_it_knows_nothing() -> None:
    """A single group gives the Wilson interval of one draw, not a width of zero."""
    estimate = metrics.share(np.array([1, 1, 1, 0]), ["a"] * 4)

    assert "wilson over 1 group" == estimate.method
    assert estimate.high - estimate.low > 0.7


def test_groups_that_are_all_right_keep_a_width() -> None:
    """Where resampling cannot move the value, Wilson's interval over the groups stands in."""
    estimate = metrics.share(np.ones(12), np.repeat([0, 1, 2], 4))

    assert (1.0, *metrics.wilson(1.0, 3), "wilson over 3 groups") == (
        estimate.value,
        estimate.low,
        estimate.high,
        estimate.method,
    )


def test_the_group_bootstrap_covers_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """With only 5 unequal groups the interval still holds the true accuracy in nine of ten
    simulated sets.

    Plain percentiles hold it in about 84 of 100.
    """
    monkeypatch.setattr(metrics, "RESAMPLES", 500)
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(120):
        sizes = rng.integers(2, 9, 5)
        rates = rng.beta(3.5, 1.5, 5)  # groups differ; the mean rate is 0.7
        right = np.concatenate(
            [rng.random(size) < rate for size, rate in zip(sizes, rates, strict=True)]
        )
        estimate = metrics.share(right, np.repeat(np.arange(5), sizes))
        held += estimate.low <= 0.7 <= estimate.high

    assert 0.88 <= held / 120 <= 0.99


@pytest.mark.parametrize(
    ("freedom", "expected"), [(4, 2.776), (9, 2.262), (29, 2.045), (199, 1.972)]
)
def test_student_quantiles_are_those_of_the_tables(freedom: int, expected: float) -> None:
    """The 97.5 % points of Student's t, from a printed table."""
    assert pytest.approx(expected, abs=0.01) == metrics.student(freedom)


def test_mcnemar_by_hand() -> None:
    """2 against 8 disputed images: 2 · (1 + 10 + 45) / 1024; none disputed, or equally many: 1."""
    assert pytest.approx(2 * 56 / 1024) == metrics.mcnemar_p(2, 8)
    assert metrics.mcnemar_p(8, 2) == metrics.mcnemar_p(2, 8)
    assert pytest.approx(2 / 1024) == metrics.mcnemar_p(0, 10)
    assert 1.0 == metrics.mcnemar_p(0, 0)
    assert 1.0 == metrics.mcnemar_p(5, 5)


def test_mcnemar_of_many_images_is_finite_and_small() -> None:
    """Counts far beyond the range of factorials give a probability near the normal
    approximation."""
    z = (5_300 - 5_000 - 1) / math.sqrt(10_300)

    assert pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02) == metrics.mcnemar_p(5_000, 5_300)


@given(st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=40, deadline=None)
def test_sign_flips_of_single_images_are_mcnemar(losses: int, wins: int) -> None:
    """With one image a group the permutation test is the exact McNemar test."""
    sums = np.array([-1] * losses + [1] * wins + [0] * 3)

    assert pytest.approx(metrics.mcnemar_p(losses, wins)) == metrics.sign_flip_p(sums)


def test_sign_flips_of_groups_by_hand() -> None:
    """Groups +3, +1, −2: of the 8 sign patterns, |±3 ±1 ±2| ≥ 2 holds for all but the two that give
    0."""
    assert pytest.approx(6 / 8) == metrics.sign_flip_p(np.array([3, 1, -2]))


def test_the_paired_comparison_by_hand() -> None:
    """Ten images, the second right on three more and wrong on one: difference 0.2, its error from
    the ten differences."""
    first = PREDICTED.copy()  # wrong on images 3, 6, 7
    second = Y.copy()
    second[0] = 2  # wrong on image 0 alone

    result = metrics.paired(Y, first, second)
    differences = np.array([-1, 0, 0, 1, 0, 0, 1, 1, 0, 0])

    assert 0.2 == result.difference.value
    assert (1, 3) == (result.first_only, result.second_only)
    assert pytest.approx(differences.std(ddof=1) / math.sqrt(10)) == result.standard_error
    assert pytest.approx(2 * (1 + 4) / 16) == result.p_value
    # Bonett and Price: (b+1)/(n+2) and (c+1)/(n+2) are 2/12 and 4/12.
    half = metrics.Z * math.sqrt((6 / 12 - (2 / 12) ** 2) / 12)
    assert pytest.approx((2 / 12 - half, 2 / 12 + half)) == (
        result.difference.low,
        result.difference.high,
    )
    assert ("bonett-price", "exact McNemar", 10) == (
        result.difference.method,
        result.test,
        result.difference.n,
    )


def test_swapping_the_two_classifiers_flips_the_sign_alone() -> None:
    """Comparing b with a is comparing a with b, mirrored."""
    y, probabilities = random_case(3)
    a, b = probabilities.argmax(axis=1), np.roll(probabilities, 1, axis=1).argmax(axis=1)
    groups = np.arange(200) // 4

    for names in (None, groups):
        there, back = metrics.paired(y, a, b, names), metrics.paired(y, b, a, names)
        assert -there.difference.value == back.difference.value
        assert pytest.approx(-there.difference.low) == back.difference.high
        assert there.standard_error == back.standard_error
        assert there.p_value == back.p_value


def test_equal_classifiers_differ_by_zero_with_a_width() -> None:
    """Two identical classifiers: difference 0, error 0, p = 1, and an interval that is not
    empty."""
    result = metrics.paired(Y, PREDICTED, PREDICTED)

    assert (0.0, 0.0, 1.0) == (result.difference.value, result.standard_error, result.p_value)
    assert result.difference.low < 0 < result.difference.high


def test_a_paired_comparison_over_groups_counts_groups() -> None:
    """A gain of ten images in a single group is not significant, however many images it holds."""
    y = np.zeros(40, dtype=int)
    groups = np.repeat(np.arange(8), 5)
    first = np.where(groups < 2, 1, 0)  # wrong on all ten images of groups 0 and 1
    result = metrics.paired(y, first, y, groups)

    assert metrics.mcnemar_p(0, 10) < 0.01
    assert 0.5 == result.p_value  # the two groups' signs: 4 patterns, 2 as extreme
    assert "exact sign flips of 8 groups" == result.test
    assert "bootstrap over 8 groups" == result.difference.method
    assert result.difference.low <= 0
    # Cluster-robust by hand: group sums of d − 0.25 are twice 3.75 and six times −1.25.
    assert (
        pytest.approx(math.sqrt(8 / 7 * (2 * 3.75**2 + 6 * 1.25**2)) / 40) == result.standard_error
    )


def test_one_group_never_decides_a_comparison() -> None:
    """With all images in one group the standard error is 1, the widest there is."""
    result = metrics.paired(
        np.zeros(5, dtype=int), np.ones(5, dtype=int), np.zeros(5, dtype=int), ["a"] * 5
    )

    assert (1.0, 1.0, 1.0) == (result.difference.value, result.standard_error, result.p_value)


def test_judge_gives_every_number_under_its_name() -> None:
    """All the parts agree with the functions that compute them one by one."""
    y, probabilities = random_case(0)
    predicted = probabilities.argmax(axis=1)

    result = metrics.judge(y, probabilities, list("abcdefg"))

    assert {"top1", "top5", "balanced", "macro_f1", "nll", "ece", "majority"} == set(result)
    assert metrics.accuracy(y, predicted) == result["top1"]
    assert metrics.share(metrics.top_k(y, probabilities, 5)) == result["top5"]
    for name, expected in (("balanced", metrics.balanced_accuracy), ("macro_f1", metrics.macro_f1)):
        estimate = result[name]
        assert isinstance(estimate, metrics.Estimate)
        assert pytest.approx(expected(y, predicted, 7)) == estimate.value
        assert estimate.low < estimate.value < estimate.high
        assert ("bootstrap", 200) == (estimate.method, estimate.n)
    assert pytest.approx(metrics.log_losses(y, probabilities).mean()) == result["nll"]
    assert metrics.calibration_error(y, probabilities) == result["ece"]
    assert metrics.majority(y) == result["majority"]


def test_judge_with_groups_says_so_in_every_method() -> None:
    """Every interval of a grouped set names the groups."""
    y, probabilities = random_case(0)

    result = metrics.judge(
        y, probabilities, list("abcdefg"), [f"animal {i // 10}" for i in range(200)]
    )

    assert {"bootstrap over 20 groups"} == {
        e.method for e in result.values() if isinstance(e, metrics.Estimate)
    }


def test_judge_of_a_perfect_classifier_keeps_a_width() -> None:
    """With every image right the class averages take Wilson's interval instead of an empty
    bootstrap."""
    result = metrics.judge(Y, np.eye(3)[Y], "abc")

    assert "top5" not in result
    for name in ("top1", "balanced", "macro_f1"):
        assert metrics.Estimate(1.0, *metrics.wilson(1.0, 10), 10, "wilson") == result[name]


def test_judge_gives_the_same_numbers_twice() -> None:
    """The bootstrap is seeded: two calls agree to the last bit, as JSON too."""
    y, probabilities = random_case(5)
    first, second = (
        metrics.judge(y, probabilities, "abcdefg", np.arange(200) // 3) for _ in range(2)
    )

    assert first == second
    text = json.dumps(
        {k: v.to_json() if isinstance(v, metrics.Estimate) else v for k, v in first.items()},
        allow_nan=False,
    )
    assert first["macro_f1"] == metrics.Estimate.from_json(json.loads(text)["macro_f1"])


def test_a_paired_result_is_plain_json() -> None:
    """`Paired.to_json` holds nothing but JSON values."""
    value = json.loads(json.dumps(metrics.paired(Y, PREDICTED, Y).to_json(), allow_nan=False))

    assert {"value", "low", "high", "n", "method"} == set(value["difference"])
    assert (0, 3) == (value["first_only"], value["second_only"])


@pytest.mark.parametrize(
    ("y", "probabilities", "message"),
    [
        ([], np.zeros((0, 2)), "no image"),
        ([0, 1], np.full((2, 3), 1 / 3), r"\(2, 3\) for 2 images of 2 classes"),
        ([0, 2], np.full((2, 2), 0.5), "a label 2 outside the 2 classes"),
        ([0, -1], np.full((2, 2), 0.5), "a label -1 outside"),
        ([0, 1], [[0.5, 0.5], [np.nan, 0.5]], "1 of 2 images .* first number 1"),
    ],
)
def test_judge_refuses_what_it_cannot_judge(
    y: list[int], probabilities: NDArray[np.float64], message: str
) -> None:
    """No images, shapes that do not fit, labels outside the classes and NaN are named, with the
    value."""
    with pytest.raises(UserError, match=message):
        metrics.judge(np.array(y), np.array(probabilities), ["a", "b"])


def test_groups_of_the_wrong_length_are_refused() -> None:
    """Every image needs one group."""
    with pytest.raises(UserError, match="3 groups for 10 images"):
        metrics.accuracy(Y, PREDICTED, ["a", "b", "c"])


def test_shuffled_labels_score_as_chance() -> None:
    """Predictions that know nothing of the labels reach about 1 / C on balanced classes, not
    more."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(5), 400)

    estimate = metrics.accuracy(y, rng.permutation(y))

    assert estimate.low < 0.2 < estimate.high
