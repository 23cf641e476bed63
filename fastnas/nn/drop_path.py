"""Per-sample drop path, as used when a derived network is trained."""

from __future__ import annotations

from torch import Tensor, nn

from fastnas.ops import drop_path


class DropPath(nn.Module):
    """Drop whole samples of a path with probability `rate` in training, and scale the rest by 1 / (1 - rate).

    `rate` is a plain attribute, so that a schedule can raise it epoch by epoch. Evaluation passes x through.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        return drop_path(x, 1.0 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
