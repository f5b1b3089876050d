"""One image, from a cold process to its class: `finetune predict`, and how long `finetune --help`
takes.

    python benchmarks/predict.py             10 rounds; bars: ≤ 1.2 s for predict, ≤ 0.25 s for
    --help python benchmarks/predict.py --quick     3 rounds; not recorded

The process is cold, not the disk: every round starts a new process, after one that does not count.
The run is a real one, made once: `finetune fit` with the SVM alone on a few of scikit-learn's
digits. The engine is OpenVINO, whose compiled network is in the cache, as after any first
prediction. The peer is a script that does the same with timm and torch (peers/timm_predict.py). One
more process tells whether torch was imported; if it was, that is said in the result.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import harness

HEAVY = ("torch", "timm", "torchvision", "sklearn", "scipy")
HOOK = """
import sys
from finetune.cli import main
sys.argv = sys.argv[1:]
try:
    main()
finally:
    print("IMPORTED", *(name for name in {heavy!r} if name in sys.modules), file=sys.stderr)
"""


def finished_run() -> Path:
    """A run of the SVM on the digits, made once in the scratch folder."""
    run = harness.SCRATCH / "run"
    if not (run / "run.json").exists():
        command = [
            harness.COMMANDS / "finetune",
            "fit",
            "sklearn:digits",
            "--strategy",
            "svm",
            "--shots",
            "20",
            "--out",
            run,
        ]
        harness.side(command)()
    return run


def picture() -> Path:
    """One JPEG of 500×375."""
    (path,) = harness.make_jpegs(harness.SCRATCH / "one", 1, (500, 375)).rglob("*.jpg")
    return path


def imported(words: list[str]) -> list[str]:
    """Which of the heavy libraries a command imports."""
    code = HOOK.format(heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    return done.stderr.rsplit("IMPORTED", 1)[1].split()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    rounds = 3 if options.quick else 10
    harness.use_cache()
    run, image, command = finished_run(), picture(), harness.COMMANDS / "finetune"
    ours = harness.side([command, "predict", run, image, "--engine", "openvino"])
    peer = harness.side(
        [harness.peer_python(), harness.HERE / "peers" / "timm_predict.py", image, "10"]
    )
    ours(), peer()
    mine, theirs = harness.rounds(ours, peer, rounds)
    heavy = imported(["finetune", "predict", str(run), str(image), "--engine", "openvino"])
    walls = [[one["wall"] for one in side] for side in (mine, theirs)]
    harness.record(
        "predict, one image",
        "`finetune predict RUN img.jpg`, cold process, OpenVINO",
        "a script with timm and torch",
        "≤ 1.2 s, without torch",
        f"{harness.spread(walls[0])}, {'WITH ' + ', '.join(heavy) if heavy else 'without torch'}",
        f"the peer: {harness.spread(walls[1])}; {harness.words(harness.ratio(walls[1], walls[0]))}",
        quick=options.quick,
    )
    words = harness.side([command, "--help"])
    bare = harness.side([sys.executable, "-c", "pass"])
    words(), bare()
    mine, theirs = harness.rounds(words, bare, rounds)
    heavy = imported(["finetune", "--help"])
    walls = [[one["wall"] for one in side] for side in (mine, theirs)]
    harness.record(
        "predict, --help",
        "`finetune --help`, cold process",
        "a Python that does nothing",
        "≤ 0.25 s",
        harness.spread(walls[0], digits=3) + (f", WITH {', '.join(heavy)}" if heavy else ""),
        f"the peer: {harness.spread(walls[1], digits=3)}",
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
