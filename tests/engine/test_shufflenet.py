import pytest
import torch
from torch import nn

from fastnas.engine.networks import build_network
from fastnas.engine.shufflenet import ShuffleBlock, ShufflenetNetwork, SqueezeExcitation
from fastnas.errors import UserError
from fastnas.profiler.counts import count
from fastnas.spaces.shufflenet import SHUFFLENET_CANDIDATES, ShufflenetSpace


def images(size=32):
    return torch.randn(2, 3, size, size, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def test_the_chain_has_twenty_layers_and_four_choices():
    space = ShufflenetSpace()
    assert space.stages == (4, 4, 8, 4) and space.choices == (4,) * 20
    assert ShufflenetSpace(4).stages == (1, 1, 1, 1) and sum(ShufflenetSpace(10).stages) == 10
    for layers in (3, 6, 0):
        with pytest.raises(UserError, match="4, 5, 10"):
            ShufflenetSpace(layers)
    with pytest.raises(UserError, match="no chain of 5 layers"):
        ShufflenetSpace(5).decode((4,) * 5)


@pytest.mark.parametrize("name", SHUFFLENET_CANDIDATES)
def test_stride_one_leaves_half_of_the_channels_as_they_are(name):
    block, x = ShuffleBlock(name, 8, 8, 1, extras=True).double(), torch.randn(2, 8, 6, 6, dtype=torch.double)
    out = block(x)
    assert out.shape == x.shape
    assert torch.equal(out[:, :4], x[:, ::2])
    assert ShuffleBlock(name, 8, 12, 2, extras=True).double()(x).shape == (2, 12, 3, 3)


@pytest.mark.parametrize(
    ("name", "swish", "excited"),
    [("shuffle_3x3", 0, 0), ("shuffle_5x5", 1, 0), ("shuffle_7x7", 1, 1), ("xception_3x3", 1, 1)],
)
def test_swish_and_excitation_are_where_vaenas_has_them(name, swish, excited):
    kinds = [type(module) for module in ShuffleBlock(name, 8, 8, 1, extras=True).main]
    assert (nn.SiLU in kinds, SqueezeExcitation in kinds) == (bool(swish), bool(excited))
    plain = [type(module) for module in ShuffleBlock(name, 8, 8, 1, extras=False).main]
    assert nn.SiLU not in plain and SqueezeExcitation not in plain


def test_a_network_of_one_architecture_computes_what_the_shared_weights_do():
    torch.manual_seed(0)
    space = ShufflenetSpace(5)
    genotype = space.decode((0, 3, 1, 2, 0))
    shared = ShufflenetNetwork(space, channels=2, classes=3).double()
    alone = build_network(genotype, channels=2, cells=1, classes=3).double()
    state = {name: value for name, value in shared.state_dict().items() if name in alone.state_dict()}
    alone.load_state_dict(state)
    torch.testing.assert_close(alone(images()), shared(images(), genotype))
    with pytest.raises(UserError, match="needs an architecture"):
        shared(images())


def test_the_size_is_that_of_single_path_one_shot():
    """On ImageNet, with plain 3x3 blocks throughout, near ShuffleNetV2's 300 million multiply-adds."""
    genotype = ShufflenetSpace().decode((0,) * 20)
    with torch.device("meta"):
        network = build_network(genotype, channels=16, cells=20, classes=1000, stem="imagenet")
    counts = count(network, (3, 224, 224))
    assert 2.5e8 < counts.multiply_adds < 3.6e8 and 2.5e6 < counts.parameters < 4e6
