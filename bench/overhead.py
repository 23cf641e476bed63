"""Microseconds that the host spends on a call, with tensors so small that nothing else counts."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from bench.answers import Function, Inputs, Passes, to_device
from bench.race import BUDGET, Pedantic, Row, device
from bench.timing import Turns, host_clock, percentile, ratio

MODES = ("no grad", "forward", "forward+backward")
CALLS = 10  # a round; few enough that a GPU's launch queue never fills, which would make the host wait


def overhead(function: Function, reference: Function, inputs: Inputs, *, op: str, mode: str, pedantic: Pedantic) -> Row:
    """Microseconds a call of ``function`` and of its eager reference, timed in turn on one thread.

    Modes: ``no grad``; ``forward`` with inputs that require gradients; ``forward+backward``. Tensors of this size gain
    nothing from a second thread, and waiting for it takes milliseconds while other programs run.

    Raises:
        AssertionError: the function's results or gradients break the tolerance rule; nothing has been timed then.
    """
    where = device()
    inputs = [to_device(t, where) for t in inputs]
    passes = Passes(reference, inputs, backward=True)
    passes.check(function)

    def batch(f: Function) -> Callable[[], None]:
        full = passes.of(f)

        def calls() -> None:
            with torch.set_grad_enabled(mode != "no grad"):
                for _ in range(CALLS):
                    if mode == "forward+backward":
                        full()
                    else:
                        f(*inputs)

        return calls

    def clock(f: Function) -> Callable[[], float]:
        timed = host_clock(batch(f))

        def after_the_queue_is_empty() -> float:
            torch.cuda.synchronize()
            return timed()

        return after_the_queue_is_empty if where.type == "cuda" else timed

    turns = Turns({"eager": clock(reference), "ours": clock(function)}, "ours")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(5):  # warms up
            turns.rounds(BUDGET)
        pedantic(turns.last, setup=turns.others, rounds=turns.rounds(BUDGET, most=500))
    finally:
        torch.set_num_threads(threads)
    return {"op": op, "mode": mode, "name": f"overhead {op} {mode}", "device": where.type} | _summary(turns.samples)


def _summary(samples: dict[str, list[float]]) -> dict[str, Any]:
    scale = 1e6 / CALLS
    return {
        "rounds": len(samples["ours"]),
        "us": statistics.median(samples["ours"]) * scale,
        "us_20": percentile(samples["ours"], 20) * scale,
        "us_80": percentile(samples["ours"], 80) * scale,
        "eager_us": statistics.median(samples["eager"]) * scale,
        "vs_eager": ratio(samples["eager"], samples["ours"]),
    }
