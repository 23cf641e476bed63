"""Several processes that search or train as one: `torchrun -m fastnas.search`, NCCL between GPUs, gloo between CPUs.

Every process (rank) holds the whole network, starts from the same seed, samples the same paths and takes its part of
each batch. Gradients are averaged over the ranks before they are used, so that all ranks make the same step:

    g = (1 / N) sum_r g_r,   g_r the gradient of the mean loss on rank r's part of the batch,

which is the gradient on the whole batch, but for batch normalisation, which sees the statistics of the part. In one
process, and within `processes.alone`, every function here does nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastnas import processes
from fastnas.errors import UserError
from fastnas.processes import ProcessLost, may_speak, world_size

TIMEOUT = timedelta(minutes=10)  # for a machine that is gone without a word; a killed process is noticed at once
PATIENCE = timedelta(days=1)  # where ranks may lawfully wait long: data is read, a ranking ends
STATISTICS = ("running_mean", "running_var")

Value = TypeVar("Value")


def join() -> None:
    """Form the group of the processes that torchrun has started, from the variables that it has set.

    From here on all ranks but the first print nothing to standard output.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
    )
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    processes.group = processes.Group(rank, world_size, local_rank, "nccl" if on_gpus else "gloo", store, patient)
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  stays open to the end
    if threading.current_thread() is threading.main_thread():
        _end_on_sigterm()


def leave() -> None:
    """Give up the group."""
    processes.group = None
    dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process when `device` is a GPU: the one with its number on this machine.

    Raises UserError when there is none, or when `device` names one for all processes.
    """
    if processes.group is None or device.type != "cuda":
        return device
    if device.index is not None:
        raise UserError(f"several processes cannot share {device}: leave --device at auto, and each takes its own GPU")
    count = torch.cuda.device_count()
    if processes.group.local_rank >= count:
        raise UserError(f"this machine has {count} GPUs: give torchrun --nproc-per-node {count}, or --device cpu")
    torch.cuda.set_device(processes.group.local_rank)
    return torch.device("cuda", processes.group.local_rank)


def total(tensor: Tensor) -> Tensor:
    """Sum over the ranks of a tensor of equal shape on all."""
    return tensor if world_size() == 1 else _sum(tensor.detach().clone())


def average(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Mean over the ranks of each tensor, all of one device, in one message. What is None must be so on all ranks."""
    present = [tensor for tensor in tensors if tensor is not None]
    if world_size() == 1 or not present:
        return list(tensors)
    flat = _sum(torch.cat([tensor.detach().reshape(-1) for tensor in present])) / world_size()
    parts = iter(flat.split([tensor.numel() for tensor in present]))
    return [None if tensor is None else next(parts).view_as(tensor).to(tensor.dtype) for tensor in tensors]


@torch.no_grad()
def average_statistics(state: Mapping[str, Any]) -> None:
    """Set the running statistics of batch normalisation in a state dict to their mean over the ranks, in place."""
    buffers = [tensor for place, tensor in _leaves(state) if place.endswith(STATISTICS)]
    for buffer, mean in zip(buffers, average(buffers), strict=True):
        buffer.copy_(mean)


def smallest(number: int) -> int:
    """The smallest of the ranks' numbers."""
    return min(_gather(torch.tensor(number))).item() if world_size() > 1 else number


def check_equal(what: str, value: Any) -> None:
    """Raise UserError on all ranks unless all have equal values: tensors and plain values in dicts, lists and tuples.

    `what`: how the error calls them, with what to do about it. Compares a hash, bit for bit.
    """
    if world_size() == 1:
        return
    digest = hashlib.sha256()
    for place, leaf in _leaves(value):
        digest.update(place.encode())
        if isinstance(leaf, Tensor):
            leaf = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        digest.update(leaf if isinstance(leaf, bytes) else repr(leaf).encode())
    first, *others = _gather(torch.tensor(list(digest.digest()), dtype=torch.uint8))
    for number, other in enumerate(others, 1):
        if not torch.equal(first, other):
            raise UserError(f"process {number} differs from process 0 in {what}")


def check_replicas(state: Mapping[str, Any], epoch: int) -> None:
    """Raise UserError on all ranks when their networks are not equal any more after `epoch`, counted from 0."""
    advice = "give all of them equal machines and versions, and go on from the last checkpoint with --resume"
    check_equal(f"its network after epoch {epoch + 1}, so their steps are not the same any more: {advice}", state)


def check_start(same: Any, batch_size: int, *, quiet: bool) -> None:
    """Compare what all ranks start from, and say how they share a batch. Raises UserError when they differ."""
    check_equal("what it starts from: give all processes the same command, data and versions", same)
    if world_size() > 1 and not quiet:
        count, each = world_size(), batch_size // world_size()
        print(f"{count} processes ({processes.group.backend}): {batch_size} images a step, {each} each", flush=True)


def of_main(value: Value) -> Value:
    """The first process's value, on all of them."""
    if world_size() == 1:
        return value
    box = [value]
    with _talking():
        dist.broadcast_object_list(box, src=0, group=processes.group.patient)
    return box[0]


def wait_for_all() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        _gather(torch.zeros(()))


@contextlib.contextmanager
def first_of_machine_first() -> Iterator[None]:
    """The first process of each machine runs the block before the others do: one download serves all."""
    if processes.group and processes.group.local_rank:
        wait_for_all()
    yield
    if processes.group and not processes.group.local_rank:
        wait_for_all()


def _sum(tensor: Tensor) -> Tensor:
    with _talking():
        dist.all_reduce(tensor)
    return tensor


def _gather(tensor: Tensor) -> list[Tensor]:
    found = [torch.empty_like(tensor) for _ in range(world_size())]
    with _talking():
        dist.all_gather(found, tensor, group=processes.group.patient)
    return found


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].split("] ", 1)[-1].removesuffix(".")
        raise ProcessLost(f"error: another process of this run has ended or cannot be reached ({reason})") from error


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and plain values with their places."""
    if isinstance(value, Mapping):
        for key, element in value.items():
            yield from _leaves(element, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, element in enumerate(value):
            yield from _leaves(element, f"{place}.{index}")
    else:
        yield place, value


def _end_on_sigterm() -> None:
    """End at once, with a word, when torchrun stops this process.

    A handler of Python's runs between two instructions of the main thread, which may be stuck in a sum that never
    comes; the number of the signal goes into a pipe at once, and a thread reads it.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def wait() -> None:
        while os.read(read, 1)[0] != signal.SIGTERM:
            pass
        time.sleep(2)  # the main thread, if it is not stuck, ends in order and says more
        if may_speak():
            text = "error: ended from outside, as torchrun does when another process is lost; go on with --resume RUN"
            print(text, file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=wait, name="sigterm", daemon=True).start()
