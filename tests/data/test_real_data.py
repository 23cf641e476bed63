from __future__ import annotations

import io
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from fastnas.data import load

ROOT = Path(os.environ.get("FASTNAS_TEST_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
ARCHIVE = ROOT / "cifar10" / "cifar10_jpeg92.npz"


@pytest.mark.skipif(not ARCHIVE.is_file(), reason=f"needs {ARCHIVE} (set FASTNAS_TEST_DATA)")
def test_real_cifar10_as_npz(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="needs Pillow")
    with np.load(ARCHIVE) as archive:
        sheet = np.asarray(image_module.open(io.BytesIO(archive["jpeg_5"].tobytes())))
        labels = archive["labels"][50000:]
    images = sheet.reshape(100, 32, 100, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
    np.savez(tmp_path / "cifar.npz", x=images, y=labels)

    data = load(f"npz:{tmp_path / 'cifar.npz'}", cutout=16)
    assert (data.num_classes, data.channels, data.image_size) == (10, 3, 32)
    assert (data.train_size, data.search_size, data.test_size) == (4000, 4000, 2000)
    for split in (data.train, data.search, data.test):
        assert (torch.bincount(split.labels) == len(split) // 10).all()
    # Real photographs: the published statistics of the training set, to within what 8,000 other images allow.
    torch.testing.assert_close(torch.tensor(data.mean), torch.tensor([0.4914, 0.4822, 0.4465]), rtol=0, atol=0.01)
    torch.testing.assert_close(torch.tensor(data.std), torch.tensor([0.2470, 0.2435, 0.2616]), rtol=0, atol=0.01)
    x = torch.cat([x for x, _ in islice(data.train.stream(256, seed=0).from_step(0), len(data.train) // 256)])
    assert x.shape[1:] == (3, 32, 32) and torch.isfinite(x).all()
    assert x.mean().abs() < 0.3 and 0.6 < x.std() < 1.2
