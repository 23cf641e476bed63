"""The error for a person's wrong input, the hint that names the nearest right word, and failures of the machine."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from typing import TypeGuard


class UserError(ValueError):
    """Wrong input of a person: a setting, a path, a file.

    The text is a clear sentence or two: what was wrong, where, and what to do. Command lines print it as one
    line and exit with code 2; library code may catch it as a ``ValueError``.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'batch_size'?"`` for the known word nearest to ``word``, ``""`` if none is near."""
    by_lower_case = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower_case, n=1, cutoff=0.6)
    return f"; did you mean {by_lower_case[near[0]]!r}?" if near else ""


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the machine had no memory left."""
    # GPU: torch.OutOfMemoryError, by name so that torch need not be imported; CPU: a bare RuntimeError.
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or on_cpu


def is_disk_full(error: BaseException) -> TypeGuard[OSError]:
    """Whether a file could not grow: no space, no quota, or a limit on its size."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_lost_worker(error: BaseException) -> bool:
    """Whether a process of PyTorch's data loader died; its signal handler raises that wherever the program is."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")
