"""The contenders of a job, fitted: the SVM, the fine-tuned model, and the winner on all images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune import classifier
from finetune.analysis import Look
from finetune.backbones import catalog
from finetune.classifier import Classifier
from finetune.evaluation import contenders, model_selection
from finetune.evaluation.contenders import Choice, Contender, Selection
from finetune.evaluation.ensemble import AnyModel, Ensemble
from finetune.features import familiarity
from finetune.heads import svm
from finetune.heads.crossval import Kernel
from finetune.heads.head import AnyHead, Head
from finetune.heads.svm import SvmResult
from finetune.network import Tap
from finetune.progress import Bar, Progress, Say, clock
from finetune.run import Part, RunDir

if TYPE_CHECKING:
    from finetune.analysis import Floats, Ints
    from finetune.backbones.stages import Backbone
    from finetune.training.config import Training
    from finetune.training.loop import TrainResult


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned backbone with its head, and what its training said."""

    backbone: Backbone
    head: Head
    result: TrainResult


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What a job has fitted: `model` ships. `models` are those of the contenders, by kind, as they
    were last fitted: on training and validation images together where `refitted` names them.
    `fitted_on` are the images, by position, that the shipped one was fitted on."""

    model: AnyModel
    models: dict[str, AnyModel]
    baseline: SvmResult
    tuned: Tuned | None
    choice: Choice | None
    refitted: tuple[str, ...]
    fitted_on: Ints

    @property
    def kind(self) -> str:
        return self.choice.winner.kind if self.choice else "svm"


def baseline(seen: Look, say: Say) -> SvmResult:
    """The SVM, chosen and fitted inside the training part."""
    train, section = seen.part("train"), seen.recipe.svm
    kernels: tuple[Kernel, ...] = svm.KERNELS if section.kernels == "auto" else section.kernels
    blocks = _asked(seen, seen.blocks(train))
    if seen.plan.strategy == "probe":
        kernels = ("logistic",)
    elif (
        section.kernels != "auto"
        and len(seen.images.classes) > svm.WIDE
        and {"linear"} < {*kernels}
    ):
        say(f"not used   svm.kernels but linear: from {svm.WIDE} classes on it is compared alone")
    with clock(seen.seconds, "svm"):
        result = svm.choose(
            blocks,
            seen.images.labels[train],
            seen.images.classes,
            groups=seen.groups[train],
            folds=section.folds,
            seed=seen.recipe.data.seed,
            kernels=kernels,
            default_taps=tuple(tap for tap in seen.default_taps if tap in blocks)
            or tuple(blocks)[:1],
            grid=None if section.C == "auto" else tuple(section.C),
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
    seconds = f"{seen.seconds['svm']:.1f} s"
    say(f"svm        {words}{f', C = {best.C:g}' if best else ''}{accuracy}, {seconds}")
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


def tune(
    seen: Look, base: SvmResult, selection: Selection, folder: RunDir | Part, say: Say, bar: Bar
) -> Tuned:
    """Fine-tune as the plan says, on the training part but for the selection images, which are
    watched."""
    rest = np.setdiff1d(seen.part("train"), selection.index)
    with clock(seen.seconds, "fine-tune"), bar("fine-tune") as progress:
        tuned = _train(seen, base, rest, selection.index, folder, "select", progress)
    result = tuned.result
    say(
        f"fine-tune  {seen.plan.strategy}: {result.steps} steps, epoch {result.best_epoch} kept, "
        f"{seen.seconds['fine-tune']:.1f} s ({result.stopped})"
    )
    for warning in result.warnings:
        say(f"           {warning}")
    return tuned


def training_of(seen: Look, base: SvmResult) -> Training:
    """The planned training, with the head's taps filled in: those of the SVM and the pooled end."""
    training = seen.plan.training
    assert training is not None
    if training.taps != ("svm",):
        return training
    taps = tuple(map(str, base.head.taps))
    pooled = str(Tap("pooled"))
    return dataclasses.replace(training, taps=taps if pooled in taps else (*taps, pooled))


def backbone_of(seen: Look, training: Training, images: int) -> Backbone:
    """The backbone that `training` starts from, loaded anew, where the memory is enough for it."""
    from finetune.backbones import create, memory

    section = seen.recipe.backbone
    origin = "random" if seen.plan.strategy == "scratch" else section.weights
    name, size = seen.named.network.name, training.input_size
    own = create.load(name, origin, size, drop_path=training.drop_path)
    frame = "whole" if seen.named.network.preprocess.squash else "crop"
    own = dataclasses.replace(own, network=catalog.framed(own.network, frame))
    count = min(training.batch_size, images)
    memory.check_training(own, training.trainable, count, half=section.precision == "bf16")
    return own


def _train(
    seen: Look,
    base: SvmResult,
    fit_on: Ints,
    watched: Ints | None,
    folder: RunDir | Part,
    phase: str,
    progress: Progress,
    epochs: int | None = None,
) -> Tuned:
    from finetune.backbones import create
    from finetune.training import loop

    section, training = seen.recipe.backbone, training_of(seen, base)
    if epochs is not None:
        training = dataclasses.replace(training, epochs=epochs)
    own = backbone_of(seen, training, len(fit_on))
    result = loop.fit(
        own,
        seen.images,
        fit_on,
        watched,
        training,
        classes=len(seen.images.classes),
        seed=seen.recipe.data.seed,
        checkpoint=folder.checkpoint(phase),
        log=lambda row: folder.log({"phase": phase, **row}),
        progress=progress,
        precision=section.precision,
    )
    words = f"{seen.named.network.source}; then fine-tuned ({seen.plan.strategy})"
    head = Head(
        tuple(map(Tap.parse, training.taps)),
        seen.images.classes,
        result.head_weight,
        result.head_bias,
        normalize=training.normalize,
        kind="fine-tuned",
    )
    return Tuned(create.described(own, words), head, result)


def choose(seen: Look, base: SvmResult, tuned: Tuned, selection: Selection, say: Say) -> Choice:
    """The SVM, the fine-tuned model and their average on the selection images."""
    seed, result = seen.recipe.data.seed, tuned.result
    first = model_selection.svm_contender(seen, base, selection)
    assert result.val_scores is not None
    scores, _ = contenders.calibrated(result.val_scores[result.best_epoch], selection, seed)
    second = Contender(
        kind="fine-tuned",
        name=f"the fine-tuned model ({seen.plan.strategy})",
        scores=scores,
        seconds=seen.seconds["fine-tune"],
        doubt="" if result.best_epoch else model_selection.NOT_TRAINED,
    )
    both = contenders.average(first, second, selection, seed)
    both = dataclasses.replace(both, doubt=both.doubt or second.doubt)
    choice = contenders.choose((first, second, both), selection, seen.recipe.policy.ship)
    for one in choice.contenders:
        right = one.right(selection.labels)
        say(
            f"{'choose' if one is first else '':<11}{one.name}: {right.mean():.1%}, log loss "
            f"{one.losses(selection.labels).mean():.3f}{' ← ships' if one is choice.winner else ''}"
        )
    say(f"           {choice.because}")
    return choice


def finish(
    seen: Look,
    base: SvmResult,
    tuned: Tuned | None,
    choice: Choice | None,
    folder: RunDir | Part,
    say: Say,
    bar: Bar,
) -> Fitted:
    """The models of the contenders; what ships is fitted again on training and validation images
    together, with the settings and the calibration that were chosen, unless `policy.refit` is
    false."""
    both, (used, bits) = seen.part("train", "val"), seen.how
    refit, head = seen.recipe.policy.refit, base.head
    if refit:
        with clock(seen.seconds, "refit"):
            head = svm.refit(base, seen.blocks(both), seen.images.labels[both])
    fitted_on = both if refit else seen.part("train")
    with clock(seen.seconds, "familiar"):
        known = familiarity.fit(
            [seen.features.blocks[tap][fitted_on] for tap in head.taps],
            seen.groups[fitted_on],
            normalize=head.normalize,
            seed=seen.recipe.data.seed,
        )
    models: dict[str, AnyModel] = {
        "svm": Classifier(seen.named.network, head, seen.named.load, used, bits, known=known)
    }
    refitted: tuple[str, ...] = ("svm",) if refit else ()
    kind = choice.winner.kind if choice else "svm"
    if tuned is not None and choice is not None:
        selection, result = choice.selection, tuned.result
        assert result.val_scores is not None
        _, temperature = contenders.calibrated(
            result.val_scores[result.best_epoch], selection, seen.recipe.data.seed
        )
        if kind != "svm" and refit:
            say(
                f"refit      on {len(both)} training and validation images, "
                f"{result.best_epoch} epochs"
            )
            with clock(seen.seconds, "refit"), bar("refit") as progress:
                epochs = result.best_epoch
                again = _train(seen, base, both, None, folder, "refit", progress, epochs)
            tuned = dataclasses.replace(again, result=result)
            refitted = ("svm", "fine-tuned", "average")
        tuned = dataclasses.replace(
            tuned, head=dataclasses.replace(tuned.head, temperature=temperature)
        )
        moved = Classifier(tuned.backbone.network, tuned.head, _held(tuned.backbone), used, bits)
        if kind == "fine-tuned":  # no frozen network is at hand then, whose features would do
            with clock(seen.seconds, "familiar"):
                own = both if refit else _seen_by(seen, kind, choice)
                moved = classifier.remember(
                    moved, seen.images.subset(own), seen.groups[own], seed=seen.recipe.data.seed
                )
        models["fine-tuned"] = moved
        weights = next(one.members for one in choice.contenders if one.kind == "average")
        members = {name: model for name, model in models.items() if isinstance(model, Classifier)}
        models["average"] = Ensemble(members, weights)
    return Fitted(
        model=models[kind],
        models=models,
        baseline=base,
        tuned=tuned,
        choice=choice,
        refitted=refitted,
        fitted_on=both if refit else _seen_by(seen, kind, choice),
    )


def _seen_by(seen: Look, kind: str, choice: Choice | None) -> Ints:
    """The images that a model which was not fitted again has seen: the SVM the training part, the
    fine-tuned model the training part without the images that chose it."""
    train = seen.part("train")
    if kind == "fine-tuned" and choice is not None:
        return np.setdiff1d(train, choice.selection.index)
    return train


def _held(backbone: Backbone) -> Callable[[], Backbone]:
    return lambda: backbone


def shipped_name(seen: Look, fitted: Fitted) -> str:
    """What ships, in a word or two: for run.json and lists."""
    if fitted.kind == "svm":
        return svm_head(fitted).kind
    words: dict[str, Any] = {
        "fine-tuned": f"fine-tuned ({seen.plan.strategy})",
        "average": f"average (svm, {seen.plan.strategy})",
    }
    return str(words[fitted.kind])


def svm_head(fitted: Fitted) -> AnyHead:
    """The SVM's head as it was last fitted."""
    model = fitted.models["svm"]
    assert isinstance(model, Classifier)
    return model.head
