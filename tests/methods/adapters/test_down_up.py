"""The bottleneck beside a residual, written out."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fulgurite.methods.adapters.down_up import DownUp, activation_of, inner_width, input_width
from fulgurite.methods.adapters.mixing import Mixture


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Plain(DownUp):
    """Starts with what it is given."""

    def reset_parameters(self, generator=None):
        pass


def adapter(seed=0, enters=5, **options):
    own = Plain(nn.Linear(enters, 3), nn.Linear(3, 4), **options)
    for number, parameter in enumerate(own.parameters()):
        parameter.data = drawn(*parameter.shape, seed=10 * seed + number)
    return own


def norm(x, layer):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def test_it_is_the_equation():
    own = adapter(scale=0.5, activation="gelu_new", norm_before=5, norm_after=4, parallel=True)
    x, y = drawn(2, 5, seed=1), drawn(2, 4, seed=2)
    hidden = norm(x, own.norm_before) @ own.down.weight.T + own.down.bias
    hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    change = norm(hidden @ own.up.weight.T + own.up.bias, own.norm_after)
    torch.testing.assert_close(own(x, y), y + 0.5 * change)
    serial = adapter(enters=4)
    hidden = (y @ serial.down.weight.T + serial.down.bias).relu()
    torch.testing.assert_close(serial(x, y), y + hidden @ serial.up.weight.T + serial.up.bias)


def test_dropout_is_behind_the_activation_and_only_while_training():
    """All of it is dropped, also where sets are mixed: what is left is the bias behind it."""
    experts, y = [adapter(seed, enters=4, dropout=1.0) for seed in range(2)], drawn(2, 4)
    mixture = Mixture.of(torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    bias = mixture.weights @ torch.stack([own.up.bias for own in experts])
    torch.testing.assert_close(experts[0](y, y), y + experts[0].up.bias)
    torch.testing.assert_close(DownUp.mix(experts, mixture, y, y), y + bias)
    for own in experts:
        own.eval()
    assert not torch.allclose(experts[0](y, y), y + experts[0].up.bias)
    assert not torch.allclose(DownUp.mix(experts, mixture, y, y), y + bias)


@pytest.mark.parametrize("grad", [True, False])
def test_a_mixture_has_the_scale_and_the_type_of_what_it_changes(grad):
    experts = [adapter(seed, enters=4, scale=0.5, norm_after=4, parallel=True) for seed in range(2)]
    x, y, mixture = drawn(2, 4, seed=5), drawn(2, 4).bfloat16(), Mixture.of(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        found, expected = DownUp.mix(experts, mixture, x, y), experts[1](x, y)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_activations_and_widths():
    x = drawn(9)
    for name, expected in (("relu", x.clamp(min=0)), ("gelu", F.gelu(x))):
        assert torch.equal(activation_of(name)(x), expected)
    assert [inner_width(24, reduction) for reduction in (1, 5, 24)] == [24, 4, 1]
    for reduction in (0, 25):
        with pytest.raises(ValueError, match=f"reduction={reduction} leaves no inner unit of 24; take 1 to 24"):
            inner_width(24, reduction)
    assert [input_width(site) for site in (7, nn.Linear(5, 4), nn.LayerNorm(6))] == [7, 5, 6]
