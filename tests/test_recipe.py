"""Recipes: strict, readable errors with file and line, and an exact round trip."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import finetune
from finetune import recipe
from finetune.errors import UserError
from finetune.recipe import Recipe

PACKAGE = Path(finetune.__file__).parent


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def writer(text: str) -> Path:
        path = tmp_path / "my.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return writer


def test_the_defaults_need_nothing() -> None:
    """An empty recipe is a whole one: the policy decides everything."""
    default = Recipe()

    assert ("tf_efficientnet_lite0",) == default.backbone.names
    assert ("auto", "auto", "auto") == (
        default.backbone.weights,
        default.policy.strategy,
        default.svm.kernels,
    )
    assert {None} == {value for key, value in default.train if key != "class_weight"}


def test_a_recipe_cannot_be_changed_in_place() -> None:
    """Recipes and their sections are frozen."""
    with pytest.raises(ValidationError):
        Recipe().train.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("text", ["", "# only a comment\n", "{}", "---\n"])
def test_an_empty_file_is_the_default(write: Any, text: str) -> None:
    """A file that says nothing asks for the defaults."""
    assert Recipe() == recipe.load(write(text))


def test_a_file_sets_what_it_names(write: Any) -> None:
    """Values land in their section; whatever is not named keeps its default."""
    loaded = recipe.load(
        write(
            "data:\n  shots: 5\ntrain:\n  lr: 1e-3\n  ema: true\nbackbone:\n  names: resnet18\n  "
            "taps: [pooled, stage3/3x3]\n"
        )
    )

    assert (5, 0.001, True) == (loaded.data.shots, loaded.train.lr, loaded.train.ema)
    assert (("resnet18",), ("pooled", "stage3/3x3")) == (
        loaded.backbone.names,
        loaded.backbone.taps,
    )
    assert Recipe().svm == loaded.svm


def test_yaml_is_version_1_2(write: Any) -> None:
    """1e-3 is a number, `no` is text and 017 is seventeen: a folder called `no` is no boolean."""
    loaded = recipe.load(write("data:\n  data: no\n  seed: 017\nsvm:\n  C: [1e-3, 1, 1e+2]\n"))

    assert ("no", 17) == (loaded.data.data, loaded.data.seed)
    assert (0.001, 1.0, 100.0) == loaded.svm.C
    assert {float} == {type(c) for c in loaded.svm.C}


@pytest.mark.parametrize(
    ("text", "line", "what", "fix"),
    [
        ("train:\n  lrr: 1\n", 2, "no key train.lrr", "did you mean train.lr?"),
        ("data:\n  shots: 5\ntrian:\n  lr: 1\n", 3, "no key trian", "did you mean train?"),
        ("dat:\n  shots: 1\n", 1, "no key dat", "did you mean data?"),
        ("train:\n  no_flip: true\n", 2, "no key train.no_flip", "did you mean data.no_flip?"),
        ("lr: 1\n", 1, "no key lr", "did you mean train.lr?"),
        ("strategy: svm\n", 1, "no key strategy", "did you mean policy.strategy?"),
        ("zzz: 1\n", 1, "no key zzz", "the keys are: data.data, "),
        ("1: 2\n", 1, "no key 1", "the keys are: "),
        ("? [a, b]\n: 1\n", None, "no key ('a', 'b')", "the keys are: "),
        ("train: 3\n", 1, "train is a section, and was given 3", "give it keys: optimizer, lr, "),
        (
            "train:\n\n  # fast\n  lr: fast\n",
            4,
            'train.lr cannot be "fast"',
            "it takes the head's learning rate, above 0",
        ),
        ("train:\n  lr: 0\n", 2, "train.lr cannot be 0", "above 0"),
        ("train:\n  lr: .inf\n", 2, "train.lr cannot be Infinity", "above 0"),
        ("train:\n  epochs: 2.5\n", 2, "train.epochs cannot be 2.5", "a whole number"),
        ("train:\n  epochs: true\n", 2, "train.epochs cannot be true", "a whole number"),
        ("train:\n  ema: 1\n", 2, "train.ema cannot be 1", "true, false or null"),
        (
            "train:\n  optimizer: adam\n",
            2,
            'train.optimizer cannot be "adam"',
            "adamw, sgd or null",
        ),
        ("data:\n  no_flip: no\n", 2, 'data.no_flip cannot be "no"', "true where"),
        ("data:\n  seed: '1'\n", 2, 'data.seed cannot be "1"', "a whole number"),
        ("data:\n  data: 2001-01-01\n", 2, 'data.data cannot be "2001-01-01"', "a folder"),
        ("data:\n  test_share: 1\n", 2, "data.test_share cannot be 1", "between 0 and 1"),
        ("data:\n  on_bad_image: halt\n", 2, 'data.on_bad_image cannot be "halt"', "stop or skip"),
        ("policy:\n  strategy: stages:0\n", 2, 'policy.strategy cannot be "stages:0"', "stages:K"),
        ("policy:\n  budget: 0\n", 2, "policy.budget cannot be 0", "minutes"),
        ("backbone:\n  names: []\n", 2, "backbone.names cannot be []", "it takes one name"),
        (
            "backbone:\n  names: [a, b]\n",
            2,
            'backbone.names cannot be ["a", "b"]',
            "several are compared by",
        ),
        ("backbone:\n  taps: 3\n", 2, "backbone.taps cannot be 3", "auto, or a list of taps"),
        ("svm:\n  C: [1, -1]\n", 2, "svm.C cannot be -1", "auto, or a list of numbers above 0"),
        (
            "svm: {kernels: [rbf, poly]}\n",
            1,
            'svm.kernels cannot be "poly"',
            "linear, logistic, rbf and lssvm",
        ),
        ("- a\n- b\n", None, 'expected sections, found ["a", "b"]', "start with one of: data, "),
        ("train:\n  lr: 1\n  lr: 2\n", 3, "the key lr stands twice", "keep one"),
        ("train:\n\tlr: 1\n", 2, "not valid YAML: found character", "mend"),
        ("a: [1\n", 2, "not valid YAML", "mend"),
        ("a: 1\n---\nb: 2\n", 2, "not valid YAML: but found another document", "mend"),
        ("x\0y", None, "not valid YAML", "mend"),
        (
            "train:\n  lr: !!python/object/apply:os.system [true]\n",
            2,
            "not valid YAML: could not determine a constructor",
            "mend",
        ),
        ("train: &x\n  lr: *x\n", 2, "train.lr cannot be", "above 0"),
        ("[" * 5000, None, "not valid YAML", "mend"),
    ],
)
def test_a_fault_is_named_with_line_value_and_remedy(
    write: Any, text: str, line: int | None, what: str, fix: str
) -> None:
    """Every wrong file is refused with file, line, the value found, and what would be right."""
    path = write(text)

    with pytest.raises(UserError) as caught:
        recipe.load(path)

    assert what in caught.value.what
    assert fix in caught.value.fix
    if line is not None:
        assert f"{path}:{line}" == caught.value.where
    else:
        assert str(caught.value.where).startswith(str(path))


def test_all_faults_are_told_at_once(write: Any) -> None:
    """Three wrong lines are named in one message, each with its place."""
    path = write("train:\n  lr: fast\n  epochs: 0\nsvm:\n  CC: 1\n")

    with pytest.raises(UserError) as caught:
        recipe.load(path)

    message = str(caught.value)
    assert [2, 3, 5] == [int(n) for n in re.findall(rf"{re.escape(str(path))}:(\d+): ", message)]
    assert "no key svm.CC (did you mean svm.C?)" in message


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    """A recipe in another encoding is refused with the position of the first bad byte."""
    path = tmp_path / "latin.yaml"
    path.write_bytes("out: hé".encode("latin-1"))

    with pytest.raises(UserError, match=r"latin\.yaml: not UTF-8 text \(byte 6\)"):
        recipe.load(path)


def test_overrides_are_read_as_yaml() -> None:
    """`--set` values pass the same reader as files: numbers, lists, null, and text that only looks
    like a boolean."""
    changed = recipe.override(
        Recipe(),
        [
            "train.lr=1e-3",
            "backbone.taps=[pooled, stage4/gem]",
            "data.data=no",
            "out=runs/a=b",
            "train.epochs=3",
            "train.epochs=null",
        ],
    )

    assert (0.001, ("pooled", "stage4/gem")) == (changed.train.lr, changed.backbone.taps)
    assert ("no", "runs/a=b", None) == (changed.data.data, changed.out, changed.train.epochs)


def test_of_two_overrides_the_last_holds() -> None:
    """On a command line the later of two values for one key wins."""
    assert 2.0 == recipe.override(Recipe(), ["train.lr=1", "train.lr=2"]).train.lr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.lrr=1", r"--set: no key train\.lrr\n  → did you mean train\.lr\?"),
        ("lr=1", r"did you mean train\.lr\?"),
        ("train=3", r"train is a section\n  → name one of its keys: train\.optimizer"),
        ("train.lr", r"'train\.lr' assigns nothing\n  → write section\.key=value"),
        ("=3", "assigns nothing"),
        ("train.lr=[1", r"--set: train\.lr: not valid YAML"),
        ("train.lr=fast", r'--set: train\.lr cannot be "fast"\n  → it takes'),
    ],
)
def test_a_wrong_override_is_named(text: str, message: str) -> None:
    """A `--set` that cannot be right says so, with the key, the value and the remedy."""
    with pytest.raises(UserError, match=message):
        recipe.override(Recipe(), [text])


def test_update_takes_values_as_they_are() -> None:
    """Values that are already Python, such as a folder called `1e-3`, are not read as YAML."""
    changed = recipe.update(
        Recipe(), {"data.data": "1e-3", "data.shots": 3, "backbone.names": ("a",)}
    )

    assert ("1e-3", 3, ("a",)) == (changed.data.data, changed.data.shots, changed.backbone.names)
    with pytest.raises(UserError, match=r'command line: data\.shots cannot be "3"'):
        recipe.update(Recipe(), {"data.shots": "3"}, where="command line")


TEXTS = st.text(min_size=1) | st.sampled_from(
    [
        "no",
        "null",
        "~",
        "true",
        "1e-3",
        "017",
        "a: b",
        "#x",
        "- a",
        "é😀",
        "\u2028\t\x7f",
        "'\"\\",
        " ",
        "2001-01-01",
    ]
)
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "data.data": TEXTS,
        "data.shots": st.integers(1, 10**9) | st.none(),
        "data.test_share": st.floats(0.001, 0.999),
        "data.no_flip": st.booleans(),
        "backbone.names": st.lists(TEXTS, min_size=1, max_size=1).map(tuple),
        "backbone.taps": st.just("auto") | st.lists(TEXTS, min_size=1, max_size=3).map(tuple),
        "policy.strategy": st.sampled_from(["stages:3", "svm", "full"]),
        "train.lr": st.floats(5e-324, 1e308) | st.none(),
        "train.ema": st.booleans() | st.none(),
        "svm.C": st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=4).map(tuple),
        "svm.kernels": st.sampled_from(["auto", ("linear",), ("rbf", "logistic")]),
        "out": TEXTS | st.none(),
    },
)


@given(CHANGES)
@settings(max_examples=40, deadline=None)
def test_dump_and_load_are_an_exact_round_trip(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, object]
) -> None:
    """Whatever a recipe holds, the file written from it gives back an equal recipe, and the same
    text again."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    asked = recipe.update(Recipe(), changes)
    path.write_bytes(recipe.dump(asked).encode())

    loaded = recipe.load(path)

    assert asked == loaded
    assert recipe.dump(asked) == recipe.dump(loaded)


def test_the_dump_writes_every_default_and_explains_every_key() -> None:
    """Every key of every section stands in the file, with a comment that says what it takes."""
    text = recipe.dump(Recipe())
    for section in ("data", "backbone", "policy", "train", "svm"):
        assert f"\n{section}:  # " in text
        for key in type(getattr(Recipe(), section)).model_fields:
            assert re.search(rf"^  {key}: \S.*  # \S", text, re.MULTILINE), key
    assert "\nout: null  # " in text


def test_the_digest_covers_what_is_asked_and_not_where_it_lies() -> None:
    """Any other key changes the digest; the folder of the images and of the run do not."""
    default = Recipe()
    moved = recipe.update(
        default,
        {"data.data": "/elsewhere/photos", "data.test": "/elsewhere/test", "out": "/elsewhere/run"},
    )
    changed = {
        recipe.digest(recipe.update(default, {key: value}))
        for key, value in {
            "train.lr": 0.1,
            "data.seed": 1,
            "data.test_share": 0.25,
            "svm.folds": 3,
            "policy.strategy": "svm",
            "backbone.names": "resnet18",
        }.items()
    }

    assert recipe.digest(default) == recipe.digest(moved)
    assert 6 == len(changed - {recipe.digest(default)})
    assert 64 == len(recipe.digest(default))


@pytest.mark.parametrize("name", recipe.shipped())
def test_every_shipped_recipe_loads_and_has_an_honest_header(name: str) -> None:
    """Each shipped recipe is valid, and its header names command, hardware, time and expected
    result."""
    assert isinstance(recipe.load(name), Recipe)
    for word in ("Command:", "Hardware:", "Time:", "Expected:"):
        assert word in recipe.describe(name), f"{name} has no {word}"
    assert f"finetune fit --recipe {name}" in recipe.describe(name)
    assert recipe.source(name).startswith("# ")


def test_the_smoke_recipe_is_small() -> None:
    """The smoke recipe asks for five images of each digit and no fine-tuning."""
    smoke = recipe.load("smoke-digits")

    assert ("sklearn:digits", 5, "svm") == (
        smoke.data.data,
        smoke.data.shots,
        smoke.policy.strategy,
    )


def test_a_header_ends_where_the_recipe_begins() -> None:
    """`describe` gives the comment at the top without its hash signs, and nothing of the recipe."""
    header = recipe.describe("smoke-digits")

    assert not [line for line in header.splitlines() if line.startswith("#")]
    assert "strategy" not in header


def test_an_unknown_recipe_suggests_one(tmp_path: Path) -> None:
    """A misspelt name names the nearest recipe; anything else lists what there is."""
    with pytest.raises(
        UserError, match=r"smoke-digts: no such recipe\n  → did you mean smoke-digits\?"
    ):
        recipe.load("smoke-digts")
    with pytest.raises(UserError, match=r"or one of: .*smoke-digits"):
        recipe.load(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="no such recipe"):
        recipe.load(tmp_path)  # a folder


def test_a_file_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user has in the folder is what the user means."""
    monkeypatch.chdir(tmp_path)
    Path("smoke-digits").write_text("data: {shots: 2}", encoding="utf-8")

    assert 2 == recipe.load("smoke-digits").data.shots


def test_recipes_are_found_where_they_are_installed(tmp_path: Path) -> None:
    """In an installation, where the recipes lie inside the package, they are read from there."""
    shutil.copytree(PACKAGE, tmp_path / "finetune", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "finetune" / "recipes").mkdir(exist_ok=True)
    (tmp_path / "finetune" / "recipes" / "here.yaml").write_text(
        "# Here.\nout: here\n", encoding="utf-8"
    )
    code = (
        "from finetune import recipe; print(recipe.shipped(), "
        "recipe.load('here').out, recipe.describe('here'))"
    )

    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )

    assert ("['here'] here Here.\n", "") == (done.stdout, done.stderr)


def test_what_later_versions_ask_leaves_the_digests_of_old_runs_alone() -> None:
    """Keys that version 0.1.0 did not know count only where they are set, and where images lie
    never does."""
    plain = recipe.digest(Recipe())

    assert plain == "3881e5abe8d12215b53fad8e677062e6f4a2d77534937e3ccf9422e9be68dcb8"
    assert plain == recipe.digest(
        recipe.override(Recipe(), ["data.image_root=elsewhere", "data.data=d", "out=o"])
    )
    assert plain != recipe.digest(recipe.override(Recipe(), ["data.group_column=patient"]))
