"""Stochastic depth in a torchvision ResNet: path_dropout adds the residual and drops samples of it in one pass.

python examples/drop_path_resnet.py
"""

from __future__ import annotations

import torch
from side_by_side import side_by_side
from torch import Tensor
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock

from fastnas import path_dropout

KEEP = 0.8


class DropPathBlock(BasicBlock):
    """A residual block whose branch is dropped for whole samples in training, and scaled by 1 / keep otherwise."""

    mask: Tensor | None = None  # [B, 2]: weight of the identity (always 1) and of the branch for each sample
    plain = False

    def branch(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        if not self.training:
            return self.relu(identity + self.branch(x))
        mask = self.mask if self.mask is not None else sample_mask(len(x))
        if self.plain:
            return self.relu(identity + self.branch(x) * mask[:, 1].view(-1, 1, 1, 1))
        return self.relu(path_dropout([identity, self.branch(x)], mask))


def sample_mask(samples: int) -> Tensor:
    keep = torch.rand(samples) < KEEP
    return torch.stack([torch.ones(samples), keep / KEEP], dim=1)


def main() -> float:
    torch.manual_seed(0)
    network = ResNet(DropPathBlock, [1, 1, 1, 1], num_classes=10)
    x = torch.randn(16, 3, 64, 64)
    blocks = [module for module in network.modules() if isinstance(module, DropPathBlock)]
    for block in blocks:
        block.mask = sample_mask(len(x))  # fixed here, so that both versions drop the same samples

    def run(plain: bool) -> Tensor:
        for block in blocks:
            block.plain = plain
        return network(x)

    difference = side_by_side("ResNet", lambda: run(True), lambda: run(False), list(network.parameters()))

    identity, branch = (torch.randn(64, 64, 32, 32, requires_grad=True) for _ in range(2))
    mask = sample_mask(64)
    alone = side_by_side(
        "residual and drop path alone",
        lambda: identity + branch * mask[:, 1].view(-1, 1, 1, 1),
        lambda: path_dropout([identity, branch], mask),
        [identity, branch],
    )
    return max(difference, alone)


if __name__ == "__main__":
    main()
