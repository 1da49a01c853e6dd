"""Element-wise rules on LoRA tensors against loops over their entries."""

import pytest
import torch

from fulgurite.methods.merging.lora_factors import Combination, of_factors

WEIGHTS = [1.0, 0.5, -2.0]


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 8, generator=generator) for _ in WEIGHTS]


@pytest.mark.parametrize("vote", ["total", "frequency"])
def test_the_elected_mean_entry_by_entry(vote, tensors):
    tensors[0][0, 0], tensors[1][0, 0], tensors[2][0, 0] = 1.0, -1.0, 0.0  # a vote that ends at zero
    merged = Combination("ties", 1.0, vote)(tensors, WEIGHTS, "q")
    for i in range(5):
        for j in range(8):
            values = [float(t[i, j]) for t in tensors]
            ballot = sum(values) if vote == "total" else sum((v > 0) - (v < 0) for v in values)
            kept = [w * v for v, w in zip(values, WEIGHTS) if v != 0 and (v > 0) == (ballot >= 0)]
            assert merged[i, j].item() == pytest.approx(sum(kept) / max(len(kept), 1), rel=1e-5, abs=1e-6)


def test_pruning_keeps_the_share_of_each_tensor(tensors):
    merged = Combination("magnitude_prune", 0.3)(tensors, WEIGHTS, "q")
    expected = torch.zeros(40)
    for tensor, weight in zip(tensors, WEIGHTS):
        chosen = sorted(range(40), key=lambda i: -abs(float(tensor.flatten()[i])))[:12]
        expected[chosen] += weight * tensor.flatten()[chosen]
    torch.testing.assert_close(merged.flatten(), expected)


def test_thinning_is_unbiased_and_its_survivors_are_scaled(tensors):
    expected = sum(w * t for w, t in zip(WEIGHTS, tensors))
    merges = torch.stack([Combination("dare_linear", 0.4, seed=s)(tensors, WEIGHTS, "q") for s in range(3000)])
    error = (merges.mean(0) - expected) / (merges.std(0) / 3000**0.5)
    assert error.abs().max() < 4.5
    one = Combination("dare_linear", 0.4)(tensors[:1], [1.0], "q")
    kept = one != 0
    torch.testing.assert_close(one[kept], tensors[0][kept] / 0.4)
    many = Combination("dare_linear", 0.4)([torch.ones(200, 200)], [1.0], "q")
    assert abs((many != 0).double().mean() - 0.4) < 4 * (0.24 / 40_000) ** 0.5


def test_masks_depend_on_seed_place_and_number_only(tensors):
    def merged(seed=0, name="q", given=tensors):
        return Combination("dare_ties", 0.5, seed=seed)(given, WEIGHTS[: len(given)], name)

    assert torch.equal(merged(), merged())
    assert not torch.equal(merged(), merged(seed=1))
    assert not torch.equal(merged(), merged(name="v"))
    same = Combination("dare_linear", 0.5)([torch.ones(9, 9)] * 2, [1.0, 1.0], "q")
    assert set(same.flatten().tolist()) == {0.0, 2.0, 4.0}


def test_factors_carry_the_root_of_the_share_and_the_sign_on_one():
    down, up = torch.ones(1, 2), torch.full((3, 1), 2.0)
    a, b = of_factors([down], [up], [-4.0], Combination("linear"), "q")
    assert torch.equal(a, -2 * down)
    assert torch.equal(b, 2 * up)
    assert torch.equal(b @ a, -4 * up @ down)
