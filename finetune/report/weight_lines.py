"""`finetune forgetting`: the study of a run, its picture, and the chosen point on the line between
old and new weights written as a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from finetune import files
from finetune.combining import forgetting as home
from finetune.combining import forgetting_told as told
from finetune.combining import members
from finetune.combining.forgetting_told import Study
from finetune.combining.weight_line import Point
from finetune.errors import UserError
from finetune.evaluation import predictions
from finetune.heads.head import softmax
from finetune.names import shown
from finetune.progress import Bar, Say, no_bar, quiet
from finetune.report import derived, line_picture
from finetune.report.derived import Derived, Rival


def forgetting(
    path: Path,
    *,
    reference: str | None = None,
    data: str | None = None,
    limit: int = 500,
    picture: Path | None = None,
    save: Path | None = None,
    force: bool = False,
    say: Say = quiet,
    bar: Bar = no_bar,
) -> dict[str, Any]:
    """Study what a run forgot (see `combining.forgetting.study`); draw the line to `picture` and
    write its chosen point as the run `save`, where these are given. Returns the study as JSON, with
    its `text`."""
    if picture is not None and picture.suffix != ".svg":
        raise UserError("the picture is SVG", where=picture, fix="name it .svg")
    found = home.study(path, reference=reference, data=data, limit=limit, say=say, bar=bar)
    lines = [told.text(found)]
    if picture is not None:
        _need_line(found, "--picture")
        files.write_text(picture, drawn(found))
        lines.append(f"\nthe line is drawn in {shown(picture)}")
    if save is not None:
        _need_line(found, "--save")
        lines.append(f"\n{_save(path, found, save, force, say)}")
    return found.to_json() | {"text": "\n".join(lines)}


def drawn(found: Study) -> str:
    """The line of a study as SVG text."""
    return line_picture.draw(
        found.line, found.chosen, f"on {found.chosen_on}", found.retains or "not measured"
    )


def _need_line(found: Study, option: str) -> None:
    if not found.line:
        raise UserError(
            "nothing moved: there is no line between old and new weights",
            where=option,
            fix="leave it out, or give a run that was fine-tuned",
        )


def _save(path: Path, found: Study, out: Path, force: bool, say: Say) -> str:
    """Write the chosen point as a run, judged once on the run's own test images."""
    if found.chosen is None or found.place is None:
        raise UserError(
            "no point was chosen: the run has seen all the images that could choose one",
            where="--save",
            fix=told.REFIT,
        )
    (member,) = members.open_members([path], fewest=1)
    test = members.common_test([member], say)
    point = found.chosen
    identity = ("line", member.about["digest"], f"{point.alpha} {point.norms}", found.chosen_on)
    with found.place(point) as model:
        said = model.predict(test.images)
        rival = Rival(
            kind="run",
            name=member.name,
            said=test.said[0],
            passes=member.passes,
            note="all new weights",
        )
        title = f"{point.alpha:.1f} of the new weights"
        verdict = derived.write(
            out,
            identity,
            Derived(
                kind="line",
                shipped=f"fine-tuned ({point.alpha:.1f} of the new weights)",
                model=model,
                found=said,
                on="test images",
                rivals=(rival,),
                beside=member.name,
                beside_because="the run itself",
                passes=1,
                title=title,
                training=test.training,
                facts=(
                    ("made from", shown(path)),
                    ("share of the new weights", f"{point.alpha:.1f}"),
                    ("BatchNorm", point.norms),
                    ("chosen on", found.chosen_on),
                    ("retains", _retains(found, point)),
                ),
                recipe=member.about["recipe"],
                settings={
                    "kind": "line",
                    "run": {"run": shown(path), "digest": member.about["digest"]},
                    "alpha": point.alpha,
                    "norms": point.norms,
                    "chosen_on": found.chosen_on,
                },
                # the images that chose fitted a share and a temperature, no weights
                trained=member.trained,
                selection=_table(found, point),
                plan=files.read_json(member.path / "plan.json"),
                extra={"forgetting.json": found.to_json(), "line.svg": drawn(found)},
            ),
            force,
        )
    return f"{verdict}\n\n  report   {shown(out)}/report.html\n  picture  {shown(out)}/line.svg"


def _retains(found: Study, point: Point) -> str:
    if point.retention is None:
        return "not measured"
    return f"{point.retention.value:.1%}: {found.retains}"


def _table(found: Study, point: Point) -> predictions.Predictions:
    """What the point says of the images that chose it."""
    classes = found.classes
    return predictions.Predictions(
        list(found.names),
        [classes[label] for label in found.labels],
        list(classes),
        softmax(point.scores, point.temperature).astype(np.float64),
    )
