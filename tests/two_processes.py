"""What tests/test_distributed.py runs in each of two processes: `python tests/two_processes.py PART ARGUMENTS`."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastnas import distributed, processes, rank, retrain, search
from fastnas.cli import run_command
from fastnas.engine.training import Batch, Means, batch_statistics, evaluate, first, recalibrate
from fastnas.errors import UserError
from fastnas.methods import METHODS, OneShot, Problem, WeightSettings, parsec
from fastnas.methods.one_shot import score
from fastnas.spaces import DartsSpace, build_space

CELLS = DartsSpace(nodes=2, candidates=("none", "avg_pool_3x3", "skip_connect", "sep_conv_3x3"))
VAE = {"ranked": 6, "rank_batches": 3, "vae_iterations": 4, "vae_hidden": 8, "vae_latent": 2, "vae_lr": 0.05}
METHOD_CASES: dict[str, dict[str, Any]] = {
    "darts": {"order": 2, "warmup_epochs": 0},
    "pc_darts": {"partial": 2, "warmup_epochs": 0},
    "parsec": {"samples": 3},
    "snas": {},
    "spos": {},
    "proxyless": {"warmup_epochs": 0, "arch_interval": 1},
    "one_shot": {"ghost_batch": 2, "dropout_rate": 0.1, "dropout_ramp": False},
    "random": {"samples": 1},
    "vaenas_os": {**VAE, "epsilon_step": 0.3},
    "vaenas_g": {**VAE, "warmup_epochs": 0, "arch_interval": 1},
}


def build(name: str) -> Any:
    weights = WeightSettings(epochs=10, batch_size=4, channels=4, cells=3, nodes=2, lr=0.1, lr_min=0.0)
    space = build_space("choice_blocks", nodes=2, cells=3) if name == "one_shot" else CELLS
    torch.manual_seed(0)
    method = METHODS[name](
        METHODS[name].Settings(**METHOD_CASES[name]), Problem(space, 3, 2, weights, torch.device("cpu"), 0)
    )
    method.start_epoch(0)
    return method


def batches() -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(5)
    while True:
        yield (
            torch.randn(4, 2, 6, 6, generator=generator, dtype=torch.double),
            torch.randint(3, (4,), generator=generator),
        )


def part(batch: Batch) -> Batch:
    x, y = (tensor.chunk(processes.world_size())[processes.rank()] for tensor in batch)
    return x, y


def tensors(state: Any) -> dict[str, torch.Tensor]:
    return {place: torch.as_tensor(leaf) for place, leaf in distributed._leaves(state) if leaf is not None}


def check_that_epochs_are_those_of_one_process(name: str) -> None:
    """Two epochs, with what the first one ends with: that trains the autoencoder of VAENAS, and scores whole batches.

    Steps have given statistics of batch normalisation: the batch's own are those of the part that a process sees.
    """
    with processes.alone():
        alone = build(name)
    together = build(name)
    stream, steps = batches(), 3
    for epoch in range(2):
        for method in (alone, together):
            method.start_epoch(epoch)
            if name != "one_shot":  # its ghost batches are the same, however many processes share the batch
                getattr(method, "supernet", getattr(method, "network", None)).eval()
        figures, expected = Means(), Means()
        for index in range(epoch * steps, (epoch + 1) * steps):
            train, found = next(stream), next(stream)
            with processes.alone():
                expected.add(alone.step(index, train, found))
            figures.add(together.step(index, part(train), part(found)))
        with processes.alone():
            wanted = expected.read()
        assert figures.read() == pytest.approx(wanted, rel=1e-6), name
        if epoch == 0:
            dealt = [next(stream) for _ in range(5)]
            with processes.alone():
                wanted = alone.end_epoch(dealt)
            ended = together.end_epoch(dealt[processes.rank() :: processes.world_size()])
            assert ended.keys() == wanted.keys()
            for figure, value in wanted.items():
                assert np.asarray(ended[figure]) == pytest.approx(np.asarray(value), rel=1e-6), (name, figure)
    states = tensors(together.state_dict()), tensors(alone.state_dict())
    assert states[0].keys() == states[1].keys(), name  # momentum for the same parameters
    for place, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][place], rtol=1e-6, atol=1e-9, msg=f"{name} {place}")
    distributed.check_equal(name, together.state_dict())


def check_statistics() -> None:
    """Replicas stay equal bit for bit in training; running statistics are averaged at the end of an epoch."""
    method, stream = build("darts"), batches()
    for index in range(2):
        method.step(index, part(next(stream)), part(next(stream)))
    weights = dict(method.supernet.named_parameters())
    distributed.check_equal("weights", weights | dict(method.alphas.named_parameters()))
    buffers = {n: b.clone() for n, b in method.supernet.named_buffers() if n.endswith(distributed.STATISTICS)}
    with pytest.raises(UserError, match="process 1 differs from process 0 in its network after epoch 8"):
        distributed.check_replicas(method.state_dict(), 7)
    distributed.average_statistics(method.state_dict())
    distributed.check_replicas(method.state_dict(), 7)
    for place, buffer in buffers.items():
        mean = distributed.total(buffer) / 2
        torch.testing.assert_close(dict(method.supernet.named_buffers())[place], mean)
    network = nn.Sequential(nn.BatchNorm2d(2))
    stream = batches()
    mine = [part(next(stream)) for _ in range(3)]
    recalibrate(network.double(), network, mine)
    distributed.check_equal("recalibrated statistics", network.state_dict())


def check_evaluation() -> None:
    """Whole batches are dealt out, so that the figures are those of one process, also with the batches' statistics."""
    method, stream = build("darts"), batches()
    dealt = [next(stream) for _ in range(5)]

    def figures(mine: list[Batch], number: int | None) -> dict[str, float]:
        with batch_statistics(method.supernet), torch.no_grad():
            return evaluate(lambda x: method.supernet(x, method.alphas()), first(mine, number))

    for number in (1, 4, None):
        with processes.alone():
            expected = figures(dealt, number)
        assert figures(dealt[processes.rank() :: 2], number) == pytest.approx(expected), number
    one_shot = build("one_shot")
    one_shot.supernet.eval()
    drawn = [one_shot.space.random_genotype(random.Random(seed)) for seed in range(3)]
    with processes.alone():
        expected = score(one_shot.supernet, drawn, dealt)
    assert score(one_shot.supernet, drawn, dealt[processes.rank() :: 2]) == expected


def check_words() -> None:
    assert distributed.of_main(f"from {processes.rank()}") == "from 0"
    assert distributed.smallest(5 - processes.rank()) == 4
    assert processes.is_main() == (processes.rank() == 0)
    with distributed.first_of_machine_first():
        if processes.rank() == 0:
            time.sleep(0.2)
            processes.group.store.set("downloaded", "yes")
        assert processes.group.store.check(["downloaded"])
    with pytest.raises(UserError, match="leave --device at auto"):
        distributed.own_device(torch.device("cuda:1"))
    with processes.alone():
        assert processes.is_main() and processes.share() == {"rank": 0, "world_size": 1}


def all_checks() -> None:
    torch.set_default_dtype(torch.double)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parsec, "batch_statistics", lambda module: contextlib.nullcontext())
        for name in METHOD_CASES:
            check_that_epochs_are_those_of_one_process(name)
    check_statistics()
    check_evaluation()
    check_words()
    torch.set_default_dtype(torch.float)


def end_the_first_by_sigterm() -> None:
    """As torchrun does when another process is lost, while it waits for a sum that never comes."""
    first_pid = distributed.of_main(os.getpid())
    if processes.rank() == 0:
        distributed.wait_for_all()
    time.sleep(0.5)
    os.kill(first_pid, signal.SIGTERM)
    with contextlib.suppress(ProcessLookupError):
        while True:  # until it is gone: a lost connection would be said in other words
            os.kill(first_pid, 0)
            time.sleep(0.05)


def killed_in_epoch(epoch: int) -> None:
    start_epoch = OneShot.start_epoch

    def start_or_die(method: OneShot, number: int) -> None:
        if number == epoch and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        start_epoch(method, number)

    OneShot.start_epoch = start_or_die


def main(arguments: list[str]) -> int:
    """`check SEARCH RETRAIN RANK`: the checks, then the three commands, each with its arguments in one word.
    `kill ARGUMENTS`: a search that loses process 1 in its third epoch. `differ FLAG VALUE ARGUMENTS`: a search whose
    process 1 has another flag."""
    torch.set_num_threads(1)
    part, *arguments = arguments
    if part == "differ":
        return search.main(arguments[2:] + arguments[:2] * processes.rank())
    if part == "kill":
        killed_in_epoch(2)
        return search.main(arguments)
    all_checks()
    for command, own in zip((search, retrain, rank), arguments, strict=True):
        assert command.main(shlex.split(own)) == 0
    end_the_first_by_sigterm()
    return 0


if __name__ == "__main__":
    run_command(main, several=True)
