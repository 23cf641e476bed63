import pytest
import torch
import torch.nn.functional as F

from fastnas.nn import MixedOp
from fastnas.spaces import DARTS_CANDIDATES


def test_is_the_weighted_sum_of_its_candidates():
    edge = MixedOp(DARTS_CANDIDATES, 4, stride=2).double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.double)
    weights = torch.randn(8, dtype=torch.double)
    expected = sum(w * candidate(x) for w, candidate in zip(weights, edge.candidates, strict=True))
    torch.testing.assert_close(edge(x, weights), expected)
    torch.testing.assert_close(edge.forward_candidate(x, 4), edge.candidates[4](x))


@pytest.mark.parametrize("stride", [1, 2])
def test_partial_channels_mix_the_first_bypass_the_rest_and_shuffle(stride):
    k, c = 4, 8
    edge = MixedOp(DARTS_CANDIDATES, c, stride, k=k).double()
    x = torch.randn(2, c, 6, 6, dtype=torch.double)
    weights = torch.randn(8, dtype=torch.double)
    mixed = sum(w * candidate(x[:, :2]) for w, candidate in zip(weights, edge.candidates, strict=True))
    bypass = x[:, 2:] if stride == 1 else F.max_pool2d(x[:, 2:], 2)
    plain = torch.cat([mixed, bypass], 1)
    expected = torch.stack([plain[:, group * (c // k) + i] for i in range(c // k) for group in range(k)], 1)
    torch.testing.assert_close(edge(x, weights), expected)


def test_random_channels_stay_in_place():
    edge = MixedOp(DARTS_CANDIDATES, 8, 1, k=4).double()
    x = torch.randn(2, 8, 6, 6, dtype=torch.double)
    weights, channels = torch.randn(8, dtype=torch.double), torch.tensor([1, 6])
    out = edge(x, weights, channels)
    mixed = sum(w * candidate(x[:, channels]) for w, candidate in zip(weights, edge.candidates, strict=True))
    torch.testing.assert_close(out[:, channels], mixed)
    rest = [0, 2, 3, 4, 5, 7]
    assert torch.equal(out[:, rest], x[:, rest])


def test_k_must_divide_the_channels():
    with pytest.raises(ValueError, match="k=3 and 8 channels"):
        MixedOp(DARTS_CANDIDATES, 8, 1, k=3)
