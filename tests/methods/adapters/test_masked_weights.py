"""Which tensors of a model's modules a mask counts through."""

import pytest
import torch
from torch import nn

from fulgurite.methods.adapters.base import SpanSite
from fulgurite.methods.adapters.masked_weights import MaskedWeight, masked_weights


class Owner(nn.Module):
    """Has a tensor under two names, and one of whole numbers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))
        self.same = self.weight
        self.steps = nn.Parameter(torch.zeros(4, dtype=torch.long), requires_grad=False)
        self.head = nn.Linear(3, 2)
        self.head.weight = self.weight


def test_a_tensor_counts_once_whatever_names_and_modules_it_has():
    model = Owner()
    sites = [SpanSite(name, model.get_submodule(name), "parameters") for name in ("", "head")]
    shared = MaskedWeight("weight", (2, 3), 0, ((0, "weight"), (0, "same"), (1, "weight")))
    assert masked_weights(sites) == [shared, MaskedWeight("head.bias", (2,), 6, ((1, "bias"),))]
    assert shared.size == 6


def test_attention_owns_the_projection_that_it_does_not_call():
    found = masked_weights([SpanSite("a", nn.MultiheadAttention(4, 2), "parameters")])
    assert [(weight.name, weight.offset) for weight in found] == [
        ("a.in_proj_weight", 0),
        ("a.in_proj_bias", 48),
        ("a.out_proj.weight", 60),
        ("a.out_proj.bias", 76),
    ]


def test_sites_without_tensors_are_refused():
    with pytest.raises(ValueError, match="none of 2 sites owns a parameter"):
        masked_weights([SpanSite(name, nn.Tanh(), "parameters") for name in "ab"])
