"""A run made of finished runs: an average, a soup, a point between old and new weights. Written,
judged once beside the runs that it comes from, and told in words."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from finetune import files, metrics, run
from finetune.classifier import Predictions
from finetune.evaluation import evaluate, predictions
from finetune.evaluation.ensemble import AnyModel
from finetune.evaluation.judgement import on_test
from finetune.files import Digests
from finetune.lock import NO_WAIT, Wait
from finetune.metrics import Paired
from finetune.names import shown, typed
from finetune.report import collect, publish, render
from finetune.report.render import Contender, ReportData
from finetune.run import RunDir


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A model beside the one that is written: what it said of the test images, `(n, C)`, and of the
    images that choose (where known), its cost in passes through a network."""

    kind: str
    name: str
    said: Any
    chosen_by: Any = None
    passes: int = 1
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Derived:
    """Everything that a run made of other runs is written from.

    `found` is what the model says of the test images, `selection` what it says of the images that
    choose, as a table; `rivals` are the runs that it comes from and what else was compared;
    `settings` stand in run.json beside the `recipe` of the first run.
    """

    kind: str
    shipped: str
    model: AnyModel
    found: Predictions
    on: str
    rivals: tuple[Rival, ...]
    beside: str  # the name of the rival that the verdict compares with
    beside_because: str
    passes: int
    title: str
    training: tuple[int, ...]
    facts: tuple[tuple[str, str], ...]
    recipe: Mapping[str, Any]
    settings: Mapping[str, Any]
    trained: Digests | None
    selection: predictions.Predictions | None = None
    weights: Mapping[str, float] | None = None
    warnings: tuple[str, ...] = ()
    plan: Mapping[str, Any] | None = None  # that of the run it comes from
    extra: Mapping[str, Any] = field(default_factory=dict)  # other files, as JSON or text


def is_there(out: Path, identity: Sequence[str], force: bool) -> bool:
    """Whether `out` holds the run that `identity` names already; a `UserError` where it holds
    another one."""
    if force or not (out / run.MANIFEST).exists():
        return False
    with run.open_run(out, out.name, files.digest(*identity)) as folder:
        return folder.is_complete


def write(
    out: Path, identity: Sequence[str], made: Derived, force: bool, wait: Wait = NO_WAIT
) -> str:
    """Write the run `out`, `run.json` last; returns its verdict. It is opened here, once everything
    is known, so that a refusal leaves nothing behind."""
    digest = files.digest(*identity)
    with run.open_run(out, out.name, digest, force=force, wait=wait) as folder:
        if not folder.is_complete:
            _write(folder, made)
    return str(run.load_run(out)["verdict"])


def _write(folder: RunDir, made: Derived) -> None:
    began = time.monotonic()
    publish.save_model(folder.path, made.model)
    if made.trained is not None:
        evaluate.record(folder.path, made.trained)
    judged = on_test(made.found)
    pairs = {rival.name: pair(made.found, rival) for rival in made.rivals}
    verdict = told(made, pairs)
    labels = [made.found.classes[label] for label in made.found.images.labels]
    predictions.write_predictions(
        folder.path / predictions.TEST,
        made.found.images.paths,
        labels,
        made.found.classes,
        made.found.probabilities,
    )
    if (chosen := made.selection) is not None:
        predictions.write_predictions(
            folder.path / predictions.SELECTION,
            chosen.paths,
            chosen.labels,
            chosen.classes,
            chosen.probabilities,
        )
    folder.write_json("metrics.json", judged.to_json())
    folder.write_json("contenders.json", rows(made, pairs))
    if made.plan is not None:
        folder.write_json("plan.json", made.plan)
    for name, value in made.extra.items():
        (folder.write_text if isinstance(value, str) else folder.write_json)(name, value)
    page = _page(folder.path, made, pairs, verdict)
    folder.write_text("report.html", render.render(page))
    folder.finish(
        {
            "shipped": made.shipped,
            "recipe": dict(made.recipe),
            "derived": dict(made.settings),
            "verdict": " ".join(verdict),
            "stages": {"write": time.monotonic() - began},
            "network": publish.named_by(made.model).network.to_json(),
            "test_evaluations": 1,
        }
    )


def pair(found: Predictions, rival: Rival) -> Paired:
    """The model that is written against a rival, image by image (second minus first)."""
    return metrics.paired(
        found.images.labels, np.asarray(rival.said).argmax(1), found.best, found.images.groups
    )


def told(made: Derived, pairs: Mapping[str, Paired]) -> tuple[str, str]:
    """Two sentences: how good it is, and how it stands beside the best of the runs it is made
    of."""
    top1 = publish.accuracy_of(made.found)
    first = (
        f"{made.title}: accuracy {top1.value:.1%} ({top1.low:.1%}–{top1.high:.1%}) on "
        f"{top1.n} {made.on}."
    )
    rival = next(one for one in made.rivals if one.name == made.beside)
    difference = pairs[rival.name].difference
    numbers = (
        f"Against {made.beside}, {made.beside_because}: {100 * difference.value:+.1f} points "
        f"({100 * difference.low:+.1f} to {100 * difference.high:+.1f}, paired)"
    )
    dearer = (
        f", and an image goes through {made.passes} networks instead of {rival.passes}"
        if made.passes > rival.passes
        else ""
    )
    if difference.low > 0:
        end = f"it is shown to be better{dearer}."
    elif difference.high < 0:
        end = f"it is worse{dearer}: keep {rival.name}."
    else:
        end = _by_probabilities(made, rival, dearer)
    return first, f"{numbers}: {end}"


def _by_probabilities(made: Derived, rival: Rival, dearer: str) -> str:
    """What the log loss says where accuracy does not tell two models apart: two standard errors
    count."""
    y = made.found.images.labels
    gain = metrics.log_losses(y, np.asarray(rival.said)) - metrics.log_losses(
        y, made.found.probabilities
    )
    error = float(gain.std(ddof=1) / np.sqrt(len(gain))) if len(gain) > 1 else np.inf
    if gain.mean() > 2 * error:
        return (
            f"accuracy does not tell the two apart{dearer}, but its probabilities are better: log "
            f"loss lower by {gain.mean():.3f} ± {error:.3f}."
        )
    advice = f"{rival.name} is the cheaper choice" if dearer else "either will do"
    return f"nothing shows that it is better{dearer}: {advice}."


def rows(made: Derived, pairs: Mapping[str, Paired]) -> list[dict[str, Any]]:
    """contenders.json: the model that is written, and each beside it, on the same images."""
    y, groups = made.found.images.labels, made.found.images.groups
    chosen = made.selection
    truth = (
        None
        if chosen is None
        else np.array([chosen.classes.index(label) for label in chosen.labels])
    )

    def row(kind: str, name: str, said: Any, own: Any, passes: int) -> dict[str, Any]:
        found: dict[str, Any] = {"kind": kind, "name": name, "passes": passes}
        if truth is not None and own is not None:
            found["selection"] = {
                "accuracy": metrics.accuracy(truth, np.asarray(own).argmax(1)).to_json(),
                "log_loss": float(metrics.log_losses(truth, np.asarray(own)).mean()),
            }
        found["test"] = {
            "accuracy": metrics.accuracy(y, np.asarray(said).argmax(1), groups).to_json(),
            "log_loss": float(metrics.log_losses(y, np.asarray(said)).mean()),
        }
        return found

    own = chosen.probabilities if chosen is not None else None
    first = row(made.kind, made.title, made.found.probabilities, own, made.passes)
    first |= {"shipped": True, "members": dict(made.weights or {})}
    others = [
        row(one.kind, one.name, one.said, one.chosen_by, one.passes)
        | {"shipped": False, "members": {}, "note": one.note}
        | {"against": pairs[one.name].to_json()}
        for one in made.rivals
    ]
    return [first, *others]


def _page(
    path: Path, made: Derived, pairs: Mapping[str, Paired], verdict: tuple[str, str]
) -> ReportData:
    found = made.found
    y, groups = found.images.labels, found.images.groups
    plot = [Contender(made.title, publish.accuracy_of(found), made.on, True)]
    for one in made.rivals:
        difference = pairs[one.name].difference
        against = (
            f"this run: {100 * difference.value:+.1f} points "
            f"({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
        )
        detail = f"{one.note}; {against}" if one.note else against
        accuracy = metrics.accuracy(y, np.asarray(one.said).argmax(1), groups)
        plot.append(Contender(one.name, accuracy, made.on, False, detail))
    return ReportData(
        title=shown(path.resolve().name),
        made=datetime.now(UTC).strftime("%Y-%m-%d"),
        headline=verdict[0],
        second=verdict[1],
        shipped=made.shipped,
        classes=found.classes,
        training=made.training,
        confusion=metrics.confusion(y, found.best, len(found.classes)),
        metrics=on_test(found).metrics,
        matrix=None,
        distance=None,
        seconds=(),
        commands=(
            ("classes of images", f"finetune predict {typed(path)} IMAGE…"),
            ("on other labelled images", f"finetune evaluate {typed(path)} FOLDER/"),
        ),
        warnings=made.warnings,
        contenders=tuple(plot),
        mistakes=collect.mistakes(found),
        facts=made.facts,
        judged_on=made.on,
    )


def summary(path: Path) -> dict[str, Any]:
    """What a run made of others holds, as JSON: its verdict and every model beside it."""
    about = files.read_json(path / "run.json")
    return {
        "run": shown(path),
        "shipped": about["shipped"],
        "verdict": about["verdict"],
        **about["derived"],
        "contenders": files.read_json(path / "contenders.json"),
    }


def text(result: dict[str, Any]) -> str:
    """The same for a person: a line a model, then the verdict."""
    lines = []
    width = max(len(row["name"]) for row in result["contenders"])
    for row in result["contenders"]:
        top1 = row["test"]["accuracy"]
        line = (
            f"{row['name']:<{width}}  {top1['value']:6.1%} ({top1['low']:.1%}–{top1['high']:.1%})  "
            f"log loss {row['test']['log_loss']:.3f}  "
            f"{row['passes']} network{'s' * (row['passes'] > 1)}"
        )
        if pair := row.get("against"):
            difference = pair["difference"]
            line += (
                f"  this run: {100 * difference['value']:+.1f} points "
                f"({100 * difference['low']:+.1f} to {100 * difference['high']:+.1f})"
            )
        lines.append(line + (f"  [{row['note']}]" if row.get("note") else ""))
    run = result["run"]
    return "\n".join(
        [
            *lines,
            "",
            result["verdict"],
            "",
            f"  report   {run}/report.html",
            f"  predict  finetune predict {run} IMAGE…",
        ]
    )
