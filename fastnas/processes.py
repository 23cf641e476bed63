"""Which of several processes this one is, and which of them writes files and speaks to the user.

Nothing here needs torch; what the processes tell each other is in `fastnas.distributed`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


class ProcessLost(KeyboardInterrupt):
    """Another process of the run has ended, so this one stops: no handler of ordinary errors shall swallow it."""


@dataclass(frozen=True)
class Group:
    """What a process knows of all."""

    rank: int
    world_size: int
    local_rank: int  # among the processes of this machine
    backend: str
    store: Any  # torch.distributed.Store
    patient: Any  # a process group for the host, whose timeout is long


group: Group | None = None  # set by fastnas.distributed.join
_together = True
_has_spoken = threading.Lock()


def start() -> None:
    """Join the processes that torchrun has started, if it has; called again it does nothing."""
    if group is None and "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from fastnas.distributed import join

        join()


def finish() -> None:
    """Leave them at the end of a run that went well."""
    if group is not None:
        from fastnas.distributed import leave

        leave()


def rank() -> int:
    """Number of this process, from 0."""
    return group.rank if group and _together else 0


def world_size() -> int:
    """Number of processes that work as one."""
    return group.world_size if group and _together else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and talks to the user."""
    return rank() == 0


def share() -> dict[str, int]:
    """This process's part of the data, as `fastnas.data.Split` takes it."""
    return {"rank": rank(), "world_size": world_size()}


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within the block this process counts as the only one: for work that each does by itself."""
    global _together
    before, _together = _together, False
    try:
        yield
    finally:
        _together = before


def launcher() -> str:
    """What starts this run again, before `-m`."""
    if group is None:
        return "python"
    return f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', group.world_size)}"


def may_speak() -> bool:
    """Whether this process shall say how the run ended: only the first one that asks, and that only once."""
    if group is None:
        return True
    if not _has_spoken.acquire(blocking=False):
        return False
    try:
        return group.store.add("spoken", 1) == 1
    except RuntimeError:  # the process that kept the store is gone
        return True
