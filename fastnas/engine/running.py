"""Running statistics of many batch normalisations in one table, so that one call updates them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class RunningStatistics:
    """The running means and variances of `norms` as rows of `table` [n, 2, C].

    The buffers of the modules become views of the table; state_dict, loading and evaluation go on as before. Where
    something has given the modules other buffers (a move to another device, say), a new table is made of these.
    """

    def __init__(self, norms: Sequence[nn.BatchNorm2d]) -> None:
        self.norms = list(norms)
        self.row = {norm: number for number, norm in enumerate(self.norms)}
        self.eps = self.norms[0].eps if self.norms else 0.0
        self._table: Tensor | None = None
        self._tracked: Tensor | None = None

    @torch.no_grad()
    def _bind(self) -> tuple[Tensor, Tensor]:
        first, last = self.norms[0], self.norms[-1]
        table, tracked = self._table, self._tracked
        if (
            table is None
            or tracked is None
            or first.running_mean.data_ptr() != table.data_ptr()
            or last.num_batches_tracked.data_ptr() != tracked[-1].data_ptr()
        ):
            table = torch.stack([torch.stack([norm.running_mean, norm.running_var]) for norm in self.norms])
            tracked = torch.stack([norm.num_batches_tracked for norm in self.norms])
            for norm, row, count in zip(self.norms, table.unbind(), tracked.unbind(), strict=True):
                norm.running_mean, norm.running_var, norm.num_batches_tracked = row[0], row[1], count
            self._table, self._tracked = table, tracked
        return table, tracked

    def read(self, rows: Tensor | None) -> Tensor:
        """Mean and variance of some rows, [len(rows), 2, C]; of all without `rows`."""
        table, _ = self._bind()
        return table if rows is None else table[rows]

    @torch.no_grad()
    def update(self, rows: Tensor | None, stats: Tensor, count: int) -> None:
        """Let rows (all without `rows`) follow the measured mean and biased variance [len(rows), 2, C] of `count`
        values, as BatchNorm2d does. `stats` does not survive."""
        if not self.norms[0].track_running_stats:
            return
        table, tracked = self._bind()
        stats[:, 1] *= count / max(1, count - 1)
        rate = self.norms[0].momentum
        if rows is None:
            tracked += 1
            table.lerp_(stats, self._rates(tracked) if rate is None else rate)
        else:
            tracked[rows] += 1
            table[rows] = torch.lerp(table[rows], stats, self._rates(tracked[rows]) if rate is None else rate)

    def _rates(self, tracked: Tensor) -> Tensor:
        """Those that make the plain mean of all batches, [n, 1, 1]."""
        return (1 / tracked.to(self._table.dtype))[:, None, None]


@torch.no_grad()
def follow(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Let one module's running statistics follow the mean and biased variance [C] of `count` values."""
    if not norm.track_running_stats:
        return
    norm.num_batches_tracked += 1
    rate = (1 / norm.num_batches_tracked).to(mean.dtype) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean, rate)
    norm.running_var.lerp_(variance * (count / max(1, count - 1)), rate)
