"""The SVM baseline: what is chosen, inside which rows, and what is said when little can be
chosen."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score

from finetune import metrics
from finetune.errors import UserError
from finetune.heads import crossval, svm, tap_search
from finetune.heads.head import Head, KernelHead, softmax
from finetune.network import Tap

GOOD, POOR, WIDE = Tap("stage3"), Tap("pooled"), Tap("stage3", grid=3)
NAMES = ("ant", "bee", "cat")


def make(
    n: int = 150, seed: int = 0, classes: int = 3, signal: float = 1.2, wide: int = 30
) -> tuple[dict[Tap, Any], Any]:
    """A tap that tells the classes apart, one that does not, and a wide one that helps a little."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    centres = np.random.default_rng(1).standard_normal((classes, 8))
    good = rng.standard_normal((n, 8)) + signal * centres[y]
    poor = rng.standard_normal((n, 8))
    extra = np.concatenate(
        [0.5 * centres[y], np.zeros((n, wide - 8))], axis=1
    ) + rng.standard_normal((n, wide))
    return {tap: x.astype(np.float32) for tap, x in ((POOR, poor), (GOOD, good), (WIDE, extra))}, y


def choose(blocks: Any, y: Any, **how: Any) -> svm.SvmResult:
    names = NAMES if y.max() < 3 else tuple(map(str, range(int(y.max()) + 1)))
    return svm.choose(blocks, y, how.pop("classes", names), **{"default_taps": (POOR,), **how})


def test_the_tap_that_tells_the_classes_apart_is_chosen() -> None:
    """The useless one is not, and new rows are classified well."""
    blocks, y = make()
    result = choose(blocks, y)
    new, truth = make(seed=5)
    scores = result.head.scores([new[tap] for tap in result.head.taps])

    assert GOOD in result.head.taps
    assert accuracy_score(truth, scores.argmax(1)) > 0.85


def test_labels_without_signal_are_guessed() -> None:
    """Where the features say nothing, the cross-validated accuracy is that of guessing: nothing
    leaks from held-out rows."""
    blocks, y = make(n=300, signal=0.0)
    blocks = {
        POOR: blocks[POOR],
        GOOD: np.random.default_rng(9).standard_normal((300, 400)).astype(np.float32),
    }
    result = choose(blocks, y)

    assert 0.2 < result.cv_accuracy < 0.45


def test_out_of_fold_scores_are_those_of_machines_that_had_not_seen_the_row() -> None:
    """Their accuracy is the one reported, and lower than that on the rows of the fit."""
    blocks, y = make(signal=0.6)
    result = choose(blocks, y)
    own = result.head.scores([blocks[tap] for tap in result.head.taps])

    assert result.cv_accuracy == pytest.approx(np.mean(result.oof_scores.argmax(1) == y))
    assert np.mean(own.argmax(1) == y) > result.cv_accuracy


def test_groups_are_never_on_both_sides() -> None:
    """Copies of one image with a random label cannot be learned when they are one group; as single
    rows they can."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.standard_normal((60, 20)), 4, axis=0).astype(np.float32)
    y, groups = np.repeat(rng.integers(0, 3, 60), 4), np.repeat(np.arange(60), 4)

    assert choose({POOR: x}, y).cv_accuracy > 0.9
    assert choose({POOR: x}, y, groups=groups).cv_accuracy < 0.55


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [("linear", "svm"), ("logistic", "logistic"), ("rbf", "rbf-svm"), ("lssvm", "rbf-lssvm")],
)
def test_each_kernel_alone_gives_its_head(kernel: svm.Kernel, kind: str) -> None:
    """`kernels=` names the only one that is compared; the linear ones fold into `Head`, the others
    into `KernelHead`."""
    blocks, y = make(n=90)
    result = choose(blocks, y, kernels=(kernel,))

    assert kind == result.head.kind
    assert isinstance(result.head, KernelHead if kind.startswith("rbf") else Head)
    assert {kernel} == {one.kernel for one in result.candidates if "early" not in one.note}


def test_neighbours_are_measured_and_never_shipped() -> None:
    """k-NN stands among the candidates, whatever its accuracy, and is not the winner."""
    blocks, y = make(n=90)
    result = choose(blocks, y)

    assert [one.kernel for one in result.candidates].count("knn") == 1
    assert result.candidates[0].kernel != "knn"
    assert result.candidates[-1].kernel == "knn"


def test_probabilities_are_calibrated_on_held_out_scores() -> None:
    """The log loss of the out-of-fold probabilities is that of the best temperature, and beats
    overconfidence."""
    blocks, y = make(signal=0.5, n=300)
    result = choose(blocks, y)

    def loss(temperature: float) -> float:
        p = softmax(result.oof_scores, temperature)
        return float(-np.log(p[np.arange(len(y)), y]).mean())

    best = loss(result.head.temperature)
    assert best <= min(loss(result.head.temperature * f) for f in (0.8, 1.25)) + 1e-4
    assert best < loss(0.05)


def test_one_image_a_class_is_fitted_with_the_default_and_said() -> None:
    """Nothing can be held out: the policy's taps, C 1, no candidates, and a warning in words."""
    blocks, y = make(n=3)
    result = choose(blocks, y)

    assert (POOR,) == result.head.taps
    assert () == result.candidates
    assert "no cross-validation is possible" in result.warnings[0]


def test_two_images_a_class_are_cross_validated_in_two_folds() -> None:
    """Fewer folds than asked are said."""
    blocks, y = make(n=6)
    result = choose(blocks, y)

    assert "2 folds instead of 5" in " ".join(result.warnings)
    assert result.candidates


def test_a_class_of_one_image_is_named() -> None:
    """It can be learned but not judged."""
    blocks, y = make(n=61)
    y = np.where(np.arange(61) == 60, 3, y)
    result = choose(blocks, y, classes=(*NAMES, "lynx"))

    assert "'lynx'" in " ".join(result.warnings)
    assert len(result.head.classes) == 4


def test_an_edge_of_the_grid_is_said() -> None:
    """With a grid of the user's own, a best C at its end is a warning that names it."""
    blocks, y = make(signal=0.7)
    result = choose(blocks, y, grid=(1e-4, 3e-4), kernels=("linear",))

    assert "edge" in " ".join(result.warnings)
    assert {one.C for one in result.candidates if "early" not in one.note} <= {1e-4, 3e-4}


def test_small_classes_are_weighed_up() -> None:
    """From ten to one, each class weighs the same: the small one is found more often than without
    weights."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [300, 25])
    x = (rng.standard_normal((325, 10)) + 0.45 * y[:, None]).astype(np.float32)
    new = (rng.standard_normal((400, 10)) + 0.45).astype(np.float32)
    with_, without = (
        choose({POOR: x}, y, classes=("a", "b"), kernels=("linear",), class_weight=w)
        for w in ("auto", None)
    )

    assert with_.balanced
    assert not without.balanced
    found = [np.mean(one.head.scores([new]).argmax(1) == 1) for one in (with_, without)]
    assert found[0] > found[1] + 0.2


def test_many_rows_are_chosen_on_a_part_and_fitted_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The subset is said; scores of rows outside it are NaN."""
    monkeypatch.setattr(svm, "ROWS", 90)
    monkeypatch.setattr(tap_search, "MIDDLE_ROWS", 60)
    monkeypatch.setattr(tap_search, "LOOK_ROWS", 45)
    blocks, y = make(n=150)
    result = choose(blocks, y)

    assert "chosen on 90 of 150 images" in result.note
    assert 90 == np.isfinite(result.oof_scores).all(axis=1).sum()
    assert {45, 60, 90} == {one.n for one in result.candidates}
    assert 90 == result.candidates[0].n


@pytest.mark.parametrize("kernel", crossval.RBF)
def test_nystroem_agrees_with_the_exact_machine(
    kernel: svm.Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many landmarks as matter, the approximated RBF machine says the same."""
    blocks, y = make(n=240, signal=0.8)
    exact = choose(blocks, y, kernels=(kernel,)).head
    monkeypatch.setattr(svm, "EXACT", 100)
    monkeypatch.setattr(svm, "LANDMARKS", 200)
    near = choose(blocks, y, kernels=(kernel,)).head
    new, _ = make(n=300, seed=3, signal=0.8)

    assert isinstance(near, KernelHead)
    assert len(near.support) <= 202  # in proportion, class by class
    agree = [head.scores([new[tap] for tap in head.taps]).argmax(1) for head in (exact, near)]
    assert np.mean(agree[0] == agree[1]) > 0.95


@pytest.mark.parametrize("kernel", [kernel for kernel in svm.KERNELS if kernel != "knn"])
def test_refit_keeps_what_was_chosen(kernel: svm.Kernel) -> None:
    """Taps, kernel, C and temperature are the winner's; only the rows are new."""
    blocks, y = make(n=90)
    more, labels = make(n=120)
    result = choose(blocks, y, kernels=(kernel,))
    again = svm.refit(result, more, labels)

    assert result.head.kind == again.kind
    assert (result.head.taps, result.head.temperature) == (again.taps, again.temperature)
    new = [make(n=60, seed=8)[0][tap] for tap in again.taps]
    assert np.mean(again.scores(new).argmax(1) == result.head.scores(new).argmax(1)) > 0.8


def test_the_same_rows_give_the_same_head() -> None:
    """To the bit, with threads and all."""
    blocks, y = make(n=120)
    first, second = choose(blocks, y), choose(blocks, y)

    assert all(
        np.array_equal(a, b)
        for a, b in zip(first.head.arrays().values(), second.head.arrays().values(), strict=True)
    )
    assert [dataclasses.replace(c, seconds=0) for c in first.candidates] == [
        dataclasses.replace(c, seconds=0) for c in second.candidates
    ]


def test_quick_says_which_rows_are_right() -> None:
    """One trial, as good as the best taps; None where nothing can be held out."""
    blocks, y = make()
    trial = svm.quick(blocks, y)

    assert trial is not None
    assert trial.losses.shape == trial.right.shape == y.shape
    assert trial.right.mean() > 0.8
    assert svm.quick({POOR: blocks[POOR][:3]}, y[:3]) is None


def test_the_closed_form_is_the_ridge_solution() -> None:
    """Held-out scores of squared errors are those of scikit-learn's kernel ridge, fitted fold by
    fold."""
    from sklearn.kernel_ridge import KernelRidge

    blocks, y = make(n=60)
    fold, _ = crossval.assign_folds(y, None, 3, 0, NAMES)
    assert fold is not None
    rows = crossval.Rows(blocks, y, np.arange(60), fold, None)
    setting = crossval.Setting((GOOD,), "linear")
    (trial,) = rows.least_squares(setting, [2.0])
    K, target = rows.kernel(setting).astype(float), np.where(y[:, None] == np.arange(3), 1, -1)
    for k in range(3):
        own, held = fold != k, fold == k
        other = KernelRidge(alpha=1 / 4, kernel="precomputed").fit(K[np.ix_(own, own)], target[own])
        np.testing.assert_allclose(
            trial.scores[held], other.predict(K[np.ix_(held, own)]), atol=1e-3
        )


def test_the_fitted_closed_form_is_what_was_compared() -> None:
    """`fit_head` with squared errors and class weights gives the scores of the kernel ridge
    solution, in both forms."""
    blocks, y = make(n=90)
    weights = crossval.class_weights(np.where(np.arange(90) < 50, 0, y))
    setting = crossval.Setting((GOOD,), "lssvm", 0.5)
    head = svm.fit_head(blocks, y, NAMES, setting, 3.0, weights, 1.0)
    rows = crossval.Rows(blocks, y, np.arange(90), np.zeros(90, np.int64), None)
    K = rows.kernel(setting).astype(float)
    coef = np.linalg.solve(
        K + np.diag(1 / (6 * weights)), np.where(y[:, None] == np.arange(3), 1.0, -1.0)
    )

    np.testing.assert_allclose(head.scores([blocks[GOOD]]), K @ coef, atol=1e-3)


def test_calibration_is_the_best_of_all_temperatures() -> None:
    """The bisected temperature is that of a fine search; it sharpens and flattens."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 500)
    z = 3 * rng.standard_normal((500, 4)) + 2 * (y[:, None] == np.arange(4))
    for factor in (0.1, 1.0, 20.0):
        temperature, losses = crossval.calibrate(factor * z, y)
        others = [
            -np.log(softmax(factor * z, t)[np.arange(500), y].astype(float)).mean()
            for t in temperature * np.linspace(0.7, 1.4, 29)
        ]
        assert losses.mean() <= min(others) + 1e-4


def test_logistic_scores_need_no_temperature() -> None:
    """The scores of a logistic regression on many rows are log-odds: the temperature is about 1."""
    blocks, y = make(n=900, signal=0.5)
    x = blocks[GOOD] / np.linalg.norm(blocks[GOOD], axis=1, keepdims=True)
    temperature, _ = crossval.calibrate(LogisticRegression(C=10).fit(x, y).decision_function(x), y)

    assert 0.8 < temperature < 1.25


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": ("one",)}, "nothing to tell apart"),
        ({"classes": (*NAMES, "dog")}, "no image of class 'dog'"),
        ({"kernels": ("knn",)}, "none that ships"),
        ({"kernels": ("poly",)}, "none that ships"),
        ({"default_taps": (Tap("fc7"),)}, "no features of tap fc7"),
        ({"groups": np.zeros(5)}, "5 groups for 150 images"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change: dict[str, Any], words: str) -> None:
    """A `UserError` that names what and where."""
    blocks, y = make()
    with pytest.raises(UserError, match=words):
        choose(blocks, y, **change)


def test_features_that_are_not_numbers_are_refused() -> None:
    """NaN in one tap names the tap."""
    blocks, y = make()
    blocks[GOOD][3, 2] = np.nan
    with pytest.raises(UserError, match=r"stage3: not every feature is a finite number"):
        choose(blocks, y)


def test_a_named_c_is_kept_where_nothing_can_be_held_out() -> None:
    """With one image a class the first C that was named is taken, told, and taken again on more
    rows."""
    blocks, y = make()
    first = np.array([int(np.flatnonzero(y == c)[0]) for c in np.unique(y)])
    few = {tap: block[first] for tap, block in blocks.items()}
    result = choose(few, y[first], grid=[30.0])
    again, other = (
        svm.refit(dataclasses.replace(result, C=C), few, y[first]) for C in (30.0, 0.01)
    )

    assert any("C = 30" in text for text in result.warnings)
    assert np.allclose(again.weight, result.head.weight, atol=1e-4)
    assert not np.allclose(other.weight, result.head.weight, atol=1e-2)
    assert np.array_equal(svm.refit(result, few, y[first]).weight, again.weight)


def test_probabilities_of_few_rows_are_not_certain() -> None:
    """Rows that are all right out of fold, by equal margins, are as sure as their number allows:
    one image's doubt, spread over the classes. The rule is that of the fine-tuned model."""
    y = np.arange(72) % 2
    z = np.where(np.eye(2)[y] > 0, 1.0, -1.0)

    temperature, _ = crossval.calibrate(z, y)

    assert pytest.approx(metrics.fit_temperature(z, y), rel=1e-3) == temperature
    wrong = 1 - softmax(z, temperature)[np.arange(72), y].astype(float)
    assert pytest.approx((1 / 144) / (1 + 1 / 72), rel=0.01) == wrong.max()
