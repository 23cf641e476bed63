"""The memory of a planned search: whether it fits, which batch does, and what to say when it did not."""

from __future__ import annotations

import warnings
from math import prod

from fastnas import processes
from fastnas.methods import WeightSettings
from fastnas.profiler.fit import SMALLEST_BATCH, free_memory
from fastnas.profiler.sizes import format_size
from fastnas.profiler.subject import Subject

AUTO_SHARE = 0.9  # of the free memory; the rest is for workspaces of libraries and for fragments
AUTO_STEPS = 10  # steps that an epoch has at least with an automatic batch size
_MAPS_AN_EDGE = 60  # more feature maps than any method keeps an edge: DARTS keeps 29


class SearchMemory:
    """Memory of one search, on the device of its `subject`; what is free is read when this is made.

    A prediction takes a few seconds, whatever the size, and no memory to speak of.
    """

    def __init__(self, subject: Subject, weights: WeightSettings) -> None:
        self.subject, self.weights = subject, weights
        self.free = free_memory(subject.device)

    def automatic_batch(self, images: int) -> int | None:
        """The batch size `auto` for `images` training images; None when none fits."""
        most = max(SMALLEST_BATCH, images // AUTO_STEPS)
        if self.free is None or self._is_surely_small(most):
            return most
        return self.subject.largest_batch(int(AUTO_SHARE * self.free), maximum=most)

    def warn(self) -> None:
        """Warn when the predicted peak exceeds the free memory, and offer the batch that fits."""
        if self.free is None or self._is_surely_small(self.weights.batch_size):
            return
        try:
            too_much = self.subject.predict().peak > self.free
        except Exception as error:  # a prediction is advice: what it cannot follow may still run
            warnings.warn(f"the memory of {self.subject.name} cannot be predicted: {error}", stacklevel=2)
            return
        if too_much:
            warnings.warn(self.explain(), stacklevel=2)

    def explain(self) -> str:
        """What the search needs, what was free, and the smaller batch that would fit, in one sentence."""
        name, batch = self.subject.name, self.weights.batch_size
        try:
            peak = self.subject.predict().peak
        except Exception:
            return f"{name} had a batch of {batch}: give a smaller --batch-size"
        each = " on each process" if processes.world_size() > 1 else ""
        text = f"{name} needs {format_size(peak)} by prediction with a batch of {batch}{each}"
        if self.free is None:
            return f"{text}: give a smaller --batch-size"
        fits = self.subject.largest_batch(int(AUTO_SHARE * self.free), maximum=batch - 1)
        advice = "even the smallest batch needs more: give fewer --channels or --cells"
        if fits is not None:
            advice = f"--batch-size {fits * processes.world_size()} would fit, and --batch-size auto finds it"
        return f"{text}, and {format_size(self.free)} were free: {advice}"

    def _is_surely_small(self, batch_size: int) -> bool:
        """Whether a coarse bound fits so easily that a prediction is not worth its seconds."""
        weights, inputs = self.weights, self.subject.inputs
        edges = sum(2 + node for node in range(weights.nodes))
        one_map = batch_size * weights.channels * prod(inputs.image[1:]) * inputs.dtype.itemsize
        return self.free is not None and 4 * _MAPS_AN_EDGE * weights.cells * edges * one_map < self.free
