"""The arithmetic of the benchmarks, their refusal of wrong answers, the byte counter, the comparison of two runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import report, table
from bench.answers import Passes, to_device
from bench.compare import Times, times
from bench.overhead import overhead
from bench.race import race, summary
from bench.timing import Turns, percentile, ratio
from fastnas.profiler.allocator import peak_bytes, peak_of

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def pedantic(target: Callable[[], Any], setup: Callable[[], Any], rounds: int) -> None:
    """What ``benchmark.pedantic`` does, two rounds at most."""
    for _ in range(min(rounds, 2)):
        setup()
        target()


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1.0), (20, 1.8), (50, 3.0), (80, 4.2), (100, 5.0)], ids=lambda v: str(v)
)
def test_percentiles_interpolate_between_neighbours(percent: float, expected: float) -> None:
    assert percentile([5.0, 1.0, 4.0, 2.0, 3.0], percent) == pytest.approx(expected)
    assert percentile([7.0], percent) == 7.0


def test_ratio_is_taken_round_by_round() -> None:
    # The machine is ten times slower in the last two rounds; the rival takes twice as long in all of them.
    assert ratio([2.0, 2.0, 20.0, 20.0], [1.0, 1.0, 10.0, 10.0]) == 2.0
    assert ratio([1.0, 2.0, 30.0], [1.0, 1.0, 1.0]) == 2.0


def test_runs_take_turns() -> None:
    order = []
    clocks = {name: lambda name=name: order.append(name) or float(len(order)) for name in ("eager", "copy", "ours")}
    turns = Turns(clocks, "ours")
    for _ in range(2):
        turns.others()
        turns.last()
    assert order == ["eager", "copy", "ours"] * 2
    assert turns.samples == {"eager": [1.0, 4.0], "copy": [2.0, 5.0], "ours": [3.0, 6.0]}


def test_rounds_keep_to_the_budget() -> None:
    turns = Turns({"eager": lambda: 0.009, "ours": lambda: 0.001}, "ours")
    assert turns.rounds(1.0) == 100
    assert turns.rounds(1e-6) == 7
    assert turns.rounds(1e6) == 200


def test_summary_of_a_row() -> None:
    samples = {"eager": [8e-3, 8e-3], "compiled": [2e-3, 2e-3], "copy": [5e-4, 5e-4], "ours": [1e-3, 1e-3]}
    row = summary(samples, traffic=2_000_000)
    assert row["us"] == row["us_20"] == row["us_80"] == pytest.approx(1000)
    assert (row["vs_eager"], row["vs_compiled"]) == pytest.approx((8, 2))
    assert (row["GB_s"], row["share_of_copy"]) == pytest.approx((2.0, 0.5))
    del samples["compiled"]
    assert not {"GB_s", "share_of_copy", "vs_compiled"} & summary(samples, traffic=None).keys()


def wrong_value(x: Tensor) -> Tensor:
    return 3.001 * x


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return 3.001 * g


@pytest.mark.parametrize("wrong", [wrong_value, _WrongGradient.apply], ids=["value", "gradient"])
def test_a_wrong_answer_is_refused_before_it_is_timed(wrong: Callable[[Tensor], Tensor]) -> None:
    def never(*_: Any, **__: Any) -> None:
        pytest.fail("a wrong answer was timed")

    x = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(AssertionError, match="error .* against float64"):
        race(wrong, lambda x: 3 * x, [x], backward=True, traffic=None, group="triple small", pedantic=never)
    with pytest.raises(AssertionError, match="error .* against float64"):
        overhead(wrong, lambda x: 3 * x, [x], op="triple", mode="forward", pedantic=never)


def test_a_row_of_a_right_answer() -> None:
    x = torch.randn(16, 1024, requires_grad=True)
    row = race(
        lambda x: 3 * x,
        lambda x: x.clone() + x.clone() + x.clone(),
        [x],
        backward=True,
        traffic=4 * x.nbytes,
        group="triple small",
        pedantic=pedantic,
        with_compiled=False,
    )
    assert (row["op"], row["name"]) == ("triple", "triple small forward+backward")
    assert row["rounds"] == 2
    assert row["us"] > 0 and row["vs_eager"] > 0 and row["share_of_copy"] > 0
    assert x.nbytes * 2 <= row["peak_bytes"] < row["eager_peak_bytes"]


def test_an_op_may_give_several_tensors() -> None:
    passes = Passes(lambda x: [2 * x, x.sum()], [torch.randn(4, requires_grad=True)], backward=True)
    passes.check(lambda x: (x + x, x.sum()))
    with pytest.raises(AssertionError):
        passes.check(lambda x: (x + x, x.mean()))


def test_overhead_row() -> None:
    threads = torch.get_num_threads()
    x = torch.randn(4, requires_grad=True)
    row = overhead(lambda x: 3 * x, lambda x: 3 * x, [x], op="triple", mode="forward+backward", pedantic=pedantic)
    assert row["name"] == "overhead triple forward+backward"
    assert 0.1 < row["us"] < 1e5
    assert torch.get_num_threads() == threads


def test_peak_of_a_series() -> None:
    assert peak_of([]) == 0
    assert peak_of([-5, 3]) == 0
    assert peak_of([4, 4, -4, -4, 6]) == 8


def test_byte_counter_against_known_cases() -> None:
    x = torch.randn(256, 256)
    nbytes = x.nbytes
    slack = 1024  # Python scalars become tensors of a few bytes

    def both_alive() -> Tensor:
        return x.add(x).mul_(x).add(x)

    def one_after_the_other() -> Tensor:
        y = x.add(x)
        del y
        return x.add(x)

    assert nbytes <= peak_bytes(lambda: x.add(x), CPU) <= nbytes + slack
    assert 2 * nbytes <= peak_bytes(both_alive, CPU) <= 2 * nbytes + slack
    assert nbytes <= peak_bytes(one_after_the_other, CPU) <= nbytes + slack
    assert peak_bytes(lambda: x.mul_(x), CPU) <= slack


def test_moving_keeps_strides_and_gradients() -> None:
    whole = torch.randn(2, 6, 3, 3)
    part = whole[:, 2:].requires_grad_()
    moved = to_device(part, torch.device("meta"))
    assert moved is not None and moved.device.type == "meta"
    assert (moved.stride(), moved.storage_offset()) == (part.stride(), part.storage_offset())
    assert moved.requires_grad and moved.is_leaf
    assert to_device(part, CPU) is part
    assert to_device(None, CPU) is None


def test_every_op_has_a_row_of_overhead() -> None:
    source = (ROOT / "bench" / "test_overhead.py").read_text()
    for path in (ROOT / "fastnas" / "ops").glob("[a-z]*.py"):
        assert f"def {path.stem}() -> Case" in source, f"bench/test_overhead.py has no case for {path.stem}"


def row(name: str, us: float, **more: Any) -> dict[str, Any]:
    figures = {"us_20": us, "us_80": us, "vs_eager": 2.0, "peak_bytes": 10, "eager_peak_bytes": 2_500_000}
    return {"op": name.partition(" ")[0], "name": name, "us": us} | figures | more


def test_table_fits_120_columns() -> None:
    rows = [
        row("partial_shuffle normal-16-channels-last forward+backward", 98_765.4, GB_s=3210.5, share_of_copy=0.915),
        row("gumbel_softmax 28 x 8 hard, rival cell-by-cell forward+backward", 12.3, vs_compiled=1.5),
    ]
    lines = table.race_lines(rows)
    overheads = [{"op": "mixed_sum", "mode": mode, "us": 12.3, "eager_us": 4567.8} for mode in table.MODES]
    assert all(len(line) <= 120 for line in [*lines, *table.overhead_lines(overheads)])
    assert "98765" in lines[4] and "92%" in lines[4]
    assert "1.50x" in lines[6] and "10 B (2.5 MB)" in lines[6]


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_600, "1.0 MB"), (268_435_456, "268 MB")]
)
def test_sizes(nbytes: int, text: str) -> None:
    assert table.size(nbytes) == text


def test_compare_marks_what_is_beyond_both_bars(tmp_path: Path) -> None:
    head = {"machine": "a machine of 2 threads"}
    before = {"same": 100, "slower": 100, "faster": 100, "small": 10, "slight": 1000, "noisy": 100, "gone": 5}
    after = {"same": 100, "slower": 106, "faster": 94, "small": 11.9, "slight": 1040, "noisy": 106, "new": 5}
    for name, figures in (("before", before), ("after", after)):
        rows = [row(n, us, us_20=us - (8 if n == "noisy" else 1)) for n, us in figures.items()]
        report.write(tmp_path / f"{name}.json", head, rows)
    command = [sys.executable, ROOT / "bench" / "compare.py", tmp_path / "before.json", tmp_path / "after.json"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert out.splitlines()[0] == "a machine of 2 threads"
    found = {line.split()[0]: line.split()[1:] for line in out.splitlines()[2:]}
    assert found == {
        "same": ["100.0", "100.0", "1.000"],
        "slower": ["100.0", "106.0", "1.060", "slower"],
        "faster": ["100.0", "94.0", "0.940", "faster"],
        "small": ["10.0", "11.9", "1.190"],
        "slight": ["1000.0", "1040.0", "1.040"],
        "noisy": ["100.0", "106.0", "1.060", "slower?"],
        "new": ["-", "5.0", "-", "added"],
        "gone": ["5.0", "-", "-", "removed"],
    }


def test_compare_takes_the_median_of_repeats() -> None:
    repeats = [{"rows": [row("a", us, us_20=us - 1, us_80=us + 2)]} for us in (10.0, 30.0, 11.0)]
    assert times(repeats) == {"a": Times(11.0, 9.0, 32.0)}


def test_compare_says_when_the_machines_differ(tmp_path: Path) -> None:
    for name in ("one", "other"):
        report.write(tmp_path / f"{name}.json", {"machine": name}, [row("same", 1.0)])
    command = [sys.executable, ROOT / "bench" / "compare.py", tmp_path / "one.json", tmp_path / "other.json"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert out.startswith("one\nother\nthese are different machines")


def test_file_of_results(tmp_path: Path) -> None:
    report.write(
        tmp_path / "deep" / "r.json", report.header("pytest", "bench/", "-k", "a or b"), [row("a small", 1.23456789)]
    )
    read = json.loads((tmp_path / "deep" / "r.json").read_text())
    assert read["rows"][0]["us"] == 1.23457
    assert read["command"] == "pytest bench/ -k 'a or b'"
    assert {"machine", "versions", "date", "load"} <= read.keys()
    assert read["versions"]["torch"] == str(torch.__version__)
