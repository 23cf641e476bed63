"""One row of a benchmark: an op against eager PyTorch, the compiled reference and a copy of the same bytes."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config

from bench.answers import Function, Inputs, Passes, to_device
from bench.timing import Clock, Turns, clock_for, copy_of, percentile, ratio
from fastnas.profiler.allocator import peak_bytes

# Inductor's cache does not tell thread counts apart: a hit could be code for another number of threads.
torch._inductor.config.fx_graph_cache = False
torch._functorch.config.enable_autograd_cache = False

BUDGET = 1.0  # seconds of timing a row, all rivals together

Row = dict[str, Any]
Pedantic = Callable[..., Any]


def device() -> torch.device:
    """Where benchmarks run: the current GPU if there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def race(
    function: Function,
    reference: Function,
    inputs: Inputs,
    *,
    backward: bool,
    traffic: int | None,
    group: str,
    pedantic: Pedantic,
    with_compiled: bool = True,
) -> Row:
    """Check the answer, then time all rivals in turn; the row of the table.

    ``pedantic`` is ``benchmark.pedantic`` of pytest-benchmark. The reference is compiled for float32 only.

    Raises:
        AssertionError: the function's results or gradients break the tolerance rule; nothing has been timed then.
    """
    where = device()
    inputs = [to_device(t, where) for t in inputs]
    passes = Passes(reference, inputs, backward=backward)
    passes.check(function)

    ours, eager = passes.of(function), passes.of(reference)
    dtypes = {t.dtype for t in inputs if t is not None and t.is_floating_point()}
    clocks: dict[str, Clock] = {"eager": clock_for(eager, where)}
    if with_compiled and dtypes == {torch.float32}:
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            clocks["compiled"] = clock_for(passes.of(torch.compile(reference, dynamic=False)), where)
    if traffic:
        clocks["copy"] = clock_for(copy_of(traffic, where), where)
    clocks["ours"] = clock_for(ours, where)

    turns = Turns(clocks, "ours")
    pedantic(turns.last, setup=turns.others, rounds=turns.rounds(BUDGET))
    row: Row = {
        "op": group.partition(" ")[0],
        "name": f"{group} {'forward+backward' if passes.wanted else 'forward'}",
        "device": where.type,
        # Weights may be wider than the maps that they belong to.
        "dtype": str(min(dtypes, key=lambda dtype: dtype.itemsize)).removeprefix("torch."),
    } | summary(turns.samples, traffic)
    row["peak_bytes"] = peak_bytes(ours, where)
    row["eager_peak_bytes"] = peak_bytes(eager, where)
    return row


def summary(samples: dict[str, list[float]], traffic: int | None) -> Row:
    """Times in microseconds and ratios of a row, from the seconds of each rival in each round."""
    ours = samples["ours"]
    row: Row = {"rounds": len(ours), "us": statistics.median(ours) * 1e6}
    row["us_20"], row["us_80"] = percentile(ours, 20) * 1e6, percentile(ours, 80) * 1e6
    for rival in ("eager", "compiled"):
        if rival in samples:
            row[f"{rival}_us"] = statistics.median(samples[rival]) * 1e6
            row[f"vs_{rival}"] = ratio(samples[rival], ours)
    if traffic:
        row["traffic_bytes"] = traffic
        row["GB_s"] = traffic / statistics.median(ours) / 1e9
        row["share_of_copy"] = ratio(samples["copy"], ours)
    return row
