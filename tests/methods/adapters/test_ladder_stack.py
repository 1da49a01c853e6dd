"""The side network of one stack: its parts, its start, and what it mixes."""

import pytest
import torch
from torch import nn

from fulgurite.methods.adapters.ladder_stack import SideStack, mixed, projected, reset_module, scheduled_mu

D, R, N = 12, 3, 4


class Family:
    """Linear side blocks that note how they were made; a norm."""

    width, dropout, parts = D, 0.0, ()

    def make(self, number, cache_index, reduction, first):
        block = nn.Linear(D // reduction, D // reduction).requires_grad_(False)
        block.made = (number, cache_index, reduction, first)
        return block

    def norm(self, reduction):
        return nn.LayerNorm(D // reduction)


def test_a_stack_has_blocks_and_maps_where_they_are_kept_and_a_gate_for_every_block():
    stack = SideStack(Family(), N, [1, 3], R, "learnable")
    assert [block.made for block in stack.blocks.values()] == [(1, N + 1, R, True), (3, N + 3, R, False)]
    assert {name: (m.in_features, m.out_features) for name, m in stack.downs.items()} == {"1": (D, 4), "3": (D, 4)}
    assert stack.gates.shape == (N,)
    assert all(p.requires_grad for p in stack.parameters())
    alone = SideStack(Family(), N, [1, 3], R, "one")
    assert len(alone.downs) == 0
    assert alone.gates is None


def test_a_stack_starts_as_layers_do_with_gates_of_0():
    stack = SideStack(Family(), N, [0], R, "learnable")
    for parameter in stack.parameters():
        nn.init.constant_(parameter, 9.0)
    stack.reset_parameters(torch.Generator().manual_seed(0))
    first = [p.clone() for p in stack.parameters()]
    assert not stack.gates.any()
    assert torch.equal(stack.norm.weight, torch.ones(4))
    assert not stack.norm.bias.any()
    for layer in (stack.first_down, *stack.downs.values()):
        bound = D**-0.5
        assert bound * 0.8 < layer.weight.abs().max() < bound
        assert 0 < layer.bias.abs().max() < bound
    stack.reset_parameters(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(first, stack.parameters()))


def test_an_embedding_starts_as_wide_as_its_entries_are_many():
    table = nn.Embedding(400, 50)
    reset_module(table, torch.Generator().manual_seed(0))
    assert table.weight.std().item() == pytest.approx(1 / 20, rel=0.05)


def test_mixing_weighs_the_side_state_with_mu_and_pads_behind_the_text():
    generator = torch.Generator().manual_seed(0)
    side, ladder = (torch.randn(2, n, 3, generator=generator) for n in (5, 2))
    whole = torch.cat([ladder, torch.zeros(2, 3, 3)], dim=1)
    torch.testing.assert_close(mixed(side, ladder, torch.tensor(0.2)), 0.2 * side + 0.8 * whole)
    torch.testing.assert_close(mixed(side, ladder, None), side + whole)
    half = mixed(side.bfloat16(), ladder, torch.sigmoid(torch.zeros(())))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, ((side + whole) / 2).bfloat16(), rtol=0.05, atol=0.01)


def test_a_map_computes_in_its_own_precision_or_that_of_autocast():
    layer, x = nn.Linear(3, 2), torch.ones(1, 3)
    assert torch.equal(projected(layer, x.bfloat16()), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert projected(layer, x.bfloat16()).dtype == torch.bfloat16


def test_mu_of_the_epochs():
    assert [scheduled_mu("schedule-linear", e, 5) for e in range(5)] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert scheduled_mu("schedule-linear", 0, 1) == 0.1
    found = [scheduled_mu("schedule-hyperbolic", e, None) for e in (0, 1, 3, 20)]
    assert found == pytest.approx([0.9, 0.5, 0.25, 0.1])
    for epoch, epochs in ((5, 5), (-1, 5), (0, None)):
        with pytest.raises(ValueError, match=f"no value for epoch {epoch}"):
            scheduled_mu("schedule-linear", epoch, epochs)
