"""What a training from scratch adds to a plain loop: its layout and precision, averaged weights."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastnas import _backends
from fastnas.engine.fused_conv import fuse_convolutions
from fastnas.errors import UserError

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Arithmetic:
    """How the steps of a training are computed; the parameters are float32 in any case.

    `fused`: ReLU, convolution and normalisation as one step where float32 is kept (`fused_conv`); `channels_last`: the
    layout of maps and weights; `precision`: what autocast computes in, one of PRECISIONS.
    """

    device: torch.device
    fused: bool
    channels_last: bool
    precision: str

    @classmethod
    def choose(
        cls, device: torch.device, *, fused: bool | None, channels_last: bool | None, precision: str
    ) -> Arithmetic:
        """None stands for what has measured faster: both on the CPU, `fused` with the compiled kernels
        (bench/results/retrain_step.json). Raises UserError for bfloat16 on a GPU without it."""
        if precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise UserError("this GPU does not compute in bfloat16: leave --precision at float32")
        on_cpu = device.type == "cpu"
        compiled = on_cpu and _backends.choose("conv_stage", "cpu") == "native"
        return cls(
            device,
            compiled if fused is None else fused,
            on_cpu if channels_last is None else channels_last,
            precision,
        )

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def prepare(self, network: nn.Module) -> nn.Module:
        """`network` on the device, in the layout, with fused convolutions if asked for; changed in place."""
        if self.fused and self.precision == "float32":
            fuse_convolutions(network)
        return network.to(self.device, memory_format=self.memory_format)

    def images(self, x: Tensor) -> Tensor:
        """A batch [B, C, H, W] in the layout."""
        return x.contiguous(memory_format=self.memory_format)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of a forward pass."""
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


class WeightAverage:
    """An exponential moving average of all weights and buffers: after step t, from 0,

    average = d average + (1 - d) weights,   d = min(decay, (1 + t) / (10 + t))

    so that the first, random weights are soon forgotten. Counters are copied.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Take in the weights after step `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = [(self.state[name], tensor) for name, tensor in network.state_dict().items()]
        floats = [(mine, new) for mine, new in pairs if mine.is_floating_point()]
        torch._foreach_lerp_([mine for mine, _ in floats], [new for _, new in floats], 1 - decay)
        for mine, new in pairs:
            if not mine.is_floating_point():
                mine.copy_(new)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved `state`; raises KeyError or RuntimeError when it is of another network."""
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
