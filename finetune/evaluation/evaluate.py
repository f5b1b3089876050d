"""A finished run judged on labelled images; those that it was trained on are known by their
digests, and left out.

A run keeps the SHA-256 of each training and validation image in `trained.safetensors`: 32 bytes an
image, in order of size, so that they tell nothing of the images' order, names or classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune import files, metrics
from finetune.classifier import Predictions
from finetune.data import images, omissions
from finetune.data.columns import Layout
from finetune.data.faults import STOP, Rules, some
from finetune.data.images import ImageSet
from finetune.errors import UserError
from finetune.evaluation.ensemble import open_run
from finetune.evaluation.predict import say_faults
from finetune.features import familiarity
from finetune.files import Digests
from finetune.names import shown
from finetune.progress import Bar, Say, no_bar, quiet

TRAINED = "trained.safetensors"
SEEN = ("leave-out", "keep")


def record(folder: Path, ids: Digests) -> None:
    """Write into a run the digests of the images that it was trained on."""
    from safetensors.numpy import save

    rows = np.unique(ids.rows, axis=0)
    files.write_bytes(folder / TRAINED, save({"sha256": np.ascontiguousarray(rows)}))


def trained_on(folder: Path) -> Digests | None:
    """The digests of the images that a run was trained on; None where it was made by a version that
    did not record them."""
    from safetensors import SafetensorError, safe_open

    path = folder / TRAINED
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            return Digests(file.get_tensor("sha256").reshape(-1, 32))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"damaged: not a table of digests ({error})", where=path, fix="fit again with --force"
        ) from error


def evaluate(
    path: Path,
    data: str | Path,
    *,
    engine_name: str | None = None,
    precision: str | None = None,
    on_bad: str = "stop",
    seen: str = "leave-out",
    layout: Layout = images.AS_NAMED,
    rules: Rules = STOP,
    say: Say = quiet,
    bar: Bar = no_bar,
) -> dict[str, Any]:
    """Metrics of a run on labelled images: on the test part where `data` has one, else on all of
    them.

    Images that the run was trained on are left out unless `seen` is keep; the `rules` say what
    images at fault do (`on_bad` is an older word for one of them). `say` tells in a line what is
    left out, and what flatters. The counts: `n` images were judged, `left_out` could not be read,
    `left_out_by_rules` are images and rows that a rule left out, `trained_on` are those that were
    among the images (None where the run does not record it), `ignored` are files that are no images
    by their names. `unfamiliar` is the share of images that are unlike the training images.
    """
    if seen not in SEEN:
        raise UserError(
            f"images that were trained on cannot {seen!r}",
            where="seen",
            fix=f"choose {' or '.join(SEEN)}",
        )
    if on_bad != "stop":
        rules = dataclasses.replace(rules, on_bad=on_bad)
    with open_run(path, engine_name=engine_name, precision=precision) as model:
        source = images.load_to_judge(data, model.classes, layout=layout, rules=rules)
        trained = trained_on(Path(path))
        known_by_bytes = trained is not None or rules.on_conflict != "stop"
        ids = images.contents(source) if known_by_bytes else [""] * len(source)
        source, kept = source.leave_out(omissions.conflicts(source, ids, rules))
        if not len(source):
            raise UserError(
                "holds no images to judge on",
                where=data,
                fix="give images of the run's classes: " + some(list(model.classes), 8),
            )
        for line in omissions.told(source):
            say(line)
        ids = [ids[i] for i in kept]
        source, known = _unseen(source, ids, trained, seen, say)
        with bar("evaluate") as progress:
            found = model.predict(source, on_bad=rules.on_bad, progress=progress)
        say_faults(found.faults, say)
    if not len(found.images):
        raise UserError(
            "none of the images can be read",
            where=data,
            fix="mend them; `finetune check` lists them",
        )
    judged = metrics.judge(
        found.images.labels, found.probabilities, model.classes, found.images.groups
    )
    return {
        "run": shown(path),
        "data": shown(data),
        "n": len(found.images),
        "left_out": len(found.faults),
        "left_out_by_rules": len(source.left_out),
        "trained_on": known,
        "seen": seen,
        "ignored": len(source.ignored),
        "unfamiliar": _unfamiliar(found),
        "metrics": {
            name: value.to_json() if isinstance(value, metrics.Estimate) else value
            for name, value in judged.items()
        },
    }


def _unfamiliar(found: Predictions) -> dict[str, float] | None:
    """The share of the images that `predict --unknown` would mark at the usual level; None where
    the run does not know."""
    if found.unfamiliar is None:
        return None
    share = float((found.unfamiliar > familiarity.LEVEL).mean())
    return {"level": familiarity.LEVEL, "share": share}


def _unseen(
    source: ImageSet, ids: Sequence[str], trained: Digests | None, seen: str, say: Say
) -> tuple[ImageSet, int | None]:
    """The images to judge on, and how many of `source`, with the digests `ids`, were trained on.
    Those that cannot be read have no digest."""
    if trained is None:
        say(
            "caution: the run does not record which images it was trained on, as its version did "
            "not: whether some of these "
            "were among them cannot be known; a run that is fitted now records it"
        )
        return source, None
    contents = set(trained)
    among = np.array([digest in contents for digest in ids])
    count, total = int(among.sum()), len(source)
    if not count:
        return source, 0
    if seen == "keep":
        say(
            f"caution: {count} of {total} images were trained on: "
            f"this flatters, and says little about new images"
        )
        return source, count
    if count == sum(map(bool, ids)):
        unread = f" that can be read ({total - count} others cannot)" if count < total else ""
        raise UserError(
            f"the run was trained on all of these {count} images{unread}: "
            f"no other is left to judge on",
            where=source.name,
            fix="give images that are new to it; or judge on these, "
            "which says little about new ones: --seen keep",
        )
    say(
        f"left out: {count} of {total} images, as the run was trained "
        f"on them (--seen keep judges on them, too)"
    )
    return source.subset(~among), count


WORDS = {
    "top1": "accuracy",
    "top5": "right among 5",
    "balanced": "balanced accuracy",
    "macro_f1": "macro-F1",
    "ece": "calibration error",
    "nll": "negative log-likelihood (nats)",
    "majority": "always the largest class",
}


def metrics_text(result: dict[str, Any]) -> str:
    """Metrics for a person, each with its interval and method."""
    first = f"{result['n']} images"
    if result["left_out"]:
        first += f", {result['left_out']} others left out"
    if result["trained_on"]:
        first += f", {result['trained_on']} " + (
            "of them trained on" if result["seen"] == "keep" else "others trained on"
        )
    lines = [first]
    for name, value in result["metrics"].items():
        if isinstance(value, dict):
            lines.append(
                f"{WORDS.get(name, name):<32}{value['value']:.3f}  "
                f"({value['low']:.3f}–{value['high']:.3f}, {value['method']})"
            )
        else:
            lines.append(f"{WORDS.get(name, name):<32}{value:.3f}")
    if strange := result["unfamiliar"]:
        level = strange["level"]
        words = f"(beyond {level:g}; {1 - level:.2g} is expected of images like them)"
        lines.append(f"{'unlike the training images':<32}{strange['share']:.3f}  {words}")
    return "\n".join(lines)
