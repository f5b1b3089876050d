"""What both commands do at the door: exit codes, `crash.log`, progress on stderr.

Nothing heavy is imported before it is needed, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import click

from finetune import hardware
from finetune.errors import UserError, printable
from finetune.progress import Progress

MENDABLE, BUG, INTERRUPTED = 1, 3, 130
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
# what the system says of a name that cannot be
NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)


def guarded(group: click.Group, prog_name: str) -> NoReturn:
    """Run a command line and exit: 0; 1 for a `UserError`; 2 for wrong usage; 3 for a bug, with
    `crash.log`; 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        # a terminal that cannot show a letter gets its number, not a crash
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    hardware.limit_threads()  # before a command imports what reads it
    try:
        code = group.main(prog_name=prog_name, standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except UserError as error:
        _fail(f"error: {error}", MENDABLE)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has seen enough, as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(MENDABLE)  # as click does where it meets the closed pipe first
    except OSError as error:
        if error.errno in DISK:
            place = printable(os.fsdecode(error.filename or "the disk"))
            _fail(
                f"error: {place}: {error.strerror}\n  → free some space, or mend the permissions",
                MENDABLE,
            )
        if error.errno in NAME:
            place = printable(os.fsdecode(error.filename or "a name"))
            _fail(f"error: {place}: {error.strerror}\n  → choose another name", MENDABLE)
        _crash(prog_name, error)
    except Exception as error:
        _crash(prog_name, error)


class Command(click.Command):
    """A command that says where an option is given twice: the last one counts."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            with contextlib.suppress(click.ClickException):  # told by the parsing itself, below
                _, _, order = self.make_parser(ctx).parse_args(list(args))
                for option in dict.fromkeys(order):
                    told = isinstance(option, click.Option) and not option.is_flag
                    if told and not option.multiple and order.count(option) > 1:
                        name = max(option.opts, key=len)
                        click.echo(f"note: {name} is given twice; the last one counts", err=True)
        return super().parse_args(ctx, args)


def _fail(text: str, code: int) -> NoReturn:
    click.echo(text, err=True)
    sys.exit(code)


def _crash(prog_name: str, error: Exception) -> NoReturn:
    """A bug: the traceback goes to a file, one line says where."""
    from finetune import files

    text = (
        f"{prog_name} {' '.join(sys.argv[1:])}\npython "
        f"{sys.version}\n\n{''.join(traceback.format_exception(error))}"
    )
    head = f"{prog_name} met a bug: {type(error).__name__}: {printable(str(error))}"
    # either may raise: a folder that was removed, none that can be written
    for folder in (Path.cwd, tempfile.gettempdir):
        with contextlib.suppress(OSError, UserError):
            path = Path(folder()) / "crash.log"
            files.write_bytes(path, text.encode(errors="backslashreplace"))
            _fail(f"{head}\n  → the traceback is in {path}; please report it", BUG)
    _fail(f"{head}\n\n{text}", BUG)


@contextlib.contextmanager
def progress(label: str) -> Iterator[Progress]:
    """Give `callback(done, total)` that draws a bar with the time left on stderr; silent where
    nobody watches."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    with contextlib.ExitStack() as stack:
        draw: list[Progress] = []

        def callback(done: int, total: int) -> None:
            if not draw:
                draw.append(stack.enter_context(_bar(label)))
            draw[0](done, total)

        yield callback


@contextlib.contextmanager
def _bar(label: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
