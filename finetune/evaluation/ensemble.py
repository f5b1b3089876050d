"""Several classifiers that answer as one: the weighted mean of their log-probabilities."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune import classifier, files, run
from finetune.classifier import Classifier, Predictions
from finetune.data import loose
from finetune.data.images import ImageSet, check_on_bad
from finetune.data.loose import Picture
from finetune.errors import UserError
from finetune.progress import Progress

FORMAT = 1
FILE = "ensemble.json"
FOLDER = "members"
AGAIN = "fit again with --force"


@dataclass(frozen=True)
class Ensemble:
    """Classifiers of the same classes, by name, each with a weight; the weights sum to 1.

    `predict` answers as that of a `Classifier` does: probabilities are the softmax of the weighted
    mean of the members' log-probabilities, a geometric mean. Each member is calibrated by its own
    temperature already. How unfamiliar an image is, the features of the member `svm` say, which
    are those of the frozen network.
    """

    members: dict[str, Classifier]
    weights: dict[str, float]

    def __enter__(self) -> Ensemble:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the opened networks go."""
        for member in self.members.values():
            member.close()

    @property
    def classes(self) -> tuple[str, ...]:
        return next(iter(self.members.values())).classes

    def predict(
        self,
        images: ImageSet | Picture | Iterable[Picture],
        *,
        on_bad: str = "stop",
        progress: Progress | None = None,
    ) -> Predictions:
        """Probabilities of every image, as `Classifier.predict` gives them: each goes through the
        network of every member."""
        check_on_bad(on_bad)
        if not isinstance(images, ImageSet):
            images = loose.load(images, on_bad=on_bad)
        total: Any = 0.0
        strange = None
        for k, (name, member) in enumerate(self.members.items()):
            found = member.predict(
                images, on_bad=on_bad, progress=_part(progress, k, len(self.members))
            )
            total = total + self.weights[name] * np.log(
                np.maximum(found.probabilities.astype(np.float64), 1e-30)
            )
            if name == "svm" or strange is None:
                strange = found.unfamiliar if found.unfamiliar is not None else strange
        return dataclasses.replace(
            found, probabilities=classifier.softmax(total), unfamiliar=strange
        )


def _part(progress: Progress | None, k: int, count: int) -> Progress | None:
    """Progress of the k-th of `count` passes over the same images."""
    if progress is None:
        return None
    return lambda done, total: progress(k * total + done, count * total)


AnyModel = Classifier | Ensemble


def save(folder: Path, ensemble: Ensemble) -> list[Path]:
    """Write `ensemble.json` and one folder for each member; returns the folders, into which the
    caller writes each member's `model.safetensors`."""
    folders = []
    for name, member in ensemble.members.items():
        own = folder / FOLDER / name
        own.mkdir(parents=True, exist_ok=True)
        classifier.save(own, member)
        folders.append(own)
    about = {"format": FORMAT, "members": ensemble.weights}
    files.write_json(folder / FILE, about)
    return folders


def load(folder: Path, *, engine_name: str | None = None, precision: str | None = None) -> AnyModel:
    """What a folder holds: a classifier, or an ensemble of them."""
    path = folder / FILE
    if not path.exists():
        return classifier.load(folder, engine_name=engine_name, precision=precision)
    about = files.read_json(path)
    if about.get("format") != FORMAT or not isinstance(about.get("members"), dict):
        raise UserError(
            f"was written in format {about.get('format')}; this version reads {FORMAT}",
            where=path,
            fix=AGAIN,
        )
    if bad := [name for name in about["members"] if not re.fullmatch(r"[\w-]+", name)]:
        raise UserError(f"damaged: no member is called {bad[0]!r}", where=path, fix=AGAIN)
    members = {
        name: classifier.load(folder / FOLDER / name, engine_name=engine_name, precision=precision)
        for name in about["members"]
    }
    return Ensemble(members, {name: float(w) for name, w in about["members"].items()})


def open_run(
    path: str | Path, *, engine_name: str | None = None, precision: str | None = None
) -> AnyModel:
    """The model of a finished run; an unfinished, damaged or missing one is a `UserError`."""
    return load(run.finished(Path(path)), engine_name=engine_name, precision=precision)


def backbone_folder(folder: Path) -> Path:
    """Where the backbone of a run lies that features are read from: of an average, the fine-tuned
    member's."""
    if not (folder / FILE).exists():
        return folder
    names = list(files.read_json(folder / FILE)["members"])
    return folder / FOLDER / ("fine-tuned" if "fine-tuned" in names else names[0])
