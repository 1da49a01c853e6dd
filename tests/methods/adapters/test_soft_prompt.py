"""The network of soft prompts, its start and its sizes."""

import pytest
import torch
from torch import nn

from fulgurite.methods.adapters.soft_prompt import SoftPrompt


class Place(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.out_features, self.takes_prompts = width, True


def test_prompts_are_those_of_the_equation():
    adapter = SoftPrompt(Place(4), length=3, hidden=5)
    for number, parameter in enumerate(adapter.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    first, _, last = adapter.network
    for row, vector in zip(adapter.prompts(), adapter.vectors):
        torch.testing.assert_close(row, last.weight @ torch.tanh(first.weight @ vector + first.bias) + last.bias)
    y = torch.randn(2, 6, 4)
    out = adapter(y, y)
    assert torch.equal(out[:, 3:], y)
    assert torch.equal(out[1, :3], adapter.prompts())


def test_without_a_network_the_vectors_are_the_prompts():
    adapter = SoftPrompt(Place(4), length=3, hidden=None)
    assert adapter.prompts() is adapter.vectors
    assert sum(p.numel() for p in adapter.parameters()) == 12


def test_published_numbers_of_parameters():
    with torch.device("meta"):
        one = sum(p.numel() for p in SoftPrompt(Place(768)).parameters())
    visual = 1_582_848
    assert one + visual == 2_843_936
    assert 4 * one + visual == 6_627_200


def test_start_is_small_and_repeatable():
    adapter = SoftPrompt(Place(64), length=50, hidden=40)
    adapter.reset_parameters(torch.Generator().manual_seed(3))
    first = [p.clone() for p in adapter.parameters()]
    assert adapter.vectors.std().item() == pytest.approx(0.02, rel=0.1)
    assert not adapter.network[0].bias.any()
    assert not adapter.network[2].bias.any()
    adapter.reset_parameters(torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(first, adapter.parameters()))


@pytest.mark.parametrize("options", [{"length": 0}, {"hidden": 0}])
def test_sizes_below_one_are_refused(options):
    with pytest.raises(ValueError, match="must be at least 1"):
        SoftPrompt(Place(4), **options)


def test_other_places_are_refused():
    with pytest.raises(ValueError, match="a Linear cannot have"):
        SoftPrompt(nn.Linear(4, 4))
