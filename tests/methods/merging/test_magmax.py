"""MagMax against a loop over coordinates."""

import pytest
import torch

from fulgurite.methods.merging.magmax import MagMax


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 0.5, -2.0]])
def test_the_largest_change_wins_and_the_last_of_equal_ones(weights):
    taus = torch.randint(-4, 5, (3, 60), generator=torch.Generator().manual_seed(0)).double()
    expected = []
    for column in zip(*taus.tolist()):
        best = 0.0
        for weight, value in zip(weights, column):
            best = weight * value if abs(weight * value) >= abs(best) else best
        expected.append(1 + 0.25 * best)
    merged = MagMax(0.25)([{"x": 1 + tau} for tau in taus], {"x": torch.ones(60).double()}, weights)["x"]
    assert torch.equal(merged, torch.tensor(expected, dtype=torch.float64))


def test_entries_are_their_experts_own_to_the_bit_and_order_matters_in_ties_alone(base, experts):
    merged = MagMax(1.0)(experts, base)["embed.weight"]
    own = torch.stack([e["embed.weight"] for e in experts])
    largest = (own - base["embed.weight"]).abs().argmax(0, keepdim=True)
    assert torch.equal(merged, own.gather(0, largest)[0])
    assert torch.equal(MagMax(1.0)(experts[::-1], base)["embed.weight"], merged)
    up, down, start = {"x": torch.ones(1)}, {"x": -torch.ones(1)}, {"x": torch.zeros(1)}
    assert [MagMax(1.0)(pair, start)["x"].item() for pair in ([up, down], [down, up])] == [-1, 1]
