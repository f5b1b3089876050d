"""How far the images are from the photographs of ImageNet, without one of them: by a ruler
network's own memory.

BatchNorm layers remember the mean and variance that each channel had over the training images. The
distance compares them with what the target images give: per channel (μ − μ_s)²/σ_s² + (σ/σ_s − 1)²,
the median over the channels of a layer, then over the layers. The idea is that of AdaBN (Li et al.
2016, arXiv 1603.04779) and of source-free adaptation by BatchNorm matching (Ishii & Sugiyama 2021,
arXiv 2101.10842). The ruler is always EfficientNet-Lite0, so that one scale serves every backbone,
those without BatchNorm too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from finetune import files
from finetune.backbones import catalog
from finetune.backbones.catalog import Named
from finetune.data.images import ImageSet
from finetune.errors import UserError
from finetune.features import extraction, knn
from finetune.features.store import Store
from finetune.network import Tap

if TYPE_CHECKING:
    from finetune.backbones.stages import Backbone

RULER = "tf_efficientnet_lite0"
SAMPLE = 128  # images looked at
BOOTSTRAP = 200  # resamples of the images
# below: near, above: far; between crops of photographs (0.03) and drawn digits (0.3)
NEAR, FAR = (0.10, 0.20)
KNN = 5  # neighbours of the second opinion
# share of the way from chance to 1 that k-NN reaches: above: near, below: far
CHANCE_NEAR, CHANCE_FAR = (0.60, 0.30)
ADVICE = {  # where the features say something else than the looks: by what they say
    "near": "the features serve these classes well: nothing needs to be done",
    "far": "the classes differ in what these features lose: compare --strategy half",
}


@dataclass(frozen=True)
class Similarity:
    """`word` is near, moderate, far, or unknown (a backbone with another pretraining, or no ruler
    here).

    `distance` with its 90 % bootstrap interval over the images; `knn` is the leave-one-out accuracy
    of `KNN` cosine neighbours on the backbone's pooled features, `knn_word` what it says; `notes`
    says where the two disagree.
    """

    word: str
    distance: float | None
    low: float | None
    high: float | None
    n: int
    knn: float | None
    knn_word: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "notes": list(self.notes),
            "ruler": RULER,
            "near_below": NEAR,
            "far_above": FAR,
        }


def measure(images: ImageSet, pretraining: str, *, store: Store, seed: int = 0) -> Similarity:
    """Distance of (a seeded sample of) `images`; `pretraining` is that of the backbone which will
    be used."""
    sample = _sample(len(images), seed)
    ruler = catalog.open_named(RULER)
    found = extraction.extract(
        images.subset(sample),
        ruler.network,
        [Tap("moments")],
        ruler.load,
        store=store,
        engine_name="torch",
        precision="float32",
        on_bad="skip",
    )
    moments = np.asarray(found.blocks[Tap("moments")], dtype=np.float64)
    layers = _layers(ruler)
    value = distance(moments.mean(0), layers)
    rng = np.random.default_rng(seed)
    share = rng.multinomial(
        len(moments), np.full(len(moments), 1 / len(moments)), size=BOOTSTRAP
    ) / len(moments)
    low, high = _interval(value, [distance(drawn, layers) for drawn in share @ moments])
    if pretraining != "imagenet":
        note = (
            f"the backbone's pretraining is {pretraining}: the distance to "
            f"ImageNet's photographs says nothing about it"
        )
        return Similarity("unknown", value, low, high, len(moments), None, "unknown", (note,))
    return Similarity(
        _word(value), value, low, high, len(moments), None, "unknown", _border(value, low, high)
    )


def _interval(value: float, spread: Sequence[float]) -> tuple[float, float]:
    """The 90 % interval of a distance from those of resamples. They are too large, the more so the
    fewer images: a sample of a sample strays from the mean twice. So they are moved back by as much
    as their mean is off."""
    bias = float(np.mean(spread)) - value
    low, high = np.quantile(spread, [0.05, 0.95]) - bias
    return max(0.0, min(value, float(low))), max(value, float(high))


def unknown(reason: str) -> Similarity:
    """The answer where nothing could be measured."""
    return Similarity("unknown", None, None, None, 0, None, "unknown", (reason,))


def second_opinion(
    first: Similarity, pooled: NDArray[np.float32], y: NDArray[np.int64]
) -> Similarity:
    """Add what leave-one-out k-NN on the pooled features says: good features for these classes mean
    a near domain."""
    from dataclasses import replace

    counts = np.bincount(y)
    if len(y) <= KNN or counts.max() < 2:
        return replace(first, notes=(*first.notes, "too few images for the k-NN opinion"))
    _, positions = knn.neighbours(pooled, KNN)
    votes = np.zeros((len(y), counts.size))
    weight = 1 + 1e-3 * np.arange(KNN, 0, -1)[: positions.shape[1]]  # the nearest decides a tie
    for j in range(positions.shape[1]):
        votes[np.arange(len(y)), y[positions[:, j]]] += weight[j]
    accuracy = float((votes.argmax(1) == y).mean())
    chance = float(((counts / len(y)) ** 2).sum())
    share = (accuracy - chance) / max(1e-9, 1 - chance)
    word = "near" if share >= CHANCE_NEAR else "far" if share < CHANCE_FAR else "moderate"
    notes = first.notes
    if first.word in ("near", "far") and word in ("near", "far") and word != first.word:
        notes = (
            *notes,
            f"the two opinions disagree: the images look {first.word}, but {KNN}-NN on the "
            f"features is right for {accuracy:.0%}; {ADVICE[word]}",
        )
    return replace(first, knn=accuracy, knn_word=word, notes=notes)


Layers = list[tuple[NDArray[np.float64], NDArray[np.float64], float]]


def distance(moments: NDArray[np.float64], layers: Layers) -> float:
    """The distance of pooled moments (means and mean squares, layer by layer) to running statistics
    `(mean, var, eps)`."""
    medians, start = [], 0
    for mean_s, var_s, eps in layers:
        width = len(mean_s)
        mean, square = moments[start : start + width], moments[start + width : start + 2 * width]
        start += 2 * width
        variance = np.maximum(square - mean**2, 0) + eps
        source = var_s + eps
        medians.append(
            np.median((mean - mean_s) ** 2 / source + (np.sqrt(variance / source) - 1) ** 2)
        )
    return float(np.median(medians))


def _layers(ruler: Named) -> Layers:
    """The running statistics of the ruler. They are kept in the cache: making the network for them
    would take seconds in every process."""
    path = None
    with contextlib.suppress(UserError):  # no cache: it is a matter of time alone
        path = files.cache_dir("networks") / f"statistics-{ruler.network.digest[:24]}.safetensors"
    if path is not None and files.is_sealed(path.with_suffix(".seal"), [path]):
        return _unpacked(load(path.read_bytes()))
    layers = _running_statistics(ruler.load())
    if path is not None:
        with contextlib.suppress(UserError):
            files.write_bytes(path, save(_packed(layers)))
            files.seal(path.with_suffix(".seal"), [path])
    return layers


def _packed(layers: Layers) -> dict[str, NDArray[np.float64]]:
    mean, var, eps = zip(*layers, strict=True)
    widths = np.array([len(part) for part in mean], dtype=np.float64)
    return {
        "mean": np.concatenate(mean),
        "var": np.concatenate(var),
        "eps": np.array(eps),
        "widths": widths,
    }


def _unpacked(found: dict[str, NDArray[np.float64]]) -> Layers:
    ends = np.cumsum(found["widths"]).astype(int)[:-1]
    parts = (np.split(found[name], ends) for name in ("mean", "var"))
    return list(zip(*parts, found["eps"].tolist(), strict=True))


def _running_statistics(backbone: Backbone) -> Layers:
    from finetune.backbones.stages import BATCH_NORMS

    norms = [part for part in backbone.module.modules() if isinstance(part, BATCH_NORMS)]
    layers = []
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        layers.append(
            (norm.running_mean.double().numpy(), norm.running_var.double().numpy(), float(norm.eps))
        )
    return layers


def _sample(n: int, seed: int) -> NDArray[np.int64]:
    if n <= SAMPLE:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, SAMPLE, replace=False))


def _word(value: float) -> str:
    return "near" if value < NEAR else "far" if value > FAR else "moderate"


def _border(value: float, low: float, high: float) -> tuple[str, ...]:
    words = sorted({_word(low), _word(value), _word(high)})
    return (
        ()
        if len(words) == 1
        else (f"the interval {low:.3f}–{high:.3f} reaches across {' and '.join(words)}",)
    )
