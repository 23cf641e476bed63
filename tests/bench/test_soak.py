"""A short soak: once its buffers are made, a search step leaves nothing behind."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("name", ["darts", "parsec"])
def test_a_step_leaves_no_tensor_behind(name: str) -> None:
    import bench.soak as soak

    row = soak.soak(name, 30, settled_after=10, batch_size=4)
    # Sampled children differ in size; one step may hold a few tensors more than another, 20 steps may not.
    assert row["tensors_end"] <= row["tensors_settled"] + 50
    assert row["tensor_bytes_end"] <= 1.2 * row["tensor_bytes_settled"]
    assert row["resident_end"] <= row["resident_settled"] + 16 * 2**20
