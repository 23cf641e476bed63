"""Something to profile: how it is built, what it is fed, and where it shall run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from fastnas import processes
from fastnas.profiler.fit import largest_batch
from fastnas.profiler.footprint import Footprint
from fastnas.profiler.step import Inputs, Trains, measure, predict


@dataclass(frozen=True, eq=False)
class Subject:
    """A training step to predict and to measure, at any batch size.

    `build`: makes it fresh on the given device, ready to step; called with `inputs.dtype` as the default dtype, and
    with random states that are put back. `device`: where it shall run, which need not be here for a prediction.
    """

    name: str
    build: Callable[[torch.device], Trains]
    inputs: Inputs
    device: torch.device
    _predicted: dict[int, Footprint] = field(default_factory=dict, repr=False)

    @processes.alone()
    def predict(self, batch_size: int | None = None) -> Footprint:
        """The footprint of a step, by default with the batch size of `inputs`. Nothing of the batch's size is held."""
        batch_size = batch_size or self.inputs.batch_size
        if batch_size not in self._predicted:
            self._predicted[batch_size] = predict(
                self._fresh(torch.device("cpu")),
                replace(self.inputs, batch_size=batch_size),
                name=self.name,
                device=self.device,
            )
        return self._predicted[batch_size]

    @processes.alone()
    def measure(self, batch_size: int | None = None) -> Footprint:
        """The footprint of a step that is run on the device."""
        return measure(
            self._fresh(self.device),
            replace(self.inputs, batch_size=batch_size or self.inputs.batch_size),
            name=self.name,
            device=self.device,
        )

    def largest_batch(self, limit: int, *, maximum: int = 1 << 20) -> int | None:
        """The largest batch size whose predicted peak is at most `limit` bytes; None when none is."""
        return largest_batch(
            lambda batch: self.predict(batch).peak, limit, start=self.inputs.batch_size, maximum=maximum
        )

    def _fresh(self, device: torch.device) -> Trains:
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.inputs.dtype)
        try:
            with torch.random.fork_rng(devices=[]):
                return self.build(device)
        finally:
            torch.set_default_dtype(default)
