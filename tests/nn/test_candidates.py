import pytest
import torch
from torch import nn

from fastnas.nn import build_candidate, candidate_names, register_candidate
from fastnas.nn import candidates as module
from fastnas.spaces import DARTS_CANDIDATES


@pytest.mark.parametrize("name", DARTS_CANDIDATES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1)])
@pytest.mark.parametrize("searching", [True, False])
def test_every_candidate_keeps_channels_and_divides_the_size(name, stride, size, searching):
    candidate = build_candidate(name, 4, stride, searching=searching)
    out = candidate(torch.randn(2, 4, *size))
    assert out.shape == (2, 4, *(-(-side // stride) for side in size))


@pytest.mark.parametrize("name", DARTS_CANDIDATES)
def test_searching_has_no_affine_normalisation_and_normalises_pools(name):
    norms = [m for m in build_candidate(name, 4, 2, searching=True).modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(not norm.affine for norm in norms)
    assert len(norms) == {"none": 0, "sep_conv_3x3": 2, "sep_conv_5x5": 2}.get(name, 1)


@pytest.mark.parametrize("name", DARTS_CANDIDATES)
def test_derived_networks_have_affine_normalisation_and_bare_pools(name):
    norms = [m for m in build_candidate(name, 4, 2, searching=False).modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.affine for norm in norms)
    assert not (norms and "pool" in name)


def test_none_is_zero_and_skip_is_the_input():
    x = torch.randn(1, 4, 6, 6)
    assert build_candidate("none", 4, 2, searching=True)(x).abs().max() == 0
    assert build_candidate("skip_connect", 4, 1, searching=True)(x) is x


def test_factorized_reduce_sees_even_and_odd_pixels():
    candidate = build_candidate("skip_connect", 2, 2, searching=True).double()
    with torch.no_grad():
        candidate.conv_even.weight.fill_(1)
        candidate.conv_odd.weight.fill_(1)
    candidate.norm = nn.Identity()
    x = torch.rand(1, 2, 4, 4, dtype=torch.double)
    out = candidate(x)
    assert torch.equal(out[:, 0], x.sum(1)[:, ::2, ::2])
    assert torch.equal(out[:, 1], x.sum(1)[:, 1::2, 1::2])


def test_parameter_counts_of_the_convolutions():
    counts = {
        name: sum(p.numel() for p in build_candidate(name, 16, 1, searching=True).parameters())
        for name in DARTS_CANDIDATES
    }
    assert counts["sep_conv_3x3"] == 2 * (16 * 9 + 16 * 16)
    assert counts["sep_conv_5x5"] == 2 * (16 * 25 + 16 * 16)
    assert counts["dil_conv_5x5"] == 16 * 25 + 16 * 16
    assert counts["none"] == counts["max_pool_3x3"] == 0


def test_own_candidates_can_be_registered_once(monkeypatch):
    monkeypatch.setattr(module, "_REGISTRY", dict(module._REGISTRY))

    @register_candidate("my_conv")
    def my_conv(channels, stride, searching):
        return nn.Conv2d(channels, channels, 3, stride, padding=1)

    assert "my_conv" in candidate_names()
    assert build_candidate("my_conv", 4, 2, searching=True)(torch.randn(1, 4, 8, 8)).shape == (1, 4, 4, 4)
    with pytest.raises(ValueError, match="already registered"):
        register_candidate("my_conv")(my_conv)
    with pytest.raises(ValueError, match="unknown candidate 'my_cnov'"):
        build_candidate("my_cnov", 4, 1, searching=True)
