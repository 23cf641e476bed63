"""A layer that learns which of its branches to use: mixed_sum and gumbel_softmax in an own nn.Module.

python examples/branches.py
"""

from __future__ import annotations

import torch
from side_by_side import side_by_side
from torch import Tensor, nn

from fastnas import gumbel_softmax, mixed_sum


class Branches(nn.Module):
    """Eight ways to process an image, mixed by learned weights; `hard` samples a single one instead."""

    def __init__(self, channels: int, branches: int = 8) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(branches, channels, 1, 1))
        self.shift = nn.Parameter(torch.randn(branches, channels, 1, 1))
        self.logits = nn.Parameter(torch.zeros(branches))

    def branches(self, x: Tensor) -> list[Tensor]:
        return [torch.addcmul(shift, x, scale) for scale, shift in zip(self.scale, self.shift, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        return mixed_sum(self.branches(x), self.logits.softmax(0))

    def forward_plain(self, x: Tensor) -> Tensor:
        return sum(w * branch for w, branch in zip(self.logits.softmax(0), self.branches(x), strict=True))

    def forward_sampled(self, x: Tensor, step: int, *, tau: float = 1.0, hard: bool = False) -> Tensor:
        """Another mixture each step, the same one for the same step on every machine."""
        return mixed_sum(self.branches(x), gumbel_softmax(self.logits, tau, seed=step, hard=hard))


def main() -> float:
    torch.manual_seed(0)
    layer, x = Branches(16), torch.randn(64, 16, 32, 32)
    outputs = [output.detach().requires_grad_() for output in layer.branches(x)]
    weights = layer.logits.detach().softmax(0).requires_grad_()
    difference = side_by_side(
        "weighted sum of 8 branches",
        lambda: sum(w * output for w, output in zip(weights, outputs, strict=True)),
        lambda: mixed_sum(outputs, weights),
        [weights, *outputs],
    )
    leaves = list(layer.parameters())
    whole = side_by_side("the whole layer", lambda: layer.forward_plain(x), lambda: layer(x), leaves)

    optimizer = torch.optim.Adam([layer.logits], lr=0.2)
    target = layer.branches(x)[5].detach()
    for step in range(60):
        loss = (layer.forward_sampled(x, step, tau=0.5) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"learned to choose branch {int(layer.logits.argmax())} (the target is branch 5)")
    return max(difference, whole)


if __name__ == "__main__":
    main()
