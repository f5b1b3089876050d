"""Random search over ranges of training values: coarse, then fine, then long.

Random draws and not a grid: of n trials on a grid of two values only √n see another learning rate
(Bergstra and Bengio 2012). Trials are compared by the calibrated log loss of the images that
choose; the test part is not touched. What was tried lies in one file on the disk, which several
processes may share, and which a search that was killed goes on from.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune import files
from finetune.analysis import Look
from finetune.check import Check
from finetune.errors import UserError
from finetune.evaluation import contenders, fitting
from finetune.evaluation.contenders import Selection
from finetune.heads.svm import SvmResult
from finetune.progress import Bar, Say
from finetune.training import trials
from finetune.training.config import Training

if TYPE_CHECKING:
    import optuna

    from finetune.training.loop import TrainResult

JOURNAL = "trials.log"
ABOUT = "started.json"
BORDER = 0.1  # of a range, by its own scale: a best value so near to an end asks for a wider range
BEST = 0.25  # of the trials of a round: their values span the ranges of the next
STRETCH = 0.1  # by which that span is widened


@dataclass(frozen=True)
class Range:
    """Values of one number: from `low` to `high`, drawn by their logarithm where `low` is above
    0."""

    name: str
    low: float
    high: float

    @property
    def log(self) -> bool:
        return self.low > 0

    def at(self, share: float) -> float:
        """The value at a share of the way from `low` to `high`."""
        if self.log:
            return float(self.low * (self.high / self.low) ** share)
        return self.low + share * (self.high - self.low)

    def share(self, value: float) -> float:
        """The inverse of `at`."""
        if self.high == self.low:
            return 0.5
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


DEFAULT = (Range("lr", 1e-5, 1e-1), Range("weight_decay", 1e-6, 1e-1))


@dataclass(frozen=True)
class Round:
    """A round of a search: so many `trials` of so many `epochs`."""

    name: str
    trials: int
    epochs: int


@dataclass(frozen=True, eq=False)
class Tried:
    """One trial that was not given up: its values, the log loss and accuracy of the images that
    choose, and the losses of each of them."""

    number: int
    round: str
    values: dict[str, float]
    log_loss: float
    accuracy: float
    epochs: int
    seconds: float
    losses: np.ndarray

    def to_json(self) -> dict[str, Any]:
        row = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del row["losses"]
        return row


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found: every trial by round, those that were given up early, the `best` of the
    last round, and `plan`, the same images answered by a training as the policy plans it."""

    ranges: dict[str, tuple[Range, ...]]
    tried: tuple[Tried, ...]
    given_up: int
    best: Tried
    plan: Tried
    near: tuple[int, ...]
    n: int

    def checks(self) -> list[Check]:
        """What can be said of the search, in words."""
        return [_border(self), _plateau(self), _worth(self)]

    def to_json(self) -> dict[str, Any]:
        return {
            "best": self.best.to_json(),
            "plan": self.plan.to_json(),
            "within_one_standard_error": list(self.near),
            "selection_images": self.n,
            "given_up_early": self.given_up,
            "ranges": {
                name: {one.name: [one.low, one.high] for one in ranges}
                for name, ranges in self.ranges.items()
            },
            "trials": [one.to_json() for one in self.tried],
            "checks": [check.to_json() for check in self.checks()],
        }


def parse(texts: Sequence[str]) -> tuple[Range, ...]:
    """Ranges as they are written, `train.lr=1e-5..1e-2`; without any, those of learning rate and
    weight decay."""
    found = []
    for text in texts:
        name, _, span = text.removeprefix("train.").partition("=")
        low, _, high = span.partition("..")
        try:
            one = Range(name.strip(), float(low), float(high))
        except ValueError:
            one = Range("", 0, 0)
        if one.name not in trials.NUMBERS:
            known = ", ".join(trials.NUMBERS)
            raise UserError(
                f"{text!r} is not a range of a value that can be searched",
                where="--range",
                fix=f"write NAME=LOW..HIGH, as in lr=1e-5..1e-2; names: {known}",
            )
        if not 0 <= one.low < one.high or not math.isfinite(one.high):
            raise UserError(
                f"{text!r}: the range has to rise from 0 or more", where="--range", fix="swap them"
            )
        found.append(one)
    if twice := {one.name for one in found if sum(other.name == one.name for other in found) > 1}:
        raise UserError(f"two ranges of {min(twice)}", where="--range", fix="give one")
    return tuple(found) or DEFAULT


def planned_rounds(trials: Sequence[int], epochs: int) -> tuple[Round, ...]:
    """Coarse, fine and long, as many `trials` each (0: no such round): a third of the plan's
    `epochs`, all of them, and twice as many."""
    lengths = (max(1, epochs // 3), epochs, 2 * epochs)
    names = ("coarse", "fine", "long")
    rounds = [
        Round(name, count, length)
        for name, count, length in zip(names, trials, lengths, strict=False)
        if count
    ]
    if not rounds:
        raise UserError("no round has a trial", where="--trials", fix="give some, as in 30,8,2")
    return tuple(rounds)


def claim(folder: Path, digest: str) -> None:
    """Make `folder` that of the search which `digest` names; refuse a folder of anything else."""
    mark = folder / ABOUT
    if mark.exists():
        if files.read_json(mark).get("digest") != digest:
            raise UserError(
                "another search, or one of other images, is here",
                where=folder,
                fix="choose another folder with --out",
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            "the folder is not empty, and no search", where=folder, fix="choose another with --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(mark, {"digest": digest})


def draw(ranges: Sequence[Range], seed: int, number: int) -> dict[str, float]:
    """The values of trial `number`: uniform over each range by its scale, the same in every
    process."""
    shares = np.random.default_rng([seed, number, 23]).random(len(ranges))
    return {one.name: one.at(float(share)) for one, share in zip(ranges, shares, strict=True)}


def narrowed(ranges: Sequence[Range], tried: Sequence[Tried]) -> tuple[Range, ...]:
    """The ranges that the best quarter of the trials span, widened a little, within the old
    ones."""
    order = sorted(tried, key=lambda one: one.log_loss)
    top = order[: max(2, math.ceil(BEST * len(order)))]
    result = []
    for one in ranges:
        shares = [one.share(trial.values[one.name]) for trial in top]
        low, high = max(0.0, min(shares) - STRETCH), min(1.0, max(shares) + STRETCH)
        result.append(Range(one.name, one.at(low), one.at(high)))
    return tuple(result)


def search(
    seen: Look,
    base: SvmResult,
    selection: Selection,
    folder: Path,
    *,
    ranges: Sequence[Range] = DEFAULT,
    rounds: Sequence[Round],
    sampler: str = "random",
    prune: bool = True,
    say: Say,
    bar: Bar,
) -> Found:
    """Try values of the planned training on the training part but for the selection images, which
    compare the trials.

    `folder` keeps what was tried. Trials are drawn at random, or from the second round's start by
    TPE (`sampler` tpe). With `prune` a trial is given up after an epoch in which it is worse than
    the median of the others at that epoch. Raises `UserError` where Optuna is not installed.
    """
    training = fitting.training_of(seen, base)
    longest = max(one.epochs for one in rounds)
    training = dataclasses.replace(training, epochs=longest, views=longest, patience=0)
    study = _study(folder, sampler, prune, seen.recipe.data.seed)
    rest = np.setdiff1d(seen.part("train"), selection.index)
    spans: dict[str, tuple[Range, ...]] = {}
    section = seen.recipe.backbone
    with trials.open_trials(
        fitting.backbone_of(seen, training, len(rest)),
        seen.images,
        rest,
        selection.index,
        training,
        classes=len(seen.images.classes),
        seed=seen.recipe.data.seed,
        precision=section.precision,
    ) as run:
        own = tuple(ranges)
        for one in rounds:
            spans[one.name] = own
            _round(study, one, own, training, run, selection, seen.recipe.data.seed, say, bar)
            done = [trial for trial in _tried(study) if trial.round == one.name]
            if not done:
                raise UserError(
                    f"no trial of the {one.name} round reached its end",
                    where="search",
                    fix="lower the upper end of --range lr=LOW..HIGH",
                )
            own = narrowed(own, done)
        plan = _planned(study, training, rounds[-1].epochs, run, selection)
    tried = _tried(study)
    last = [trial for trial in tried if trial.round == rounds[-1].name]
    best = min(last, key=lambda trial: trial.log_loss)
    near = tuple(trial.number for trial in last if _is_near(trial, best))
    given_up = sum(trial.state.name == "PRUNED" for trial in study.trials)
    return Found(spans, tuple(tried), given_up, best, plan, near, len(selection))


def _round(
    study: optuna.Study,
    one: Round,
    ranges: Sequence[Range],
    training: Training,
    run: trials.Trial,
    selection: Selection,
    seed: int,
    say: Say,
    bar: Bar,
) -> None:
    """The trials of a round that no process has done yet."""
    import optuna

    own = dataclasses.replace(training, epochs=one.epochs)
    with bar(one.name) as progress:
        while (done := _count(study, one.name)) < one.trials:
            trial = study.ask()
            values: dict[str, Any] = dict(_values(trial, study, ranges, seed))
            trial.set_user_attr("round", one.name)
            try:
                _record(trial, one.name, dataclasses.replace(own, **values), run, selection)
            except optuna.TrialPruned:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            except UserError as error:  # a learning rate at which the loss is no longer finite
                trial.set_user_attr("error", str(error).splitlines()[0])
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            except BaseException:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                raise
            progress(done + 1, one.trials)
    found = [trial for trial in _tried(study) if trial.round == one.name]
    if found:
        best = min(found, key=lambda trial: trial.log_loss)
        say(
            f"{one.name:<10} {one.trials} trials of {one.epochs} epochs, {len(found)} to the end; "
            f"best: {in_words(best)}, log loss {best.log_loss:.3f}, {best.accuracy:.1%}"
        )


def _values(
    trial: optuna.Trial, study: optuna.Study, ranges: Sequence[Range], seed: int
) -> dict[str, float]:
    """The values of a trial; those of the random search follow from its number alone, so that a
    search that goes on never draws the same again."""
    if study.user_attrs["sampler"] == "tpe":
        return {
            one.name: trial.suggest_float(one.name, one.low, one.high, log=one.log)
            for one in ranges
        }
    values = draw(ranges, seed, trial.number)
    trial.set_user_attr("values", values)
    return values


def _record(
    trial: optuna.Trial, name: str, training: Training, run: trials.Trial, selection: Selection
) -> None:
    import optuna

    began = time.monotonic()

    def log(row: dict[str, Any]) -> None:
        if "val/calibrated" in row:
            trial.report(row["val/calibrated"], row["epoch"])
            if row["epoch"] < training.epochs and trial.should_prune():
                raise optuna.TrialPruned

    result = run(training, log)
    losses, accuracy = _judged(result, selection)
    trial.set_user_attr("losses", [round(float(loss), 5) for loss in losses])
    trial.set_user_attr("accuracy", accuracy)
    trial.set_user_attr("epochs", result.best_epoch)
    trial.set_user_attr("seconds", time.monotonic() - began)
    trial.study.tell(trial, float(losses.mean()))


def _judged(result: TrainResult, selection: Selection) -> tuple[np.ndarray, float]:
    """The log loss of every selection image and their accuracy, of the epoch that was kept; the
    temperature is that of the other folds."""
    assert result.val_scores is not None
    scores, _ = contenders.calibrated(result.val_scores[result.best_epoch], selection, 0)
    rows = np.arange(len(selection))
    right = scores.argmax(1) == selection.labels
    return -scores[rows, selection.labels].astype(np.float64), float(right.mean())


def _planned(
    study: optuna.Study,
    training: Training,
    epochs: int,
    run: trials.Trial,
    selection: Selection,
) -> Tried:
    """The training as the policy plans it, judged on the same images."""
    kept = study.user_attrs.get("plan")
    values = {name: float(getattr(training, name)) for name in ("lr", "weight_decay")}
    if kept is None:
        began = time.monotonic()
        result = run(dataclasses.replace(training, epochs=epochs), lambda row: None)
        losses, accuracy = _judged(result, selection)
        kept = {
            "losses": [float(loss) for loss in losses],
            "accuracy": accuracy,
            "epochs": result.best_epoch,
            "seconds": time.monotonic() - began,
        }
        study.set_user_attr("plan", kept)
    losses = np.asarray(kept["losses"])
    return Tried(
        -1,
        "plan",
        values,
        float(losses.mean()),
        kept["accuracy"],
        kept["epochs"],
        kept["seconds"],
        losses,
    )


# ---------------------------------------------------------------------------------- what was tried


def _study(folder: Path, sampler: str, prune: bool, seed: int) -> optuna.Study:
    """The study in `folder`, new or as an earlier process left it."""
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise UserError(
            "Optuna is not installed", where="search", fix="pip install optuna"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    with files.disk_errors(folder):
        storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
        study = optuna.create_study(
            storage=storage,
            study_name="search",
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(seed=seed) if sampler == "tpe" else None,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=0)
            if prune
            else optuna.pruners.NopPruner(),
        )
        study.set_user_attr("sampler", sampler)
    return study


def _count(study: optuna.Study, name: str) -> int:
    """Trials of a round that are done: to their end, or given up early. One that a killed process
    left half done is none."""
    ended = ("COMPLETE", "PRUNED")
    return sum(
        trial.state.name in ended and trial.user_attrs.get("round") == name
        for trial in study.get_trials(deepcopy=False)
    )


def _tried(study: optuna.Study) -> list[Tried]:
    result = []
    for trial in study.get_trials(deepcopy=False):
        about = trial.user_attrs
        if trial.state.name == "COMPLETE" and trial.value is not None:
            result.append(
                Tried(
                    trial.number,
                    about["round"],
                    dict(about.get("values") or trial.params),
                    trial.value,
                    about["accuracy"],
                    about["epochs"],
                    about["seconds"],
                    np.asarray(about["losses"]),
                )
            )
    return result


def _is_near(one: Tried, best: Tried) -> bool:
    """Whether a trial's log loss is within one paired standard error of the best."""
    gap = one.losses - best.losses
    return bool(gap.mean() <= gap.std() / math.sqrt(len(gap)))


# ----------------------------------------------------------------------------------------- in words


def in_words(one: Tried) -> str:
    """The values of a trial."""
    return ", ".join(f"{name} {value:.2g}" for name, value in one.values.items())


def _border(found: Found) -> Check:
    first = next(iter(found.ranges.values()))
    at = {one.name: one.share(found.best.values[one.name]) for one in first}
    near = {name: share for name, share in at.items() if not BORDER < share < 1 - BORDER}
    words = in_words(found.best)
    if not near:
        return Check("ranges", "pass", words, "the best values lie inside of the ranges")
    ends = ", ".join(
        f"{name} at its {'lower' if share < 0.5 else 'upper'} end" for name, share in near.items()
    )
    return Check(
        "ranges",
        "warn",
        words,
        f"the best values lie within {BORDER:.0%} of an end: {ends}",
        f"search again with a wider range: {', '.join(f'--range {name}=…' for name in near)}",
    )


def _plateau(found: Found) -> Check:
    last = [one for one in found.tried if one.round == found.best.round]
    count = len(found.near)
    value = f"{count} of {len(last)} trials within one standard error of the best, n = {found.n}"
    if len(last) < 3:
        return Check("plateau", "skip", value, "too few trials in the last round to say")
    if count > max(2, len(last) // 2):
        return Check(
            "plateau",
            "warn",
            value,
            "these values hardly matter here, or there are too few images to tell them apart",
            "keep the plan; look for gains in more images",
        )
    return Check("plateau", "pass", value, "the search tells the values apart")


def _worth(found: Found) -> Check:
    gap = found.plan.losses - found.best.losses
    error = float(gap.std() / math.sqrt(len(gap)))
    name = "against the plan"
    value = (
        f"log loss {found.best.log_loss:.3f}, the plan's {found.plan.log_loss:.3f}, "
        f"their difference ± {error:.3f}"
    )
    if gap.mean() > error:
        return Check(name, "pass", value, "the search found better values than the plan's")
    return Check(
        name,
        "warn",
        value,
        "not shown to be better than the plan, though chosen on these very images",
        "fit with the plan as it is",
    )
