"""The main job end to end: look at the images, decide, fit the SVM baseline, fine-tune if the plan
says so, judge once.

`fit` is what `finetune fit` calls and what a Python user calls. Every step says in one line what it
does (`say`).
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune import analysis, files, names, options, recipe, run
from finetune import recipe as recipes
from finetune.analysis import Look
from finetune.backbones import device
from finetune.data import folders, images, omissions
from finetune.errors import UserError
from finetune.evaluation import ensemble, fitting, folds, model_selection, plan_checks
from finetune.evaluation.ensemble import AnyModel
from finetune.evaluation.fitting import Fitted
from finetune.features import extraction
from finetune.features.store import Store
from finetune.files import Digests
from finetune.lock import Wait
from finetune.network import Tap
from finetune.progress import Bar, Say, no_bar, quiet
from finetune.recipe import Recipe
from finetune.report import publish
from finetune.run import Part, RunDir

if TYPE_CHECKING:
    from finetune.evaluation.search import Found
    from finetune.training.preflight import Preflight

# options that `extract` of version 0.1.0 took and did not heed
_UNHEARD = ("seed", "shots", "test")
WAY = "features.json"  # among the checkpoints: the engine and precision of the features
# what is done with images at fault
RULES = ("on_bad_image", "on_conflict", "on_leak", "on_empty_class", "on_stray")


@dataclass(frozen=True)
class Outcome:
    """The end of a job: where the run is, which model it ships, and how good that is."""

    path: Path
    shipped: str
    metrics: dict[str, Any]
    verdict: str


def fit(
    data: str | Path | None = None,
    *,
    recipe: str | Path | Recipe | None = None,
    source: str | Path | None = None,
    assignments: Sequence[str] = (),
    force: bool = False,
    wait: float = 0.0,
    say: Say = quiet,
    bar: Bar = no_bar,
    **given: Any,
) -> Outcome:
    """Turn a folder of images into a judged classifier; returns where the run is and what it ships.

    `data` is a folder per class, a folder with train/ val/ test/, a CSV table or a named set;
    `recipe` a recipe's path or name (`source` is an older word for it); what is `given` beside it
    are the options of the command (`options.OPTIONS`), and `assignments` `section.key=value` texts.
    A finished run of the same recipe and data is returned as it is unless `force`; where another
    process is at work on it, `wait` says for how many seconds to wait. Raises `UserError` for
    everything that the user can mend.
    """
    settings, notes = options.build(data, options.one_recipe(recipe, source), assignments, given)
    _say_all(notes, say)
    store = Store()
    try:
        return _fit(settings, store, force, Wait(wait, say), say, bar)
    finally:
        store.close()


def load(
    path: str | Path, *, engine_name: str | None = None, precision: str | None = None
) -> AnyModel:
    """Open a finished run for prediction: `finetune.load(run.path).predict(["img.jpg"])`."""
    return ensemble.open_run(path, engine_name=engine_name, precision=precision)


def advise(
    data: str | Path | None = None,
    *,
    recipe: str | Path | Recipe | None = None,
    source: str | Path | None = None,
    assignments: Sequence[str] = (),
    say: Say = quiet,
    bar: Bar = no_bar,
    **given: Any,
) -> Look:
    """The policy's decision and its reasons, without training."""
    settings, notes = options.build(
        data, options.one_recipe(recipe, source), assignments, given, "advise"
    )
    _say_all(notes, say)
    store = Store()
    try:
        pictures, ids = analysis.scan(settings, store, say)
        seen = analysis.take(settings, pictures, ids, store, say, bar, pooled_only=True)
    finally:
        store.close()
    _say_all((*options.unused(settings, seen.plan), *options.of_advice(settings)), say)
    return seen


def preflight(
    data: str | Path | None = None,
    *,
    recipe: str | Path | Recipe | None = None,
    assignments: Sequence[str] = (),
    say: Say = quiet,
    bar: Bar = no_bar,
    **given: Any,
) -> Preflight:
    """Check what `fit` would do with the same words, on a sample, before it takes its time."""
    settings, notes = options.build(data, recipe, assignments, given, "preflight")
    _say_all(notes, say)
    store = Store()
    try:
        pictures, ids = analysis.scan(settings, store, say)
        seen = analysis.take(settings, pictures, ids, store, say, bar)
        _say_all(options.unused(settings, seen.plan), say)
        return plan_checks.whole(seen, fitting.baseline(seen, say), bar)
    finally:
        store.close()


def search(
    data: str | Path | None = None,
    *,
    out: Path,
    ranges: Sequence[str] = (),
    trials: Sequence[int] = (30, 8, 2),
    sampler: str = "random",
    prune: bool = True,
    recipe: str | Path | Recipe | None = None,
    assignments: Sequence[str] = (),
    say: Say = quiet,
    bar: Bar = no_bar,
    **given: Any,
) -> Found:
    """Search ranges of training values, at random: `trials` in a coarse, a fine and a long round.

    `out` keeps the trials, `search.json`, the page `search.html` and `best.yaml`, the recipe of the
    best trial: `fit(recipe=out / "best.yaml")` trains and judges it. The same call goes on where a
    killed one stopped. `ranges` are texts as `lr=1e-5..1e-2`; other options are those of `fit`.
    Raises `UserError` where the plan trains nothing, and for everything else a user can mend.
    """
    from finetune.evaluation import search as home
    from finetune.report import search_page

    spans = home.parse(ranges)
    settings, notes = options.build(data, recipe, assignments, given)
    _say_all(notes, say)
    store = Store()
    try:
        pictures, ids = analysis.scan(settings, store, say)
        digest = _job_digest(settings, pictures, ids)
        home.claim(out, files.digest(digest, *map(str, (spans, trials, sampler, prune))))
        seen = analysis.take(settings, pictures, ids, store, say, bar)
        if seen.plan.training is None:
            raise UserError(
                f"the plan trains nothing ({seen.plan.strategy}): there is nothing to search",
                where="search",
                fix="ask for a strategy, as in --strategy stages:2",
            )
        base = fitting.baseline(seen, say)
        rounds = home.planned_rounds(trials, seen.plan.training.epochs)
        chosen = model_selection.selection(seen)
        found = home.search(
            seen,
            base,
            chosen,
            out,
            ranges=spans,
            rounds=rounds,
            sampler=sampler,
            prune=prune,
            say=say,
            bar=bar,
        )
    finally:
        store.close()
    epochs = next(one.epochs for one in rounds if one.name == found.best.round)
    changes = {f"train.{name}": value for name, value in found.best.values.items()}
    best = recipes.update(settings, {**changes, "train.epochs": epochs, "out": None})
    files.write_text(out / "best.yaml", recipes.dump(best))
    files.write_json(out / "search.json", found.to_json())
    files.write_text(out / "search.html", search_page.render(found, names.shown(_name(settings))))
    return found


def extract(
    data: str | Path,
    output: Path,
    *,
    taps: str | Sequence[str] = ("pooled",),
    say: Say = quiet,
    bar: Bar = no_bar,
    **given: Any,
) -> str:
    """Write features of every image of `data` (labelled or not) to `output`; returns a line that
    says what was written.

    `.npz` holds `X` (n, d) float32, the taps side by side and not normalised, `y`, `paths`,
    `classes` and, as JSON, a `manifest` of what made them; `.parquet` the same as a table (needs
    pyarrow). The rows follow `paths`.
    """
    if output.suffix not in (".npz", ".parquet"):
        raise UserError(
            f"features are not written as {output.suffix or 'a file without ending'!r}",
            where=output,
            fix="name it .npz or .parquet",
        )
    options.check_names(given, (*options.OF_EXTRACT, *_UNHEARD), "extract")
    if asked := [name for name in ("shots", "test") if given.get(name) is not None]:
        what = (
            f"{', '.join(f'--{name}' for name in asked)} would divide the images, and extract "
            f"writes the features of all of them"
        )
        raise UserError(
            what,
            where="extract",
            fix="leave it out; the images of a CSV, or of another folder, are extracted like these",
        )
    if given.get("seed") is not None:
        say("not used   seed: the features of all images are written, none by chance")
    texts = list(options.listed(taps))
    settings, _ = options.build(data, None, (), {**given, "seed": None, "taps": texts}, "extract")
    _say_all(options.of_machine(settings), say)
    store = Store()
    try:
        if _is_flat(Path(data), settings.data.on_stray == "skip"):
            source = images.load_unlabelled(data)
        else:
            about = settings.data
            source = images.load(str(data), layout=recipe.layout(about), rules=recipe.rules(about))
        source, ids = analysis.digests(source, store, settings.data.on_bad_image)
        if source.classes:
            source, ids = omissions.apply(source, ids, recipe.rules(settings.data))
        _say_all((f"           {line}" for line in omissions.told(source)), say)
        named = analysis.open_backbone(settings, say)
        found = analysis.extract(
            settings,
            source,
            ids,
            named,
            [Tap.parse(text) for text in texts],
            store,
            say,
            bar,
            choose=False,
        )
        X = np.concatenate([np.asarray(block) for block in found.blocks.values()], axis=1)
        manifest = {
            "network": named.network.to_json(),
            "taps": [str(tap) for tap in found.blocks],
            "spaces": list(found.spaces.values()),
            **dataclasses.asdict(found.way),
        }
        extraction.save(output, X, found.images, manifest | {"digests": list(found.digests)})
    finally:
        store.close()
    return f"{X.shape[0]} × {X.shape[1]} features written to {names.shown(output)}"


def _say_all(lines: Iterable[str], say: Say) -> None:
    for line in lines:
        say(line)


def _is_flat(data: Path, strays: bool) -> bool:
    """Whether images lie in the folder itself: then there are no classes, unless those are
    `strays` beside class folders."""
    if not data.is_dir():
        return False
    with os.scandir(data) as found:
        entries = list(found)
    if strays and any(folders.is_folder(entry) for entry in entries if entry.name[0] != "."):
        return False
    return any(os.path.splitext(entry.name)[1].lower() in folders.EXTENSIONS for entry in entries)


# ------------------------------------------------------------------------------------------ the job


def _fit(settings: Recipe, store: Store, force: bool, wait: Wait, say: Say, bar: Bar) -> Outcome:
    began = time.monotonic()
    pictures, ids = analysis.scan(settings, store, say)
    digest = _job_digest(settings, pictures, ids)
    out = Path(names.written(settings.out)) if settings.out else None
    folder = run.open_run(out, _name(settings), digest, force=force, wait=wait)
    if folder.is_complete:
        say(f"finished   {names.shown(folder.path)} holds this run already; --force does it again")
        return outcome(folder.path)
    with folder:
        folder.write_text("recipe.yaml", recipes.dump(settings))
        seen = analysis.take(_as_begun(settings, folder, say), pictures, ids, store, say, bar)
        seen = dataclasses.replace(seen, recipe=settings)
        files.write_json(folder.checkpoint(WAY), dataclasses.asdict(seen.features.way))
        repeated = None
        if settings.data.folds is not None:

            def procedure(look: Look, part: Part) -> Fitted:
                return _fitted(look, part, quiet, bar)

            repeated = folds.judge(
                _as_begun(settings, folder, quiet),
                seen.images,
                seen.digests,
                folder,
                procedure,
                store=store,
                say=say,
                bar=bar,
            )
        _say_all(options.unused(settings, seen.plan), say)
        fitted = _fitted(seen, folder, say, bar)
        written = publish.publish(folder, seen, fitted, began, bar, repeated)
    say(f"judge      {model_selection.short(written)}; {seen.seconds['all']:.1f} s in all")
    if before := written.get("test/top1_as_given"):
        count = written["test/labels_changed"]
        say(
            f"           {count} test label{'s were' if count > 1 else ' was'} corrected: accuracy "
            f"{before['value']:.1%} with the labels as given, {written['test/top1']['value']:.1%} "
            f"as corrected"
        )
    return outcome(folder.path)


def _fitted(seen: Look, folder: RunDir | Part, say: Say, bar: Bar) -> Fitted:
    """The SVM, the fine-tuned model where it may pay, and the choice between them."""
    base = fitting.baseline(seen, say)
    if seen.plan.training is None:
        return fitting.finish(seen, base, None, None, folder, say, bar)
    if reason := model_selection.reason_to_skip(seen, base):
        say(f"fine-tune  left out: {reason}")
        _say_all(options.of_training(seen.recipe, "nothing is fine-tuned"), say)
        return fitting.finish(seen, base, None, None, folder, say, bar)
    _say_all(options.of_weights(seen.recipe, base.balanced), say)
    selection = model_selection.selection(seen)
    rest = np.setdiff1d(seen.part("train"), selection.index)
    if isinstance(folder, RunDir):  # a fold is checked as part of the whole
        plan_checks.quick(seen, base, rest, folder, say)
    tuned = fitting.tune(seen, base, selection, folder, say, bar)
    choice = fitting.choose(seen, base, tuned, selection, say)
    return fitting.finish(seen, base, tuned, choice, folder, say, bar)


def _as_begun(settings: Recipe, folder: RunDir, say: Say) -> Recipe:
    """The recipe with the engine and precision that an earlier process began this run with, if one
    did: what is measured meanwhile, or on another machine, changes nothing."""
    path = folder.checkpoint(WAY)
    if not path.exists():
        return settings
    way, about = device.Way(**files.read_json(path)), settings.backbone
    if way.engine == "openvino" and not device.has_openvino():
        say(
            "engine     torch goes on with what openvino began, which is not installed here: the "
            "features are read again, and differ in their last digits"
        )
        way = device.Way("torch", way.precision)
    how = {
        "engine": way.engine if about.engine == "auto" else about.engine,
        "precision": way.precision if about.precision == "auto" else about.precision,
    }
    return settings.model_copy(update={"backbone": about.model_copy(update=how)})


def _name(settings: Recipe) -> str:
    """A short name of the data for the run's folder: photos/ → photos, sklearn:digits → digits."""
    text = names.written(str(settings.data.data))
    return re.split(
        r"[/\\:]", str(Path(text).resolve()) if set(text) <= set("./") else text.rstrip("/")
    )[-1].removesuffix(".csv")


def _job_digest(settings: Recipe, pictures: images.ImageSet, ids: Digests) -> str:
    """Changes with the recipe (its place excepted), with any image's bytes, label or part.

    What is done with bad images and the like is excepted too: a run that they stopped goes on with
    --on-bad-image skip, as its error advises, and what the other rules leave out is no longer among
    the images.
    """
    assert pictures.split is not None
    rows = [
        f"{d} {label} {part}"
        for d, label, part in zip(ids, pictures.labels, pictures.split, strict=True)
    ]
    default = recipes.Data().model_dump()
    data = settings.data.model_copy(update={key: default[key] for key in RULES})
    return files.digest(
        recipes.digest(settings.model_copy(update={"out": None, "data": data})),
        *pictures.classes,
        *rows,
    )


WAY = "features.json"  # among the checkpoints: the engine and precision of the features


def outcome(path: Path) -> Outcome:
    """Read a finished run's outcome back."""
    about = run.load_run(path)
    return Outcome(path, about["shipped"], files.read_json(path / "metrics.json"), about["verdict"])
