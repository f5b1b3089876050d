"""The run directory: one writer, complete or able to go on, damage found, an exact table of
predictions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import odd
import pytest

import finetune
from finetune import files, lock, run
from finetune.errors import UserError
from finetune.evaluation import predictions
from finetune.report import runs
from finetune.run import RunDir, open_run

DIGEST, OTHER = "a" * 64, "b" * 64
ROOT = str(Path(finetune.__file__).parent.parent)


def begin(path: Path, digest: str = DIGEST, **more: Any) -> RunDir:
    return open_run(path, "unused", digest, **more)


def complete(path: Path, **summary: Any) -> Path:
    with begin(path) as work:
        work.write_json(
            "metrics.json",
            {
                "test/top1": {"value": 0.9, "low": 0.8, "high": 0.95, "n": 10, "method": "wilson"},
                "test/ece": 0.05,
            },
        )
        work.write_text("report.html", "<p>fine</p>")
        work.log({"stage": "svm", "seconds": 1.5})
        work.finish({"shipped": "svm", **summary})
    return path


def lines(path: Path) -> list[Any]:
    return [
        json.loads(line) for line in (path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def elsewhere(code: str, *arguments: object, **how: Any) -> subprocess.Popen[str]:
    """Python in another process, with this checkout first on its path."""
    environment = {**os.environ, "PYTHONPATH": ROOT}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **how,
    )


HOLD = """
import sys
from pathlib import Path
from finetune.run import open_run
work = open_run(Path(sys.argv[1]), "x", "a" * 64)
work.log({"step": 1, "loss": 0.5})
work.log({"step": 2, "loss": 0.4})
(work.path / ".metrics.json.abc.tmp").write_text("half")
with (work.path / "log.jsonl").open("ab") as file:
    file.write(b'{"step": 3, "lo')
print("ready", flush=True)
sys.stdin.read()
"""


# --- opening and completing ---------------------------------------------------------------------


def test_a_new_run_is_named_after_data_and_digest(tmp_path: Path) -> None:
    """Without --out the folder is runs/<name>-<ten digits>, the name made safe for any file
    system."""
    with open_run(None, "Ünsere Photos: 2024/", "0123456789abcdef", root=tmp_path / "runs") as work:
        assert tmp_path / "runs" / "Ünsere-Photos-2024-0123456789" == work.path
    with open_run(None, "../..", "0123456789abcdef", root=tmp_path / "runs") as work:
        assert tmp_path / "runs" / "run-0123456789" == work.path


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When run.json appears every other file stands already, checkpoints included; afterwards they
    are gone."""
    seen: list[set[str]] = []
    write = files.write_json

    def spy(path: Path, value: Any) -> None:
        if path.name == "run.json":
            seen.append({file.name for file in path.parent.rglob("*")})
        write(path, value)

    monkeypatch.setattr(files, "write_json", spy)
    complete(tmp_path / "r")

    assert {
        "metrics.json",
        "report.html",
        "log.jsonl",
        "checkpoints",
        "started.json",
        "lock.sqlite",
    } == seen[0]
    assert {"metrics.json", "report.html", "log.jsonl", "run.json"} == {
        file.name for file in (tmp_path / "r").rglob("*")
    }


def test_the_manifest_says_what_ran(tmp_path: Path) -> None:
    """run.json holds format, status, digest, time, versions, and the digest of every file."""
    info = run.load_run(complete(tmp_path / "r", command="finetune fit photos"))

    assert (1, "complete", DIGEST, 1) == (
        info["format"],
        info["status"],
        info["digest"],
        info["starts"],
    )
    assert "finetune fit photos" == info["command"]
    assert info["seconds"] >= 0
    assert np.__version__ == info["versions"]["numpy"]
    assert {"log.jsonl", "metrics.json", "report.html"} == set(info["files"])
    assert (
        files.file_digest(tmp_path / "r" / "report.html") == info["files"]["report.html"]["sha256"]
    )


def test_the_versions_are_read_without_importing_anything() -> None:
    """Naming torch's version does not load torch."""
    code = (
        "import sys; from finetune import run; print(sorted(run.versions())); "
        "print(sys.modules.keys() & {'torch', 'sklearn'})"
    )
    out, _ = elsewhere(code).communicate()

    assert "'torch'" in out.splitlines()[0]
    assert "set()" == out.splitlines()[1]


def test_a_finished_run_is_given_back_as_it_is(tmp_path: Path) -> None:
    """Asking again for a finished run takes no lock and writes nothing."""
    path = complete(tmp_path / "r")
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}

    with begin(path) as again:
        assert again.is_complete
        with pytest.raises(RuntimeError, match="closed"):
            again.write_text("more.txt", "more")
        with pytest.raises(RuntimeError, match="closed"):
            again.log({"stage": "more"})

    assert before == {file: file.stat().st_mtime_ns for file in path.rglob("*")}


def test_a_closed_run_takes_no_more_files(tmp_path: Path) -> None:
    """After the lock is given back nothing can be written by mistake."""
    work = begin(tmp_path / "r")
    work.close()

    for write in (
        lambda: work.write_text("a", ""),
        lambda: work.checkpoint("a"),
        lambda: work.finish({}),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            write()


def test_checkpoints_left_by_a_kill_at_the_very_end_are_removed(tmp_path: Path) -> None:
    """A kill between run.json and the removal leaves a complete run, which the next look tidies."""
    path = complete(tmp_path / "r")
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "started.json").write_text("{}", encoding="utf-8")

    with begin(path) as again:
        assert again.is_complete

    assert not (path / "checkpoints").exists()


@pytest.mark.parametrize("finish", [True, False])
def test_another_run_in_the_folder_is_not_overwritten(tmp_path: Path, finish: bool) -> None:
    """A folder that holds a run of other settings, finished or not, is refused; --force replaces it
    whole."""
    path = tmp_path / "r"
    if finish:
        complete(path)
    else:
        with begin(path) as work:
            work.write_text("plan.json", "old")
            work.log({"step": 1})
            (work.checkpoint("train")).write_text("old", encoding="utf-8")

    with pytest.raises(
        UserError, match=r"run with other settings or other images is here\n.*--force"
    ):
        begin(path, OTHER)
    with begin(path, OTHER, force=True) as work:
        assert not work.is_complete
        assert ["checkpoints", "lock.sqlite", "started.json"] == sorted(
            file.name for file in path.rglob("*")
        )
        work.finish({})

    assert OTHER == run.load_run(path)["digest"]


def test_force_does_a_finished_run_again(tmp_path: Path) -> None:
    """With --force the same run begins anew, with an empty log."""
    path = complete(tmp_path / "r")

    with begin(path, force=True) as work:
        assert not work.is_complete
        work.log({"stage": "svm", "seconds": 9.0})

    assert [{"stage": "svm", "seconds": 9.0}] == lines(path)


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    """A folder with anything else in it is refused, with --force too, and keeps what it holds."""
    (tmp_path / "holiday.jpg").write_bytes(b"precious")

    for force in (False, True):
        with pytest.raises(UserError, match=r"not empty and not a run: it holds 'holiday\.jpg'"):
            begin(tmp_path, force=force)

    assert ["holiday.jpg"] == [file.name for file in tmp_path.iterdir()]


def test_an_empty_folder_is_welcome(tmp_path: Path) -> None:
    """An existing, empty folder can be the run."""
    with begin(tmp_path) as work:
        work.finish({})

    assert tmp_path == run.finished(tmp_path)


def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path) -> None:
    """--out naming a file is a user's error."""
    (tmp_path / "r").write_text("", encoding="utf-8")

    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        begin(tmp_path / "r")


def test_a_full_disk_leaves_no_half_file_and_a_run_that_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No space while a result is written: a UserError, nothing half-written, and the same run opens
    again."""
    work = begin(tmp_path / "r")

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match="the disk is full"):
            work.write_text("report.html", "long")
    work.close()

    assert ["checkpoints"] == [file.name for file in (tmp_path / "r").iterdir()]
    with begin(tmp_path / "r") as again:
        assert not again.is_complete


def test_a_kill_while_force_clears_leaves_a_run_to_be_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between removing the old run's files, --force has left an unfinished run, whose old
    files go at the next start."""
    path = complete(tmp_path / "r")
    remove = Path.unlink

    def killed(self: Path, missing_ok: bool = False) -> None:
        if self.name == "metrics.json":
            raise KeyboardInterrupt
        remove(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            begin(path, force=True)
    assert (path / "metrics.json").exists()
    with begin(path) as work:
        assert not work.is_complete
        assert ["checkpoints"] == [file.name for file in path.iterdir()]


def test_two_openers_at_once_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that another process finishes between the first look and the lock is given back as
    finished."""
    take = lock.take

    def late(file: Path, where: Path, wait: lock.Wait) -> Any:
        monkeypatch.setattr(lock, "take", take)
        complete(where)
        return take(file, where, wait)

    monkeypatch.setattr(lock, "take", late)

    with begin(tmp_path / "r") as work:
        assert work.is_complete


# --- the log ------------------------------------------------------------------------------------


def test_the_log_is_one_object_a_line_and_readable_at_once(tmp_path: Path) -> None:
    """Every line is flushed when it is written, with any Unicode in it."""
    with begin(tmp_path / "r") as work:
        for step in range(3):
            work.log({"step": step, "note": "Größe\n日本"})

            assert [{"step": i, "note": "Größe\n日本"} for i in range(step + 1)] == lines(work.path)


def test_nan_never_reaches_the_log(tmp_path: Path) -> None:
    """NaN is no JSON: it is refused, and leaves no half line."""
    with begin(tmp_path / "r") as work:
        work.log({"step": 1})
        with pytest.raises(ValueError, match="JSON compliant"):
            work.log({"step": 2, "loss": float("nan")})

        assert [{"step": 1}] == lines(work.path)


def test_a_file_name_that_is_not_utf8_is_logged(tmp_path: Path) -> None:
    """A name from the file system with stray bytes comes back as it was."""
    with begin(tmp_path / "r") as work:
        work.log({"skipped": "photo\udcff.jpg"})

        assert [{"skipped": "photo\udcff.jpg"}] == lines(work.path)


def test_going_on_repeats_no_line(tmp_path: Path) -> None:
    """Steps that are computed again after a stop are told once, though their times differ; new ones
    are added."""
    with begin(tmp_path / "r") as work:
        work.log({"stage": "features", "images": 5, "seconds": 2.0})
        work.log({"warning": "edge of the grid"})
        work.log({"warning": "edge of the grid"})
        for step in (1, 2, 3):
            work.log({"phase": "select", "step": step, "loss": 1 / step})
    with begin(tmp_path / "r") as work:
        work.log({"stage": "features", "images": 5, "seconds": 0.1})
        work.log({"warning": "edge of the grid"})
        work.log({"warning": "edge of the grid"})
        work.log({"warning": "edge of the grid"})  # a third time is news
        for step in (3, 4):
            work.log({"phase": "select", "step": step, "loss": 1 / step + 1e-9})
        work.log({"phase": "refit", "step": 3, "loss": 0.1})

    told = lines(tmp_path / "r")
    assert [1, 2, 3, 4] == [line["step"] for line in told if line.get("phase") == "select"]
    assert [3] == [line["step"] for line in told if line.get("phase") == "refit"]
    assert 3 == sum("warning" in line for line in told)
    assert [2.0] == [line["seconds"] for line in told if line.get("stage") == "features"]


def test_equal_lines_of_one_process_are_all_kept(tmp_path: Path) -> None:
    """Only what an earlier process told is left out."""
    with begin(tmp_path / "r") as work:
        for _ in range(3):
            work.log({"note": "again"})

    assert 3 == len(lines(tmp_path / "r"))


def test_a_damaged_log_is_named(tmp_path: Path) -> None:
    """A whole line that is not JSON is no trace of a kill: it is refused, not skipped."""
    with begin(tmp_path / "r") as work:
        work.log({"step": 1})
    (tmp_path / "r" / "log.jsonl").write_bytes(b"nonsense\n")

    with pytest.raises(UserError, match=r"log\.jsonl: damaged"):
        begin(tmp_path / "r")
    with begin(tmp_path / "r", force=True) as work:  # and the refusal has given the lock back
        assert not work.is_complete


# --- one writer ---------------------------------------------------------------------------------


def test_a_second_writer_is_told_who_is_at_work_and_a_killed_one_leaves_no_lock(
    tmp_path: Path,
) -> None:
    """While another process writes, its id is told. After kill -9 the run opens at once, swept and
    with whole lines."""
    path = tmp_path / "r"
    other = elsewhere(HOLD, path)
    try:
        assert other.stdout is not None
        assert "ready" == other.stdout.readline().strip(), other.communicate()
        with pytest.raises(
            UserError, match=rf"another process is at work here \(process {other.pid}\)"
        ):
            begin(path)
        with pytest.raises(UserError, match="another process is at work"):
            begin(path, force=True)
    finally:
        other.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        other.communicate()

    with begin(path) as work:
        assert [1, 2] == [line["step"] for line in lines(path)]
        assert not list(path.rglob(".*.tmp"))
        work.log({"step": 3, "loss": 0.3})
        work.finish({})

    assert [1, 2, 3] == [line["step"] for line in lines(path)]
    assert 2 == run.load_run(path)["starts"]


def test_one_process_cannot_open_a_run_twice(tmp_path: Path) -> None:
    """The second writer may be the same process; being refused does not loosen the first one's
    lock."""
    with begin(tmp_path / "r"):
        for _ in range(2):
            with pytest.raises(UserError, match=rf"process {os.getpid()}"):
                begin(tmp_path / "r")
        code = (
            "import sys; from pathlib import Path; from finetune.run import open_run; "
            "open_run(Path(sys.argv[1]), 'x', 'a' * 64)"
        )
        _, err = elsewhere(code, tmp_path / "r").communicate()

        assert f"another process is at work here (process {os.getpid()})" in err
    with begin(tmp_path / "r"):
        pass


def test_a_lock_on_a_removed_file_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A holder that finishes removes its lock file; one who got hold of the removed file knocks at
    the new one."""
    file = tmp_path / "lock.sqlite"
    look = lock._inode
    calls = 0

    def vanishing(path: Path) -> int | None:
        nonlocal calls
        calls += 1
        if calls == 2:  # after the lock was taken, before it is given out
            path.unlink()
        return look(path)

    monkeypatch.setattr(lock, "_inode", vanishing)
    held = lock.take(file, tmp_path)

    assert file.exists()
    assert 4 == calls
    with pytest.raises(UserError, match="another process"):
        lock.take(file, tmp_path)
    held.close()


def test_a_lock_that_cannot_be_made_is_a_users_error(tmp_path: Path) -> None:
    """A file of another kind in the lock's place is named, without a traceback."""
    (tmp_path / "lock.sqlite").write_bytes(
        b"not a database, but long enough to be read as one" * 50
    )

    with pytest.raises(UserError, match="cannot be locked"):
        lock.take(tmp_path / "lock.sqlite", tmp_path)


def test_a_finished_run_ends_the_lock(tmp_path: Path) -> None:
    """`finish` gives the lock back before the context ends."""
    with begin(tmp_path / "r") as work:
        work.finish({})
        with begin(tmp_path / "r", force=True) as again:
            assert not again.is_complete


# --- reading ------------------------------------------------------------------------------------


def test_a_moved_run_is_whole(tmp_path: Path) -> None:
    """A run carries no path of its own: moved, it is still verified."""
    complete(tmp_path / "r").rename(tmp_path / "elsewhere")

    assert tmp_path / "elsewhere" == run.finished(tmp_path / "elsewhere")


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    """A changed byte, a changed size and a missing file are each named; sizes alone are a faster,
    weaker look."""
    path = complete(tmp_path / "r")
    report = path / "report.html"

    report.write_text("<p>fake</p>", encoding="utf-8")  # as long as before
    with pytest.raises(UserError, match=r"report\.html: damaged"):
        run.finished(path)
    assert path == run.finished(path, verify=False)
    report.write_text("<p>longer</p>", encoding="utf-8")
    with pytest.raises(UserError, match=r"report\.html: damaged"):
        run.finished(path, verify=False)
    report.unlink()
    with pytest.raises(UserError, match=r"report\.html: missing"):
        run.finished(path)


def test_what_is_no_finished_run_is_told_apart(tmp_path: Path) -> None:
    """No run, an unfinished run, a damaged manifest and another format each have their own
    message."""
    with pytest.raises(UserError, match="no run is here"):
        run.finished(tmp_path / "absent")
    begin(tmp_path / "r").close()
    with pytest.raises(UserError, match="this run is not finished\n  → give the same"):
        run.finished(tmp_path / "r")
    (tmp_path / "r" / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"run\.json: damaged: not valid JSON"):
        run.finished(tmp_path / "r")
    for text in ('{"format": 99}', "[]"):
        (tmp_path / "r" / "run.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"run format (99|None) is not 1"):
            run.finished(tmp_path / "r")


def test_runs_are_listed_with_their_state(tmp_path: Path) -> None:
    """Complete, unfinished and damaged runs are listed by name; what is no run is left out."""
    complete(tmp_path / "a")
    begin(tmp_path / "b").close()
    (complete(tmp_path / "c") / "report.html").unlink()
    (tmp_path / "notes").mkdir()
    (tmp_path / "file.txt").write_text("", encoding="utf-8")

    rows = runs.list_runs(tmp_path)

    assert ["a", "b", "c"] == [row["run"] for row in rows]
    assert ["complete", "unfinished"] == [row["status"] for row in rows[:2]]
    assert "missing" in rows[2]["status"]
    assert ("svm", 0.9) == (rows[0]["shipped"], rows[0]["test/top1"]["value"])
    assert "0.900 (0.800–0.950)" in runs.rows_text(rows)
    json.dumps(rows, allow_nan=False)


def test_a_folder_without_runs_is_said_to_be_empty(tmp_path: Path) -> None:
    """An empty folder is an empty list and a sentence; a missing one is an error."""
    assert [] == runs.list_runs(tmp_path)
    assert "no runs are here" == runs.rows_text([])
    with pytest.raises(UserError, match="no such folder"):
        runs.list_runs(tmp_path / "absent")


def test_a_comparison_shows_metrics_and_what_differs(tmp_path: Path) -> None:
    """Runs side by side: every metric, and of the recipe only the keys that differ."""
    shared = {"data": {"seed": 0}, "svm": {"folds": 5}}
    a = complete(tmp_path / "a", recipe={**shared, "train": {"lr": 0.1}})
    b = complete(tmp_path / "b", recipe={**shared, "train": {"lr": 0.2}})

    rows = runs.compare([a, b])

    assert ["run", "shipped", "test/top1", "test/ece", "seconds", "train.lr"] == list(rows[0])
    assert [(str(a), 0.1), (str(b), 0.2)] == [(row["run"], row["train.lr"]) for row in rows]
    assert 0.05 == rows[0]["test/ece"]


def test_a_comparison_refuses_an_unfinished_run(tmp_path: Path) -> None:
    """Only complete runs are compared."""
    begin(tmp_path / "b").close()

    with pytest.raises(UserError, match="not finished"):
        runs.compare([complete(tmp_path / "a"), tmp_path / "b"])


def test_rows_with_many_columns_are_printed_the_long_way() -> None:
    """Up to six columns a run is a line; more, and it is a column."""
    short = runs.rows_text([{"run": "a", "n": 1}, {"run": "b", "n": None, "x": 0.123456}])
    long = runs.rows_text([{"run": "a", **dict.fromkeys("tuvwxyz", 1)}])

    assert ["run  n  x", "a    1  –", "b    –  0.1235"] == short.splitlines()
    assert ["run  a", "t    1"] == long.splitlines()[:2]


def test_a_paired_result_is_printed_as_its_difference() -> None:
    """A nested result in metrics.json takes one cell: the difference with its interval."""
    difference = {"value": 0.02, "low": -0.01, "high": 0.05, "n": 100, "method": "bonett-price"}

    assert "0.020 (-0.010–0.050)" in runs.rows_text(
        [{"run": "a", "test/paired": {"difference": difference, "p_value": 0.3}}]
    )


def test_a_table_of_a_run_keeps_floats_exactly(tmp_path: Path) -> None:
    """`write_csv` writes floats so that they read back bit for bit, NumPy's too."""
    with begin(tmp_path / "r") as work:
        work.write_csv("t.csv", ["name", "x"], [["a", 0.1 + 0.2], ["b", np.float32(0.1)], ["c", 3]])

    cells = [
        line.split(",")[1]
        for line in (tmp_path / "r" / "t.csv").read_text(encoding="utf-8").splitlines()[1:]
    ]
    assert (0.1 + 0.2, float(np.float32(0.1)), "3") == (float(cells[0]), float(cells[1]), cells[2])


def test_any_name_of_a_file_can_be_read_back_from_predictions(tmp_path: Path) -> None:
    """Paths are written in printable UTF-8, a line an image, and read back as the files are
    called."""
    path, count = tmp_path / "predictions.csv", len(odd.NAMES)
    predictions.write_predictions(
        path, odd.NAMES, ["cat"] * count, ["cat", "dog"], np.full((count, 2), 0.5)
    )

    assert list(odd.NAMES) == predictions.read_predictions(path).paths
    assert count + 1 == len(path.read_text(encoding="utf-8").splitlines())
