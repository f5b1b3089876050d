"""A run's head on a frozen network: the same bits alone and in a batch, before and after a save;
damage is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from finetune import classifier
from finetune.classifier import Classifier
from finetune.data import decode
from finetune.data.images import ImageSet, load, load_unlabelled
from finetune.errors import UserError
from finetune.heads.head import AnyHead, Head, KernelHead, rbf, side_by_side, softmax
from finetune.network import Tap

if TYPE_CHECKING:
    from finetune.backbones.stages import Backbone

POOLED, STAGE = Tap("pooled"), Tap("stage2")
CLASSES = ("Grüße", "猫 'один'", "c")


def linear(tiny: Backbone, taps: tuple[Tap, ...] = (POOLED, STAGE), **how: Any) -> Head:
    width = sum(tiny.network.width(tap) for tap in taps)
    random = np.random.default_rng(3)
    weight, bias = 4 * random.normal(size=(3, width)), random.normal(size=3)
    return Head(
        taps,
        CLASSES,
        weight.astype(np.float32),
        bias.astype(np.float32),
        **{"temperature": 0.37, **how},
    )


def kernel(tiny: Backbone) -> KernelHead:
    width = tiny.network.width(POOLED)
    random = np.random.default_rng(4)
    support, coef, bias = (
        random.normal(size=(30, width)) / 10,
        random.normal(size=(3, 30)),
        random.normal(size=3),
    )
    a, b, c = (array.astype(np.float32) for array in (support, coef, bias))
    return KernelHead((POOLED,), CLASSES, a, b, c, gamma=0.8123456789, temperature=1.9)


HEADS: dict[str, Callable[[Backbone], AnyHead]] = {"linear": linear, "rbf": kernel}
each_head = pytest.mark.parametrize("kind", list(HEADS))


def model(tiny: Backbone, head: AnyHead, engine: str = "torch", **how: Any) -> Classifier:
    return Classifier(tiny.network, head, lambda: tiny, engine, "float32", **how)


@pytest.fixture
def pictures(shapes: Path) -> ImageSet:
    return load(shapes).subset(range(0, 60, 3))


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


# ------------------------------------------------------------------------------------------ numbers


tables = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 5)),
    elements=st.floats(-100, 100, width=32),
)


@settings(max_examples=50, deadline=None)
@given(scores=tables, temperature=st.floats(0.05, 50))
def test_softmax_is_a_distribution_in_the_order_of_the_scores(
    scores: NDArray[np.float32], temperature: float
) -> None:
    """Rows sum to 1, nothing is negative, the largest score stays the largest; a shift of all
    scores changes nothing."""
    made = softmax(scores, temperature)

    assert np.float32 == made.dtype
    np.testing.assert_allclose(made.sum(1), 1, rtol=1e-5)
    assert (made >= 0).all()
    np.testing.assert_array_equal(
        made.max(1), np.take_along_axis(made, scores.argmax(1)[:, None], 1)[:, 0]
    )
    np.testing.assert_allclose(
        softmax(scores.astype(np.float64) + 1000, temperature), made, atol=1e-5
    )


def test_softmax_takes_scores_of_any_size() -> None:
    """No overflow, no NaN; a high temperature levels, a low one decides."""
    huge = np.array([[1e30, 0, -1e30], [0, 0, 0]], np.float32)

    np.testing.assert_allclose(
        softmax(huge), np.array([[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]]), atol=1e-6
    )
    np.testing.assert_allclose(softmax(np.array([[1.0, 2.0]]), 1e6), [[0.5, 0.5]], atol=1e-6)
    np.testing.assert_allclose(
        softmax(np.array([[1.0, 2.0]])), [[1 / (1 + np.e), np.e / (1 + np.e)]], rtol=1e-6
    )
    assert (0, 3) == softmax(np.zeros((0, 3))).shape


def test_taps_stand_side_by_side_each_at_unit_length() -> None:
    """Every tap weighs the same, whatever its scale; without `normalize` they are joined as they
    are."""
    a, b = np.array([[3, 4]], np.float32), np.array([[1000, 0, 0]], np.float64)

    np.testing.assert_allclose(side_by_side([a, b], True), [[0.6, 0.8, 1, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(side_by_side([a, b], False), [[3, 4, 1000, 0, 0]])
    assert np.float32 == side_by_side([a, b], True).dtype


@settings(max_examples=50, deadline=None)
@given(block=tables, scale=st.sampled_from([2.0**-10, 1.0, 2.0**12]))
def test_a_normalised_row_does_not_know_its_scale(block: NDArray[np.float32], scale: float) -> None:
    """Rows have length 1 or, where they were zero, stay zero; a power of two in front of them
    changes no bit."""
    block[np.abs(block) < 1e-3] = 0
    made = side_by_side([block], True)

    np.testing.assert_allclose(
        np.linalg.norm(made, axis=1), block.any(1).astype(np.float32), rtol=1e-5
    )
    np.testing.assert_array_equal(made, side_by_side([block * np.float32(scale)], True))


def test_a_row_of_zeros_stays_zero_and_is_scored_by_the_bias() -> None:
    """No NaN from an image without features."""
    head = Head((POOLED,), CLASSES, np.ones((3, 4), np.float32), np.array([1, 2, 3], np.float32))

    np.testing.assert_array_equal(side_by_side([np.zeros((2, 4))], True), np.zeros((2, 4)))
    np.testing.assert_array_equal(head.scores([np.zeros((1, 4), np.float32)]), [[1, 2, 3]])


def test_scores_are_the_products_that_they_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear and RBF scores by their formulas, in blocks of any size, for no row at all too."""
    monkeypatch.setattr("finetune.heads.head.ROWS", 3)
    random = np.random.default_rng(0)
    x, weight, bias = (
        random.normal(size=shape).astype(np.float32) for shape in ((8, 5), (3, 5), (3,))
    )
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    support, coef = (
        random.normal(size=(6, 5)).astype(np.float32),
        random.normal(size=(3, 6)).astype(np.float32),
    )
    line = Head((POOLED,), CLASSES, weight, bias)
    round_ = KernelHead((POOLED,), CLASSES, support, coef, bias, gamma=0.5)
    gauss = np.exp(-0.5 * ((unit[:, None].astype(np.float64) - support[None]) ** 2).sum(2))

    np.testing.assert_allclose(line.scores([x]), unit @ weight.T + bias, atol=1e-5)
    np.testing.assert_allclose(round_.scores([x]), gauss @ coef.T + bias, atol=1e-5)
    np.testing.assert_allclose(rbf(unit, unit, 2.0).diagonal(), 1, atol=1e-6)
    assert (0, 3) == line.scores([x[:0]]).shape == round_.scores([x[:0]]).shape


# ------------------------------------------------------------------------------------------ predict


@each_head
@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_one_image_alone_has_the_bits_that_it_has_in_a_batch(
    tiny: Backbone, pictures: ImageSet, kind: str, engine: str
) -> None:
    """Neither the number of images nor their order changes a probability."""
    own = model(tiny, HEADS[kind](tiny), engine)
    whole = own.predict(pictures)
    order = np.random.default_rng(2).permutation(len(pictures))

    np.testing.assert_array_equal(
        whole.probabilities[order], own.predict(pictures.subset(order)).probabilities
    )
    for i in (0, 15, 16, 19):
        np.testing.assert_array_equal(
            whole.probabilities[i : i + 1], own.predict(pictures.subset([i])).probabilities
        )
    np.testing.assert_array_equal(whole.probabilities.argmax(1), whole.best)
    assert len(set(map(tuple, whole.probabilities.tolist()))) > 10  # they do depend on the image


def test_views_are_averaged(tiny: Backbone, pictures: ImageSet, tmp_path: Path) -> None:
    """With the mirrored view, an image and its mirror image get the same; one view is what that
    view gives."""
    from PIL import Image, ImageOps

    side = tiny.network.preprocess.size
    own = dataclasses.replace(
        tiny,
        network=dataclasses.replace(
            tiny.network, preprocess=dataclasses.replace(tiny.network.preprocess, resize=side)
        ),
    )
    for i in range(3):
        image = decode.decode(pictures.read(i)).resize((side, side), Image.Resampling.BICUBIC)
        (tmp_path / "plain").mkdir(exist_ok=True)
        (tmp_path / "mirrored").mkdir(exist_ok=True)
        image.save(tmp_path / "plain" / f"{i}.png")
        ImageOps.mirror(image).save(tmp_path / "mirrored" / f"{i}.png")
    head = linear(own)
    plain, mirrored = (load_unlabelled(tmp_path / name) for name in ("plain", "mirrored"))
    one, other = (model(own, head).predict(source).probabilities for source in (plain, mirrored))
    both = model(own, head, views=("", "flip"))
    means = [both.predict(source).probabilities for source in (plain, mirrored)]

    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(means[0], means[1])
    np.testing.assert_array_equal(
        other, model(own, head, views=("flip",)).predict(plain).probabilities
    )
    logs = [head.temperature * np.log(p.astype(np.float64)) for p in (one, other, means[0])]
    centred = [z - z.mean(1, keepdims=True) for z in logs]
    np.testing.assert_allclose((centred[0] + centred[1]) / 2, centred[2], atol=1e-3)


@pytest.fixture
def with_bad(pictures: ImageSet, tmp_path: Path) -> Path:
    """Four images by name order: good, empty, good, text."""
    root = tmp_path / "incoming"
    root.mkdir()
    for i, name in enumerate(["a.png", "c.png"]):
        (root / name).write_bytes(pictures.read(i))
    (root / "b.png").write_bytes(b"")
    (root / "d.png").write_bytes(b"hello")
    return root


def test_bad_images_stop_a_prediction_by_name(tiny: Backbone, with_bad: Path) -> None:
    """All of them in one message, which says how to go on."""
    message = refusal(lambda: model(tiny, linear(tiny)).predict([with_bad]))

    for words in ("2 bad images", "b.png (empty", "d.png (not an image", "--on-bad-image skip"):
        assert words in message


@pytest.mark.parametrize("views", [("",), ("", "flip")])
def test_skipped_images_are_listed_once_and_shift_no_other(
    tiny: Backbone, with_bad: Path, pictures: ImageSet, views: tuple[str, ...]
) -> None:
    """Probabilities stay with their paths; faults hold each bad image once, also with two views."""
    own = model(tiny, linear(tiny), views=views)
    found = own.predict([with_bad], on_bad="skip")

    assert (f"{with_bad}/a.png", f"{with_bad}/c.png") == found.images.paths
    assert [f"{with_bad}/b.png", f"{with_bad}/d.png"] == [fault.path for fault in found.faults]
    np.testing.assert_array_equal(
        own.predict(pictures.subset([0, 1])).probabilities, found.probabilities
    )


def test_nothing_but_bad_images(tiny: Backbone, with_bad: Path) -> None:
    """Skipping all of them leaves an empty answer, of the right shape."""
    found = model(tiny, linear(tiny)).predict(
        [with_bad / "b.png", with_bad / "d.png"], on_bad="skip"
    )

    assert (0, 3) == found.probabilities.shape
    assert 2 == len(found.faults)


def test_rows_and_faults_together_are_as_many_as_the_inputs(tiny: Backbone, with_bad: Path) -> None:
    """A bad image that was given twice is left out twice, a missing file is left out by name, and
    no row is shifted."""
    given = [with_bad / name for name in ("b.png", "a.png", "gone.png", "b.png", "a.png")]
    found = model(tiny, linear(tiny)).predict([*given, b"nonsense"], on_bad="skip")

    assert [str(given[1]), str(given[4])] == list(found.images.paths)
    assert [*(str(given[i]) for i in (0, 2, 3)), "[5]"] == [fault.path for fault in found.faults]
    assert ["empty", "unreadable", "empty", "not an image"] == [
        fault.kind for fault in found.faults
    ]


def test_every_input_has_its_row_in_the_order_given(
    tiny: Backbone, pictures: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file given twice has two rows, and is decoded once; a folder stands at its place; names are
    those that were typed."""
    (tmp_path / "in").mkdir()
    for i, name in enumerate(["b.png", "a.png", "in/z.png", "in/y.png"]):
        (tmp_path / name).write_bytes(pictures.read(i))
    monkeypatch.chdir(tmp_path)
    seen: list[bytes] = []
    to_input = decode.to_input
    monkeypatch.setattr(
        decode, "to_input", lambda data, pre: seen.append(data) or to_input(data, pre)
    )
    found = model(tiny, linear(tiny)).predict(["b.png", "in/", Path("b.png"), "./a.png", "b.png"])

    assert ("b.png", "in/y.png", "in/z.png", "b.png", "./a.png", "b.png") == found.images.paths
    assert 4 == len(seen)
    expected = model(tiny, linear(tiny)).predict(pictures.subset([0, 3, 2, 0, 1, 0])).probabilities
    np.testing.assert_array_equal(expected, found.probabilities)


def test_pictures_in_memory_get_the_bits_of_their_files(tiny: Backbone, shapes: Path) -> None:
    """A path, the bytes of the file, the picture and its array in one list; one picture alone; a
    stack of them."""
    from PIL import Image

    file = shapes / "circle" / "03.png"
    picture = Image.open(file)
    array = np.array(picture)
    own = model(tiny, linear(tiny))
    found = own.predict(
        [file, file.read_bytes(), picture, array, bytearray(file.read_bytes()), picture]
    )

    assert (str(file), "[1]", "[2]", "[3]", "[4]", "[5]") == found.images.paths
    np.testing.assert_array_equal(
        np.repeat(found.probabilities[:1], 6, axis=0), found.probabilities
    )
    for alone in (picture, array, file.read_bytes(), str(file), np.stack([array])):
        np.testing.assert_array_equal(found.probabilities[:1], own.predict(alone).probabilities)
    assert (0, 3) == own.predict([]).probabilities.shape


def test_the_network_is_opened_once_and_let_go(
    tiny: Backbone, pictures: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first prediction opens it, later ones use it, close and the end of `with` free it; then
    it is opened again."""
    import gc
    import weakref

    opened: list[Any] = []
    open_runner = classifier.engine.open_runner

    def counted(*args: Any, **how: Any) -> Any:
        runner = open_runner(*args, **how)
        opened.append(weakref.ref(runner))
        return runner

    monkeypatch.setattr(classifier.engine, "open_runner", counted)
    with model(tiny, linear(tiny)) as own:
        first, second = own.predict(pictures), own.predict(pictures)
        assert 1 == len(opened)
    gc.collect()
    assert opened[0]() is None
    np.testing.assert_array_equal(first.probabilities, second.probabilities)
    np.testing.assert_array_equal(first.probabilities, own.predict(pictures).probabilities)
    assert 2 == len(opened)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_threads_may_share_a_classifier(tiny: Backbone, pictures: ImageSet, precision: str) -> None:
    """What several threads ask for at once is what one gets, and the network is opened once;
    closing waits for them."""
    from concurrent.futures import ThreadPoolExecutor

    own = dataclasses.replace(model(tiny, linear(tiny)), precision=precision)
    expected = own.predict(pictures).probabilities
    own.close()
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(own.predict, pictures) for _ in range(6)]
        closed = pool.submit(own.close)
        for answer in asked:
            np.testing.assert_array_equal(expected, answer.result().probabilities)
        closed.result()


@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="only Linux tells what a process has open"
)
def test_a_closed_classifier_holds_no_file(
    tiny: Backbone, pictures: ImageSet, folder: Path
) -> None:
    """Neither the run's files nor the converted network stay open or mapped: the folders can be
    removed on any system."""
    import gc

    write(folder, tiny, model(tiny, linear(tiny), "auto"))
    with classifier.load(folder) as own:
        own.predict(pictures.subset([0]))
    gc.collect()
    fds = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    held = "\n".join([Path("/proc/self/maps").read_text(), *fds])

    assert str(folder) not in held
    assert "/compiled/" not in held


def test_progress_of_a_prediction(tiny: Backbone, pictures: ImageSet) -> None:
    """It ends at the number of images."""
    calls: list[tuple[int, int]] = []
    model(tiny, linear(tiny)).predict(
        pictures, progress=lambda done, total: calls.append((done, total))
    )

    assert (20, 20) == calls[-1]
    assert sorted(set(calls)) == calls


# ------------------------------------------------------------------------------------ save and load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def write(folder: Path, tiny: Backbone, own: Classifier) -> Path:
    """A run's model files."""
    from finetune.backbones import create

    create.save(tiny, folder / "model.safetensors")
    classifier.save(folder, own)
    return folder


@each_head
@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_a_saved_classifier_gives_the_same_bits(
    tiny: Backbone, pictures: ImageSet, folder: Path, kind: str, engine: str
) -> None:
    """Head, class names, temperature, views and network come back; so do probabilities, through the
    saved trunk."""
    own = model(tiny, HEADS[kind](tiny), engine, views=("", "flip"))
    write(folder, tiny, own)
    again = classifier.load(folder.rename(folder.with_name("moved")))

    np.testing.assert_array_equal(
        own.predict(pictures).probabilities, again.predict(pictures).probabilities
    )
    assert CLASSES == again.classes
    assert (own.views, own.network, own.precision) == (again.views, again.network, again.precision)
    for field in dataclasses.fields(own.head):
        np.testing.assert_array_equal(
            getattr(own.head, field.name), getattr(again.head, field.name)
        )


def test_engine_and_precision_may_be_overridden(
    tiny: Backbone, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was asked for is used, auto being no word of it; a run's engine that is not installed
    here gives way to torch."""
    write(folder, tiny, model(tiny, linear(tiny), "openvino"))

    assert "torch" == classifier.load(folder, engine_name="torch").engine
    assert "bf16" == classifier.load(folder, precision="bf16").precision
    assert "openvino" == classifier.load(folder, engine_name="auto").engine
    monkeypatch.setattr("finetune.backbones.device.has_openvino", lambda: False)
    assert "torch" == classifier.load(folder).engine


def test_weights_of_another_network_are_refused(
    tiny: Backbone, pictures: ImageSet, folder: Path
) -> None:
    """A trunk that was exchanged is noticed by its digest before it says anything."""
    import torch

    from finetune.backbones import create

    write(folder, tiny, model(tiny, linear(tiny)))
    other = create.load(tiny.network.name, "random")
    with torch.no_grad():
        next(other.module.parameters()).mul_(2)
    create.save(other, folder / "model.safetensors")
    message = refusal(lambda: classifier.load(folder).predict(pictures))

    assert "not those of this run" in message
    assert "model.safetensors" in message


def damage_config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        change(config)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    return damage


def damage_head(
    change: Callable[[dict[str, Any], dict[str, str]], object],
) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        from safetensors import safe_open
        from safetensors.numpy import save_file

        with safe_open(folder / "head.safetensors", framework="numpy") as file:
            about, arrays = (
                dict(file.metadata()),
                {name: file.get_tensor(name) for name in ("weight", "bias")},
            )
        change(arrays, about)
        save_file(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()},
            folder / "head.safetensors",
            about,
        )

    return damage


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no config": ("config.json", lambda folder: (folder / "config.json").unlink()),
    "half a config": (
        "config.json",
        lambda folder: (folder / "config.json").write_text('{"regraft": {'),
    ),
    "a list for a config": (
        "config.json",
        lambda folder: (folder / "config.json").write_text("[1]"),
    ),
    "text for a config": (
        "config.json",
        lambda folder: (folder / "config.json").write_text('"regraft"'),
    ),
    "a foreign config": ("config.json", damage_config(lambda c: c.pop("regraft"))),
    "no network": ("config.json", damage_config(lambda c: c["regraft"].pop("network"))),
    "null for the network": (
        "config.json",
        damage_config(lambda c: c["regraft"].update(network=None)),
    ),
    "a network that lacks its digest": (
        "config.json",
        damage_config(lambda c: c["regraft"]["network"].pop("digest")),
    ),
    "no views": ("config.json", damage_config(lambda c: c["regraft"].pop("views"))),
    "no engine": ("config.json", damage_config(lambda c: c["regraft"].pop("engine"))),
    "no precision": ("config.json", damage_config(lambda c: c["regraft"].pop("precision"))),
    "another format": ("", damage_config(lambda c: c["regraft"].update(format=99))),
    "no head": ("head.safetensors", lambda folder: (folder / "head.safetensors").unlink()),
    "an empty head": (
        "head.safetensors",
        lambda folder: (folder / "head.safetensors").write_bytes(b""),
    ),
    "a head cut short": (
        "head.safetensors",
        lambda folder: (folder / "head.safetensors").write_bytes(
            (folder / "head.safetensors").read_bytes()[:-7]
        ),
    ),
    "text for a head": (
        "head.safetensors",
        lambda folder: (folder / "head.safetensors").write_bytes(b"hello" * 20),
    ),
    "no bias": ("head.safetensors", damage_head(lambda a, m: a.pop("bias"))),
    "no temperature": ("head.safetensors", damage_head(lambda a, m: m.pop("temperature"))),
    "a word for the temperature": (
        "head.safetensors",
        damage_head(lambda a, m: m.update(temperature="warm")),
    ),
    "a temperature of zero": (
        "head.safetensors",
        damage_head(lambda a, m: m.update(temperature="0.0")),
    ),
    "a tap that the network lacks": ("tap", damage_head(lambda a, m: m.update(taps='["stage77"]'))),
    "an unknown tap": ("tap", damage_head(lambda a, m: m.update(taps='["nowhere"]'))),
    "classes that do not parse": (
        "head.safetensors",
        damage_head(lambda a, m: m.update(classes="[cat")),
    ),
    "a class too few": (
        "head.safetensors",
        damage_head(lambda a, m: m.update(classes='["a", "b"]')),
    ),
    "a bias too short": (
        "head.safetensors",
        damage_head(lambda a, m: a.update(bias=a["bias"][:2])),
    ),
    "weights too narrow": (
        "head.safetensors",
        damage_head(lambda a, m: a.update(weight=a["weight"][:, :-1])),
    ),
    "NaN among the weights": (
        "head.safetensors",
        damage_head(lambda a, m: a["weight"].__setitem__((0, 0), np.nan)),
    ),
}


@pytest.mark.parametrize("name", list(DAMAGES))
def test_damaged_files_are_named(tiny: Backbone, folder: Path, name: str) -> None:
    """Whatever is missing, cut or of the wrong shape in config.json or head.safetensors: a message,
    at the door."""
    write(folder, tiny, model(tiny, linear(tiny)))
    where, damage = DAMAGES[name]
    damage(folder)

    assert where in refusal(lambda: classifier.load(folder))


def test_save_leaves_no_half_file(tiny: Backbone, folder: Path) -> None:
    """Only the two files, and a second save over the first."""
    for _ in range(2):
        classifier.save(folder, model(tiny, linear(tiny)))

    assert {"config.json", "head.safetensors"} == {path.name for path in folder.iterdir()}


def test_timm_opens_a_run_whose_head_is_one_pooled_layer(
    tiny: Backbone, pictures: ImageSet, folder: Path
) -> None:
    """`timm.create_model("local-dir:…")` gives the run's own answers, its class names and its
    preprocessing."""
    import timm
    import timm.data
    import torch

    from finetune.backbones import create

    head = linear(tiny, (POOLED,), normalize=False, temperature=1.0, kind="fine-tuned")
    own = model(tiny, head)
    create.save(tiny, folder / "model.safetensors", (head.weight, head.bias))
    classifier.save(folder, own)
    shutil.move(folder, folder.with_name("elsewhere"))
    opened: Any = timm.create_model(
        f"local-dir:{folder.with_name('elsewhere')}", pretrained=True
    ).eval()
    pre = tiny.network.preprocess
    pixels = np.stack([decode.to_input(pictures.read(i), pre) for i in range(6)]).astype(np.float32)
    ready = (pixels / 255 - np.array(pre.mean, np.float32)) / np.array(pre.std, np.float32)
    with torch.inference_mode():
        answers = (
            opened(torch.from_numpy(ready).permute(0, 3, 1, 2).contiguous()).softmax(1).numpy()
        )
    config = timm.data.resolve_data_config({}, model=opened)

    np.testing.assert_allclose(
        own.predict(pictures.subset(range(6))).probabilities, answers, atol=1e-4
    )
    assert list(CLASSES) == opened.pretrained_cfg["label_names"]
    assert (3, pre.size, pre.size) == tuple(config["input_size"])
    assert (pre.mean, pre.std, pre.interpolation) == (
        tuple(config["mean"]),
        tuple(config["std"]),
        config["interpolation"],
    )
    assert pre.resize == int(pre.size / config["crop_pct"])


@pytest.mark.parametrize("field", ["support", "coef", "bias"])
def test_a_damaged_kernel_head_is_named(tiny: Backbone, folder: Path, field: str) -> None:
    """Support vectors, coefficients and biases have to fit each other, the classes and the taps."""
    head = kernel(tiny)
    short = {field: getattr(head, field)[..., :-1]}
    write(folder, tiny, model(tiny, dataclasses.replace(head, **short)))

    assert f"{field} (" in refusal(lambda: classifier.load(folder))
