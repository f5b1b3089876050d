"""Networks by name: their descriptions come from the cache where they are whole, else they are made
again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from finetune.backbones import architectures, catalog, create

if TYPE_CHECKING:
    from finetune.backbones.stages import Backbone


@pytest.fixture
def weights(tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights of the small network in a file, and a cache in which nothing is described."""
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "cache"))
    create.save(tiny, tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


@pytest.fixture
def loaded(tiny: Backbone, weights: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Loading takes no time; the list says how often it was asked for."""
    asked: list[str] = []

    def load(name: str, *_: Any) -> Backbone:
        asked.append(name)
        return tiny

    monkeypatch.setattr(create, "load", load)
    return asked


def described(weights: Path) -> Path:
    (path,) = (weights.parent / "cache" / "networks").iterdir()
    return path


def test_a_description_is_made_once(tiny: Backbone, weights: Path, loaded: list[str]) -> None:
    """The second opening loads nothing."""
    for _ in range(2):
        assert tiny.network == catalog.open_named("test_efficientnet", str(weights)).network
    assert 1 == len(loaded)


@pytest.mark.parametrize(
    "damage",
    ["cut", "empty", "no JSON", "no text", "a list", "no network", "another mean", "a folder"],
)
def test_a_damaged_description_is_made_again(
    tiny: Backbone, weights: Path, loaded: list[str], damage: str
) -> None:
    """Also where it still parses: a network that sees images in another way would give other
    features under the same name."""
    catalog.open_named("test_efficientnet", str(weights))
    path = described(weights)
    found = json.loads(path.read_text())
    whole = path.read_bytes()
    found["network"]["preprocess"]["mean"] = [0.1, 0.2, 0.3]
    contents = {
        "cut": whole[:100],
        "empty": b"",
        "no JSON": b"hello",
        "no text": b"\xff\xfe",
        "a list": b"[1]",
    }
    contents |= {
        "no network": b'{"network": {}, "sha256": ""}',
        "another mean": json.dumps(found).encode(),
    }
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(contents[damage])

    assert tiny.network == catalog.open_named("test_efficientnet", str(weights)).network
    assert 2 == len(loaded)
    if damage != "a folder":
        assert whole == path.read_bytes()


def test_without_a_cache_a_network_is_loaded(
    tiny: Backbone, weights: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is kept, and nothing stops."""
    monkeypatch.setenv("REGRAFT_CACHE", str(weights))

    assert tiny.network == catalog.open_named("test_efficientnet", str(weights)).network
    assert 1 == len(loaded)


def test_the_list_of_backbones_needs_no_torch() -> None:
    """Where the hub's cache is empty, the list and what else can be named import neither torch nor
    timm; torchvision's names are those that load."""
    code = (
        "import sys; from finetune.backbones import catalog; catalog.here(); catalog.others(); "
        "print([name for name in ('torch', 'timm') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "[]" == found.stdout.strip()
    assert catalog.OF_TORCHVISION == tuple(architectures.TORCHVISION)
