"""`finetune ensemble --soup`: the weights of fine-tuned runs averaged into one network, and that
judged once, beside each of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune import files
from finetune.combining import members, soup
from finetune.combining.soup import Kitchen, Mix
from finetune.combining.weight_line import INTERPOLATED, REESTIMATED
from finetune.evaluation import predictions
from finetune.heads.head import softmax
from finetune.lock import NO_WAIT, Wait
from finetune.names import shown
from finetune.progress import Say, quiet
from finetune.report import derived
from finetune.report.derived import Derived, Rival


def mix(
    paths: Sequence[Path],
    out: Path,
    *,
    force: bool = False,
    wait: Wait = NO_WAIT,
    say: Say = quiet,
) -> dict[str, Any]:
    """Mix fine-tuned runs into the new run `out`: a greedy soup, chosen on images that none of them
    was trained on; returns what it holds. Raises `UserError` for runs that did not begin at the
    same weights, each with a way on."""
    found = members.open_members(paths)
    identity = ("soup", *(leaf.digest for one in found for leaf in one.leaves))
    if derived.is_there(out, identity, force):
        say(f"finished   {shown(out)} holds this soup already; --force makes it again")
        return derived.summary(out)
    test = members.common_test(found, say)
    kitchen = Kitchen(found, say)
    singles = soup.singles(kitchen)
    _tell(kitchen, singles, say)
    first = soup.greedy(kitchen, singles)
    tried = [first, kitchen.mix(kitchen.of(first), REESTIMATED)]
    uniform = [
        kitchen.mix(kitchen.runs, norms)
        for norms in (INTERPOLATED, REESTIMATED)
        if len(first.names) < len(kitchen.runs)
    ]
    _tell(kitchen, (*tried, *uniform), say)
    best = max(tried, key=lambda one: one.worth)
    others = [one for one in (*tried, *uniform) if one is not best]
    derived.write(out, identity, _derived(kitchen, best, others, singles, test), force, wait)
    return derived.summary(out)


def _tell(kitchen: Kitchen, mixes: Sequence[Mix], say: Say) -> None:
    for one in mixes:
        say(
            f"           {_name(one)}: {one.accuracy:.1%}, log loss {one.log_loss:.3f} on "
            f"{len(kitchen.images)} images that choose"
        )


def _name(one: Mix) -> str:
    if len(one.names) == 1:
        return one.names[0]
    return f"the mean of {', '.join(sorted(one.names))}, BatchNorm {one.norms}"


def _derived(
    kitchen: Kitchen, best: Mix, others: Sequence[Mix], singles: Sequence[Mix], test: Any
) -> Derived:
    kept = kitchen.moving.keep(test.images)
    rivals = []
    for one, said in zip(kitchen.runs, test.said, strict=True):
        single = next(s for s in singles if s.names == (one.member.name,))
        rivals.append(
            Rival(
                kind="run",
                name=one.member.name,
                said=said,
                chosen_by=single.probabilities,
                note="" if one.member.name in best.names else "not in the soup",
            )
        )
    for other in others:
        runs = kitchen.of(other)
        kitchen.place(runs, other.norms)
        said = softmax(kitchen.scores(runs, kept), other.temperature)
        rivals.append(
            Rival(kind="soup", name=_name(other), said=said, chosen_by=other.probabilities)
        )
    model = kitchen.classifier(best)
    classes = kitchen.images.classes
    member = kitchen.runs[0].member
    return Derived(
        kind="soup",
        shipped=f"soup ({', '.join(best.names)})",
        model=model,
        found=model.predict(test.images),
        on="test images",
        rivals=tuple(rivals),
        beside=singles[0].names[0],
        beside_because="the best of them on the images that choose",
        passes=1,
        title=f"The mean weights of {len(best.names)} runs",
        training=test.training,
        facts=(
            *(("ingredient", name) for name in best.names),
            ("BatchNorm", best.norms),
            ("chosen on", f"{len(kitchen.images)} images that no run was trained on"),
            ("stages that differ", ", ".join(kitchen.stages)),
        ),
        recipe=member.about["recipe"],
        settings={
            "kind": "soup",
            "norms": best.norms,
            "members": {
                one.member.name: {
                    "run": shown(one.member.path),
                    "in": one.member.name in best.names,
                    "digest": one.member.about["digest"],
                }
                for one in kitchen.runs
            },
        },
        trained=member.trained,
        selection=predictions.Predictions(
            list(kitchen.images.paths),
            [classes[label] for label in kitchen.labels],
            list(classes),
            np.asarray(best.probabilities, dtype=np.float64),
        ),
        weights={name: 1 / len(best.names) for name in best.names},
        plan=files.read_json(member.path / "plan.json"),
    )
