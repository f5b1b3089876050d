"""The quick form of every benchmark, one after another: does each still work? At most 20 minutes on
2 cores.

    python benchmarks/run.py [--quick] [NAME …]     as in `run.py svm store`; `make bench` calls it

Prints a line a measurement, and one a script with its seconds; what a failed script said goes to
stderr, and the exit code is then 1. The quick forms are too small for the bars and are not
recorded: each script without --quick does the real measuring. The first call makes the peers'
environment (several GB, minutes).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import harness

SCRIPTS: dict[str, tuple[str, ...]] = {  # script → what it is given besides --quick
    "predict": ("predict.py",),
    "store": ("store.py",),
    "svm": ("svm.py",),
    "svm --large": ("svm.py", "--large"),
    "gallery": ("gallery.py",),
    "precision": ("precision.py",),
    "growth": ("growth.py",),
    "partial": ("partial.py",),
    "extraction": ("extraction.py",),
    "engines": ("engines.py",),
    "search": ("search.py", "--rounds", "3"),
    "fit": ("fit.py", "small"),
}
LIMIT = 600  # seconds that one script may take


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SCRIPTS))
    parser.add_argument("--quick", action="store_true", help="what it does anyway")
    options = parser.parse_args()
    if unknown := set(options.names) - {name.split()[0] for name in SCRIPTS}:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}")
    harness.peer_python()
    failed, began = [], time.perf_counter()
    for name, (script, *words) in SCRIPTS.items():
        if options.names and name.split()[0] not in options.names:
            continue
        start = time.perf_counter()
        command = [sys.executable, str(harness.HERE / script), *words, "--quick"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=LIMIT
            )
            code, out, err = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired:
            code, out, err = 1, "", f"not ended after {LIMIT} s"
        for line in out.splitlines():
            if line.endswith("; quick"):
                print(f"  {line.removesuffix('; quick')}")
        print(
            f"{name}: {'ok' if code == 0 else 'FAILED'}, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        if code:
            failed.append(name)
            print(f"{out[-1000:]}\n{err[-3000:]}", file=sys.stderr, flush=True)
    words = f"; failed: {', '.join(failed)}" if failed else ""
    print(f"{time.perf_counter() - began:.0f} s in all{words}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
