"""Options and recipe keys: each is obeyed, refused with a way on, or told in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import finetune
from finetune import analysis, cli, job, options, policy, recipe
from finetune.errors import UserError
from finetune.features.store import Store
from finetune.recipe import Recipe


def settings(*assignments: str) -> Recipe:
    return recipe.override(Recipe(), assignments)


def plan(about: Recipe, per_class: int = 10) -> policy.Plan:
    facts = policy.Facts(
        {"a": per_class, "b": per_class}, "near", ("stem", "stage1", "stage2"), 64, 64
    )
    overrides = {key: value for key, value in about.train.model_dump().items() if value is not None}
    return policy.decide(facts, strategy=about.policy.strategy, overrides=overrides)


def unused(*assignments: str, per_class: int = 10) -> list[str]:
    about = settings(*assignments)
    return options.unused(about, plan(about, per_class))


def refused(call: Any, *args: Any, **how: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **how)
    return str(caught.value)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `finetune fit` passes on, in place of the job."""
    found: dict[str, Any] = {}

    def fit(data: str, **given: Any) -> job.Outcome:
        found.update(given)
        return job.Outcome(Path("run"), "svm", {}, "shipped")

    monkeypatch.setattr(job, "fit", fit)
    return found


# --------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [(("--seed", "0"), "data.seed", 0), (("--flip",), "data.no_flip", False)],
)
def test_nothing_and_no_replace_what_a_recipe_says(
    words: tuple[str, ...], key: str, value: object, asked: dict[str, Any], tmp_path: Path
) -> None:
    """--seed 0 replaces seed 3, and --flip replaces no_flip: true."""
    file = tmp_path / "r.yaml"
    file.write_text("data:\n  seed: 3\n  no_flip: true\n", encoding="utf-8")
    CliRunner().invoke(
        cli.cli, ["fit", "photos", "--recipe", str(file), *words], catch_exceptions=False
    )
    given = {name: value for name, value in asked.items() if name in options.OPTIONS}
    made, told = options.build("photos", asked["recipe"], asked["assignments"], given)

    assert value == recipe.get(made, key)
    assert f"{key} {recipe.shown(value)} (its own: " in told[0]
    assert told[0].count("its own") == 1


def test_an_empty_value_is_refused_and_not_dropped() -> None:
    """No taps, no backbone and no folder are mistakes, not the default."""
    assert "--taps: backbone.taps cannot be []" in refused(
        options.build, "d", None, (), {"taps": ()}
    )
    assert "--backbone: backbone.names cannot be []" in refused(
        options.build, "d", None, (), {"backbone": []}
    )
    assert "--out" in refused(options.build, "d", None, (), {"out": ""})
    assert "--epochs" in refused(options.build, "d", None, (), {"epochs": 0})


def test_several_backbones_are_refused() -> None:
    """a,b is not taken for a."""
    message = refused(options.build, "d", None, (), {"backbone": "a,b"})
    assert 'backbone.names cannot be ["a", "b"]' in message
    assert "several are compared by" in message


def test_an_option_and_an_assignment_that_disagree_are_refused() -> None:
    """--out Y with --set out=X names both; where they agree, or an assignment replaces another,
    nothing is wrong."""
    message = refused(options.build, "d", None, ("out=X",), {"out": "Y"})
    assert "--out says Y, and --set out=X" in message
    assert "leave one of them out" in message
    assert "finetune fit" in refused(
        options.build, "d", None, ("policy.strategy=full",), {"strategy": "svm"}
    )
    assert "DATA says d, and --set data.data=e" in refused(
        options.build, "d", None, ("data.data=e",), {}
    )
    assert "5" in refused(options.build, "d", None, ("data.shots=null",), {"shots": 5})
    assert 2 == options.build("d", None, ("data.seed=1", "data.seed=2"), {"seed": 2})[0].data.seed


def test_what_replaces_a_recipes_value_is_told(tmp_path: Path) -> None:
    """`finetune svm` with a recipe that asks for half says that this is not done."""
    file = tmp_path / "r.yaml"
    file.write_text("policy:\n  strategy: half\n", encoding="utf-8")
    assert [
        "recipe     replaced on the command line: policy.strategy svm (its own: half)"
    ] == options.build("d", file, (), {"strategy": "svm"})[1]
    assert [] == options.build("d", file, (), {"strategy": "half"})[1]


@pytest.mark.parametrize("call", [finetune.fit, finetune.advise])
def test_a_misspelt_option_names_the_nearest(call: Any) -> None:
    """A typo names the option that was meant, a recipe's key the way to write it, anything else all
    that there is."""
    assert "no option is called sed\n  → did you mean seed?" in refused(call, "d", sed=1)
    assert "did you mean recipe?" in refused(call, "d", recipee="x.yaml")
    assert "assignments=['train.lr=…']" in refused(call, "d", lr=1)
    assert "choose from seed, shots" in refused(call, "d", xyzzy=1)


@pytest.mark.parametrize("call", [finetune.fit, finetune.advise])
def test_a_recipe_is_given_as_recipe_or_source(call: Any, tmp_path: Path) -> None:
    """Both words lead to the recipe; both at once are refused."""
    file = tmp_path / "r.yaml"
    file.write_text("data:\n  data: nowhere\n", encoding="utf-8")
    assert "nowhere: no such file" in refused(call, recipe=file)
    assert "nowhere: no such file" in refused(call, source=file)
    assert "nowhere: no such file" in refused(call, recipe=recipe.load(file))
    assert "two names of one option" in refused(call, recipe=file, source=file)


# ------------------------------------------------------------------------- what has no effect, told


@pytest.mark.parametrize(
    ("assignments", "says"),
    [
        (("policy.strategy=svm", "train.epochs=5"), "train.epochs: nothing is fine-tuned (svm)"),
        (
            ("train.lr=1", "data.no_flip=true"),
            "train.lr, data.no_flip: nothing is fine-tuned (svm)",
        ),
        (
            ("policy.strategy=full", "data.no_flip=true", "train.augment=none"),
            "data.no_flip: no image is mirrored",
        ),
        (
            ("policy.strategy=full", "policy.budget=5"),
            "policy.budget: the strategy full was asked for",
        ),
        (("policy.budget=5",), "policy.budget: it weighs fine-tuning alone"),
        (("policy.strategy=probe", "backbone.taps=[stage1]"), "backbone.taps: a probe is"),
        (("policy.strategy=probe", "svm.kernels=[rbf]"), "svm.kernels: a probe is"),
        (
            ("policy.strategy=scratch", "backbone.weights=w.pth"),
            "backbone.weights for the training",
        ),
    ],
)
def test_keys_without_effect_are_told(assignments: tuple[str, ...], says: str) -> None:
    """A key that a plan makes no use of is named with the reason, in one line."""
    lines = unused(*assignments)
    assert 1 == len(lines)
    assert says in lines[0]


@pytest.mark.parametrize(
    "assignments",
    [
        (),
        ("policy.strategy=svm", "train.class_weight=none", "svm.folds=3", "data.seed=1"),
        ("policy.strategy=full", "train.epochs=5", "data.no_flip=true", "backbone.taps=[stage1]"),
    ],
)
def test_keys_that_are_obeyed_are_not_told(assignments: tuple[str, ...]) -> None:
    """Nothing is said of what has an effect."""
    assert [] == unused(*assignments)


def test_advice_says_what_it_does_not_read() -> None:
    """Keys of the SVM, the taps and the run's folder have no part in advice."""
    (line,) = options.of_advice(
        settings("svm.folds=3", "out=x", "backbone.taps=[pooled]", "data.seed=1")
    )
    assert line == "not used   backbone.taps, svm.folds, out: advice fits no SVM and writes no run"


def test_weights_of_classes_for_the_svm_alone_are_told() -> None:
    """Where auto weighs the classes of an imbalanced set, a line says that fine-tuning does not,
    and how it would."""
    (line,) = options.of_weights(Recipe(), balanced=True)
    assert "not for fine-tuning; --set train.class_weight=balanced" in line
    assert [] == options.of_weights(Recipe(), balanced=False)
    assert [] == options.of_weights(settings("train.class_weight=balanced"), balanced=True)


def test_bf16_without_hardware_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bf16 is emulated, a line says so; where it is not, none does."""
    about = settings("backbone.precision=bf16", "backbone.engine=torch")
    for here, count in ((False, 1), (True, 0)):
        monkeypatch.setattr(options.device, "has_bf16", lambda _engine, here=here: here)
        assert count == len(options.of_machine(about))


def test_shots_that_a_class_does_not_have_and_shares_without_effect_are_told(shapes: Path) -> None:
    """--shots 1000 of 16 training images names the classes; a share that makes no part is named
    with the reason."""
    said: list[str] = []
    analysis.scan(
        settings(f"data.data={shapes}", "data.shots=1000", "data.validation_share=0.3"),
        Store(),
        said.append,
    )
    assert (
        "3 classes have fewer than 1000 training images, and all of them are used: circle (16),"
        in said[1]
    )
    assert "data.validation_share: with data.shots there is no validation part" in said[2]
    said.clear()
    analysis.scan(
        settings(f"data.data={shapes}", "data.validation_share=0.3"), Store(), said.append
    )
    assert "data.validation_share: it gives fewer than 100 images" in said[1]
    assert 2 == len(said)


def test_a_given_test_part_leaves_its_share_without_effect() -> None:
    """test_share is told where test images are given, validation_share where validation images
    are."""
    about = settings("data.test_share=0.3", "data.validation_share=0.3")
    lines = analysis.of_parts(about, {"train", "val", "test"}, {"train": 5, "val": 5, "test": 5})
    assert ["not used   data.test_share: the test images are given"] == lines[:1]
    assert "the validation images are given" in lines[1]
    assert [] == analysis.of_parts(about, set(), {"train": 500, "val": 150, "test": 100})


def test_columns_of_what_is_no_table_are_told(shapes: Path) -> None:
    """--path-column with a folder is no table's: a line says that it is not used."""
    said: list[str] = []
    analysis.scan(settings(f"data.data={shapes}", "data.path_column=x"), Store(), said.append)
    assert "--path-column is for CSV tables, and not used here" in said[1]


def test_extract_refuses_what_would_divide_the_images(shapes: Path, tmp_path: Path) -> None:
    """--shots and --test are refused, --seed is told; they were taken without effect."""
    words = [
        "extract",
        str(shapes),
        "-o",
        str(tmp_path / "x.npz"),
        "--backbone",
        "test_efficientnet",
        "--weights",
        "random",
    ]
    words += ["--engine", "torch", "--precision", "float32"]
    result = CliRunner().invoke(cli.cli, [*words, "--shots", "1"])
    assert "--shots would divide the images" in str(result.exception)
    done = CliRunner().invoke(cli.cli, [*words, "--seed", "1"], catch_exceptions=False)
    assert "not used   seed" in done.output
    assert "no option is called epochs" in refused(
        job.extract, shapes, tmp_path / "x.npz", epochs=3
    )


def test_cache_does_one_thing() -> None:
    """--clear with --prune is refused, and --json is heeded by both."""
    assert 2 == CliRunner().invoke(cli.cli, ["cache", "--clear", "--prune", "3"]).exit_code
    assert (
        '"freed": '
        in CliRunner()
        .invoke(cli.cli, ["cache", "--prune", "0", "--json"], catch_exceptions=False)
        .output
    )
    assert (
        '"freed": '
        in CliRunner()
        .invoke(cli.cli, ["cache", "--clear", "--json"], catch_exceptions=False)
        .output
    )
