"""How many faults the preflight catches, and how often it cries wolf: one cell per case and seed.

    python benchmarks/preflight.py CELLS.jsonl --seeds 0-9
    python benchmarks/preflight.py CELLS.jsonl --seeds 0-2 [--shots K] NAME=FOLDER …
    python benchmarks/preflight.py CELLS.jsonl --table

The first form provokes each fault of code in a small torch loop (a convolutional network on
scikit-learn's digits) and gives it to `finetune.preflight`. The second gives healthy and faulty
folders to the command `finetune preflight`: as it is, with its labels shuffled, and with a learning
rate a thousand times the plan's. A fault is caught where a check fails, and hinted at where one
warns; a healthy case is sound where nothing does either. Cells that CELLS.jsonl holds are not done
again: kill it, and go on later.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from finetuning import cells, numbers, processor
from sklearn.datasets import load_digits
from torch import nn

import finetune

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
BATCH, COUNT = 32, 6
FASTER = 1000  # times the plan's learning rate
RATE = 9e-4  # of the plan's head, and 3e-3 where everything moves (finetune/policy.py)


# ---------------------------------------------------------------------------- a loop of one's own


def network(classes: int = 10, *, norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    """Two convolutions, a hidden layer, and the head, on 1 × 8 × 8 pixels."""
    norms = [nn.BatchNorm2d(16), nn.BatchNorm2d(32)] if norm else [nn.Identity(), nn.Identity()]
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), norms[0], nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), norms[1], nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(512, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, classes),
    )  # fmt: skip


def focal(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Focal loss with γ = 2 (Lin et al. 2017)."""
    log = torch.log_softmax(output, 1)[torch.arange(len(y)), y]
    return -((1 - log.exp()) ** 2 * log).mean()


def binary(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    target = nn.functional.one_hot(y, output.shape[1]).float()
    return nn.functional.binary_cross_entropy_with_logits(output, target)


class Case:
    """A model, its batches, its loss and its optimiser, healthy until something is changed."""

    def __init__(self, seed: int, **changes: Any) -> None:
        torch.manual_seed(seed)
        self.model = network(**changes)
        self.loss: Loss = nn.CrossEntropyLoss()
        self.optimizer: torch.optim.Optimizer | None = None
        digits = load_digits()
        order = np.random.default_rng(seed).permutation(len(digits.target))[: BATCH * COUNT]
        pixels = (digits.images[order].astype(np.float32) - 4.88) / 6.02
        self.x, self.y = torch.from_numpy(pixels)[:, None], torch.from_numpy(digits.target[order])

    def rate(self, lr: float) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)

    def run(self) -> Any:
        batches = list(zip(self.x.split(BATCH), self.y.split(BATCH), strict=True))
        return finetune.preflight(self.model, batches, self.loss, optimizer=self.optimizer)


def healthy_plain(seed: int) -> Case:
    return Case(seed)


def healthy_norm(seed: int) -> Case:
    return Case(seed, norm=True)


def healthy_dropout_smoothing(seed: int) -> Case:
    case = Case(seed, norm=True, dropout=0.3)
    case.loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    return case


def healthy_focal(seed: int) -> Case:
    case = Case(seed)
    case.loss = focal
    return case


def healthy_binary(seed: int) -> Case:
    case = Case(seed)
    case.loss = binary
    return case


def healthy_zero_head(seed: int) -> Case:
    case = Case(seed)
    for parameter in case.model[-1].parameters():
        nn.init.zeros_(parameter)
    return case


def summed_loss(seed: int) -> Case:
    case = Case(seed)
    case.loss = nn.CrossEntropyLoss(reduction="sum")
    return case


def frozen_head(seed: int) -> Case:
    case = Case(seed)
    case.model[-1].requires_grad_(False)
    return case


def head_not_in_optimiser(seed: int) -> Case:
    case = Case(seed)
    case.optimizer = torch.optim.AdamW(case.model[:-1].parameters(), lr=1e-3)
    return case


def dead_layer(seed: int) -> Case:
    case = Case(seed)
    nn.init.constant_(case.model[8].bias, -100.0)
    return case


def dead_half(seed: int) -> Case:
    case = Case(seed)
    with torch.no_grad():
        case.model[3].bias[:20] = -100.0
    return case


def nan_weight(seed: int) -> Case:
    case = Case(seed)
    with torch.no_grad():
        case.model[3].weight[0, 0, 0, 0] = float("nan")
    return case


def nan_pixel(seed: int) -> Case:
    case = Case(seed)
    case.x[7, 0, 3, 3] = float("nan")
    return case


def nan_gradient(seed: int) -> Case:
    case = Case(seed)

    def broken(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        zero = (output - output.detach()).square().sum()
        return nn.functional.cross_entropy(output, y) + zero.sqrt()

    case.loss = broken
    return case


def rate_times_1000(seed: int) -> Case:
    case = Case(seed)
    case.rate(1.0)
    return case


def rate_over_1000(seed: int) -> Case:
    case = Case(seed)
    case.rate(1e-6)
    return case


def too_few_outputs(seed: int) -> Case:
    return Case(seed, classes=9)


def too_many_outputs(seed: int) -> Case:
    return Case(seed, classes=1000)


def one_class(seed: int) -> Case:
    case = Case(seed)
    case.y[:] = 3
    return case


def softmax_in_model(seed: int) -> Case:
    case = Case(seed)
    case.model.append(nn.Softmax(1))
    return case


def raw_pixels(seed: int) -> Case:
    case = Case(seed)
    case.x = (case.x * 6.02 + 4.88) * 16
    return case


LOOPS = {
    function.__name__: function
    for function in (
        healthy_plain, healthy_norm, healthy_dropout_smoothing, healthy_focal, healthy_binary,
        healthy_zero_head, summed_loss, frozen_head, head_not_in_optimiser, dead_layer, dead_half,
        nan_weight, nan_pixel, nan_gradient, rate_times_1000, rate_over_1000, too_few_outputs,
        too_many_outputs, one_class, softmax_in_model, raw_pixels,
    )
}  # fmt: skip


# ---------------------------------------------------------------------------------- the command


def shuffled(folder: Path, target: Path, seed: int) -> Path:
    """A copy of a folder of class folders with the same numbers of images, dealt out at random."""
    rng = np.random.default_rng([seed, 99])  # not what the command divides the images by
    parts = [folder / "train"] if (folder / "train").is_dir() else [folder]
    files = sorted(p for part in parts for p in part.glob("*/*") if p.is_file())
    names = rng.permutation([p.parent.name for p in files])
    for number, (path, name) in enumerate(zip(files, names, strict=True)):
        (target / name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name / f"{number:06}{path.suffix}")
    return target


def command(folder: str, seed: int, case: str, shots: int | None) -> dict[str, Any]:
    """One `finetune preflight --json`; what it exits with has to agree with what it says."""
    with tempfile.TemporaryDirectory() as scratch:
        more = ["--seed", str(seed), *(["--shots", str(shots)] if shots else [])]
        if case == "shuffled labels":
            folder = str(shuffled(Path(folder), Path(scratch) / "shuffled", seed))
        if case == "rate × 1000":
            more += ["--set", f"train.lr={RATE * FASTER}", "--strategy", "stages:3"]
        line = [sys.executable, "-m", "finetune", "preflight", folder, "--json", *more]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1) or not done.stdout.strip():
            raise SystemExit(f"{folder}, seed {seed}: {done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(done.stdout)
        assert (found["status"] == "fail") == (done.returncode == 1)
        return found


COMMANDS = ("healthy", "shuffled labels", "rate × 1000")


# -------------------------------------------------------------------------------------- the table


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    """A line per case."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for cell in found:
        groups[cell["set"], cell["case"]].append(cell)
    yield "| set | case | n | failed | warned | passed | by | seconds |"
    yield "|---|---|---|---|---|---|---|---|"
    for (name, case), rows in groups.items():
        by = Counter(check for row in rows for check, status in row["not_passed"].items())
        counts = [sum(row["status"] == word for row in rows) for word in ("fail", "warn", "pass")]
        words = ", ".join(f"{check} {count}" for check, count in by.most_common())
        seconds = float(np.median([row["wall"] for row in rows]))
        yield (
            f"| {name} | {case.replace('_', ' ')} | {len(rows)} | "
            f"{' | '.join(map(str, counts))} | {words} | {seconds:.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("sets", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--seeds", default="0-9", type=numbers)
    parser.add_argument("--shots", type=int, help="training images per class of the folders")
    parser.add_argument("--cases", default=",".join(COMMANDS))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_intermixed_args()
    if args.table:
        print("\n".join(table(cells(args.path))))
        return
    done = {(cell["set"], cell["case"], cell["seed"]) for cell in cells(args.path)}
    pairs = [text.partition("=")[::2] for text in args.sets]
    wanted = [(name, folder, case) for name, folder in pairs for case in args.cases.split(",")]
    wanted = wanted or [("loop", "", case) for case in LOOPS]
    for seed in args.seeds:
        for name, folder, case in wanted:
            if (name, case, seed) in done:
                continue
            began = time.monotonic()
            result = (
                command(folder, seed, case, args.shots)
                if folder
                else LOOPS[case](seed).run().to_json()
            )
            cell = {
                "set": name,
                "case": case,
                "seed": seed,
                "status": result["status"],
                "not_passed": {
                    check["name"]: check["status"]
                    for check in result["checks"]
                    if check["status"] in ("warn", "fail")
                },
                "values": {check["name"]: check["value"] for check in result["checks"]},
                "wall": time.monotonic() - began,
                "cpu": processor(),
            }
            with args.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(cell, ensure_ascii=False) + "\n")
            print(f"{name:10} {case:28} {seed} {cell['status']:5} {cell['not_passed']}", flush=True)


if __name__ == "__main__":
    main()
