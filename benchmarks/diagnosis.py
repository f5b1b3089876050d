"""How often `finetune diagnose` names the fault that was provoked: one cell per set, case and seed.

    python benchmarks/diagnosis.py CELLS.jsonl NAME=FOLDER … --seeds 0-2
    python benchmarks/diagnosis.py CELLS.jsonl [NAME …] --table

Trains a head, or the last stage with it, on 200 images of each set, with every fault and without
one; the frozen stages run once per set and augmentation. A cell keeps its curves, so that the table
(case × primary finding) can be made again after a rule was changed. Cells that CELLS.jsonl holds
are not done again: kill it, and go on later.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from finetuning import cells, numbers, processor

from finetune.backbones import create, stages
from finetune.data import images
from finetune.data.images import ImageSet
from finetune.evaluation import diagnosis
from finetune.training import loop
from finetune.training.config import Training
from finetune.training.inputs import Feed, Job, open_feed

NETWORK, SIZE = "tf_efficientnet_lite0", 64
TRAIN, VAL, FEW = 200, 150, 25  # images; FEW: a validation part that cannot tell epochs apart
LR, EPOCHS = 3e-3, 10

# fault → what differs from the healthy training; `labels` and `val` are of the data
CASES: dict[str, dict[str, Any]] = {
    "healthy": {},
    "healthy, last stage": {"stage": True, "lr": 1e-3},
    "healthy, mixup": {"mixup": 0.4},
    "healthy, strong augmentation": {"augment": "strong", "stage": True, "lr": 1e-3},
    "healthy, from a probe": {"head_init": "probe", "lr": 3e-4, "stage": True},
    "lr × 100": {"lr": LR * 100},
    "lr × 100, last stage": {"stage": True, "lr": 0.1},
    "lr ÷ 1000": {"lr": LR / 1000},
    "lr ÷ 1000, last stage": {"stage": True, "lr": 1e-6},
    "diverging": {"lr": 30.0, "clip": 0.0, "optimizer": "sgd", "schedule": "constant"},
    "decayed at once": {"decay": True},
    "bad initialisation": {"stage": True, "lr": 1e-3, "start": 0.3},
    "overfitting": {"stage": True, "lr": 3e-3, "few": 40, "epochs": 25, "wrong": 0.2},
    "underfitting": {"weight_decay": 300.0, "lr": 1e-3},
    "shuffled labels": {"labels": "shuffled", "stage": True, "lr": 1e-3},
    "few validation images": {"val": FEW, "head_init": "probe", "lr": 3e-4},
    "stopped too soon": {"epochs": 3, "lr": 1e-3, "schedule": "constant"},
}
EXPECTED = {
    "healthy": "healthy",
    "lr ×": "learning rate too high",
    "lr ÷": "learning rate too low",
    "decayed": "decayed too early",
    "bad": "slow start",
    "shuffled": "wrong labels",
    "few": "noisy validation",
    "stopped": "stopped too soon",
}


def expected(case: str) -> str:
    return next((found for key, found in EXPECTED.items() if case.startswith(key)), case)


# -------------------------------------------------------------------------------------- provoking


@contextlib.contextmanager
def decayed_at_once() -> Iterator[None]:
    """Let every schedule fall to a hundredth after the first epoch."""
    before = loop.schedules.factors

    def factors(training: Training, total_steps: int) -> Any:
        own, first = before(training, total_steps), total_steps // training.epochs
        return lambda t: own(t) if t < first else own(t) / 100

    loop.schedules.factors = factors
    try:
        yield
    finally:
        loop.schedules.factors = before


def relabelled(found: ImageSet, share: float, seed: int) -> ImageSet:
    """The labels of a `share` of the images exchanged among each other."""
    rng, labels = np.random.default_rng([seed, 7]), found.labels.copy()
    chosen = rng.permutation(len(labels))[: round(share * len(labels))]
    labels[chosen] = labels[rng.permutation(chosen)]
    return dataclasses.replace(found, labels=labels)


def planned(backbone: Any, case: dict[str, Any]) -> Training:
    moving = stages.last_stages(backbone, 1) if case.get("stage") else ()
    names = {field.name for field in dataclasses.fields(Training)}
    own = {"head_init": "zero", "lr": LR, "epochs": EPOCHS, "views": 2, "patience": 0, **case}
    return Training(
        trainable=moving,
        trunk_lr_scale=0.3,
        input_size=SIZE,
        **{k: own[k] for k in own if k in names},
    )


def trained(job: Job, feed: Feed, case: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """The rows that a training with the fault logs, that of epoch 0 first."""
    share = 1.0 if case.get("labels") == "shuffled" else case.get("wrong", 0.0)
    train = job.train[: case.get("few", TRAIN)]
    rows: list[dict[str, Any]] = []
    own = dataclasses.replace(
        job,
        images=relabelled(job.images, share, seed),
        train=train,
        val=job.val[: case.get("val", VAL)],
        clean=train,
        training=planned(job.backbone, case),
        log=rows.append,
    )
    if factor := case.get("start"):
        for stage in stages.last_stages(job.backbone, 1):
            keys = next(one.keys for one in job.backbone.stages if one.name == stage)
            for key, parameter in job.backbone.module.named_parameters():
                if key in keys:
                    parameter.data.mul_(factor)
    patched = decayed_at_once() if case.get("decay") else contextlib.nullcontext()
    with patched, contextlib.suppress(loop.DivergedError):
        loop.trial(own, feed, None)
    start = {key[6:]: value for key, value in rows[0].items() if key.startswith("start/")}
    about = {"epoch": 0} | {key: rows[0][key] for key in ("images", "classes", "chance")}
    return [{**about, **start}, *rows[1:]]


def measure(name: str, folder: str, seed: int, done: set[tuple[str, str, int]]) -> Iterator[Any]:
    """The cells of one set and seed, those that share inputs one after the other."""
    found = images.load(folder)
    order = np.random.default_rng([seed, 3]).permutation(len(found))
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for case, what in CASES.items():
        if (name, case, seed) not in done:  # a case that changes the weights stands alone
            key = (bool(what.get("stage")), what.get("augment", "light"), what.get("start"))
            groups[key].append(case)
    for key, cases in groups.items():
        yield from of_group(name, found, order, cases, key[1], seed)


def of_group(
    name: str, found: ImageSet, order: Any, cases: list[str], augment: str, seed: int
) -> Iterator[dict[str, Any]]:
    backbone = create.load(NETWORK, "auto", SIZE)
    first = dataclasses.replace(planned(backbone, CASES[cases[0]]), augment=augment, epochs=EPOCHS)
    with loop.open_job(
        backbone, found, order[:TRAIN], order[TRAIN : TRAIN + VAL], first,
        classes=len(found.classes), seed=seed, precision="float32",
    ) as job, open_feed(job, []) as feed:  # fmt: skip
        for case in cases:
            began = time.process_time()
            rows = trained(job, feed, CASES[case], seed)
            seconds = round(time.process_time() - began, 2)
            yield {"set": name, "case": case, "seed": seed, "seconds": seconds, "rows": rows}


# ------------------------------------------------------------------------------------------ telling


def table(found: list[dict[str, Any]]) -> str:
    """The confusion matrix, a line per case: what its runs' primary findings were."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for cell in found:
        counts[cell["case"]][diagnosis.diagnose(cell["rows"])[0].name] += 1
    lines = ["| provoked | n | named | primary findings |", "|---|---|---|---|"]
    for case in (case for case in CASES if case in counts):
        right = counts[case][expected(case)]
        if case.startswith("lr ×"):  # so high that it never came back
            right += counts[case]["diverging"]
        words = ", ".join(f"{name} {n}" for name, n in counts[case].most_common())
        lines.append(f"| {case} | {counts[case].total()} | {right} | {words} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", type=Path)
    parser.add_argument("sets", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--seeds", type=numbers, default=[0])
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    known = cells(asked.cells)
    if not asked.table:
        done = {(cell["set"], cell["case"], cell["seed"]) for cell in known}
        for seed in asked.seeds:
            for name, folder in (one.split("=", 1) for one in asked.sets):
                for cell in measure(name, folder, seed, done):
                    with asked.cells.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(cell) + "\n")
                    known.append(cell)
    names = {one.split("=", 1)[0] for one in asked.sets}
    chosen = [cell for cell in known if not names or cell["set"] in names]
    print(table(chosen))
    print(f"\n{len(chosen)} runs, {sum(c['seconds'] for c in chosen):.0f} s of CPU, {processor()}")


if __name__ == "__main__":
    main()
