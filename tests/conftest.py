"""Guards around every test, and the networks and images that several test files share.

No test writes outside its temporary folder or reaches beyond this machine: the cache and the home
folder are temporary, and sockets to other machines are refused. A test that lets code try the
network takes the fixture `no_network` and clears it; any other attempt fails the test.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

# Read when torch is imported. Two processes of two threads each would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
# Processes that tests start import the modules beside this file, too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
)

from finetune import timings

if TYPE_CHECKING:
    import combined
    import webs

    from finetune.backbones.stages import Backbone
    from finetune.data.images import ImageSet

SHAPES = ("circle", "square", "triangle")


# ------------------------------------------------------------------------------------------- guards


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is slow to make and the same for every test: converted networks and their descriptions,
    by content."""
    return tmp_path_factory.mktemp("shared-cache")


@pytest.fixture(scope="session", autouse=True)
def session_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What fixtures of the session write goes to a temporary cache and home folder, too."""
    base = tmp_path_factory.mktemp("session")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGRAFT_CACHE", str(base / "cache"))
        patch.setenv("HOME", str(base))
        yield


@pytest.fixture(autouse=True)
def own_folders(
    tmp_path_factory: pytest.TempPathFactory, shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache and a home folder for this test alone (but for the parts of the cache that are
    shared)."""
    base = tmp_path_factory.mktemp("own")
    for name in ("home", "cache"):
        (base / name).mkdir()
    for part in ("compiled", "networks"):
        (shared_cache / part).mkdir(exist_ok=True)
        (base / "cache" / part).symlink_to(shared_cache / part, target_is_directory=True)
    monkeypatch.setenv("REGRAFT_CACHE", str(base / "cache"))
    monkeypatch.setenv("HOME", str(base / "home"))
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "HF_HOME", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for timings, or depends on them: the first way counts as the fastest.

    What is about timings gives its own rates.
    """
    monkeypatch.setattr(timings, "measure", lambda ways, opened: {ways[0]: 100.0})


def is_here(address: Any) -> bool:
    """Whether a socket address, or a host name, stays on this machine."""
    host = address[0] if isinstance(address, tuple) else address
    if (
        host is None
        or isinstance(host, bytes)
        or str(host) in ("", "localhost")
        or str(host).startswith("/")
    ):
        return True
    try:
        return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Refuse every way to another machine, and list who tried."""
    attempts: list[str] = []

    def guarded(original: Any, at: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            address = args[at] if len(args) > at else kwargs.get("address", kwargs.get("host"))
            if not is_here(address):
                attempts.append(str(address))
                raise ConnectionRefusedError(f"a test tried the network: {address}")
            return original(*args, **kwargs)

        return call

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(
            socket.socket, name, guarded(getattr(socket.socket, name), 2 if name == "sendto" else 1)
        )
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, guarded(getattr(socket, name), 0))
    yield attempts
    assert [] == attempts, "the code under test tried to reach another machine"


# ------------------------------------------------------------------------------------------- images


def draw(kind: str, rng: np.random.Generator, side: int = 64) -> Image.Image:
    """One filled shape of a random colour, size and place on a plain ground."""
    ground, colour = (tuple(int(c) for c in rng.integers(0, 256, 3)) for _ in range(2))
    image = Image.new("RGB", (side, side), ground)
    r = int(rng.integers(side // 6, side // 3))
    x, y = (int(v) for v in rng.integers(r, side - r, 2))
    canvas = ImageDraw.Draw(image)
    if kind == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif kind == "square":
        canvas.rectangle((x - r, y - r, x + r, y + r), fill=colour)
    else:
        canvas.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colour)
    return image


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per class with 20 drawn PNGs each; the same pixels in every session. Do not write
    into it."""
    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    for kind in SHAPES:
        (root / kind).mkdir()
        for i in range(20):
            draw(kind, rng).save(root / kind / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def shades(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark and light pictures, 20 each: told apart after three epochs from nothing, so that the
    moved model can ship."""
    root = tmp_path_factory.mktemp("shades")
    rng = np.random.default_rng(0)
    for name, ground in (("dark", 20), ("light", 200)):
        (root / name).mkdir()
        for i in range(20):
            Image.fromarray(rng.integers(ground, ground + 40, (48, 64, 3), np.uint8)).save(
                root / name / f"{i:02d}.png"
            )
    return root


@pytest.fixture(scope="session")
def combined_runs(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> combined.Runs:
    """Small finished runs on `shapes`. Do not write into them."""
    import combined

    return combined.make(shapes, tmp_path_factory.mktemp("combined"))


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 20 JPEGs of 500 × 375 pixels: crops of scikit-learn's two sample
    photographs."""
    from sklearn.datasets import load_sample_images

    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(20):
        whole = Image.fromarray(load_sample_images().images[i % 2])
        scale = rng.uniform(0.5, 1.0)
        width, height = int(500 * scale), int(375 * scale)
        x, y = (
            int(rng.integers(0, whole.width - width + 1)),
            int(rng.integers(0, whole.height - height + 1)),
        )
        crop = whole.crop((x, y, x + width, y + height)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        crop.save(root / f"{i:02d}.jpg", quality=90)
    return root


# ----------------------------------------------------------------------------------------- networks


@pytest.fixture(scope="session")
def tiny() -> Backbone:
    """A small network with seeded random weights, for the tests that need none. Do not train it:
    `load` another."""
    import torch

    from finetune.backbones import create

    torch.manual_seed(0)
    return create.load("test_efficientnet", "random")


@pytest.fixture(scope="session")
def lite0() -> Backbone:
    """EfficientNet-Lite0 with its real weights. Do not train it: `load` another."""
    from finetune.backbones import create

    return create.load("tf_efficientnet_lite0")


@pytest.fixture(scope="session")
def data() -> ImageSet:
    """The images of `trainings`."""
    import trainings

    return trainings.colours()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors are quickest on one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[webs.Site]:
    """A gallery that is served to requests without a server."""
    import webs

    yield from webs.served(tmp_path, monkeypatch.setattr)
