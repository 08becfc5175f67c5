"""What the commands share: the console, tables, --json files, and outcomes turned into exit codes and words.

Like cli.py it imports no ML framework, and rich only when something is to be shown.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import click

from optimize.pipeline.errors import ExitCode, OptimizeError, RequestError


def exit_with(command: Callable[[], int | None]) -> NoReturn:
    """End this process with what `command` returns, or with the words and the exit code of what it raises."""
    _open_standard_descriptors()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, _interrupted)
    try:
        code = command()
    except (click.exceptions.Abort, KeyboardInterrupt):
        code = _complain(
            "interrupted; what was built so far is kept", "the same command goes on from there", ExitCode.INTERRUPTED
        )
    except click.ClickException as error:
        error.show()
        code = ExitCode.REFUSED
    except OptimizeError as error:
        code = _complain(error.message, error.hint, error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        code = _complain(f"cannot write: {error}", "make room, or name another folder", ExitCode.BUG)
    sys.exit(int(code or 0))


def console() -> Any:
    """A rich Console on standard output."""
    from rich.console import Console

    class Tireless(Console):
        def on_broken_pipe(self) -> None:
            """Go on when nobody reads any more: the product is the folder, not the output."""
            _read_by_nobody()

    found = Tireless()
    return found if found.is_terminal else Tireless(width=200)


def _read_by_nobody() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """Print text as it is."""
    console().print(text, markup=False, highlight=False, soft_wrap=True)


def table(*titles: str) -> Any:
    """A rich Table in this project's style."""
    from rich.box import SIMPLE
    from rich.table import Table

    return Table(*titles, box=SIMPLE, pad_edge=False)


@contextmanager
def ends_quietly() -> Iterator[None]:
    """For a command whose output is all that it makes: when nobody reads on, or it is interrupted, that is no error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _read_by_nobody()
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)


@contextmanager
def errors_to(json_file: Path | None) -> Iterator[None]:
    """Write the error of a refusal to --json, too, but for what was written there meanwhile: an unfinished report.

    That this fails must not hide the refusal.
    """
    before = _stamp(json_file)
    try:
        yield
    except (OptimizeError, KeyboardInterrupt) as error:
        code = error.exit_code if isinstance(error, OptimizeError) else ExitCode.INTERRUPTED
        if json_file is not None and _stamp(json_file) == before:
            try:
                words = str(error) or "interrupted"
                _write(json_file, json.dumps({"exit_code": code, "error": words}, indent=1) + "\n")
            except OptimizeError as unwritten:
                click.echo(f"error: {unwritten.message}", err=True)
        raise


def _stamp(path: Path | None) -> tuple[int, int, int] | None:
    """What changes where a file is written anew; None where there is none."""
    try:
        found = path.stat() if path is not None else None
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size) if found is not None else None


def check_apart(json_file: Path | None, *read: Path) -> None:
    """Refuse a --json that is one of the files, or in one of the folders, that are read: before anything is written."""
    if json_file is None:
        return
    for path in read:
        with suppress(OSError):  # it may be no path at all, but a hub's id
            if path.exists() and _within(json_file, path):
                raise RequestError(f"--json {json_file} would be written over what is read", hint="name another file")


def check_outside(json_file: Path | None, out: Path | None, store: Path) -> None:
    """Refuse a --json that would change an emitted folder, or an artifact, after its digests were written down."""
    for folder, what in ((out, "the folder that is emitted"), (store, "the store")):
        if json_file is not None and folder is not None and _within(json_file, folder):
            raise RequestError(f"--json {json_file} lies in {what}", hint="name another file")


def _within(path: Path, other: Path) -> bool:
    """Whether a path is another one, or lies in it."""
    return path.resolve().is_relative_to(other.resolve())


def check_writable(json_file: Path | None) -> None:
    """Find out before a run of minutes, not after it."""
    if json_file is None:
        return
    try:
        if json_file.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if json_file.is_fifo():
            raise OSError(errno.EINVAL, "it is a pipe, which would wait for a reader")
        json_file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=json_file.parent):  # elsewhere than in the file: nothing is left half-written
            pass
        if json_file.is_file():
            json_file.unlink()  # so that an older report is never taken for this run's, however this one ends
    except OSError as error:
        raise RequestError(
            f"--json {json_file} cannot be written: {error.strerror}", hint="name another file"
        ) from None


def write_result(path: Path | None, kind: type, result: object) -> None:
    """A result of that type as JSON, where --json was given."""
    if path is not None:
        from optimize.pipeline.manifest import adapter

        _write(path, adapter(kind).dump_json(result, indent=1).decode() + "\n")


def _open_standard_descriptors() -> None:
    """Whoever closed one of them would else find a worker's pipe in its place."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _interrupted(number: int, frame: object) -> NoReturn:
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)  # what ends workers and removes what is half-written is not broken off
    raise KeyboardInterrupt


def _complain(message: str, hint: str | None, code: ExitCode) -> ExitCode:
    click.echo(f"error: {message}", err=True)
    if hint is not None:
        click.echo(f"  {hint}", err=True)
    return code


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise OptimizeError(f"{path} cannot be written: {error}") from None
