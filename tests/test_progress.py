"""The display: a bar, plain lines or nothing, and few reads of the metrics."""

from __future__ import annotations

import io
import re
import sys

import pytest
import torch

from fastnas import progress
from fastnas.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def plain(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests move by hand: clock[0] is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def open_terminal(monkeypatch):
    """A function, since pytest puts its own sys.stdout in place after the fixtures have run."""

    def opened(kind: str = "xterm") -> Terminal:
        stream = Terminal()
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setenv("TERM", kind)
        monkeypatch.setenv("COLUMNS", "140")
        return stream

    return opened


class Counted(torch.Tensor):
    """A scalar that counts how often it is read."""

    reads = 0

    def item(self):
        Counted.reads += 1
        return super().item()


def search(bar: Progress, clock: list[float], epochs: range, steps: int = 10, seconds: float = 0.1) -> None:
    for epoch in epochs:
        bar.start_epoch(epoch)
        for _ in range(steps):
            clock[0] += seconds
            bar.step({"loss": torch.tensor(2.5).as_subclass(Counted)})
        bar.end_epoch({"epoch": epoch, "loss": 1.25, "search_accuracy": 0.5, "entropy": 1.5, "edges": [1.0]})


def test_plain_lines_off_a_terminal(capsys, clock):
    Counted.reads = 0
    with Progress(4, 10, start_epoch=2) as bar:
        search(bar, clock, range(2, 4))
        bar.message("genotype [red] in runs/x")
    lines = capsys.readouterr().out.splitlines()
    form = r"epoch {}/4  loss 1\.25  search accuracy 50\.0%  entropy 1\.5  [\d,]+ MiB  1\.0 s  {} left"
    assert re.fullmatch(form.format(3, "0:01"), lines[0])
    assert re.fullmatch(form.format(4, "0:00"), lines[1])
    assert lines[2:] == ["genotype [red] in runs/x"]
    assert Counted.reads == 0


def test_quiet_prints_nothing(capsys, clock):
    with Progress(1, 10, quiet=True) as bar:
        search(bar, clock, range(1))
        bar.message("hello")
    assert capsys.readouterr() == ("", "")


def test_quiet_on_a_terminal(open_terminal, clock):
    terminal = open_terminal()
    with Progress(1, 10, quiet=True) as bar:
        search(bar, clock, range(1))
    assert terminal.getvalue() == ""


def test_bar_on_a_terminal(open_terminal, clock):
    terminal = open_terminal()
    with Progress(3, 10) as bar:
        search(bar, clock, range(1), seconds=1000.0)
        bar.message("saved [checkpoint]")
    text = terminal.plain()
    assert re.search(r"epoch 1/3 [━╸╺]+ +step 1/10  8:03:20 left  loss 2\.5  [\d,]+ MiB", text)
    assert re.search(r"epoch 1/3 [━╸╺]+ +step 10/10  5:33:20 left  loss 1\.25  search accuracy 50\.0%", text)
    assert "saved [checkpoint]" in text


def test_dumb_terminal_gets_plain_lines(open_terminal, clock):
    terminal = open_terminal("dumb")
    with Progress(1, 10) as bar:
        search(bar, clock, range(1))
    assert terminal.getvalue().count("\n") == 1 and "\x1b" not in terminal.getvalue()


def test_metrics_are_read_at_most_twice_a_second(open_terminal, clock):
    open_terminal()
    Counted.reads = 0
    with Progress(1, 1000) as bar:
        search(bar, clock, range(1), steps=1000, seconds=0.01)
    assert 10 <= Counted.reads <= 21


def test_the_terminal_is_given_back_after_an_error(open_terminal, clock):
    terminal = open_terminal()
    with pytest.raises(KeyboardInterrupt), Progress(1, 10) as bar:
        bar.start_epoch(0)
        raise KeyboardInterrupt
    assert terminal.getvalue().endswith("\x1b[?25h")
