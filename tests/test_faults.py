"""Faults, each brought about: what was saved stays whole, and the one line that it prints says how to go on."""

from __future__ import annotations

import builtins
import errno
import os
import random
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from fastnas import _files, cli, retrain, runs, search
from fastnas.engine.checkpoint import load_checkpoint, save_checkpoint
from fastnas.methods import Darts

SIZE = "--batch-size 8 --channels 4 --cells 3 --threads 1 --device cpu --quiet"
SEARCH = f"--method darts --nodes 2 --epochs 2 {SIZE}"
RETRAIN = f"--genotype DARTS_V2 --epochs 2 --auxiliary-weight 0 --cutout 0 {SIZE}"
STEPS = 3  # of an epoch of the search
PACKAGE = Path(search.__file__).parent
SAVING = {PACKAGE / "_files.py", PACKAGE / "runs.py", PACKAGE / "engine" / "checkpoint.py"}
WORKING = {PACKAGE / "search.py", PACKAGE / "engine" / "training.py", PACKAGE / "methods" / "darts.py"}

Command = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def call(text: str, main: Callable[[list[str]], int] = search.main) -> tuple[int, str]:
        """Exit code and standard error of a command line."""
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.run_command(main, shlex.split(text))
        return caught.value.code, capsys.readouterr().err

    return call


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted search."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.raises(SystemExit) as caught:
        cli.run_command(search.main, shlex.split(f"{SEARCH} --data npz:{images} --out {out}"))
    assert caught.value.code == 0
    return out


def assert_same(run: Path, expected: Path) -> None:
    for name in ("metrics.jsonl", "genotype.json", "cells.svg", "checkpoint.pt"):
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name
    assert not list(run.glob("*.tmp"))


def resume_of(message: str) -> str:
    """The arguments of the command at the end of a message of one line."""
    assert message.count("\n") == 1, message
    return message.rstrip().split("go on with: python -m fastnas.search ")[1] + " --quiet"


class AtLine:
    """Within the block ``act`` is called before the n-th line that runs of the given files; 0 only counts them."""

    def __init__(self, files: set[Path], number: int, act: Callable[[], Any]) -> None:
        self.files, self.number, self.act = {str(path) for path in files}, number, act
        self.lines = 0

    def __enter__(self) -> AtLine:
        sys.settrace(self._enter)
        return self

    def __exit__(self, *problem: object) -> None:
        sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename in self.files else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.number:
                sys.settrace(None)
                self.act()
        return self._line


@pytest.fixture(scope="module")
def moments(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[set[Path], int]]:
    """Lines of a search to stop it at: at random, as many of those that save as of those that compute."""
    found = []
    for seed, files in enumerate((SAVING, WORKING)):
        arguments = f"{SEARCH} --data npz:{images} --out {tmp_path_factory.mktemp('count') / 'run'}"
        with AtLine(files, 0, lambda: None) as counter, pytest.raises(SystemExit):
            cli.run_command(search.main, shlex.split(arguments))
        found += [(files, number) for number in sorted(random.Random(seed).sample(range(1, counter.lines), 5))]
    return found


@pytest.mark.parametrize("moment", range(10))
def test_a_kill_at_any_moment(moment, moments, images, whole, tmp_path, command):
    files, number = moments[moment]
    run = tmp_path / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads; none of them is in use
        child = os.fork()
    if child == 0:
        with AtLine(files, number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            search.main(shlex.split(f"{SEARCH} --data npz:{images} --out {run}"))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    if not (run / "checkpoint.pt").exists():
        if (run / "config.toml").exists():
            code, message = command(f"--resume {run}")
            assert code == 2 and "no checkpoint at" in message and "start a new run" in message
        return
    assert command(f"--resume {run} --quiet") == (0, "")
    (run / "checkpoint.pt.tmp").unlink(missing_ok=True)
    assert_same(run, whole)


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", [1, 4, 8])
def test_an_interrupt_at_any_moment(kind, code, moment, moments, images, whole, tmp_path, command):
    files, number = moments[moment]
    run = tmp_path / "a run"
    before = signal.getsignal(signal.SIGTERM)
    with AtLine(files, number, lambda: signal.raise_signal(kind)):
        got, message = command(f"{SEARCH} --data npz:{images} --out {shlex.quote(str(run))}")
    word = "terminated" if kind == signal.SIGTERM else "interrupted"
    assert got == code and message.startswith(word) and signal.getsignal(signal.SIGTERM) == before
    if not (run / "checkpoint.pt").exists():
        assert message == f"{word}\n"
        return
    assert command(resume_of(message)) == (0, "")
    assert_same(run, whole)


def test_an_interrupted_retraining_says_how_to_go_on(images, tmp_path, command, monkeypatch):
    def stop(*arguments):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(retrain, "set_learning_rate", stop)
    run = tmp_path / "run"
    code, message = command(f"{RETRAIN} --data npz:{images} --out {run}", retrain.main)
    assert (code, message) == (143, f"terminated; go on with: python -m fastnas.retrain --resume {run}\n")
    monkeypatch.undo()
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    assert command(f"--resume {run} --quiet", retrain.main) == (0, "")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call it with the bytes that the disk still takes; the write that exceeds them is torn."""
    left = 0

    class File:
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            self.file = builtins.open(*arguments, **keywords)  # noqa: SIM115

        def __enter__(self) -> File:
            return self

        def __exit__(self, *problem: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: Any) -> None:
            nonlocal left
            self.file.write(data[: max(left, 0)])
            left -= len(data)
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")

    def fill(size: int) -> None:
        nonlocal left
        left = size
        for module in (_files, runs):
            monkeypatch.setattr(module, "open", File, raising=False)

    return fill


@pytest.mark.parametrize("share", [0.3, 0.52, 0.67, 0.9])  # of what the run writes: in its checkpoints, mostly
def test_a_full_disk(share, images, whole, tmp_path, command, disk, monkeypatch):
    checkpoint = (whole / "checkpoint.pt").stat().st_size
    run = tmp_path / "run"
    disk(int(share * 3 * checkpoint))
    code, message = command(f"{SEARCH} --data npz:{images} --out {run}")
    assert code == 2 and str(run) in message and message.count("\n") == 1
    monkeypatch.undo()
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    if share < 1 / 3:
        assert message.startswith(f"error: the disk is full, {run / 'checkpoint.pt'} could not be written: free some")
        return
    assert message.startswith(f"error: the disk is full, {run}") and "free some space, then go on with" in message
    assert not list(run.glob("*.tmp"))
    assert command(resume_of(message)) == (0, "")
    assert_same(run, whole)


def test_a_full_disk_tears_a_line_of_the_metrics(images, whole, tmp_path, command, disk, monkeypatch):
    run = tmp_path / "run"
    append = runs._append

    def fill_then_append(path, record):
        disk(20)
        append(path, record)

    monkeypatch.setattr(runs, "_append", fill_then_append)
    code, message = command(f"{SEARCH} --data npz:{images} --out {run}")
    assert code == 2 and message.startswith(f"error: the disk is full, {run / 'metrics.jsonl'} could not be written")
    assert len((run / "metrics.jsonl").read_bytes()) == 20
    monkeypatch.undo()
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    assert command(resume_of(message)) == (0, "")
    assert_same(run, whole)


def places(content: bytes) -> dict[str, int]:
    """A byte of every part of a checkpoint."""
    header = content.index(b"\n") + 1
    archive = content.index(b"PK\x03\x04")
    return {
        **{"magic": 3, "format": content.index(b" ") + 1, "checksum": header - 20, "method": header + 3},
        **{"archive": archive + 1, "pickle": content.index(b"data.pkl") + 100, "tensors": len(content) // 2},
        **{"directory": content.index(b"PK\x01\x02") + 10, "end": content.rindex(b"PK\x05\x06") + 4},
        "last": len(content) - 1,
    }


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_checkpoint_falls_back_with_one_warning(damage, tmp_path):
    path = tmp_path / "checkpoint.pt"
    for value in (1, 2):
        save_checkpoint(path, {"value": value, "tensors": [torch.ones(64) for _ in range(4)]}, method="darts")
    good = path.read_bytes()
    draws = random.Random(0)
    spots = [*places(good).values(), 0, *(draws.randrange(len(good)) for _ in range(100))]
    for spot in spots:
        flipped = good[spot] ^ (1 << draws.randrange(8))
        path.write_bytes(good[:spot] + (bytes([flipped]) + good[spot + 1 :] if damage == "flip" else b""))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if good[:spot].startswith(b"fastnas-checkpoint ") and damage == "flip" and chr(flipped).isdigit():
                continue  # a digit of the format makes it another format, which is named: test_checkpoint.py
            assert load_checkpoint(path, method="darts")["value"] == 1, spot
        assert len(caught) == 1 and "going on from the checkpoint before it" in str(caught[0].message)


def test_no_memory_in_mid_search_keeps_what_was_saved(images, whole, tmp_path, command, monkeypatch):
    step = Darts.step

    def exhaust(self, index, *batches):
        if index == STEPS + 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return step(self, index, *batches)

    monkeypatch.setattr(Darts, "step", exhaust)
    monkeypatch.setattr(search.SearchMemory, "explain", lambda self: "give a smaller --batch-size")  # test_memory.py
    run = tmp_path / "run"
    code, message = command(f"{SEARCH} --data npz:{images} --out {run}")
    assert (code, message) == (2, "error: out of memory: give a smaller --batch-size\n")
    monkeypatch.undo()
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    assert command(f"--resume {run} --quiet") == (0, "")
    assert_same(run, whole)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of two classes, 40 of each."""
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (80, 12, 12, 3), dtype=np.uint8)
    for index, array in enumerate(pixels):
        path = tmp_path / "images" / f"class{index % 2}" / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(array).save(path)
    return tmp_path / "images"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_corrupt_image_is_named(streamed, folder, tmp_path, command, monkeypatch):
    if streamed:
        pytest.importorskip("torchvision")
        monkeypatch.setattr("fastnas.data.folder.RESIDENT_LIMIT", 0)
    bad = folder / "class1" / "41.png"
    good = bad.read_bytes()
    bad.write_bytes(good[: len(good) // 2])
    run = tmp_path / "run"
    arguments = f"{SEARCH} --workers 0 --image-size 8 --data folder:{folder} --out {run}"
    code, message = command(arguments)
    assert code == 2 and message.startswith(f"error: cannot read the image {bad} (")
    assert message.endswith("): repair it or remove it\n")
    if streamed:
        bad.write_bytes(good)
        assert command(f"--resume {run} --quiet") == (0, "")


def test_a_lost_data_worker(folder, tmp_path, command, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setattr("fastnas.data.folder.RESIDENT_LIMIT", 0)
    step = Darts.step

    def lose(self, index, *batches):
        if index == STEPS + 1:
            torch.multiprocessing.active_children()[0].kill()
            time.sleep(0.5)
        return step(self, index, *batches)

    monkeypatch.setattr(Darts, "step", lose)
    run = tmp_path / "run"
    code, message = command(f"{SEARCH} --epochs 3 --workers 1 --image-size 8 --data folder:{folder} --out {run}")
    assert code == 2
    assert message.startswith("error: a process that reads images was killed, perhaps for lack of memory: free some,")
    monkeypatch.setattr(Darts, "step", step)
    assert command(resume_of(message)) == (0, "")


def test_other_threads_may_run_commands(capsys):
    """Only the main thread can handle SIGTERM; elsewhere a command runs without."""
    codes = []

    def call() -> None:
        try:
            cli.run_command(lambda arguments: 3, [])
        except SystemExit as stop:
            codes.append(stop.code)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert codes == [3]
