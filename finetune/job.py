"""The main job end to end: look at the images, decide, fit the SVM baseline, fine-tune if the plan
says so, judge once.

`fit` is what `finetune fit` calls and what a Python user calls. Every step says in one line what it
does (`say`).
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune import analysis, classifier, device, files, metrics, names, options, recipe, run
from finetune import recipe as recipes
from finetune.analysis import Floats, Ints, Look
from finetune.backbones import catalog, weights
from finetune.classifier import Classifier
from finetune.data import folders, images, omissions, splits
from finetune.errors import UserError
from finetune.evaluation import evaluate, judgement, model_selection, predictions
from finetune.evaluation.judgement import Judgement
from finetune.features import extraction
from finetune.features.store import Store
from finetune.files import Digests
from finetune.heads import svm
from finetune.heads.crossval import Kernel
from finetune.heads.head import AnyHead, Head
from finetune.heads.svm import SvmResult
from finetune.lock import Wait
from finetune.metrics import Paired
from finetune.names import shown
from finetune.network import Tap
from finetune.progress import Bar, Say, clock, no_bar, quiet
from finetune.recipe import Recipe
from finetune.report import collect, render
from finetune.run import RunDir

if TYPE_CHECKING:
    from finetune.backbones.stages import Backbone
    from finetune.training.loop import TrainResult

# options that `extract` of version 0.1.0 took and did not heed
_UNHEARD = ("seed", "shots", "test")
WAY = "features.json"  # among the checkpoints: the engine and precision of the features
STOP_SHARE = 0.1  # of the images that it is fitted on: they decide when fine-tuning stops

# what is done with images at fault
RULES = ("on_bad_image", "on_conflict", "on_leak", "on_empty_class")


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


def load(path: str | Path, **how: Any) -> Classifier:
    """Open a finished run for prediction: `finetune.load(run.path).predict(["img.jpg"])`."""
    return classifier.load(run.finished(Path(path)), **how)


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
        if _is_flat(Path(data)):
            source = images.load_unlabelled(data)
        else:
            layout = recipe.layout(settings.data)
            source = images.load(
                str(data), layout=layout, on_empty_class=settings.data.on_empty_class
            )
        source, ids = analysis.digests(source, store, settings.data.on_bad_image)
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


def _is_flat(data: Path) -> bool:
    """Whether images lie in the folder itself: then there are no classes."""
    return data.is_dir() and any(
        entry.suffix.lower() in folders.EXTENSIONS for entry in data.iterdir() if entry.is_file()
    )


# ------------------------------------------------------------------------------------------ the job


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned backbone with its head, what its training said, and its scores on the images
    that choose."""

    backbone: Backbone
    head: Head
    result: TrainResult
    scores: Floats


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
        _say_all(options.unused(settings, seen.plan), say)
        baseline = _baseline(seen, say)
        tuned = _tune(seen, baseline, folder, say, bar)
        pair = (
            model_selection.compare(seen, baseline, tuned.scores, tuned.result.best_epoch, say)
            if tuned
            else None
        )
        ships = (
            tuned is not None
            and pair is not None
            and model_selection.ships(pair, tuned.result.best_epoch)
        )
        head, trained = _refit(seen, baseline, tuned if ships else None, folder, say, bar)
        return _finish(seen, baseline, tuned, pair, head, trained, folder, began, say, bar)


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


def _baseline(seen: Look, say: Say) -> SvmResult:
    """The SVM, chosen and fitted inside the training part."""
    train, about = seen.part("train"), seen.recipe.svm
    kernels: tuple[Kernel, ...] = svm.KERNELS if about.kernels == "auto" else about.kernels
    blocks = _asked(seen, seen.blocks(train))
    if seen.plan.strategy == "probe":
        kernels = ("logistic",)
    elif (
        about.kernels != "auto" and len(seen.images.classes) > svm.WIDE and {"linear"} < {*kernels}
    ):
        say(
            f"not used   svm.kernels but linear: with more than "
            f"{svm.WIDE} classes it alone is compared"
        )
    with clock(seen.seconds, "svm"):
        result = svm.choose(
            blocks,
            seen.images.labels[train],
            seen.images.classes,
            groups=seen.groups[train],
            folds=about.folds,
            seed=seen.recipe.data.seed,
            kernels=kernels,
            default_taps=tuple(tap for tap in seen.default_taps if tap in blocks)
            or tuple(blocks)[:1],
            grid=None if about.C == "auto" else tuple(about.C),
            class_weight=None
            if seen.recipe.train.class_weight == "none"
            else seen.recipe.train.class_weight,
        )
    best = result.candidates[0] if result.candidates else None
    words = f"{' + '.join(map(str, result.head.taps))}, {result.head.kind}"
    accuracy = (
        f": {result.cv_accuracy:.1%} ± {result.cv_error:.1%} out of fold (n = {len(train)})"
        if best
        else ""
    )
    say(
        f"svm        {words}{f', C = {best.C:g}' if best else ''}{accuracy}, "
        f"{seen.seconds['svm']:.1f} s"
    )
    for text in (result.note, *result.warnings):
        if text:
            say(f"           {text}")
    return result


def _asked(seen: Look, blocks: dict[Tap, Floats]) -> dict[Tap, Floats]:
    """The features that the SVM may choose from: those that were asked for, though the pooled ones
    are always read."""
    if seen.plan.strategy == "probe":
        return {Tap("pooled"): blocks[Tap("pooled")]}
    if seen.recipe.backbone.taps == "auto":
        return blocks
    asked = [Tap.parse(text) for text in seen.recipe.backbone.taps]
    return {tap: block for tap, block in blocks.items() if tap in asked} or blocks


def _tune(seen: Look, baseline: SvmResult, folder: RunDir, say: Say, bar: Bar) -> Tuned | None:
    """Fine-tune on the training part, as the plan says, away from the images that will choose."""
    if seen.plan.training is None:
        return None
    if reason := model_selection.decided(seen, baseline):
        say(f"fine-tune  left out: {reason}")
        _say_all(options.of_training(seen.recipe, "nothing is fine-tuned"), say)
        return None
    _say_all(options.of_weights(seen.recipe, baseline.balanced), say)
    choosing = model_selection.choosing(seen)
    rest = np.setdiff1d(seen.part("train"), choosing)
    with clock(seen.seconds, "fine-tune"), bar("fine-tune") as progress:
        stop = splits.hold_out(
            seen.images.labels, seen.groups, rest, STOP_SHARE, seen.recipe.data.seed
        )
        tuned = _train(seen, np.setdiff1d(rest, stop), stop, folder, "select", None, progress)
        scores = _scores(tuned, seen, choosing)
    result = tuned.result
    say(
        f"fine-tune  {seen.plan.strategy}: {result.steps} steps, best epoch {result.best_epoch}, "
        f"{seen.seconds['fine-tune']:.1f} s ({result.stopped})"
    )
    for warning in result.warnings:
        say(f"           {warning}")
    return dataclasses.replace(tuned, scores=scores)


def _train(
    seen: Look,
    fit_on: Ints,
    stop_on: Ints | None,
    folder: RunDir,
    phase: str,
    epochs: int | None,
    progress: Any,
) -> Tuned:
    from finetune.backbones import create, memory
    from finetune.training import loop

    about, training = seen.recipe.backbone, seen.plan.training
    assert training is not None
    if epochs is not None:
        training = dataclasses.replace(training, epochs=epochs)
    weights = "random" if seen.plan.strategy == "scratch" else about.weights
    own = create.load(seen.named.network.name, weights, training.input_size)
    own = dataclasses.replace(
        own,
        network=catalog.framed(
            own.network, "whole" if seen.named.network.preprocess.squash else "crop"
        ),
    )
    size, count = own.network.preprocess.size, min(training.batch_size, len(fit_on))
    memory.check(
        own.module, own.network.name, size, memory.RUN * count, f"a batch of {count} and an input"
    )
    result = loop.fit(
        own,
        seen.images,
        fit_on,
        stop_on,
        training,
        classes=len(seen.images.classes),
        seed=seen.recipe.data.seed,
        checkpoint=folder.checkpoint(phase),
        log=lambda row: folder.log({"phase": phase, **row}),
        progress=progress,
        precision=about.precision,
    )
    words = f"{seen.named.network.source}; then fine-tuned ({seen.plan.strategy})"
    own = create.described(own, words)
    head = Head(
        (Tap("pooled"),),
        seen.images.classes,
        result.head_weight,
        result.head_bias,
        normalize=False,
        kind="fine-tuned",
    )
    return Tuned(own, head, result, np.zeros((0, len(seen.images.classes)), np.float32))


def _scores(tuned: Tuned, seen: Look, index: Ints) -> Floats:
    """Decision values of the fine-tuned model on images by position, through torch: the network may
    change again."""
    model = Classifier(
        tuned.backbone.network,
        tuned.head,
        lambda: tuned.backbone,
        "torch",
        seen.how[1],
    )
    return np.log(np.maximum(model.predict(seen.images.subset(index)).probabilities, 1e-12))


def _refit(
    seen: Look, baseline: SvmResult, winner: Tuned | None, folder: RunDir, say: Say, bar: Bar
) -> tuple[AnyHead, Tuned | None]:
    """The winner's settings on training and validation images together."""
    both = seen.part("train", "val")
    with clock(seen.seconds, "refit"):
        head = svm.refit(baseline, seen.blocks(both), seen.images.labels[both])
        if winner is None:
            return head, None
        say(
            f"refit      on {len(both)} training and validation images, "
            f"{winner.result.best_epoch} epochs"
        )
        with bar("refit") as progress:
            again = _train(seen, both, None, folder, "refit", winner.result.best_epoch, progress)
        temperature = metrics.fit_temperature(
            winner.scores, seen.images.labels[model_selection.choosing(seen)]
        )
        return head, dataclasses.replace(
            again, head=dataclasses.replace(again.head, temperature=temperature)
        )


def _finish(
    seen: Look,
    baseline: SvmResult,
    tuned: Tuned | None,
    pair: Paired | None,
    svm_head: AnyHead,
    trained: Tuned | None,
    folder: RunDir,
    began: float,
    say: Say,
    bar: Bar,
) -> Outcome:
    """Write the model, judge it once on the test part (if there is one) through the path of
    `predict`, and write the report."""
    from finetune.backbones import create

    used, bits = seen.how
    if trained is None:
        model = Classifier(seen.named.network, svm_head, seen.named.load, used, bits)
        create.save(seen.named.load(), folder.path / "model.safetensors")
    else:
        model = Classifier(
            trained.backbone.network, trained.head, lambda: trained.backbone, used, bits
        )
        create.save(
            trained.backbone,
            folder.path / "model.safetensors",
            (trained.head.weight, trained.head.bias),
        )
    classifier.save(folder.path, model)
    evaluate.record(folder.path, seen.digests.take(seen.part("train", "val")))
    if text := weights.notice(
        seen.named.network.name, weights.find(seen.named.network.name, seen.recipe.backbone.weights)
    ):
        folder.write_text("LICENSE-weights.txt", text)
    with clock(seen.seconds, "judge"), bar("judge") as progress:
        judged = _judged(seen, baseline, tuned if trained else None, model, progress)
    found, written = judged.found, judged.to_json()
    svm_beside = None
    if trained and judged.part == "test":
        svm_beside, paired = judgement.beside(seen, svm_head, judged)
        written |= {"test/svm": svm_beside.to_json(), "test/paired": paired.to_json()}
    if found is not None:
        name = "predictions.csv" if judged.part == "test" else f"predictions-{judged.part}.csv"
        labels = [seen.images.classes[label] for label in found.images.labels]
        predictions.write_predictions(
            folder.path / name, found.images.paths, labels, found.classes, found.probabilities
        )
    folder.write_json("metrics.json", written)
    folder.write_json("plan.json", _plan_json(seen, baseline, pair))
    if left := (*omissions.account(seen.images), *seen.features.faults):
        folder.write_csv(
            "left_out.csv",
            ("path", "kind", "detail"),
            [(shown(f.path), f.kind, f.detail) for f in left],
        )
    seen.seconds["all"] = time.monotonic() - began
    verdict = model_selection.verdict(seen, written, baseline, pair, trained is not None)
    data = collect.collect(
        seen,
        baseline,
        tuned.result if tuned else None,
        pair,
        model.head,
        judged,
        svm_beside,
        verdict,
        folder.path,
    )
    folder.write_text("report.html", render.render(data))
    shipped = f"fine-tuned ({seen.plan.strategy})" if trained else svm_head.kind
    folder.finish(
        {
            "shipped": shipped,
            "recipe": seen.recipe.model_dump(mode="json"),
            "verdict": " ".join(verdict),
            "stages": seen.seconds,
            "network": model.network.to_json(),
            "test_evaluations": int(judged.part == "test"),
        }
    )
    say(f"judge      {model_selection.short(written)}; {seen.seconds['all']:.1f} s in all")
    return outcome(folder.path)


def _judged(
    seen: Look, baseline: SvmResult, winner: Tuned | None, model: Classifier, progress: Any
) -> Judgement:
    """The shipped model on the test part; without one, what is known of it from the images that
    chose it."""
    if len(test := seen.part("test")):
        return judgement.on_test(model.predict(seen.images.subset(test), progress=progress))
    if winner is not None:
        return judgement.when_chosen(seen, winner.scores, model_selection.choosing(seen))
    return judgement.out_of_fold(seen, baseline)


def _plan_json(seen: Look, baseline: SvmResult, pair: Paired | None) -> dict[str, Any]:
    return {
        "plan": seen.plan.to_json(),
        "similarity": seen.similarity.to_json(),
        "svm": {
            "cv_accuracy": baseline.cv_accuracy if baseline.candidates else None,
            "cv_error": baseline.cv_error if baseline.candidates else None,
            "warnings": list(baseline.warnings),
            "candidates": [
                {**dataclasses.asdict(c), "taps": [str(tap) for tap in c.taps]}
                for c in baseline.candidates
            ],
        },
        "choice": pair.to_json() if pair else None,
    }


def outcome(path: Path) -> Outcome:
    """Read a finished run's outcome back."""
    about = run.load_run(path)
    return Outcome(path, about["shipped"], files.read_json(path / "metrics.json"), about["verdict"])
