from __future__ import annotations

import pytest
import torch

import fastnas
from fastnas.reference.gumbel_softmax import gumbel_softmax as reference
from fastnas.testing import DTYPES

SHAPES = [(1, 1), (28, 8), (3, 5, 7), (0, 8), (4, 0), (7,), (5, 33), (2, 1000), (300, 3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_value_and_gradient(check, shape: tuple[int, ...], dtype: torch.dtype, hard: bool) -> None:
    logits = torch.randn(shape, dtype=torch.float64).to(dtype)
    check(lambda f, x: f(x, 0.7, seed=12345, hard=hard), fastnas.gumbel_softmax, reference, [logits])


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**62 + 3, -(2**63)])
@pytest.mark.parametrize("tau", [0.05, 1.0, 16])
def test_any_seed_and_temperature(check, device, seed: int, tau: float) -> None:
    x = torch.randn(6, 5, dtype=torch.float64)
    check(lambda f, x: f(x, tau, seed=seed), fastnas.gumbel_softmax, reference, [x])
    where = {"seed": torch.tensor(seed, device=device)}
    t = torch.tensor(tau, dtype=torch.float64, device=device)
    check(lambda f, x: f(x, t, **where), fastnas.gumbel_softmax, reference, [x])


def test_rows_that_are_not_contiguous(check) -> None:
    check(lambda f, x: f(x, seed=3), fastnas.gumbel_softmax, reference, [torch.randn(5, 9).T])


def test_excluded_choices_and_nan_rows(device: torch.device) -> None:
    x = torch.randn(4, 5)
    x[1, 2], x[3, 0] = -torch.inf, torch.nan
    for hard in (False, True):
        y = fastnas.gumbel_softmax(x.to(device), seed=1, hard=hard).cpu()
        torch.testing.assert_close(y, reference(x, seed=1, hard=hard), equal_nan=True)
        assert y[1, 2] == 0
        assert y[3].isnan().all()


def test_noise_is_finite_and_as_accurate_as_the_logarithm_over_many_words(check, device) -> None:
    x = torch.zeros(32, 1024, device=device)
    check(lambda f, x: f(x, seed=7), fastnas.gumbel_softmax, reference, [x])
    assert fastnas.gumbel_softmax(x, 1e-3, seed=7).isfinite().all()
