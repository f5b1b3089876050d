"""The run directory: the only writer of results, and the way back to them.

`run.json` is written last, with the digest of every other file: where it stands, the run is
complete, and nothing is written there afterwards. Until then `checkpoints/` holds what a killed run
needs to go on, and a lock that says who is at work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import shutil
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from finetune import files, lock
from finetune.errors import UserError
from finetune.files import write_csv
from finetune.lock import NO_WAIT, Wait
from finetune.names import shown

FORMAT = 1
CHECKPOINTS = "checkpoints"
LOG = "log.jsonl"
MANIFEST = "run.json"
METRICS = "metrics.json"
STARTED = "started.json"
LOCK = "lock.sqlite"
PACKAGES = (
    "regraft",
    "torch",
    "timm",
    "torchvision",
    "openvino",
    "scikit-learn",
    "numpy",
    "pillow",
    "safetensors",
    "faiss-cpu",
)


# --- writing ------------------------------------------------------------------------------------


class RunDir:
    """An open run directory with one writer at a time. As a context manager it gives the lock back
    and leaves the rest.

    Writing into a finished or closed run is a bug in the caller and raises `RuntimeError`.
    """

    def __init__(self, path: Path, digest: str, held: sqlite3.Connection | None) -> None:
        self.path, self.digest, self._lock = path, digest, held
        self.is_complete = held is None
        self._began = time.monotonic()
        self._log: IO[bytes] | None = None
        self._told: Counter[str] = _told(path / LOG) if held else Counter()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back. What was written stays, so that the run can go on."""
        if self._log is not None:
            self._log.close()
        if self._lock is not None:
            self._lock.close()
        self._log = self._lock = None

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append one JSON line to `log.jsonl`, flushed.

        A run that goes on computes some steps again. A line that an earlier process wrote already,
        known by its keys and by every value but the measured ones (floats), is not written a second
        time.
        """
        known = _identity(entry)
        if self._told[known]:
            self._told[known] -= 1
            return
        # A name that is not UTF-8 holds lone surrogates, which become JSON's own escapes.
        line = (
            json.dumps(entry, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace")
            + b"\n"
        )
        with files.disk_errors(self.path / LOG):
            self._log = self._log or self._own(LOG).open("ab")
            self._log.write(line)
            self._log.flush()

    def write_text(self, name: str, text: str) -> None:
        files.write_text(self._own(name), text)

    def write_json(self, name: str, value: Any) -> None:
        files.write_json(self._own(name), value)

    def write_csv(self, name: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        write_csv(self._own(name), header, rows)

    def checkpoint(self, name: str) -> Path:
        """Where the step `name` keeps what it needs to go on; removed when the run is complete."""
        return self._own(CHECKPOINTS) / name

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write `run.json` with the digest of every file, then remove the checkpoints and give the
        lock back.

        `seconds` is the time of this process; `starts` says how many it took.
        """
        manifest = self._own(MANIFEST)
        if self._log is not None:
            os.fsync(self._log.fileno())
        _sweep(self.path)
        content = {
            "format": FORMAT,
            "status": "complete",
            "digest": self.digest,
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._began, 3),
            "starts": files.read_json(self.path / CHECKPOINTS / STARTED)["starts"],
            "versions": versions(),
            "git": git_commit(),
            "platform": platform.platform(),
            **summary,
            "files": {
                name: {"bytes": file.stat().st_size, "sha256": files.file_digest(file)}
                for name, file in _results(self.path)
            },
        }
        files.write_json(manifest, content)
        self.is_complete = True
        _remove_checkpoints(self.path, self.close)

    def _own(self, name: str) -> Path:
        if self._lock is None or self.is_complete:
            raise RuntimeError(f"{self.path} is closed: {name} cannot be written")
        return self.path / name


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a run that is worked on like a run of its own: its checkpoints and its lines of
    the log bear its `name`."""

    run: RunDir
    name: str

    def log(self, entry: Mapping[str, Any]) -> None:
        self.run.log({"part": self.name, **entry})

    def checkpoint(self, name: str) -> Path:
        return self.run.checkpoint(self.name) / name


def open_run(
    out: Path | None,
    name: str,
    digest: str,
    *,
    root: Path = Path("runs"),
    force: bool = False,
    wait: Wait = NO_WAIT,
) -> RunDir:
    """Open the run directory `out`, or `root/<name>-<digest>`, for the work that `digest` (hex)
    names.

    A complete run of the same digest is given back as it is (`is_complete`, no lock); an unfinished
    one goes on. Raises `UserError` where another process is at work there for longer than `wait`,
    and where the folder holds another run or anything else. `force` removes the run that is there,
    finished or not, and begins anew.
    """
    path = out if out is not None else root / f"{_slug(name)}-{digest[:10]}"
    if not force and (path / MANIFEST).exists():
        return _finished(path, digest)
    _refuse_foreign(path)
    held = lock.take(
        path / CHECKPOINTS / LOCK,
        path,
        dataclasses.replace(wait, other="choose another folder with --out"),
    )
    try:
        # finished by another process since the first look
        if not force and (path / MANIFEST).exists():
            held.close()
            return _finished(path, digest)
        with files.disk_errors(path):
            _begin(path, digest, force)
        return RunDir(path, digest, held)
    except BaseException:
        held.close()
        raise


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:40] or "run"


def _begin(path: Path, digest: str, force: bool) -> None:
    """Make the folder ready: sweep what a kill left, and check that the unfinished run is the one
    asked for."""
    _sweep(path)
    started = path / CHECKPOINTS / STARTED
    before: dict[str, Any] = (
        files.read_json(started)
        if started.exists()
        else {"digest": digest, "starts": 0, "clear": False}
    )
    if before["digest"] != digest and not force:
        raise UserError(
            "an unfinished run with other settings or other images is here",
            where=path,
            fix="choose another folder with --out, or start over here with --force",
        )
    state = {
        "format": FORMAT,
        "digest": digest,
        "starts": 1 if force else before["starts"] + 1,
        "clear": force or before["clear"],
    }
    files.write_json(started, state)
    # told before it is done: at every moment of a kill the folder is a whole run or one to be
    # cleared
    if state["clear"]:
        (path / MANIFEST).unlink(missing_ok=True)
        for file in [*_checkpoint_files(path), *(file for _, file in _results(path))]:
            if file != started:
                file.unlink()
        files.write_json(started, {**state, "clear": False})


def _finished(path: Path, digest: str) -> RunDir:
    found = files.read_json(path / MANIFEST).get("digest")
    if found != digest:
        raise UserError(
            "a finished run with other settings or other images is here",
            where=path,
            fix="choose another folder with --out, or replace it with --force",
        )
    if (path / CHECKPOINTS).exists():  # left by a kill between the manifest and the end
        with contextlib.suppress(UserError):
            _remove_checkpoints(path, lock.take(path / CHECKPOINTS / LOCK, path).close)
    return RunDir(path, digest, None)


def _refuse_foreign(path: Path) -> None:
    """A folder that holds anything but a run is not ours to write into."""
    # a run at work has the first, then both, then the second
    signs = (path / CHECKPOINTS / STARTED, path / MANIFEST)
    if not path.is_dir() or any(sign.exists() for sign in (*signs, signs[0])):
        return
    foreign = sorted(item.name for item in path.iterdir() if item.name != CHECKPOINTS)
    if foreign:
        what = f"the folder is not empty and not a run: it holds {shown(foreign[0])!r}"
        raise UserError(what, where=path, fix="choose a new folder with --out")


def _remove_checkpoints(path: Path, unlock: Callable[[], None]) -> None:
    """Remove `checkpoints/` and give the lock back, in this order where the system allows it."""
    for file in _checkpoint_files(path):
        file.unlink(missing_ok=True)
    if os.name == "nt":  # there an open file cannot be removed
        unlock()
    shutil.rmtree(path / CHECKPOINTS, ignore_errors=True)
    unlock()


# --- the files ----------------------------------------------------------------------------------


def _identity(entry: Mapping[str, Any]) -> str:
    return json.dumps(
        {key: None if isinstance(value, float) else value for key, value in entry.items()},
        sort_keys=True,
        default=str,
    )


def _told(log: Path) -> Counter[str]:
    """What the log tells already; a last line that a kill cut short is removed."""
    if not log.exists():
        return Counter()
    text = log.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with files.disk_errors(log), log.open("rb+") as file:
            file.truncate(len(whole))
    try:
        return Counter(_identity(json.loads(line)) for line in whole.splitlines())
    except ValueError as error:
        raise UserError(
            f"damaged: a line is not JSON ({error})", where=log, fix="start over with --force"
        ) from error


def _results(path: Path) -> list[tuple[str, Path]]:
    """The files of a run, but for hidden ones, `run.json` and the checkpoints."""
    found = sorted(
        (file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file()
    )
    return [
        (name, file)
        for name, file in found
        if name != MANIFEST and not name.startswith((f"{CHECKPOINTS}/", "."))
    ]


def _checkpoint_files(path: Path) -> list[Path]:
    return [
        file
        for file in (path / CHECKPOINTS).rglob("*")
        if file.is_file() and not file.name.startswith(LOCK)
    ]


def _sweep(path: Path) -> None:
    """Remove the temporary files that a killed writer left."""
    for file in path.rglob(".*.tmp"):
        file.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """The versions of Python and of every package that can change a result, none of them
    imported."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def git_commit() -> str | None:
    """The commit of the checkout that this code runs from, `-dirty` where files were changed; None
    outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return (
            subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            or None
        )
    return None


# --- reading ------------------------------------------------------------------------------------


def finished(path: Path, verify: bool = True) -> Path:
    """`path` itself, once its files agree with the digests in `run.json` (with their sizes alone,
    unless `verify`).

    Raises `UserError` where there is no complete run, a file is missing, or its bytes are not those
    that were written.
    """
    manifest = path / MANIFEST
    if not manifest.exists():
        if (path / CHECKPOINTS / STARTED).exists():
            raise UserError(
                "this run is not finished",
                where=path,
                fix="give the same `finetune fit` command again: it goes on where it stopped",
            )
        raise UserError(
            "no run is here: it has no run.json",
            where=path,
            fix="give the folder that `finetune fit` printed",
        )
    info = files.read_json(manifest)
    found = info.get("format") if isinstance(info, dict) else None
    if found != FORMAT:
        raise UserError(
            f"run format {found!r} is not {FORMAT}",
            where=manifest,
            fix="use the version of Regraft that made it",
        )
    for name, expected in info["files"].items():
        file = path / name
        if not file.is_file():
            raise UserError(
                "missing, though run.json lists it",
                where=file,
                fix="restore the file, or fit again with --force",
            )
        if file.stat().st_size != expected["bytes"] or (
            verify and files.file_digest(file) != expected["sha256"]
        ):
            raise UserError(
                "damaged: it is not what the run wrote",
                where=file,
                fix="restore the file, or fit again with --force",
            )
    return path


def load_run(path: Path) -> dict[str, Any]:
    """The `run.json` of a finished run, its files compared by size alone."""
    value: dict[str, Any] = files.read_json(finished(path, verify=False) / MANIFEST)
    return value


def history(path: Path, phase: str | None = None) -> list[dict[str, Any]]:
    """The epochs that `log.jsonl` of a run tells, finished or not: a row each, as `loop.fit` logs
    them, of one `phase` or of all; none where nothing was trained.

    A row of epoch 0 stands for the weights before the first step, where the log knows them: their
    values, `images` (numbers of `train`, `val` and `clean` images), `classes` and `chance` (the
    validation accuracy of guessing). An epoch that was
    told twice counts once; a last line that a kill cut short is passed over. Raises `UserError` for
    a damaged line.
    """
    log = path / LOG
    if not log.exists():
        return []
    whole = log.read_bytes().rpartition(b"\n")[0]
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
            told = _before_training(entry) if "groups" in entry else entry
            if "epoch" in told and phase in (None, told.get("phase")):
                place = str(told.get("part", "")), str(told.get("phase", "")), int(told["epoch"])
                rows[place] = told
        except (ValueError, TypeError) as error:
            raise UserError(
                f"line {number} is damaged ({error})", where=log, fix="restore the file"
            ) from error
    return list(rows.values())


def _before_training(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The row of epoch 0 from what a training logs at its beginning."""
    start = {key[6:]: value for key, value in entry.items() if key.startswith("start/")}
    if not start:
        return {}
    kept = {k: entry[k] for k in ("part", "phase", "images", "classes", "chance") if k in entry}
    return {**kept, "epoch": 0, "step": 0, **start}
