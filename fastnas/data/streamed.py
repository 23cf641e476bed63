"""Large folders: images are read, cropped and flipped by worker processes, a batch at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from fastnas.data.augment import SAMPLE_SEED, Recipe
from fastnas.data.folder import read_image
from fastnas.data.stream import Plan
from fastnas.errors import UserError

Request = tuple[list[int], "list[int] | None"]  # rows, and a seed for each when augmented


class Streamed:
    """A store of image files; `workers` processes (at most one a CPU) read ahead, 0 reads in this process."""

    def __init__(self, paths: Sequence[str], labels: Tensor, size: int, device: torch.device, workers: int) -> None:
        self.paths = paths
        self.labels = labels
        self.image_size = size
        self.device = device
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._workers = min(workers, cpus)

    def fetch(self, plans: Iterable[Plan], recipe: Recipe) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """See stream.Store.fetch; raises UserError naming an image that cannot be decoded."""
        ahead: deque[Plan] = deque()

        def requests() -> Iterator[Request]:
            for plan in plans:
                ahead.append(plan)
                yield plan.rows.tolist(), None if plan.draws is None else plan.draws[SAMPLE_SEED].tolist()

        loader = DataLoader(
            _Batches(self.paths, self.image_size, recipe.flip),
            batch_size=None,  # a request is a whole batch already
            sampler=requests(),
            num_workers=self._workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        for images in loader:
            if isinstance(images, UserError):
                raise images
            plan = ahead.popleft()
            draws = None if plan.draws is None else plan.draws.to(self.device)
            labels = self.labels[plan.rows].to(self.device, non_blocking=True)
            yield images.to(self.device, non_blocking=True), labels, draws

    def contents(self) -> Iterator[bytes | memoryview]:
        """Labels, and each file's name below the folder and its size: the pixels are not read."""
        yield self.labels.numpy().data.cast("B")
        root = os.path.commonpath(self.paths) if self.paths else ""
        for path in self.paths:
            yield f"{os.path.relpath(path, root)} {os.path.getsize(path)}".encode(errors="surrogateescape")


class _Batches(Dataset):
    """Maps a request to uint8 [B, 3, S, S]. An unreadable file gives the UserError as the value, because a
    loader wraps what a worker raises in that worker's traceback."""

    def __init__(self, paths: Sequence[str], size: int, flip: bool) -> None:
        self.paths = paths
        crop = [v2.RandomResizedCrop(size, antialias=True), *([v2.RandomHorizontalFlip()] if flip else [])]
        self.train = v2.Compose([*crop, v2.PILToTensor()])
        # The usual ratio of the evaluation on ImageNet: shorter side 256 for a crop of 224.
        self.plain = v2.Compose([v2.Resize(size * 256 // 224, antialias=True), v2.CenterCrop(size), v2.PILToTensor()])

    def __getitem__(self, request: Request) -> Tensor | UserError:
        rows, seeds = request
        state = torch.get_rng_state()
        try:
            if seeds is None:
                return torch.stack([self.plain(read_image(self.paths[row])) for row in rows])
            return torch.stack([self._augmented(self.paths[row], seed) for row, seed in zip(rows, seeds, strict=True)])
        except UserError as error:
            return error
        finally:
            torch.set_rng_state(state)

    def _augmented(self, path: str, seed: int) -> Tensor:
        # The transforms draw from the global CPU generator; torch.manual_seed would touch other devices too.
        torch.default_generator.manual_seed(seed)
        return self.train(read_image(path))
