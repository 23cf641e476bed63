"""One edge of a supernet: all candidate operations, weighted and summed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastnas.nn.candidates import build_candidate
from fastnas.ops import mixed_sum, partial_shuffle


class MixedOp(nn.Module):
    """The mixed operation of one edge: y = sum_o w_o o(x) (DARTS, eq. 2), on C/K channels (PC-DARTS, eq. 1).

    With `k` > 1 only the first C/K channels pass the candidates; the others bypass them (2x2 max-pooled where
    the edge has stride 2), and the result is channel-shuffled with `k` groups. With random `channels` in the
    call, those take the place of the first C/K and nothing is shuffled.

    `candidates`: names of registered candidate operations; `channels`: C, divisible by `k`.
    """

    def __init__(self, candidates: Sequence[str], channels: int, stride: int, *, k: int = 1) -> None:
        super().__init__()
        if k < 1 or channels % k:
            raise ValueError(f"partial channels need k to divide the channels, got k={k} and {channels} channels")
        self.k = k
        self.stride = stride
        self.selected = channels // k
        self.candidates = nn.ModuleList(
            build_candidate(name, self.selected, stride, searching=True) for name in candidates
        )

    def forward(
        self, x: Tensor, weights: Tensor, channels: Tensor | None = None, active: Sequence[int] | None = None
    ) -> Tensor:
        """x [B, C, H, W], weights [O], channels int64 [C/K] or None -> [B, C, ceil(H/s), ceil(W/s)].

        `active`: the candidates that are run, the others counting as weight 0; needs k = 1. None runs all.
        """
        if active is not None:
            return mixed_sum([self.candidates[index](x) for index in active], weights[list(active)])
        if self.k == 1:
            return mixed_sum([candidate(x) for candidate in self.candidates], weights)
        if channels is None:
            selected, bypass = x.split([self.selected, x.shape[1] - self.selected], dim=1)
        else:
            selected, bypass = x.index_select(1, channels), x
        outputs = [candidate(selected) for candidate in self.candidates]
        return partial_shuffle(outputs, weights, bypass, stride=self.stride, channels=channels)

    def forward_candidate(self, x: Tensor, index: int) -> Tensor:
        """Run candidate `index` alone on the whole of x: a sampled path. Needs k = 1."""
        return self.candidates[index](x)
