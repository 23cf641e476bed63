"""Networks of choice blocks (Bender et al. 2018): the one-shot model, and one architecture built alone."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnas.errors import UserError
from fastnas.ops import path_dropout, sample_path_mask
from fastnas.spaces.architecture import ArchitectureString
from fastnas.spaces.choice_blocks import OPERATIONS, ChoiceBlockSpace
from fastnas.spaces.darts import reduction_cells

GHOST = 32  # images of a ghost batch (section 3.2)

Norm = Callable[[int], nn.Module]


class GhostNorm(nn.Module):
    """Batch normalisation, each ghost batch by its own statistics, in training and in evaluation alike (section 3.2).

    [B, C, H, W] is cut into max(1, B // ghost) parts along B. Nothing is remembered: the statistics of an architecture
    are not known in advance.
    """

    def __init__(self, channels: int, ghost: int = GHOST) -> None:
        super().__init__()
        self.ghost = ghost
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.tensor_split(max(1, len(x) // self.ghost))
        out = [F.batch_norm(part, None, None, self.weight, self.bias, training=True) for part in parts]
        return torch.cat(out) if len(out) > 1 else out[0]


def _conv(norm: Norm, c_in: int, channels: int, kernel: tuple[int, int]) -> list[nn.Module]:
    """BN-ReLU-Conv, the paper's order."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    return [norm(c_in), nn.ReLU(), nn.Conv2d(c_in, channels, kernel, padding=padding, bias=False)]


def _separable(norm: Norm, channels: int, kernel: int) -> nn.Sequential:
    """A pair of depthwise separable convolutions."""
    layers: list[nn.Module] = []
    for _ in range(2):
        depthwise = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        layers += [norm(channels), nn.ReLU(), depthwise, nn.Conv2d(channels, channels, 1, bias=False)]
    return nn.Sequential(*layers)


def _operation(name: str, norm: Norm, channels: int) -> nn.Module:
    if name.startswith("sep_conv"):
        return _separable(norm, channels, int(name[-1]))
    if name == "conv_1x7_7x1":
        return nn.Sequential(*_conv(norm, channels, channels, (1, 7)), *_conv(norm, channels, channels, (7, 1)))
    if name == "max_pool_3x3":
        return nn.MaxPool2d(3, 1, padding=1)
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)
    return nn.Identity()


@dataclass(frozen=True)
class PathMasks:
    """Which paths each ghost batch keeps, the same in all cells: for each block bool [G, 2 + i] of its inputs and bool
    [G, 7] of its operations."""

    inputs: tuple[Tensor, ...]
    operations: tuple[Tensor, ...]

    @classmethod
    def sample(cls, space: ChoiceBlockSpace, rate: float, ramp: float, groups: int, seed: int) -> PathMasks:
        """Path dropout at `ramp` (0 to 1) of its linear schedule: each of k paths goes with probability ramp * r^(1/k),
        `rate` being r. At the end all inputs of an operation are dropped with probability r, whatever k is."""
        generator = torch.Generator().manual_seed(seed)

        def draw(k: int) -> Tensor:
            return sample_path_mask(k, rate * ramp**k, groups, generator=generator)

        blocks = range(space.blocks)
        return cls(tuple(draw(2 + i) for i in blocks), tuple(draw(len(OPERATIONS)) for _ in blocks))

    def part(self, rank: int, world_size: int) -> PathMasks:
        """The ghost batches of one of `world_size` equal parts of the batch."""
        inputs, operations = (
            tuple(mask.chunk(world_size)[rank] for mask in masks) for masks in (self.inputs, self.operations)
        )
        return PathMasks(inputs, operations)

    @classmethod
    def of(cls, space: ChoiceBlockSpace, string: Sequence[int]) -> PathMasks:
        """The masks that leave one architecture, for a single ghost batch."""
        cell = space.cell(string)

        def keep(size: int, chosen: Sequence[int]) -> Tensor:
            return torch.tensor([[index in chosen for index in range(size)]])

        return cls(
            tuple(keep(2 + i, states) for i, (states, _) in enumerate(cell)),
            tuple(keep(len(OPERATIONS), operations) for _, operations in cell),
        )


def _masked_sum(paths: Mapping[int, Callable[[], Tensor]], mask: Tensor | None, like: Callable[[], Tensor]) -> Tensor:
    """Sum of the kept paths, of all without a mask; those that no ghost batch keeps are not computed.

    `like`: zeros for none at all.
    """
    kept = None if mask is None else mask.any(0).tolist()
    active = [index for index in paths if kept is None or kept[index]]
    if not active:
        return like()
    outputs = [paths[index]() for index in active]
    if mask is None or bool(mask[:, active].all()):
        return reduce(operator.add, outputs)
    return path_dropout(outputs, mask[:, active].to(outputs[0].device))


class ChoiceBlock(nn.Module):
    """Concatenation of the inputs and a 1x1 convolution, then the sum of operations.

    The convolution of a concatenation is kept as one convolution an input, whose outputs are added: an input that is
    off is a path that is off. `built`: (states, operations) to build, None for all.
    """

    def __init__(
        self, widths: Sequence[int], channels: int, norm: Norm, built: tuple[Sequence[int], ...] | None
    ) -> None:
        super().__init__()
        self.channels = channels
        states, operations = built or (range(len(widths)), range(len(OPERATIONS)))
        self.inputs = nn.ModuleDict(
            {str(state): nn.Sequential(*_conv(norm, widths[state], channels, (1, 1))) for state in states}
        )
        self.operations = nn.ModuleDict(
            {str(index): _operation(OPERATIONS[index], norm, channels) for index in operations}
        )

    def forward(
        self, states: Sequence[Tensor], inputs: Tensor | None = None, operations: Tensor | None = None
    ) -> Tensor:
        """`inputs`, `operations`: the masks of `PathMasks`, or None for all that is built."""

        def nothing() -> Tensor:
            first = states[0]
            return first.new_zeros(len(first), self.channels, *first.shape[2:])

        paths = {int(name): partial(module, states[int(name)]) for name, module in self.inputs.items()}
        x = _masked_sum(paths, inputs, nothing)
        return _masked_sum({int(n): partial(module, x) for n, module in self.operations.items()}, operations, nothing)


class ChoiceBlockNetwork(nn.Module):
    """Stem of `channels` filters, equal cells, pool, classifier; calling it gives logits [B, classes].

    Images are halved and filters doubled before the cells at a third and at two thirds. `only`: build that
    architecture alone, with ordinary batch normalisation (then no second argument is needed); else the one-shot model,
    with ghost batches of `ghost` images. Raises UserError for a string of another space.
    """

    def __init__(
        self,
        space: ChoiceBlockSpace,
        *,
        channels: int,
        cells: int,
        classes: int,
        in_channels: int = 3,
        ghost: int = GHOST,
        only: ArchitectureString | None = None,
    ) -> None:
        super().__init__()
        self.space, self.ghost = space, ghost
        norm: Norm = partial(GhostNorm, ghost=ghost) if only is None else nn.BatchNorm2d
        self.only = only
        built = [None] * space.blocks if only is None else list(space.cell(only.string))
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        widths = (channels, channels)
        self.cells = nn.ModuleList()
        self.reductions = reduction_cells(cells) if cells >= 3 else ()
        for index in range(cells):
            channels = 2 * channels if index in self.reductions else channels
            self.cells.append(
                nn.ModuleList(
                    ChoiceBlock((*widths, *[channels] * i), channels, norm, built[i]) for i in range(space.blocks)
                )
            )
            widths = (widths[1], space.blocks * channels)
        self.norm = norm(widths[1])
        self.classifier = nn.Linear(widths[1], classes)

    def forward(self, x: Tensor, architecture: ArchitectureString | PathMasks | None = None) -> Tensor:
        """x [B, in_channels, H, W]. `architecture`: the masks of a training step, or one architecture to evaluate.

        Raises ValueError when the ghost batches of the masks are no equal parts of the batch.
        """
        return self.after_stem(self.stem(x), architecture)

    def after_stem(self, x: Tensor, architecture: ArchitectureString | PathMasks | None = None) -> Tensor:
        """The rest of `forward`, from the stem's output, which is the same for all architectures."""
        masks = (
            PathMasks.of(self.space, architecture.string)
            if isinstance(architecture, ArchitectureString)
            else architecture
        )
        if masks is None and self.only is None:
            raise UserError("a one-shot model needs an architecture or the masks of its paths")
        groups = 1 if masks is None else len(masks.inputs[0])
        if groups > 1 and len(x) != groups * self.ghost:
            raise ValueError(f"{groups} ghost batches of {self.ghost} images are not a batch of {len(x)}")
        all_built = [None] * self.space.blocks
        s0 = s1 = x
        for index, cell in enumerate(self.cells):
            if index in self.reductions:
                s0, s1 = (F.avg_pool2d(s, 2, ceil_mode=True) for s in (s0, s1))
            states = [s0, s1]
            of_blocks = (all_built, all_built) if masks is None else (masks.inputs, masks.operations)
            for block, inputs, operations in zip(cell, *of_blocks, strict=True):
                states.append(block(states, inputs, operations))
            s0, s1 = s1, torch.cat(states[2:], dim=1)
        return self.classifier(F.adaptive_avg_pool2d(F.relu(self.norm(s1)), 1).flatten(1))

    def usage(self, masks: PathMasks) -> Iterator[tuple[nn.Parameter, float]]:
        """Each parameter with the share of ghost batches whose architecture has its path; 1 outside the blocks."""
        for name, parameter in self.named_parameters():
            share = 1.0
            if name.startswith("cells."):
                _, _, block, kind, path, *_ = name.split(".")
                share = float(getattr(masks, kind)[int(block)][:, int(path)].float().mean())
            yield parameter, share
