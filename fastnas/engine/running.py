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

    def read(self, rows: Tensor) -> Tensor:
        """Mean and variance of some rows, [len(rows), 2, C]."""
        return self._bind()[0][rows]

    @torch.no_grad()
    def update(self, rows: Tensor, stats: Tensor, count: int) -> None:
        """Let rows follow the measured mean and biased variance [len(rows), 2, C] of `count` values, as BatchNorm2d
        does."""
        if not self.norms[0].track_running_stats:
            return
        table, tracked = self._bind()
        measured = stats.clone()
        measured[:, 1] *= count / max(1, count - 1)
        tracked[rows] += 1
        rate = self.norms[0].momentum
        if rate is None:  # the plain mean of all batches
            rate = (1 / tracked[rows].to(table.dtype))[:, None, None]
        table[rows] = torch.lerp(table[rows], measured, rate)
