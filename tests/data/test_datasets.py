"""Named sets: scikit-learn's digits, and torchvision's data sets through a stand-in and through
FakeData."""

from __future__ import annotations

import socket
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from finetune.data import datasets
from finetune.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "cache"))


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(data)))


def stand_in(monkeypatch: pytest.MonkeyPatch, **members: Any) -> None:
    """Put a data set called `StandIn` into torchvision."""
    kind = type("StandIn", (torchvision.datasets.VisionDataset,), members)
    monkeypatch.setattr(torchvision.datasets, "StandIn", kind, raising=False)


def picture(value: int) -> Image.Image:
    return Image.new("L", (4, 4), value)


def test_digits() -> None:
    """1,797 digits of 8 × 8 pixels, as PNG bytes, with values from 0 to 255."""
    found = datasets.load("sklearn:digits")
    assert (1797, 1797, tuple("0123456789")) == (
        len(found.paths),
        len(set(found.paths)),
        found.classes,
    )
    assert found.split is None
    image = opened(found.source(found.paths[0]))
    assert ((8, 8), 0, 239) == (image.shape, image.min(), image[1, 3])
    assert 255 == max(opened(found.source(path)).max() for path in found.paths[:20])
    assert found.paths[5] == "5/0005.png"
    assert 5 == found.labels[5]


def test_digits_match_their_source() -> None:
    """Every image is the digit of its label, in the order of scikit-learn."""
    from sklearn.datasets import load_digits

    data, found = load_digits(), datasets.load("sklearn:digits")
    assert np.array_equal(data.target, found.labels)
    for i in (0, 700, 1796):
        assert np.array_equal(
            np.round(data.images[i] * 255 / 16), opened(found.source(found.paths[i]))
        )


def test_bytes_are_the_same_at_every_reading() -> None:
    """The bytes of an image do not change between readings, so that their digest names them."""
    found = datasets.load("sklearn:digits")
    assert found.source("7/0007.png") == datasets.load("sklearn:digits").source("7/0007.png")


def test_fake_data_works_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's FakeData has no parts, labels of its own and images that are made when they are
    read."""
    monkeypatch.setattr(socket, "socket", lambda *a, **k: pytest.fail("the network was tried"))
    kind = torchvision.datasets.FakeData
    monkeypatch.setattr(kind.__init__, "__defaults__", (20, (3, 16, 16), 4, None, None, 0))
    found = datasets.load("torchvision:FakeData")
    data = kind(size=20, image_size=(3, 16, 16), num_classes=4)
    assert [data[i][1] for i in range(20)] == found.labels.tolist()
    assert ("0", "1", "2", "3") == found.classes
    assert found.split is None
    assert np.array_equal(np.asarray(data[3][0]), opened(found.source(found.paths[3])))


def test_train_and_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets with train=True and False have a training and a test part, kept in the cache folder."""

    def init(self: Any, root: str, train: bool = True, download: bool = False) -> None:
        assert download
        assert Path(root).is_dir()
        self.targets, self.classes, self.base = (
            ([0, 1, 0] if train else [1]),
            ["cat", "dog"],
            10 if train else 90,
        )

    stand_in(
        monkeypatch,
        __init__=init,
        __len__=lambda self: len(self.targets),
        __getitem__=lambda self, i: (picture(self.base + i), self.targets[i]),
    )
    found = datasets.load("torchvision:StandIn")
    assert found.split is not None
    assert (["train"] * 3 + ["test"], [0, 1, 0, 1], ("cat", "dog")) == (
        found.split.tolist(),
        found.labels.tolist(),
        found.classes,
    )
    assert [10, 11, 12, 90] == [int(opened(found.source(path))[0, 0]) for path in found.paths]


def test_split_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets with split= are asked for every part under the names that torchvision uses; those they
    lack are left out."""

    def init(self: Any, root: str, split: str = "trainval", download: bool = False) -> None:
        if split not in ("trainval", "test"):
            raise ValueError(f"Unknown value '{split}' for argument split.")
        self._labels = [0, 1] if split == "trainval" else [1]

    stand_in(
        monkeypatch,
        __init__=init,
        __len__=lambda self: len(self._labels),
        __getitem__=lambda self, i: (picture(i), self._labels[i]),
    )
    found = datasets.load("torchvision:StandIn")
    assert found.split is not None
    assert ["train", "train", "test"] == found.split.tolist()
    assert ("0", "1") == found.classes


def test_labels_are_checked_against_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that does not hold the labels (here it starts from 1) is not believed: the images are
    asked."""
    stand_in(
        monkeypatch,
        __init__=lambda self: setattr(self, "labels", [1, 2]),
        __len__=lambda self: 2,
        __getitem__=lambda self, i: (picture(i), self.labels[i] - 1),
    )
    assert [0, 1] == datasets.load("torchvision:StandIn").labels.tolist()


@pytest.mark.parametrize("target", [np.array([0, 1, 1]), {"boxes": []}, "a caption", 0.5])
def test_other_targets_than_one_class_are_refused(
    monkeypatch: pytest.MonkeyPatch, target: Any
) -> None:
    """Attributes, boxes, captions and numbers are no class."""
    stand_in(
        monkeypatch,
        __init__=lambda self: None,
        __len__=lambda self: 3,
        __getitem__=lambda self, i: (picture(i), target),
    )
    with pytest.raises(UserError, match="does not have one class an image"):
        datasets.load("torchvision:StandIn")


def test_failed_download_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the message says what failed and what to do."""

    def init(self: Any, root: str, train: bool = True, download: bool = False) -> None:
        raise URLError("Name or service not known")

    stand_in(monkeypatch, __init__=init)
    with pytest.raises(
        UserError, match=r"could not be fetched.*Name or service not known(.|\n)*check the network"
    ):
        datasets.load("torchvision:StandIn")


def test_split_that_fails_to_download_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that fails half way is an error, not a smaller set."""

    def init(self: Any, root: str, split: str = "train", download: bool = False) -> None:
        if split == "test":
            raise RuntimeError("Error downloading test.tgz")
        self._labels = [0, 1]

    stand_in(
        monkeypatch,
        __init__=init,
        __len__=lambda self: 2,
        __getitem__=lambda self, i: (picture(i), i),
    )
    with pytest.raises(UserError, match=r"Error downloading test\.tgz"):
        datasets.load("torchvision:StandIn")


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some sets need another package: it is named."""

    def init(self: Any, root: str, split: str = "train", download: bool = False) -> None:
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    stand_in(monkeypatch, __init__=init)
    with pytest.raises(UserError, match="pip install scipy"):
        datasets.load("torchvision:StandIn")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sklearn:iris", "sklearn:digits"),
        ("tfds:mnist", "named sets"),
        ("torchvision:CIFAR1000", "CIFAR10"),
        ("torchvision:Nothing", "torchvision:"),
        ("torchvision:", "torchvision:"),
        ("torchvision:ImageFolder", "called 'ImageFolder'"),
        ("torchvision:CocoDetection", "needs annFile"),
    ],
)
def test_unknown_names_list_what_there_is(text: str, says: str) -> None:
    """A set that does not exist, or that needs more than its name, is refused with a few that
    do."""
    with pytest.raises(UserError, match=says):
        datasets.load(text)
