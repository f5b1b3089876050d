"""Which part of a picture the network looks at: the centre crop of its weights' own transform, or
the whole picture, squashed.

A crop loses the ends of long pictures for good, and pictures that differ only there become
duplicates of each other. So the whole is taken unless the crop finds better on a sample, by more
than one paired standard error, as in `finetune fit`. Where folders name classes, better means
average precision with every picture as a query; without classes, how surely an altered copy of a
picture (its sides cut or mirrored outwards, brighter or darker, smaller, a JPEG) finds it among the
others.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from finetune import hardware
from finetune.backbones import catalog
from finetune.data import decode
from finetune.data.images import ImageSet
from finetune.errors import UserError
from finetune.features.store import Store
from finetune.network import Preprocess
from retrieval import encode, metrics
from retrieval.encoder import Encoder
from retrieval.vectors import Ints, Rows

# as users write them → as `catalog.framed` calls them
FRAMES = {"crop": "crop", "squash": "whole", "whole": "whole"}
SAMPLE = 200  # pictures that decide
FEW = 20  # fewer decide nothing
# where the crop costs less than this share of the pictures, on average, for their shape, it stays
SQUARE = 0.03
SAME, APART = 0.99, 0.95  # cosines: two pictures that look the same, and surely not
CUT = 0.08  # of a side, at most, that an altered copy loses or gains
LONGEST = 8192  # pixels of an altered copy: a JPEG has limits
TEMPERATURES = np.geomspace(0.003, 0.3, 40)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Frame:
    """What was chosen, `crop` or `squash`, and why in words."""

    name: str
    why: str


def seen(encoder: Encoder) -> str:
    """The frame in which an encoder looks at pictures, as users call it."""
    return "squash" if encoder.networks[0].preprocess.squash else "crop"


def check(encoder: Encoder, asked: str | None) -> None:
    """Refuse a frame that does not exist, and one that is not that of the run: its network has
    learned with its own."""
    if asked not in (None, "auto", *FRAMES):
        raise UserError(
            f"no frame is called {asked!r}", where="--frame", fix="choose auto, crop or squash"
        )
    if encoder.run and asked not in (None, "auto") and FRAMES[str(asked)] != FRAMES[seen(encoder)]:
        what = (
            f"the run {encoder.run[0]} looks at pictures in the "
            f"frame {seen(encoder)!r}, not {asked!r}"
        )
        raise UserError(what, where="--frame", fix="leave out --frame: a run brings its own")


def framed(encoder: Encoder, name: str) -> Encoder:
    """The encoder of a named network, looking at pictures in another frame."""
    return dataclasses.replace(
        encoder,
        networks=tuple(catalog.framed(network, FRAMES[name]) for network in encoder.networks),
    )


def choose(
    encoder: Encoder,
    source: ImageSet,
    digests: Sequence[str],
    folders: Sequence[str | None],
    store: Store,
    *,
    seed: int = 0,
) -> Frame:
    """Crop or squash, from a sample of `source`; `folders` names the class of each image where
    there is one.

    The features of the sample go through the store, so that those of the chosen frame are not made
    again.
    """
    if seen(encoder) == "squash":
        return Frame("squash", "as the weights were trained")
    labels = np.unique([name or "" for name in folders], return_inverse=True)[1].astype(np.int64)
    part = _drawn(labels, np.array([name is not None for name in folders], dtype=np.bool_), seed)
    judged = len(part) > 0
    if not judged:
        part = np.sort(np.random.default_rng(seed).permutation(len(source))[:SAMPLE])
    cut = _cut(source.subset(part))
    words = f"for their shape the crop loses {cut:.0%} of the pictures"
    if cut < SQUARE:
        return Frame("crop", f"{words}, which are nearly square")
    if len(part) < FEW:
        return Frame("squash", f"{words}; too few to measure more: {len(part)}")
    alone = dataclasses.replace(
        encoder,
        networks=encoder.networks[:1],
        loads=encoder.loads[:1],
        scales=(1.0,),
        views=("",),
        whitening=None,
    )
    sample, known = source.subset(part), [digests[i] for i in part]
    tables, kept = _tables(alone, sample, known, store)
    if len(kept) < FEW:
        return Frame("squash", f"{words}; too few readable ones to measure more: {len(kept)}")
    if judged:
        better, numbers = _by_class(tables, labels[part][kept])
    else:
        better, numbers = _by_copies(alone, sample.subset(kept), tables, seed)
    alike = np.triu(
        (tables["crop"] @ tables["crop"].T >= SAME)
        & (tables["squash"] @ tables["squash"].T < APART),
        1,
    ).sum()
    pairs = (
        f"; {alike} pair{'s look' if alike > 1 else ' looks'} the same in the crop alone"
        if alike
        else ""
    )
    return Frame("crop" if better else "squash", f"{numbers}; {words}{pairs}")


def first_folder(path: str, sources: Sequence[str]) -> str | None:
    """The first folder on the way of an image, seen from that of `sources` which holds it; None
    where it lies in none."""
    for source in sources:
        if source != "." and path.startswith(f"{source}/"):
            path = path[len(source) + 1 :]
            break
    return path.split("/")[0] if "/" in path else None


# --------------------------------------------------------------------------------------- the sample


def _drawn(labels: Ints, known: NDArray[np.bool_], seed: int) -> Ints:
    """At most `SAMPLE` images of classes with at least two, as many of each as can be; none where
    classes say nothing."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.flatnonzero(known))
    members: dict[int, list[int]] = defaultdict(list)
    for i in order.tolist():
        members[int(labels[i])].append(i)
    classes = [found for found in members.values() if len(found) > 1]
    classes = classes[: SAMPLE // 2]
    if len(classes) < 2:
        return np.empty(0, np.int64)
    taken: list[int] = []
    for turn in range(max(map(len, classes))):
        taken += [found[turn] for found in classes if turn < len(found)]
    part = np.sort(np.array(taken[:SAMPLE], dtype=np.int64))
    return part if len(part) >= FEW else part[:0]


def _cut(sample: ImageSet) -> float:
    """The share of the pictures that a square cut out of their middle loses, on average."""
    lost = []
    for i in range(len(sample)):
        try:
            width, height = decode.size(sample.read(i))
        except decode.DecodeError:
            continue
        lost.append(1 - min(width, height) / max(width, height))
    return float(np.mean(lost)) if lost else 0.0


def _tables(
    encoder: Encoder, sample: ImageSet, digests: Sequence[str], store: Store
) -> tuple[dict[str, Rows], Ints]:
    """Vectors of the sample in both frames, and the positions of the pictures that could be
    read."""
    found = {
        name: encode.from_store(framed(encoder, name), sample, digests, store)
        for name in ("crop", "squash")
    }
    readable = set.intersection(*(set(one.images.paths) for one in found.values()))
    tables = {}
    for name, one in found.items():
        at = np.array(
            [i for i, path in enumerate(one.images.paths) if path in readable], dtype=np.int64
        )
        tables[name] = np.concatenate([np.zeros((0, encoder.width), np.float32), *one.blocks(at)])
    return tables, np.array(
        [i for i, path in enumerate(sample.paths) if path in readable], dtype=np.int64
    )


# ----------------------------------------------------------------------------------------- measures


def _better(gain: Floats) -> tuple[bool, float]:
    """Whether the crop is better by more than one standard error of the paired differences, and
    that error."""
    error = float(gain.std() / math.sqrt(len(gain)))
    return bool(gain.mean() > error), error


def _by_class(tables: dict[str, Rows], labels: Ints) -> tuple[bool, str]:
    """Every picture is a query for those of its class."""
    precision, first = {}, {}
    for name, table in tables.items():
        scores = table @ table.T
        np.fill_diagonal(scores, -np.inf)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :-1]
        hits = labels[order] == labels[:, None]
        totals = hits.sum(axis=1)
        good = totals > 0
        precision[name] = metrics.average_precision(hits[good], totals[good])
        first[name] = metrics.success_at(hits[good], totals[good], 1).mean()
    better, error = _better(precision["crop"] - precision["squash"])
    means = {
        name: f"mAP {values.mean():.3f}, the first right {first[name]:.1%}"
        for name, values in precision.items()
    }
    words = f"{means['squash']}; in the crop {means['crop']} (paired error of mAP {error:.3f}"
    return better, f"{words}; {len(precision['crop'])} images by their folders)"


def _by_copies(
    encoder: Encoder, sample: ImageSet, tables: dict[str, Rows], seed: int
) -> tuple[bool, str]:
    """An altered copy of every picture is a query for it: by log loss, after one fitted temperature
    per frame."""
    pre = encoder.networks[0].preprocess
    with ThreadPoolExecutor(hardware.cores()) as pool:
        made = pool.map(
            lambda i: _altered(sample.read(i), pre, np.random.default_rng([seed, i])),
            range(len(sample)),
        )
        copies = dict(zip(sample.paths, made, strict=True))
    queries = dataclasses.replace(sample, source=copies.__getitem__)
    # how a picture is cut to the input is no part of the network
    runners = encode.open_runners(encoder)
    losses, first = {}, {}
    for name, table in tables.items():
        asked, _ = encode.directly(framed(encoder, name), queries, runners)
        scores = (asked @ table.T).astype(np.float64)
        own = np.diagonal(scores)
        first[name] = np.mean((scores >= own[:, None]).sum(axis=1) == 1)
        losses[name] = min(
            (_log_loss(scores, own, t) for t in TEMPERATURES), key=lambda loss: float(loss.mean())
        )
    better, error = _better(losses["squash"] - losses["crop"])
    means = {
        name: f"{first[name]:.1%} (log loss {loss.mean():.3f})" for name, loss in losses.items()
    }
    words = (
        f"altered copies find {len(sample)} pictures first in "
        f"{means['squash']}, in the crop {means['crop']}"
    )
    return better, f"{words}, paired error {error:.3f}"


def _log_loss(scores: Floats, own: Floats, temperature: float) -> Floats:
    top = scores.max(axis=1)
    total = np.log(np.exp((scores - top[:, None]) / temperature).sum(axis=1))
    return (top - own) / temperature + total


def _altered(data: bytes, pre: Preprocess, rng: np.random.Generator) -> bytes:
    """A copy as copies come about: each side cut, or mirrored outwards, a little; brighter or
    darker; smaller; a JPEG."""
    image: Any = decode.decode(data, short_side=math.ceil(pre.resize * decode.DRAFT_MARGIN))
    shrink = max(1.0, min(image.size) / (pre.resize * decode.DRAFT_MARGIN)) / rng.uniform(0.5, 1)
    width, height = image.size
    by = (rng.uniform(0, CUT, 4) * (width, height, width, height)).astype(int)
    if rng.random() < 0.5:
        image = image.crop((by[0], by[1], width - by[2], height - by[3]))
    else:
        sides = ((by[1], by[3]), (by[0], by[2]), (0, 0))
        image = Image.fromarray(np.pad(np.asarray(image), sides, mode="symmetric"))
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.8, 1.25))
    shrink = max(shrink, max(image.size) / LONGEST)
    smaller = tuple(max(1, round(side / shrink)) for side in image.size)
    out = io.BytesIO()
    image.resize(smaller, Image.Resampling.BOX).save(out, "JPEG", quality=85)
    return out.getvalue()
