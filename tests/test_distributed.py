"""Searches, retrainings and rankings by two processes: what they compute, write and say, and how they end.

Starting a process costs seconds, so few are started; the checks of `tests/two_processes.py` run in one pair.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.run import get_args_parser

import fastnas
from fastnas import distributed, processes, rank, retrain, search
from fastnas.errors import UserError
from fastnas.methods import OneShot
from fastnas.runs import RunFolder

ROOT = Path(fastnas.__file__).parents[1]
SCRIPT = str(Path(__file__).with_name("two_processes.py"))
MINUTE = 60
# Ghost batches have their own statistics: shared by two processes the search is that of one, but for rounding.
SEARCH = "--method one_shot --space choice_blocks --epochs 4 --batch-size 16 --ghost-batch 8 --channels 2 --cells 3 "
SEARCH += "--nodes 2 --candidates 2 --threads 1 --device cpu --lr 0.005"
RETRAIN = "--genotype DARTS_V2 --epochs 2 --batch-size 16 --channels 4 --cells 3 --drop-path 0.2 --cutout 0 --threads 1"
FILES = {"config.toml", "metrics.jsonl", "timing.jsonl", "genotype.json", "cells.svg", "checkpoint.pt"}


@pytest.fixture(scope="module")
def data(archive: Callable[..., Path]) -> str:
    return f"--data npz:{archive(100, 2)}"


@pytest.fixture(scope="module")
def whole(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The search in one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert search.main(shlex.split(f"{SEARCH} {data} --out {folder} --quiet")) == 0
    return folder


def start_two(*command: str) -> list[subprocess.Popen[str]]:
    """Two processes as torchrun starts them, but without its agent, which would end one after the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", **environment()}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | group | {"RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]


def environment() -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment(),
        capture_output=True,
        text=True,
        timeout=3 * MINUTE,
    )


def ends(running: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, standard output and errors of each, which must end within a minute of each other."""
    found: list[Any] = [None, None]

    def wait(number: int) -> None:
        out, err = running[number].communicate()
        found[number] = (running[number].returncode, out, err)

    threads = [threading.Thread(target=wait, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    while all(thread.is_alive() for thread in threads):
        time.sleep(0.1)
    for thread in threads:
        thread.join(MINUTE)
    for process in running:
        process.kill()
    assert None not in found, "one process went on without the other"
    return found


def metrics(run: Path) -> list[dict[str, Any]]:
    return RunFolder.open(run).metrics()


def assert_same_search(run: Path, expected: Path) -> None:
    assert {path.name for path in run.iterdir()} >= FILES
    assert (run / "genotype.json").read_bytes() == (expected / "genotype.json").read_bytes()
    for record, wanted in zip(metrics(run), metrics(expected), strict=True):
        assert record.pop("genotype") == wanted.pop("genotype")
        assert record == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("command", [search, retrain, rank])
def test_torchrun_takes_no_flag_for_its_own(command):
    """It looks at the flags behind the module's name too, and fails at one that begins two of its own."""
    theirs = get_args_parser()._option_string_actions
    ours = set(command.build_parser()._option_string_actions) - {"-h", "--help"}
    assert [flag for flag in ours if any(name.startswith(flag) for name in theirs)] == []


def test_two_processes_work_as_one(data, whole, tmp_path):
    """The steps of every method, statistics, evaluation; then a search, a retraining and a ranking; then SIGTERM."""
    commands = [f"{SEARCH} {data} --out {tmp_path}/run", f"{RETRAIN} {data} --out {tmp_path}/retrained"]
    commands.append(f"{tmp_path}/run --samples 5")
    (code, out, err), (other_code, other_out, other_err) = ends(start_two(SCRIPT, "check", *commands))
    assert err.startswith("error: ended from outside") and err.count("\n") == 1, err + other_err
    assert (code, other_code, other_out, other_err) == (1, 0, "", "")

    assert out.startswith("2 processes (gloo): 16 images a step, 8 each\nepoch 1/4")
    assert_same_search(tmp_path / "run", whole)
    retrained = json.loads((tmp_path / "retrained" / "result.json").read_text())
    assert f"test accuracy  {retrained['test_accuracy']:.2%}" in out
    assert [record["epoch"] for record in metrics(tmp_path / "retrained")] == [0, 1]
    # One process tests the network that two have trained and tested.
    assert retrain.main(["--resume", str(tmp_path / "retrained"), "--quiet"]) == 0
    assert json.loads((tmp_path / "retrained" / "result.json").read_text()) == pytest.approx(retrained)

    ranking = rank.read_ranking(tmp_path / "run")
    assert len(ranking) == 5 and "5 architectures in" in out
    assert {len(path.read_bytes().splitlines()) for path in (tmp_path / "run" / "rank").glob("*.jsonl")} == {2, 3}
    # One process goes on where two have ranked: only index 5 is new.
    rank.main([str(tmp_path / "run"), "--samples", "6", "--quiet"])
    new = rank.shard_path(tmp_path / "run", 0, 1)
    assert [json.loads(line)["index"] for line in new.read_text().splitlines()] == [5]
    for path in (tmp_path / "run" / "rank").iterdir():
        path.unlink()
    rank.main([str(tmp_path / "run"), "--samples", "5", "--quiet"])
    assert rank.read_ranking(tmp_path / "run") == ranking


def test_a_killed_process_ends_the_other_and_one_process_goes_on(data, whole, tmp_path):
    run = tmp_path / "run"
    arguments = shlex.split(f"{SEARCH} {data} --out {run} --quiet")
    (code, _, err), (killed, *_) = ends(start_two(SCRIPT, "kill", *arguments))
    assert (code, killed) == (1, -9)
    assert err.startswith("error: another process of this run has ended") and err.count("\n") == 1
    assert err.endswith(f"go on with: torchrun --nproc-per-node 2 -m fastnas.search --resume {run}\n")
    assert [record["epoch"] for record in metrics(run)] == [0, 1]
    assert search.main(["--resume", str(run), "--quiet"]) == 0
    assert_same_search(run, whole)


def test_torchrun_goes_on_with_the_run_of_one_process(data, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    start_epoch = OneShot.start_epoch

    def stop_in_the_third(method: OneShot, epoch: int) -> None:
        start_epoch(method, epoch)
        if epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OneShot, "start_epoch", stop_in_the_third)
        with contextlib.suppress(KeyboardInterrupt):
            search.main(shlex.split(f"{SEARCH} {data} --out {run} --quiet"))
    assert len(metrics(run)) == 2
    done = torchrun("-m", "fastnas.search", "--resume", str(run))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 4/4") == 1
    assert_same_search(run, whole)


@pytest.mark.parametrize(
    ("flag", "value", "line"),
    [
        ("--seed", "1", "error: process 1 differs from process 0 in what it starts from: give all processes"),
        ("--data", "npz:/nowhere.npz", "error: no file /nowhere.npz: check the path after npz:"),
    ],
)
def test_of_the_errors_of_all_one_is_printed(data, tmp_path, flag, value, line):
    arguments = shlex.split(f"{SEARCH} {data} --out {tmp_path}/run --quiet")
    done = torchrun(SCRIPT, "differ", flag, value, *arguments)
    assert done.returncode == 1
    ours = [text for text in done.stderr.splitlines() if text.startswith(("error", "terminate"))]
    assert len(ours) == 1 and ours[0].startswith(line), done.stderr


def test_one_process_does_what_it_did_before():
    tensors = [torch.ones(2), None]
    assert distributed.average(tensors) == tensors
    assert distributed.total(tensors[0]) is tensors[0]
    assert distributed.smallest(3) == 3 and distributed.of_main("here") == "here"
    distributed.check_replicas({"weights": tensors}, 0)
    assert processes.is_main() and processes.may_speak() and processes.launcher() == "python"
    assert distributed.own_device(torch.device("cuda:1")) == torch.device("cuda:1")


@pytest.fixture
def second_of_two(monkeypatch):
    monkeypatch.setattr(processes, "group", processes.Group(1, 2, 1, "gloo", None, None))


def test_each_process_takes_its_own_gpu(second_of_two, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.own_device(torch.device("cuda")) == torch.device("cuda:1") and chosen == [1]
    with pytest.raises(UserError, match="leave --device at auto"):
        distributed.own_device(torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="this machine has 1 GPUs: give torchrun --nproc-per-node 1"):
        distributed.own_device(torch.device("cuda"))


def test_an_automatic_batch_is_what_the_smallest_device_takes_for_each(second_of_two, monkeypatch):
    class Memory:
        def automatic_batch(self, images: int) -> int:
            assert images == 50
            return 12

    monkeypatch.setattr(distributed, "smallest", lambda number: min(number, 10))
    plan = search.resolve({"batch_size": "auto"})
    assert search._with_fitting_batch(plan, Memory(), 100).weights.batch_size == 20


def test_batches_that_cannot_be_shared_are_refused(second_of_two, data, tmp_path):
    with pytest.raises(UserError, match="ghost batches of 8 on each of 2 processes"):
        search.main(shlex.split(f"{SEARCH.replace('--batch-size 16', '--batch-size 24')} {data} --out {tmp_path}/a"))
    with pytest.raises(UserError, match="cannot be shared equally by 2 processes"):
        retrain.main(shlex.split(f"{RETRAIN.replace('--batch-size 16', '--batch-size 15')} {data} --out {tmp_path}/b"))
    with pytest.raises(UserError, match="leaves each of 2 processes one image"):
        retrain.main(shlex.split(f"{RETRAIN.replace('--batch-size 16', '--batch-size 2')} {data} --out {tmp_path}/c"))
    with pytest.raises(UserError, match="leave out --shard"):
        rank.main([str(tmp_path), "--shard", "0/2"])
