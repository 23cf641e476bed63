"""Ctrl-C while a command line still loads torch, which takes seconds: one line and exit code 130, as later on."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def wait_for_command() -> None:
    """End the process at Ctrl-C until `command_starts`, if it is `python -m fastnas.X`: nothing has begun by then.

    No KeyboardInterrupt, because some of what torch loads would swallow it.
    """
    located = sys.argv[:1] == ["-m"]  # what Python sets while it looks for the module, whose package comes first
    if not located or not sys.orig_argv[-len(sys.argv)].startswith("fastnas."):
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as under nohup
        signal.signal(signal.SIGINT, _end)


def command_starts() -> None:
    """Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(130)
