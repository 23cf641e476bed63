"""Channel shuffle in torchvision's ShuffleNetV2: partial_shuffle concatenates and shuffles in one pass.

The block keeps torchvision's parameters and their names, so its published weights load as they are. It keeps the layout
too: in channels_last, where the convolutions are faster, torchvision's shuffle gives back NCHW, and what comes next
converts it.

    python examples/shufflenet_block.py
"""

from __future__ import annotations

import torch
from side_by_side import side_by_side
from torch import Tensor
from torchvision.models import ShuffleNetV2
from torchvision.models.shufflenetv2 import InvertedResidual, channel_shuffle

from fastnas import partial_shuffle


class FusedInvertedResidual(InvertedResidual):
    """torchvision's block; only what happens after its two branches differs."""

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            kept, processed = x.chunk(2, dim=1)
            return partial_shuffle([kept], None, self.branch2(processed))
        return partial_shuffle([self.branch1(x)], None, self.branch2(x))


def main() -> float:
    torch.manual_seed(0)
    sizes = ([2, 2, 2], [24, 48, 96, 192, 256])
    plain = ShuffleNetV2(*sizes, num_classes=10).eval()
    fused = ShuffleNetV2(*sizes, num_classes=10, inverted_residual=FusedInvertedResidual).eval()
    fused.load_state_dict(plain.state_dict())
    for network in (plain, fused):
        network.to(memory_format=torch.channels_last)
    x = torch.randn(16, 3, 96, 96).to(memory_format=torch.channels_last).requires_grad_()
    difference = side_by_side("ShuffleNetV2, channels_last", lambda: plain(x), lambda: fused(x), [x])

    halves = [torch.randn(64, 58, 28, 28, requires_grad=True) for _ in range(2)]
    alone = side_by_side(
        "concatenation and shuffle alone",
        lambda: channel_shuffle(torch.cat(halves, dim=1), 2),
        lambda: partial_shuffle([halves[0]], None, halves[1]),
        halves,
    )
    return max(difference, alone)


if __name__ == "__main__":
    main()
