"""What all command lines share: the parser, and errors as one clear line with an exit code.

Exit codes: 0 done, 1 something broke, 2 wrong input, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import sys
import textwrap
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from fastnas import _interrupt, processes
from fastnas.errors import UserError, did_you_mean, is_disk_full, is_lost_worker, is_out_of_memory


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised like Ctrl-C so that files are closed and temporary ones removed."""


class HelpFormatter(argparse.HelpFormatter):
    """Keeps the lines of a description and wraps only the long ones; a column wide enough for long flags."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, 110)
        super().__init__(prog, max_help_position=min(34, width // 2), width=width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = (textwrap.fill(line, width, subsequent_indent=indent) for line in text.splitlines())
        return "\n".join(indent + line for line in lines)


class ArgumentParser(argparse.ArgumentParser):
    """A parser with ``--debug`` and no abbreviations, whose errors are one line and name the nearest flag."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, "allow_abbrev": False, **keywords})
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        message = " ".join(message.split())
        text = f"error: {message.removesuffix('.')}; see {self.prog} --help\n"
        self.exit(2, text if processes.may_speak() else None)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            flags = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"unknown argument {word}{did_you_mean(word, flags).removesuffix('?')}")
        return namespace


def check_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Raise UserError when a flag that was given, by the name of its attribute, is below 1."""
    for name in names:
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"{name.replace('_', '-')} must be at least 1, got {value}")


def run_command(
    main: Callable[[list[str]], int | None], arguments: Sequence[str] | None = None, *, several: bool = False
) -> NoReturn:
    """Run ``main(arguments)``, the command line by default, and exit.

    ``several``: whether the command works as one of several processes that torchrun starts; of their errors one is
    printed.

    A UserError is printed as one line and exits with 2, an interrupt with 130, SIGTERM with 143, any other exception
    with 1. ``--debug`` among the arguments adds the traceback. Warnings are printed as one line too.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if not debug:
        warnings.showwarning = _show_warning
    try:
        _interrupt.command_starts()
        processes.start()
        if processes.world_size() > 1 and not several:
            raise UserError("this command runs as one process: start it with python -m, without torchrun")
        with _terminable():
            code = main(arguments) or 0
            sys.stdout.flush()
        if code == 0:
            processes.finish()
    except SystemExit as stop:  # of the parser
        code = stop.code
    except KeyboardInterrupt as stop:
        words, code = _stopped(stop)
        _say("; ".join([*words, *map(str, stop.args)]))
    except BrokenPipeError:
        # The reader of a pipe, such as head, is gone; or else Python complains again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        hint = "" if debug or isinstance(error, UserError) else "; run again with --debug for the traceback"
        _say(f"error: {_explain(error)}{hint}")
        code = 2 if isinstance(error, UserError) else 1
    if processes.group is not None:
        sys.stdout.flush()
        os._exit(code)  # an orderly exit would wait for processes that may be gone
    sys.exit(code)


def _stopped(stop: KeyboardInterrupt) -> tuple[list[str], int]:
    """What to say before the arguments of `stop`, and the exit code."""
    if isinstance(stop, processes.ProcessLost):
        return [], 1
    if isinstance(stop, Terminated):
        return ["terminated" if processes.group is None else "terminated, perhaps for the loss of another process"], 143
    return ["interrupted"], 130


@contextlib.contextmanager
def resumable(command: str, folder: Path) -> Iterator[None]:
    """Inside, what stops the run in ``folder`` from outside says with which command it goes on.

    That is Ctrl-C and SIGTERM, a full disk, and the loss of a process that reads images. ``command``: as in
    ``"fastnas.search"``.
    """
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        problem = _from_outside(error)
        interrupt = isinstance(error, KeyboardInterrupt)
        if problem is None and not interrupt or not (folder / "checkpoint.pt").exists():
            raise
        go_on = f"go on with: {processes.launcher()} -m {command} --resume {shlex.quote(str(folder))}"
        if interrupt:
            raise type(error)(*error.args, go_on) from error
        raise UserError(f"{problem}, then {go_on}") from error


def _from_outside(error: BaseException) -> str | None:
    """What happened to the machine and what to do about it; None for an error of another kind."""
    if is_disk_full(error):
        return f"the disk is full, {error.filename or 'a file'} could not be written: free some space"
    if is_lost_worker(error):
        return "a process that reads images was killed, perhaps for lack of memory: free some, or give fewer --workers"
    return None


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM raises Terminated."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _explain(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if problem := _from_outside(error):
        return problem
    if is_out_of_memory(error):
        return "out of memory: give a smaller --batch-size, fewer --channels or --cells, or free the device"
    text = str(error).removesuffix(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    if processes.is_main():
        print(*f"warning: {message}".split(), file=sys.stderr, flush=True)


def _say(text: str) -> None:
    if processes.may_speak():
        print(" ".join(text.split()), file=sys.stderr, flush=True)
