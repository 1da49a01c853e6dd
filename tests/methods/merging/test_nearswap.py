"""NearSwap against its formula, entry by entry."""

import pytest
import torch

from fulgurite.methods.merging.nearswap import NearSwap


def test_near_entries_are_swapped_and_others_move_by_t():
    change = torch.tensor([0.0, 1e-7, -1e-7, 0.01, 0.02, -0.05, 3.0]).double()
    base = torch.linspace(-2, 2, 7).double()
    expected = [b + min(0.02 / max(abs(c), 1e-6), 1) * c for b, c in zip(base.tolist(), change.tolist())]
    merged = NearSwap(0.02)([{"x": base + change}], {"x": base})["x"]
    torch.testing.assert_close(merged, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_near_models_come_back_to_the_bit_and_t_zero_is_the_base(base, experts):
    assert torch.equal(NearSwap(10.0)(experts[:1], base)["embed.weight"], experts[0]["embed.weight"])
    assert torch.equal(NearSwap(0.0)(experts[:1], base)["embed.weight"], base["embed.weight"])


def test_what_it_cannot_take_is_refused(base, experts):
    with pytest.raises(ValueError, match="NearSwap merges one model into its base, got 2"):
        NearSwap(0.1)(experts[:2], base)
    with pytest.raises(ValueError, match=r"leave out the weight 0\.5"):
        NearSwap(0.1)(experts[:1], base, [0.5])
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="t is a distance of at least 0"):
            NearSwap(wrong)
