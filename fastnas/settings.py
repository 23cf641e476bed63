"""Settings that searching and retraining share: the data, and the machine."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from fastnas import data, distributed, processes
from fastnas.config import option
from fastnas.errors import UserError

# What a resumed run may set anew: where things are and run, not what is computed.
CHANGEABLE_ON_RESUME = {"data_dir", "device", "threads", "workers"}

MAX_SEED = 2**63 - 1  # what PyTorch's generators take


@dataclass(frozen=True)
class DataSettings:
    data: str = option("digits", f"data set: {', '.join(data.NAMES)}")
    data_dir: Path | None = option(None, "folder that holds the data set, in torchvision's format")
    download: bool = option(False, "let torchvision download the data set into --data-dir")
    image_size: int | None = option(
        None, "resize images to this many pixels; none keeps the data set's own size", minimum=4
    )
    num_classes: int | None = option(None, "classes of the classifier; none counts them in the labels", minimum=2)
    cutout: int = option(0, "side in pixels of the square cut out of each training image; 0 is off", minimum=0)
    workers: int = option(2, "processes that read images when they do not fit into memory", minimum=0)


@dataclass(frozen=True)
class RuntimeSettings:
    seed: int = option(
        0, "seed of everything random: weights, split, batches, augmentation, sampling", minimum=0, maximum=MAX_SEED
    )
    device: str = option("auto", "cpu, cuda or cuda:N; auto takes a GPU when there is one")
    threads: int | None = option(None, "CPU threads; none leaves PyTorch's choice", minimum=1)
    deterministic: bool = option(
        False, "let PyTorch use deterministic kernels alone, or fail: for GPUs, CPU runs repeat exactly without it"
    )


def prepare(runtime: RuntimeSettings) -> torch.device:
    """Seed, set threads and determinism, and pick the device; of several processes each takes its own GPU.

    Raises UserError for a device that is not there.
    """
    processes.start()
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    if runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # every kernel here writes all of its output
        torch.backends.cudnn.benchmark = False  # it picks algorithms by their time
    torch.manual_seed(runtime.seed)
    if runtime.device == "auto":
        return distributed.own_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", runtime.device):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {runtime.device!r}")
    device = distributed.own_device(torch.device(runtime.device))
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].removesuffix(".")
        raise UserError(f"device {runtime.device!r} cannot be used here ({reason}); try --device cpu") from None
    return device


def load_data(
    settings: DataSettings,
    runtime: RuntimeSettings,
    device: torch.device,
    *,
    search_fraction: float = 0.5,
    train_fraction: float | None = None,
) -> data.Data:
    """The data set with its seeded three-way split, on `device` if it fits there."""
    with distributed.first_of_machine_first() if settings.download else contextlib.nullcontext():
        return data.load(
            settings.data,
            settings.data_dir,
            seed=runtime.seed,
            search_fraction=search_fraction,
            train_fraction=train_fraction,
            device=device,
            download=settings.download,
            image_size=settings.image_size,
            cutout=settings.cutout,
            workers=settings.workers,
            num_classes=settings.num_classes,
        )
