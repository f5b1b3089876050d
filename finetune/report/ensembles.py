"""`finetune ensemble`: finished runs averaged, and the average judged once, beside each of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune import classifier
from finetune.classifier import Predictions
from finetune.combining import averaging, members
from finetune.combining.averaging import Weighing
from finetune.combining.members import Member, Shared
from finetune.errors import UserError
from finetune.evaluation import predictions
from finetune.evaluation.ensemble import Ensemble
from finetune.files import Digests
from finetune.lock import NO_WAIT, Wait
from finetune.names import shown
from finetune.progress import Bar, Say, no_bar, quiet
from finetune.report import derived
from finetune.report.derived import Derived, Rival


def make(
    paths: Sequence[Path],
    out: Path,
    *,
    soup: bool = False,
    weights: str = "equal",
    data: str | None = None,
    force: bool = False,
    wait: Wait = NO_WAIT,
    say: Say = quiet,
    bar: Bar = no_bar,
) -> dict[str, Any]:
    """What `finetune ensemble` calls: `average`, or a soup (`soups.mix`), which takes no weights
    and is judged on the runs' own test images."""
    if not soup:
        return average(
            paths, out, weights=weights, data=data, force=force, wait=wait, say=say, bar=bar
        )
    if weights != "equal" or data is not None:
        option = "--data" if data is not None else "--weights"
        raise UserError(
            "a soup chooses its ingredients on the images that chose the runs, as equals, and is "
            "judged on their test images",
            where=option,
            fix=f"leave {option} out; `finetune evaluate` judges the finished soup on other images",
        )
    from finetune.report import soups

    return soups.mix(paths, out, force=force, wait=wait, say=say)


def average(
    paths: Sequence[Path],
    out: Path,
    *,
    weights: str = "equal",
    data: str | None = None,
    force: bool = False,
    wait: Wait = NO_WAIT,
    say: Say = quiet,
    bar: Bar = no_bar,
) -> dict[str, Any]:
    """Average finished runs into the new run `out`; returns what it holds, for people and JSON.

    Each member is calibrated by its own temperature. `weights` is equal, learned or greedy; the
    latter two are found on the images that chose the members, which none was fitted on, and never
    on test images. The average is judged once, on the test images of the members (nothing is
    predicted again), or on the images of `data` that no member was trained on. Raises `UserError`
    for members that cannot be averaged, each with a way on.
    """
    if weights not in averaging.WAYS:
        raise UserError(
            f"no weights are called {weights!r}",
            where="--weights",
            fix=f"choose {', '.join(averaging.WAYS)}",
        )
    found = members.open_members(paths)
    leaves = [f"{leaf.digest} {leaf.share}" for one in found for leaf in one.leaves]
    identity = ("ensemble", weights, data or "", *leaves)
    if derived.is_there(out, identity, force):
        say(f"finished   {shown(out)} holds this average already; --force makes it again")
        return derived.summary(out)
    weighing = _weighing(found, weights)
    say(f"weights    {_in_words(found, weighing)}")
    test, on = _test(found, data, say, bar)
    derived.write(out, identity, _derived(found, weighing, test, on, weights), force, wait)
    return derived.summary(out)


def _weighing(found: Sequence[Member], way: str) -> Weighing:
    if way == "equal":
        return averaging.equal(len(found))
    tables = members.selection_tables(found)
    classes = found[0].classes
    y = np.array([classes.index(label) for label in tables[0].labels], dtype=np.int64)
    weighing = averaging.weigh(
        way,
        [table.probabilities for table in tables],
        y,
        found[0].recipe.data.seed,
        "images that no run was fitted on when they chose it",
    )
    if sum(w > 0 for w in weighing.weights) < 2:
        best = found[int(np.argmax(weighing.weights))]
        raise UserError(
            f"{way} weights give {best.name} everything: nothing is left to average",
            where=best.path,
            fix="use this run as it is, or --weights equal",
        )
    return weighing


def _in_words(found: Sequence[Member], weighing: Weighing) -> str:
    shares = ", ".join(
        f"{one.name} {w:.2f}" for one, w in zip(found, weighing.weights, strict=True)
    )
    return f"{shares} ({weighing.words})"


def _test(found: Sequence[Member], data: str | None, say: Say, bar: Bar) -> tuple[Shared, str]:
    if data is None:
        return members.common_test(found, say), "test images"
    images, _ = members.new_images(found, data, say)
    said = []
    for member in found:
        model = member.open()
        with model, bar(member.name) as progress:
            said.append(model.predict(images, progress=progress).probabilities)
    return Shared(images, tuple(said), (0,) * len(images.classes)), f"images of {shown(data)}"


def _derived(
    found: Sequence[Member], weighing: Weighing, test: Shared, on: str, way: str
) -> Derived:
    used = [
        (one, weight, said)
        for one, weight, said in zip(found, weighing.weights, test.said, strict=True)
        if weight
    ]
    tables = [one.selection for one in found]
    own = [None if table is None else table.probabilities for table in tables]
    selection = _averaged_selection(found, weighing)
    beside, because = _best(found, test, selection is not None)
    passes = sum(one.passes for one, _, _ in used)
    rivals = tuple(
        Rival(
            kind="run",
            name=one.name,
            said=said,
            chosen_by=chosen if selection is not None else None,
            passes=one.passes,
            note="" if weight else "left out: its weight is 0",
        )
        for one, weight, said, chosen in zip(found, weighing.weights, test.said, own, strict=True)
    )
    return Derived(
        kind="average",
        shipped=f"average ({', '.join(one.name for one, _, _ in used)})",
        model=flat(used),
        found=Predictions(
            test.images,
            found[0].classes,
            averaging.combine(test.said, weighing.weights),
            (),
        ),
        on=on,
        rivals=rivals,
        beside=beside,
        beside_because=because,
        passes=passes,
        title=f"The average of {len(used)} runs",
        training=test.training,
        facts=(
            *((f"member {one.name}", f"weight {w:.3f}; {_what(one)}") for one, w, _ in used),
            ("weights", weighing.words),
            ("mean", "weighted mean of calibrated log-probabilities (geometric)"),
            ("cost", f"an image goes through {passes} networks"),
        ),
        recipe=found[0].about.get("recipe", {}),
        settings={
            "kind": "average",
            "weights": way,
            "weights_because": weighing.words,
            "members": {
                one.name: {"run": shown(one.path), "weight": w, "digest": one.about["digest"]}
                for one, w in zip(found, weighing.weights, strict=True)
            },
        },
        trained=_trained([one for one, _, _ in used]),
        selection=selection,
        weights={one.name: w for one, w, _ in used},
    )


def flat(used: Sequence[tuple[Member, float, Any]]) -> Ensemble:
    """One ensemble of all classifiers in the members; a member that is an average gives its own,
    each with its share of the member's weight, which leaves what is predicted as it is."""
    models: dict[str, classifier.Classifier] = {}
    weights: dict[str, float] = {}
    for one, weight, _ in used:
        for leaf in one.leaves:
            name = f"{one.name}-{leaf.name}" if leaf.name else one.name
            models[name] = classifier.load(leaf.folder)
            weights[name] = weight * leaf.share
    return Ensemble(models, weights)


def _averaged_selection(
    found: Sequence[Member], weighing: Weighing
) -> predictions.Predictions | None:
    """What the average says of the images that choose, where all members say it of the same."""
    try:
        tables = members.selection_tables(found)
    except UserError:
        return None
    mixed = averaging.combine([table.probabilities for table in tables], weighing.weights)
    return tables[0]._replace(probabilities=mixed.astype(np.float64))


def _best(found: Sequence[Member], test: Shared, chosen: bool) -> tuple[str, str]:
    """The member that the average is compared with, and why it is that one: the best on the images
    that choose, where these are known."""
    if chosen:
        tables = members.selection_tables(found)
        truth = np.array([found[0].classes.index(label) for label in tables[0].labels])
        said: Sequence[Any] = [table.probabilities for table in tables]
        because = "the best of them on the images that choose"
    else:
        truth, said = test.images.labels, test.said
        because = "the best of them on these images, which flatters it a little"
    right = [
        (float((one.argmax(1) == truth).mean()), float(np.log(np.maximum(
            one[np.arange(len(truth)), truth], averaging.SMALLEST)).mean()))
        for one in said
    ]  # fmt: skip
    return found[max(range(len(found)), key=lambda k: right[k])].name, because


def _what(one: Member) -> str:
    return f"{one.about['shipped']} on {one.about['network']['name']}"


def _trained(found: Sequence[Member]) -> Digests | None:
    """All images that a member was trained on; None where a member does not record it."""
    rows = [one.trained.rows for one in found if one.trained is not None]
    return Digests(np.concatenate(rows)) if len(rows) == len(found) else None
