"""What a step holds in memory: its peak, what the peak consists of, what each pass saves, and the course of it all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastnas.profiler.tracker import CATEGORIES, SAVED, Event, Pass, Tracker

TIMELINE_BINS = 240


@dataclass(frozen=True)
class Sample:
    """Memory at the fullest moment of a stretch of the step: bytes of each category, in the order of CATEGORIES."""

    operation: int
    phase: str
    bytes: tuple[int, ...]


@dataclass(frozen=True)
class Saved:
    """Bytes that one forward pass saved for its backward pass, the input batch included.

    `by_module`: saved activations by the path of the module that made them; `by_cell`, `by_edge` and
    `by_candidate` are sums of it. Edges and candidates carry their index, and a candidate its name where it is known.
    """

    phase: str
    bytes: int
    by_module: dict[str, int]
    by_cell: dict[str, int]
    by_edge: dict[str, int]
    by_candidate: dict[str, int]


@dataclass(frozen=True)
class Footprint:
    """Memory of one step in bytes, predicted or measured; the same fields for both, so that they can be compared.

    `peak`: the most that is held at once; `at_peak`: its parts, which add up to it; `peak_phase`: when that is;
    `saved`: one entry a pass with gradients, in order; `flops`: 2 for a multiply-add, forward and backward;
    `operations`: calls into PyTorch; `parameters`: number of weights; `allocator_peak`: what the device's allocator
    counted at its peak, and `seconds`: the time of a step without counting, both when measured.
    """

    name: str
    kind: str
    batch_size: int
    peak: int
    peak_phase: str
    at_peak: dict[str, int]
    saved: tuple[Saved, ...]
    timeline: tuple[Sample, ...]
    flops: dict[str, int]
    operations: int
    parameters: int
    allocator_peak: int | None = None
    seconds: float | None = None

    @property
    def largest_pass(self) -> Saved | None:
        """The pass that saves most; None for a step without gradients."""
        return max(self.saved, key=lambda entry: entry.bytes, default=None)

    @property
    def saved_bytes(self) -> int:
        """The most that one pass saves."""
        return self.largest_pass.bytes if self.largest_pass else 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `--json` writes them."""
        return asdict(self) | {"saved_bytes": self.saved_bytes}


def summarise(
    tracker: Tracker, *, name: str, kind: str, batch_size: int, parameters: int, candidates: Sequence[str] = ()
) -> Footprint:
    """The footprint of what `tracker` saw. `candidates`: names of an edge's candidate operations, in order."""
    top = _peak(tracker.events)
    levels, timeline = _replay(tracker.events, top)
    return Footprint(
        name=name,
        kind=kind,
        batch_size=batch_size,
        peak=sum(levels),
        peak_phase=tracker.events[top].phase if tracker.events else "",
        at_peak=dict(zip(CATEGORIES, levels, strict=True)),
        saved=tuple(_saved(entry, candidates) for entry in tracker.passes),
        timeline=timeline,
        flops=dict(tracker.flops),
        operations=tracker.operations,
        parameters=parameters,
    )


def _peak(events: Sequence[Event]) -> int:
    """Index of the event after which most is held."""
    level = highest = top = 0
    for index, event in enumerate(events):
        level += event.size
        if level > highest:
            highest, top = level, index
    return top


def _replay(events: Sequence[Event], top: int) -> tuple[list[int], tuple[Sample, ...]]:
    """Bytes of each category after event `top`, and the fullest moment of each stretch of the step."""
    place = {category: index for index, category in enumerate(CATEGORIES)}
    levels, at_top = [0] * len(CATEGORIES), [0] * len(CATEGORIES)
    # What exists before the first operation is one moment.
    started = sum(event.operation == 0 for event in events)
    width = max(1, -(-(len(events) - started) // TIMELINE_BINS))
    samples, fullest, total = [], -1, 0
    for index, event in enumerate(events):
        levels[place[event.block.category]] += event.size
        total += event.size
        if index == top:
            at_top = list(levels)
        if index + 1 < started:
            continue
        if total > fullest:
            fullest, sample = total, Sample(event.operation, event.phase, tuple(levels))
        if (index - started) % width == width - 1 or index + 1 in (started, len(events)):
            samples.append(sample)
            fullest = -1
    return at_top, tuple(samples)


def _saved(entry: Pass, candidates: Sequence[str]) -> Saved:
    by_module: Counter[str] = Counter()
    for block in entry.saved:
        if block.category == SAVED:
            by_module.update(block.shares or {block.module: block.size})
    return Saved(
        phase=entry.phase,
        bytes=entry.bytes,
        by_module=dict(by_module),
        by_cell=_group(by_module, r"cells\.(\d+)", "cell {}"),
        by_edge=_group(by_module, r"cells\.(\d+)\.edges\.(\d+)", "cell {}, edge {}"),
        by_candidate=_by_candidate(by_module, candidates),
    )


def _group(by_module: Counter[str], pattern: str, name: str) -> dict[str, int]:
    groups: Counter[str] = Counter()
    for module, size in by_module.items():
        if found := re.search(pattern, module):
            groups[name.format(*found.groups())] += size
    return dict(groups)


def _by_candidate(by_module: Counter[str], candidates: Sequence[str]) -> dict[str, int]:
    numbered = _group(by_module, r"candidates\.(\d+)", "{}")
    names = dict(enumerate(candidates))
    return {names.get(int(number), f"candidate {number}"): size for number, size in numbered.items()}
