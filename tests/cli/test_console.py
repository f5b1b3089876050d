"""The door of both commands: exit codes, crash.log, and a bar for those who watch."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from finetune import console
from finetune.errors import UserError


def leave(
    error: BaseException | None, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str]:
    """The exit code of a command that ends in `error`, and what it says on stderr."""

    @click.group()
    def group() -> None: ...

    @group.command()
    def work() -> None:
        if error is not None:
            raise error

    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["tool", *(words or ("work",))])
    with pytest.raises(SystemExit) as caught:
        console.guarded(group, "tool")
    patch.undo()
    return int(caught.value.code or 0), capsys.readouterr().err


def test_success_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    """A command that ends well, and --help, exit 0 and say nothing on stderr."""
    assert (0, "") == leave(None, capsys)
    assert (0, "") == leave(None, capsys, "--help")


def test_a_mendable_error(capsys: pytest.CaptureFixture[str]) -> None:
    """A `UserError` exits 1 with where, what and what to do, and no traceback."""
    code, text = leave(UserError("it is empty", where="photos", fix="fill it"), capsys)
    assert (1, "error: photos: it is empty\n  → fill it\n") == (code, text)


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown command or option is click's own error: exit 2, with the usage."""
    code, text = leave(None, capsys, "play")
    assert 2 == code
    assert "No such command" in text


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_interrupted(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C exits 130, without a traceback."""
    code, text = leave(error, capsys)
    assert (130, False) == (code, "Traceback" in text)


def test_a_full_disk_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    """A full disk that nobody foresaw is told in words and exits 1."""
    code, text = leave(OSError(errno.ENOSPC, "No space left on device", "out.csv"), capsys)
    assert 1 == code
    assert "out.csv: No space left on device" in text


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR])
def test_a_name_that_cannot_be_is_no_bug(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Too long, a circle of links, or below a file: another name helps."""
    code, text = leave(OSError(number, "It cannot be", "x" * 300), capsys)
    assert 1 == code
    assert f"{'x' * 300}: It cannot be" in text
    assert "choose another name" in text


def test_a_bug_where_there_is_no_folder_at_all(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The working folder was removed, and there is none for temporary files: the traceback goes to
    stderr."""

    def gone(*_: object) -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(Path, "cwd", gone)
    monkeypatch.setattr("tempfile.gettempdir", gone)
    code, text = leave(ZeroDivisionError("by nothing"), capsys)
    assert 3 == code
    assert "ZeroDivisionError: by nothing" in text
    assert "Traceback" in text


@pytest.mark.parametrize("error", [ZeroDivisionError("by nothing"), OSError(errno.EIO, "odd")])
def test_a_bug(
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Anything else exits 3: one line says what and where, the traceback and the command are in
    crash.log."""
    monkeypatch.chdir(tmp_path)
    code, text = leave(error, capsys)
    log = tmp_path / "crash.log"
    assert (3, 2) == (code, len(text.splitlines()))
    assert str(log) in text
    assert all(
        part in log.read_text()
        for part in ("tool work", "Traceback", str(error), "test_console.py")
    )


def test_a_bug_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where neither this folder nor the temporary one takes crash.log, the traceback is printed."""

    def refuse(path: Path, _data: bytes) -> None:
        raise UserError("the disk is full", where=path)

    monkeypatch.setattr("finetune.files.write_bytes", refuse)
    code, text = leave(ZeroDivisionError("by nothing"), capsys)
    assert 3 == code
    assert "Traceback" in text
    assert [] == list(tmp_path.iterdir())


def test_a_closed_pipe_is_quiet() -> None:
    """When the reader goes away, as with `| head`, nothing is said and nothing is logged."""
    code = (
        "import click; from finetune import console\n"
        "@click.group()\ndef group(): pass\n"
        "@group.command()\ndef work():\n for i in range(100000): print(i)\n"
        "import sys; sys.argv = ['tool', 'work']; console.guarded(group, 'tool')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert b"" == process.stderr.read()
    assert 1 == process.returncode


def test_progress_is_silent_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal there is no bar, and rich is not imported for it."""
    with console.progress("features") as callback:
        callback(1, 2)
    assert ("", "") == tuple(capsys.readouterr())


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal a bar with label and counts is drawn on stderr, and taken away at the end."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with console.progress("features") as callback:
        callback(1, 20)
        callback(20, 20)
    assert "features" in terminal.getvalue()
    assert "20/20" in terminal.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_no_terminal_is_too_plain(encoding: str) -> None:
    """Letters and bytes that a terminal cannot show are written as numbers, in results and in
    errors."""
    code = (
        "import sys, click; from finetune import console; from finetune.errors import UserError\n"
        "@click.group()\ndef group(): pass\n"
        "@group.command()\ndef work():\n print('caf\\udce9 \u2192'); raise UserError('no "
        "\u5199 caf\\udce9')\n"
        "sys.argv = ['tool', 'work']; console.guarded(group, 'tool')"
    )
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=env)
    assert 1 == result.returncode
    assert (b"caf\\udce9" in result.stdout, rb"caf\xe9" in result.stderr) == (True, True)
