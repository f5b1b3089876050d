"""What a network takes of the memory: reckoned without running it, refused with a number and a way
on where it does not fit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from finetune import hardware
from finetune.backbones import create, memory
from finetune.backbones.stages import Backbone, last_stages
from finetune.errors import UserError
from finetune.features import conversion, engine
from finetune.network import Tap

SMALL = "test_efficientnet"


def free(monkeypatch: pytest.MonkeyPatch, size: float | None) -> None:
    """Let so many bytes be free on this machine."""
    monkeypatch.setattr(hardware, "available", lambda: size and int(size))


# ---------------------------------------------------------------------------------------- reckoning


def test_the_largest_operation_is_counted() -> None:
    """An operation reads and writes its tensors, and nothing is computed for it: 3 × 8 × 8 in, 16 ×
    8 × 8 out; the weights are there once, whatever the batch."""
    convolution = nn.Conv2d(3, 16, 1, bias=False)
    assert 4 * (3 * 64 + 16 * 64) == memory.largest(convolution, 8)
    assert 4 * (19 * 10**10) == memory.largest(convolution, 10**5)


def test_weights_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """AlexNet's 244 MB of weights are no part of an image: a batch of 64 needs less than 1 GB."""
    module = create.load("alexnet", "random").module
    free(monkeypatch, 1e9)
    memory.check(module, "alexnet", 224, memory.RUN * 64)
    with pytest.raises(UserError, match=r"alexnet .* needs some 1\.\d GB"):
        memory.check(module, "alexnet", 224, memory.RUN * 640)


@pytest.mark.parametrize(
    ("name", "stages", "images", "taken"),
    [
        ("tf_efficientnet_lite0", 7, 32, 2.91e9),
        ("tf_efficientnet_lite0", 2, 32, 0.80e9),
        ("resnet18", 4, 32, 1.37e9),
        ("resnet50", 4, 16, 2.11e9),
        ("vit_tiny_patch16_224", 12, 16, 0.67e9),
    ],
)
def test_a_training_is_reckoned_near_what_it_takes(
    name: str, stages: int, images: int, taken: float
) -> None:
    """What one epoch in float32 was measured to take (peak of its process, n = 1): the activations
    behind the freeze boundary, and the copies of the weights."""
    own = create.load(name, "random")
    moving = [s.name for s in own.stages] if stages > 3 else last_stages(own, stages)
    assert 0.75 < memory.of_training(own, moving, images) / taken < 1.25


def test_a_training_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, tiny: Backbone
) -> None:
    """The message names the batch that would fit, which does."""
    moving = [stage.name for stage in tiny.stages]
    free(monkeypatch, memory.of_training(tiny, moving, 64) / 2)
    with pytest.raises(UserError, match=r"batches of 64 images of 160 pixels") as caught:
        memory.check_training(tiny, moving, 64)
    (fewer,) = re.findall(r"at most (\d+) images", str(caught.value))
    assert 16 < int(fewer) < 32
    memory.check_training(tiny, moving, int(fewer) - 1)


def test_attention_makes_no_matrix_of_all_tokens() -> None:
    """A transformer's need grows with the pixels, not with their square."""
    small, large = (
        memory.largest(create.load("test_vit", "random", side).module, side) for side in (320, 640)
    )
    assert 4.2 > large / small > 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine_name", "images"), [("torch", memory.RUN * 8), ("openvino", 4 * memory.CONVERTED)]
)
def test_the_reckoning_is_near_what_is_taken(engine_name: str, images: float) -> None:
    """The peak memory of a process between two sizes grows by what was reckoned, within a half."""
    code = (
        "import sys, resource, numpy as np\nfrom finetune.backbones import create as backbone\n"
        "from finetune.features import engine\nfrom "
        "finetune.network import Tap\n"
        "side = int(sys.argv[1]); made = backbone.load('tf_efficientnet_lite0', 'random', side)\n"
        f"run = engine.open_runner(made.network, (Tap('pooled'),), lambda: made, "
        f"engine={engine_name!r}, precision='float32')\n"
        "list(run.stream(np.zeros((run.batch, side, side, 3), np.uint8) for _ in range(2)))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    taken = [
        int(
            subprocess.run(
                [sys.executable, "-c", code, str(side)], capture_output=True, text=True, check=True
            ).stdout
        )
        for side in (384, 768)
    ]
    module = create.load("tf_efficientnet_lite0", "random").module
    expected = images * (memory.largest(module, 768) - memory.largest(module, 384))
    assert 0.5 < (taken[1] - taken[0]) / expected < 1.5


# ----------------------------------------------------------------------------------------- refusing


def test_a_size_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that the memory cannot hold is refused before anything of it is made; the size that is
    named instead works."""
    free(monkeypatch, 200e6)
    with pytest.raises(
        UserError,
        match=r"input of 9999 pixels needs some \d+\.\d GB of memory, and 0\.2 GB are free",
    ) as caught:
        create.load(SMALL, "random", 9999)
    (size,) = re.findall(r"at most (\d+) pixels", str(caught.value))
    assert 160 < int(size) < 2000
    assert int(size) == create.load(SMALL, "random", int(size)).network.preprocess.size


def test_batches_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, tiny: Backbone) -> None:
    """Opened for either engine, a network that was loaded when there was room is refused where
    there is none."""
    free(monkeypatch, 1e6)
    for name in ("torch", "openvino"):
        with pytest.raises(UserError, match="input of 160 pixels needs some"):
            engine.open_runner(
                tiny.network, (Tap("pooled"),), lambda: tiny, engine=name, precision="float32"
            )


def test_little_memory_runs_one_batch_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tiny: Backbone
) -> None:
    """Where all streams of OpenVINO do not fit, it runs one; where one does not, a converted
    network is refused, too."""
    model, _ = conversion.converted(tiny.network, (Tap("pooled"),), lambda: tiny)
    need = (
        conversion.HELD["float32"]
        * conversion.BATCH
        * memory.largest(tiny.module, 160)
        / hardware.SHARE
    )
    monkeypatch.setattr(hardware, "cores", lambda: 4)
    for share, streams in ((10, ""), (1.5, "1")):
        free(monkeypatch, need * share)
        assert streams == conversion.one_stream(model, tiny.network, "float32")
    free(monkeypatch, need * 0.5)
    with pytest.raises(UserError, match="choose at most"):
        conversion.one_stream(model, tiny.network, "float32")


def test_where_nobody_knows_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that does not tell what is free is trusted."""
    free(monkeypatch, None)
    memory.check(nn.Conv2d(3, 16, 1), "small", 10**6, 1000)


@pytest.mark.parametrize(
    ("name", "side", "words", "works"),
    [
        ("test_vit", 161, "it takes multiples of 16, such as 160", 160),
        ("alexnet", 40, "64 can be taken, too", 64),
    ],
)
def test_sizes_that_a_network_cannot_take(name: str, side: int, words: str, works: int) -> None:
    """A side between the patches, or too small to leave a map, is refused with one that works."""
    with pytest.raises(UserError, match=words):
        create.load(name, "random", side)
    assert works == create.load(name, "random", works).network.preprocess.size


# -------------------------------------------------------------------------------------- the machine


def test_a_container_bounds_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least of what the system has and what the container may still take, files in memory not
    counted; None if unknown."""
    tables = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 5000 kB\n"}

    def read(path: Path) -> str:
        if str(path) not in tables:
            raise FileNotFoundError(path)
        return tables[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert 5_120_000 == hardware.available()
    tables["/sys/fs/cgroup/memory.max"] = "max"
    tables["/sys/fs/cgroup/memory.current"] = "3000000"
    assert 5_120_000 == hardware.available()
    tables["/sys/fs/cgroup/memory.max"] = "4000000"
    assert 1_000_000 == hardware.available()
    tables["/sys/fs/cgroup/memory.stat"] = "anon 1\ninactive_file 500000\n"
    assert 1_500_000 == hardware.available()
    tables.clear()
    assert hardware.available() is None
