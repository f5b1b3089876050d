"""The main job end to end: look at the images, decide, fit the SVM baseline, fine-tune if the plan says so, judge once.

`fit` is what `finetune fit` calls and what a Python user calls. Every step says in one line what it does (`say`).
"""

from __future__ import annotations

import dataclasses
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune import (
    catalog,
    choice,
    classifier,
    features,
    files,
    folders,
    images,
    look,
    metrics,
    page,
    recipe,
    report,
    run,
    splits,
    svm,
    weights,
)
from finetune.classifier import AnyHead, Classifier, Head, Predictions
from finetune.crossval import Kernel
from finetune.errors import UserError
from finetune.files import Digests
from finetune.lock import Wait
from finetune.look import Bar, Floats, Ints, Look, Say, clock, no_bar, quiet
from finetune.metrics import Estimate, Paired
from finetune.network import Tap
from finetune.recipe import Recipe
from finetune.run import RunDir
from finetune.store import Store
from finetune.svm import SvmResult

if TYPE_CHECKING:
    from finetune.backbone import Backbone
    from finetune.train import TrainResult

STOP_SHARE = 0.1  # of the images that it is fitted on: they decide when fine-tuning stops

OPTIONS = {  # options of the commands and of `fit`, and the recipe's keys behind them
    "seed": "data.seed",
    "shots": "data.shots",
    "test": "data.test",
    "on_bad_image": "data.on_bad_image",
    "no_flip": "data.no_flip",
    "backbone": "backbone.names",
    "weights": "backbone.weights",
    "engine": "backbone.engine",
    "precision": "backbone.precision",
    "taps": "backbone.taps",
    "strategy": "policy.strategy",
    "budget": "policy.budget",
    "epochs": "train.epochs",
    "out": "out",
}


@dataclass(frozen=True)
class Outcome:
    """The end of a job: where the run is, which model it ships, and how good that is."""

    path: Path
    shipped: str
    metrics: dict[str, Any]
    verdict: str


def build_recipe(
    data: str | Path | None = None, source: str | Path | None = None, assignments: tuple[str, ...] = (), **options: Any
) -> Recipe:
    """The recipe of a job: a file or shipped recipe, then options by name (see `OPTIONS`), then `section.key=value` texts."""
    base = recipe.load(source) if source is not None else Recipe()
    unknown = set(options) - set(OPTIONS)
    if unknown:
        raise UserError(f"no option is called {', '.join(sorted(unknown))}", where="fit", fix=f"choose from {', '.join(OPTIONS)}")
    changes = {
        OPTIONS[name]: str(value) if isinstance(value, Path) else value
        for name, value in options.items()
        if value not in (None, ())
    }
    if data is not None:
        changes["data.data"] = str(data)
    return recipe.override(recipe.update(base, changes), assignments)


def fit(
    data: str | Path | None = None,
    *,
    source: str | Path | None = None,
    assignments: tuple[str, ...] = (),
    force: bool = False,
    wait: float = 0.0,
    say: Say = quiet,
    bar: Bar = no_bar,
    **options: Any,
) -> Outcome:
    """Turn a folder of images into a judged classifier; returns where the run is and what it ships.

    `data` is a folder per class, a folder with train/ val/ test/, a CSV table or a named set; `source` a recipe's path
    or name; `options` are those of the command (`OPTIONS`). A finished run of the same recipe and data is returned as
    it is unless `force`; where another process is at work on it, `wait` says for how many seconds to wait. Raises
    `UserError` for everything that the user can mend.
    """
    settings = build_recipe(data, source, assignments, **options)
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
    source: str | Path | None = None,
    assignments: tuple[str, ...] = (),
    say: Say = quiet,
    bar: Bar = no_bar,
    **options: Any,
) -> Look:
    """The policy's decision and its reasons, without training."""
    settings = build_recipe(data, source, assignments, **options)
    store = Store()
    try:
        pictures, ids = look.scan(settings, store, say)
        return look.take(settings, pictures, ids, store, say, bar, pooled_only=True)
    finally:
        store.close()


def extract(
    data: str | Path,
    output: Path,
    *,
    taps: tuple[str, ...] | list[str] = ("pooled",),
    say: Say = quiet,
    bar: Bar = no_bar,
    **options: Any,
) -> str:
    """Write features of every image of `data` (labelled or not) to `output`; returns a line that says what was written.

    `.npz` holds `X` (n, d) float32, the taps side by side and not normalised, `y`, `paths`, `classes` and, as JSON, a
    `manifest` of what made them; `.parquet` the same as a table (needs pyarrow). The rows follow `paths`.
    """
    if output.suffix not in (".npz", ".parquet"):
        raise UserError(
            f"features are not written as {output.suffix or 'a file without ending'!r}",
            where=output,
            fix="name it .npz or .parquet",
        )
    settings = build_recipe(data, None, (), taps=list(taps), **options)
    store = Store()
    try:
        source = images.load_unlabelled(data) if _is_flat(Path(data)) else images.load(str(data))
        ids = features.digests(source, store)
        named = look.open_backbone(settings, say)
        found = look.extract(settings, source, ids, named, [Tap.parse(text) for text in taps], store, say, bar)
        X = np.concatenate([np.asarray(block) for block in found.blocks.values()], axis=1)
        manifest = {
            "network": named.network.to_json(),
            "taps": [str(tap) for tap in found.blocks],
            "spaces": list(found.spaces.values()),
        }
        features.save(output, X, found.images, manifest | {"digests": list(found.digests)})
    finally:
        store.close()
    return f"{X.shape[0]} × {X.shape[1]} features written to {output}"


def _is_flat(data: Path) -> bool:
    """Whether images lie in the folder itself: then there are no classes."""
    return data.is_dir() and any(entry.suffix.lower() in folders.EXTENSIONS for entry in data.iterdir() if entry.is_file())


# --------------------------------------------------------------------------------------------------------- the job


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned backbone with its head, what its training said, and its scores on the images that choose."""

    backbone: Backbone
    head: Head
    result: TrainResult
    scores: Floats


def _fit(settings: Recipe, store: Store, force: bool, wait: Wait, say: Say, bar: Bar) -> Outcome:
    began = time.monotonic()
    pictures, ids = look.scan(settings, store, say)
    digest = _job_digest(settings, pictures, ids)
    folder = run.open_run(Path(settings.out) if settings.out else None, _name(settings), digest, force=force, wait=wait)
    if folder.is_complete:
        say(f"finished   {folder.path} holds this run already; --force does it again")
        return outcome(folder.path)
    with folder:
        folder.write_text("recipe.yaml", recipe.dump(settings))
        seen = look.take(settings, pictures, ids, store, say, bar)
        baseline = _baseline(seen, say)
        tuned = _tune(seen, baseline, folder, say, bar)
        pair = choice.compare(seen, baseline, tuned.scores, tuned.result.best_epoch, say) if tuned else None
        ships = tuned is not None and pair is not None and choice.ships(pair, tuned.result.best_epoch)
        head, trained = _refit(seen, baseline, tuned if ships else None, folder, say, bar)
        return _finish(seen, baseline, tuned, pair, head, trained, folder, began, say, bar)


def _name(settings: Recipe) -> str:
    """A short name of the data for the run's folder: photos/ → photos, sklearn:digits → digits."""
    text = str(settings.data.data)
    return re.split(r"[/\\:]", str(Path(text).resolve()) if set(text) <= set("./") else text.rstrip("/"))[-1].removesuffix(".csv")


def _job_digest(settings: Recipe, pictures: images.ImageSet, ids: Digests) -> str:
    """Changes with the recipe (its place excepted), with any image's bytes, label or part.

    What bad images do is excepted too: a run that they stopped goes on with --on-bad-image skip, as its error advises.
    """
    assert pictures.split is not None
    rows = [f"{d} {label} {part}" for d, label, part in zip(ids, pictures.labels, pictures.split, strict=True)]
    data = settings.data.model_copy(update={"on_bad_image": "stop"})
    return files.digest(recipe.digest(settings.model_copy(update={"out": None, "data": data})), *pictures.classes, *rows)


def _baseline(seen: Look, say: Say) -> SvmResult:
    """The SVM, chosen and fitted inside the training part."""
    train, about = seen.part("train"), seen.recipe.svm
    kernels: tuple[Kernel, ...] = svm.KERNELS if about.kernels == "auto" else about.kernels
    blocks = seen.blocks(train)
    if seen.plan.strategy == "probe":
        kernels, blocks = ("logistic",), {tap: block for tap, block in blocks.items() if tap == Tap("pooled")}
    with clock(seen.seconds, "svm"):
        result = svm.choose(
            blocks,
            seen.images.labels[train],
            seen.images.classes,
            groups=seen.groups[train],
            folds=about.folds,
            seed=seen.recipe.data.seed,
            kernels=kernels,
            default_taps=tuple(tap for tap in seen.default_taps if tap in blocks) or (Tap("pooled"),),
            grid=None if about.C == "auto" else tuple(about.C),
            class_weight=None if seen.recipe.train.class_weight == "none" else seen.recipe.train.class_weight,
        )
    best = result.candidates[0] if result.candidates else None
    words = f"{' + '.join(map(str, result.head.taps))}, {result.head.kind}"
    accuracy = f": {result.cv_accuracy:.1%} ± {result.cv_error:.1%} out of fold (n = {len(train)})" if best else ""
    say(f"svm        {words}{f', C = {best.C:g}' if best else ''}{accuracy}, {seen.seconds['svm']:.1f} s")
    for text in (result.note, *result.warnings):
        if text:
            say(f"           {text}")
    return result


def _tune(seen: Look, baseline: SvmResult, folder: RunDir, say: Say, bar: Bar) -> Tuned | None:
    """Fine-tune on the training part, as the plan says, away from the images that will choose."""
    if seen.plan.training is None:
        return None
    if reason := choice.decided(seen, baseline):
        say(f"fine-tune  left out: {reason}")
        return None
    choosing = choice.choosing(seen)
    rest = np.setdiff1d(seen.part("train"), choosing)
    with clock(seen.seconds, "fine-tune"), bar("fine-tune") as progress:
        stop = splits.hold_out(seen.images.labels, seen.groups, rest, STOP_SHARE, seen.recipe.data.seed)
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
    seen: Look, fit_on: Ints, stop_on: Ints | None, folder: RunDir, phase: str, epochs: int | None, progress: Any
) -> Tuned:
    from finetune import backbone, train

    about, training = seen.recipe.backbone, seen.plan.training
    assert training is not None
    if epochs is not None:
        training = dataclasses.replace(training, epochs=epochs)
    weights = "random" if seen.plan.strategy == "scratch" else about.weights
    own = backbone.load(seen.named.network.name, weights, training.input_size)
    own = dataclasses.replace(
        own, network=catalog.framed(own.network, "whole" if seen.named.network.preprocess.squash else "crop")
    )
    result = train.fit(
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
    own = backbone.described(own, words)
    head = Head((Tap("pooled"),), seen.images.classes, result.head_weight, result.head_bias, normalize=False, kind="fine-tuned")
    return Tuned(own, head, result, np.zeros((0, len(seen.images.classes)), np.float32))


def _scores(tuned: Tuned, seen: Look, index: Ints) -> Floats:
    """Decision values of the fine-tuned model on images by position, through torch: the network may change again."""
    model = Classifier(tuned.backbone.network, tuned.head, lambda: tuned.backbone, "torch", seen.recipe.backbone.precision)
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
        say(f"refit      on {len(both)} training and validation images, {winner.result.best_epoch} epochs")
        with bar("refit") as progress:
            again = _train(seen, both, None, folder, "refit", winner.result.best_epoch, progress)
        temperature = metrics.fit_temperature(winner.scores, seen.images.labels[choice.choosing(seen)])
        return head, dataclasses.replace(again, head=dataclasses.replace(again.head, temperature=temperature))


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
    """Write the model, judge it once on the test part through the path of `predict`, and write the report."""
    from finetune import backbone

    used, bits = seen.how
    if trained is None:
        model = Classifier(seen.named.network, svm_head, seen.named.load, used, bits)
        backbone.save(seen.named.load(), folder.path / "model.safetensors")
    else:
        model = Classifier(trained.backbone.network, trained.head, lambda: trained.backbone, used, bits)
        backbone.save(trained.backbone, folder.path / "model.safetensors", (trained.head.weight, trained.head.bias))
    classifier.save(folder.path, model)
    if text := weights.notice(seen.named.network.name, weights.find(seen.named.network.name, seen.recipe.backbone.weights)):
        folder.write_text("LICENSE-weights.txt", text)
    test = seen.part("test")
    with clock(seen.seconds, "judge"), bar("judge") as progress:
        found = model.predict(seen.images.subset(test), progress=progress)
    judged = _judge(seen, found, svm_head, trained is not None)
    labels = [seen.images.classes[label] for label in found.images.labels]
    run.write_predictions(folder.path / "predictions.csv", found.images.paths, labels, found.classes, found.probabilities)
    folder.write_json("metrics.json", judged)
    folder.write_json("plan.json", _plan_json(seen, baseline, pair))
    seen.seconds["all"] = time.monotonic() - began
    verdict = choice.verdict(seen, judged, baseline, pair, trained is not None)
    beside = Estimate.from_json(judged["test/svm"]) if "test/svm" in judged else None
    plain = metrics.judge(found.images.labels, found.probabilities, found.classes, found.images.groups)
    data = page.collect(
        seen, baseline, tuned.result if tuned else None, pair, model.head, found, plain, beside, verdict, folder.path
    )
    folder.write_text("report.html", report.render(data))
    shipped = f"fine-tuned ({seen.plan.strategy})" if trained else svm_head.kind
    folder.finish(
        {
            "shipped": shipped,
            "recipe": seen.recipe.model_dump(mode="json"),
            "verdict": " ".join(verdict),
            "stages": seen.seconds,
            "network": model.network.to_json(),
            "test_evaluations": 1,
        }
    )
    say(f"judge      {choice.short(judged)}; {seen.seconds['all']:.1f} s in all")
    return outcome(folder.path)


def _judge(seen: Look, found: Predictions, svm_head: AnyHead, fine_tuned: bool) -> dict[str, Any]:
    """Metrics of the shipped model on the test part, and of the SVM beside it where the fine-tuned model ships."""
    y, groups = found.images.labels, found.images.groups
    judged = metrics.judge(y, found.probabilities, found.classes, groups)
    result: dict[str, Any] = {
        f"test/{name}": value.to_json() if isinstance(value, Estimate) else value for name, value in judged.items()
    }
    if fine_tuned:
        test = seen.part("test")
        scores = svm_head.scores([np.asarray(seen.features.blocks[tap][test]) for tap in svm_head.taps])
        result["test/svm"] = metrics.accuracy(y, scores.argmax(1), groups).to_json()
        result["test/paired"] = metrics.paired(y, scores.argmax(1), found.best, groups).to_json()
    return result


def _plan_json(seen: Look, baseline: SvmResult, pair: Paired | None) -> dict[str, Any]:
    return {
        "plan": seen.plan.to_json(),
        "similarity": seen.similarity.to_json(),
        "svm": {
            "cv_accuracy": baseline.cv_accuracy if baseline.candidates else None,
            "cv_error": baseline.cv_error if baseline.candidates else None,
            "warnings": list(baseline.warnings),
            "candidates": [{**dataclasses.asdict(c), "taps": [str(tap) for tap in c.taps]} for c in baseline.candidates],
        },
        "choice": pair.to_json() if pair else None,
    }


def outcome(path: Path) -> Outcome:
    """Read a finished run's outcome back."""
    about = run.load_run(path)
    return Outcome(path, about["shipped"], files.read_json(path / "metrics.json"), about["verdict"])
