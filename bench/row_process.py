"""A row of `bench/search_step.py` in a process of its own.

A search runs one executor. Where several take turns in one process, each finds a heap in the pieces that the others
have left of it, and the fastest row pays most for that.
"""

from __future__ import annotations

from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from bench.step_rows import Problem, Row
from fastnas.engine.training import settled_heap
from fastnas.errors import UserError
from fastnas.profiler.footprint import Footprint


class RowProcess:
    """Does what the Row does, elsewhere; the process waits between two calls and ends with the `with` block."""

    def __init__(self, name: str, problem: Problem, device: torch.device) -> None:
        context = get_context("spawn")  # a fork would share the heap, and a GPU does not survive it
        self._pipe, theirs = context.Pipe()
        arguments = name, problem, device, torch.get_num_threads(), theirs
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def seconds(self) -> float:
        return self._ask("seconds")

    def breakdown(self) -> dict[str, float]:
        return self._ask("breakdown")

    def footprint(self) -> Footprint:
        return self._ask("footprint")

    def __enter__(self) -> RowProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join()

    def _ask(self, method: str) -> Any:
        self._pipe.send(method)
        return self._receive()

    def _receive(self) -> Any:
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            self._process.join()
            raise answer
        return answer


def _serve(name: str, problem: Problem, device: torch.device, threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    try:
        row = Row(name, problem, device)
    except UserError as error:
        return pipe.send(error)
    pipe.send(None)
    try:
        pipe.send(getattr(row, pipe.recv())())  # the first run makes what stays
        with settled_heap():  # as in a search
            while True:
                pipe.send(getattr(row, pipe.recv())())
    except EOFError:  # the other end was closed
        return None
