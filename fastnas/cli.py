"""What all command lines share: the parser, and errors as one clear line with an exit code.

Exit codes: 0 done, 1 something broke, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fastnas import processes
from fastnas.errors import UserError, did_you_mean, is_out_of_memory


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


def run_command(
    main: Callable[[list[str]], int | None], arguments: Sequence[str] | None = None, *, several: bool = False
) -> NoReturn:
    """Run ``main(arguments)``, the command line by default, and exit.

    ``several``: whether the command works as one of several processes that torchrun starts; of their errors one is
    printed.

    A UserError is printed as one line and exits with 2, an interrupt with 130, any other exception with 1.
    ``--debug`` among the arguments adds the traceback. Warnings are printed as one line too.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if not debug:
        warnings.showwarning = _show_warning
    try:
        processes.start()
        if processes.world_size() > 1 and not several:
            raise UserError("this command runs as one process: start it with python -m, without torchrun")
        code = main(arguments) or 0
        sys.stdout.flush()
        if code == 0:
            processes.finish()
    except SystemExit as stop:  # of the parser
        code = stop.code
    except KeyboardInterrupt as stop:
        code = say_stopped(stop)
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


def say_stopped(stop: KeyboardInterrupt, command: str | None = None) -> int:
    """Say why a run stopped and the `command` that goes on with it; returns the exit code."""
    lost = isinstance(stop, processes.ProcessLost)
    hint = f"; go on with: {processes.launcher()} -m {command}" if command else ""
    _say(f"{f'error: {stop}' if lost else 'interrupted'}{hint}")
    return 1 if lost else 130


def _explain(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
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
