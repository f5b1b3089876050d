"""What to label next: images that the run is unsure of, and that differ from one another.

`badge` draws them as Ash et al. 2020 do ("Deep Batch Active Learning by Diverse, Uncertain Gradient
Lower Bounds", ICLR): k-means++ on the gradients that the head would get, were its own answer the
truth. Such a gradient is long where the model is unsure, and two are near where images and answers
are alike. `margin` takes the smallest distances between the two best probabilities, `random` draws
evenly. Which is worth it was measured: docs/how-to/suggest.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from finetune import files
from finetune.analysis import Floats, Ints
from finetune.classifier import Classifier
from finetune.data import loose
from finetune.data.faults import Fault
from finetune.data.images import ImageSet
from finetune.data.loose import Picture
from finetune.errors import UserError
from finetune.evaluation.ensemble import AnyModel, open_run
from finetune.evaluation.evaluate import trained_on
from finetune.features import extraction
from finetune.features.store import Store
from finetune.files import Digests
from finetune.heads.head import side_by_side, softmax
from finetune.names import shown
from finetune.progress import Bar, Say, no_bar, quiet

Method = Literal["badge", "margin", "random"]
METHODS: tuple[Method, ...] = ("badge", "margin", "random")


def pick(
    probabilities: NDArray[Any], x: Floats, count: int, *, method: Method = "badge", seed: int = 0
) -> Ints:
    """Positions of at most `count` images with these probabilities `(n, C)` and features `(n, D)`,
    the first to be labelled first."""
    n = len(probabilities)
    random = np.random.default_rng([seed, 23])
    if method == "random":
        return random.permutation(n)[:count]
    if method == "margin":
        return np.argsort(margins(probabilities), kind="stable")[:count]
    return _badge(probabilities, x, min(count, n), random)


def margins(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """The most probable class's lead over the second `(n,)`."""
    best = np.sort(np.asarray(probabilities, dtype=np.float64), axis=1)[:, -2:]
    return best[:, 1] - best[:, 0]


def _badge(probabilities: NDArray[Any], x: Floats, count: int, random: np.random.Generator) -> Ints:
    """k-means++ on gradients, which are never made: the product of two is that of the errors times
    that of the features."""
    n = len(x)
    errors = np.array(probabilities, dtype=np.float64)
    errors[np.arange(n), errors.argmax(axis=1)] -= 1
    squares = (errors**2).sum(axis=1) * np.einsum("ij,ij->i", x, x, dtype=np.float64)
    first = int(squares.argmax())
    chosen, distance = [first], np.full(n, np.inf)
    while len(chosen) < count:
        last = chosen[-1]
        product = (errors @ errors[last]) * (x @ x[last])
        distance = np.minimum(distance, np.maximum(squares + squares[last] - 2 * product, 0))
        distance[chosen] = 0
        total = distance.sum()
        left = np.setdiff1d(np.arange(n), chosen)
        if total <= 0:  # what is left is sure, or like what was chosen
            chosen += left[np.argsort(-squares[left], kind="stable")].tolist()[
                : count - len(chosen)
            ]
            break
        chosen.append(int(random.choice(n, p=distance / total)))
    return np.array(chosen, dtype=np.int64)


# -------------------------------------------------------------------------------- of a whole folder


@dataclass(frozen=True)
class Suggestions:
    """Images of `source` to be labelled next, the first first: `positions`, and what the run says
    of each, `probabilities` `(n, C)`. `trained_on` counts images that were left out as the run was
    trained on them; `faults` could not be read."""

    source: ImageSet
    classes: tuple[str, ...]
    positions: Ints
    probabilities: Floats
    method: str
    pool: int
    trained_on: int
    faults: tuple[Fault, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Rows `{rank, path, prediction, score, margin}`; names are those that were given."""
        best = self.probabilities.argmax(axis=1)
        lead = margins(self.probabilities)
        return [
            {
                "rank": k + 1,
                "path": shown(self.source.paths[i]),
                "prediction": self.classes[best[k]],
                "score": float(self.probabilities[k, best[k]]),
                "margin": float(lead[k]),
            }
            for k, i in enumerate(self.positions)
        ]


def suggest(
    path: str | Path,
    pictures: Picture | Sequence[Picture],
    count: int = 50,
    *,
    method: Method = "badge",
    seed: int = 0,
    on_bad: str = "stop",
    say: Say = quiet,
    bar: Bar = no_bar,
) -> Suggestions:
    """The images among `pictures` (files and folders, as for `predict`) that the run in `path`
    would learn the most from.

    Each content is there once; images that the run was trained on are left out. Features are read
    by way of the feature store. Raises `UserError` where nothing is left.
    """
    source = loose.load(pictures, on_bad=on_bad)
    store = Store()
    try:
        with open_run(path) as model, bar("suggest") as progress:
            member = _reader(model)
            found = extraction.extract(
                source,
                member.network,
                member.head.taps,
                member.load,
                store=store,
                engine_name=member.engine,
                precision=member.precision,
                on_bad=on_bad,
                progress=progress,
            )
            keep, known = _new(found.digests, trained_on(Path(path)))
            if not len(keep):
                what = f"no image is left to label: the run was trained on all {known}"
                raise UserError(what, where=source.name, fix="give images without labels")
            x = [np.asarray(found.blocks[tap][keep]) for tap in member.head.taps]
            probabilities = _probabilities(model, member, x, found.images.subset(keep))
    finally:
        store.close()
    chosen = pick(
        probabilities,
        side_by_side(x, member.head.normalize),
        count,
        method=method,
        seed=seed,
    )
    for fault in found.faults:
        say(f"left out: {fault.to_text()}")
    return Suggestions(
        found.images,
        model.classes,
        keep[chosen],
        probabilities[chosen],
        method,
        len(keep),
        known,
        found.faults,
    )


def _reader(model: AnyModel) -> Classifier:
    """The classifier whose features say which images are alike: of an average, the SVM."""
    if isinstance(model, Classifier):
        return model
    return model.members.get("svm", next(iter(model.members.values())))


def _probabilities(
    model: AnyModel, member: Classifier, x: Sequence[Floats], source: ImageSet
) -> Floats:
    if model is member:
        return softmax(member.head.scores(x), member.head.temperature)
    return model.predict(source).probabilities


def _new(ids: Digests, trained: Digests | None) -> tuple[Ints, int]:
    """Positions of the contents that the run was not trained on, each once, and how many were."""
    seen = set(trained or ())
    new = np.array([i for i, digest in enumerate(ids) if digest not in seen], dtype=np.int64)
    return ids.first(new) if len(new) else new, len(ids) - len(new)


COLUMNS = ("rank", "path", "prediction", "score", "margin", "label")


def write_csv(path: Path, found: Suggestions) -> None:
    """The suggestions as a table with an empty column `label` to fill in: then it can be read as
    `path,label`."""
    rows = ([row.get(name, "") for name in COLUMNS] for row in found.rows())
    files.write_csv(path, COLUMNS, rows)


def to_text(found: Suggestions) -> str:
    """The suggestions for a person, a line each."""
    rows = found.rows()
    width = max((len(row["path"]) for row in rows), default=0)
    lines = [
        f"{row['path']:<{width}}  {row['prediction']} {row['score']:.2f}  margin "
        f"{row['margin']:.2f}"
        for row in rows
    ]
    words = f"{len(rows)} of {found.pool:,} images to label next ({found.method})"
    if found.trained_on:
        words += f"; {found.trained_on} others were trained on"
    return "\n".join([*lines, words])
