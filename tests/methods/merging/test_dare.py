"""DARE: masks of their place, exact survivors, no bias."""

import pytest
import torch

from fulgurite.methods.merging.dare import Dare
from fulgurite.methods.merging.linear import TaskArithmetic
from fulgurite.methods.random import chosen

TAU = torch.randn(4000, generator=torch.Generator().manual_seed(0))


def thinned(merger, tau=TAU, name="x"):
    """delta of one task vector."""
    return merger([{name: tau}], {name: torch.zeros_like(tau)})[name]


@pytest.mark.parametrize("drop", [0.3, 0.9])
def test_survivors_are_divided_by_the_density_exactly(drop):
    mask = chosen(1 - drop, 5, "dare", 0, "x", 4000).bool()
    expected = torch.where(mask, TAU / (1 - drop), 0)
    assert torch.equal(thinned(Dare(drop, seed=5)), expected)
    assert abs(int(mask.sum()) - 4000 * (1 - drop)) < 4 * (4000 * drop * (1 - drop)) ** 0.5
    assert torch.equal(thinned(Dare(drop, "none", seed=5)), torch.where(mask, TAU, 0))


def test_l1_gives_each_tensor_its_sum_of_magnitudes_back():
    delta = thinned(Dare(0.8, "l1"))
    mask = delta != 0
    torch.testing.assert_close(delta.abs().sum(), TAU.abs().sum(), rtol=1e-5, atol=0)
    ratio = delta[mask] / TAU[mask]
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=1e-6, atol=0)
    assert torch.equal(thinned(Dare(0.8, "l1"), TAU * 0), TAU * 0)


def test_the_mean_over_seeds_is_task_arithmetic():
    tau = torch.linspace(-2, 2, 9)
    experts, base = [{"x": tau}, {"x": tau.flip(0) + 1}], {"x": torch.ones(9)}
    merges = torch.stack([Dare(0.5, lam=0.3, seed=seed)(experts, base, [1.0, 2.0])["x"] for seed in range(1500)])
    expected = TaskArithmetic(0.3)(experts, base, [1.0, 2.0])["x"]
    # Each merge has a variance of lam^2 sum_i w_i^2 tau_i^2 (1 - rho) / rho, at most 0.36 * 4 + 0.09 * 9.
    assert ((merges.mean(0) - expected).abs() < 4 * merges.std(0) / 1500**0.5 + 1e-6).all()
    assert (merges.std(0) > 0).sum() >= 8


def test_masks_depend_on_their_place_alone(base, experts):
    merger = Dare(0.5, seed=3)
    whole = merger(experts, base)
    name = "block.0.mlp.weight"
    assert torch.equal(merger([{name: e[name]} for e in experts], {name: base[name]})[name], whole[name])
    assert not torch.equal(Dare(0.5, seed=4)(experts, base)[name], whole[name])
    same = merger([experts[0], experts[0]], base, [1.0, -1.0])
    assert (same[name] - base[name]).abs().max() > 0.01


def test_every_expert_has_its_own_rate_and_nothing_left_changes_nothing(base, experts):
    merged = Dare([0.0, 1.0, 1.0])(experts, base)
    assert torch.equal(merged["embed.weight"], experts[0]["embed.weight"])
    assert torch.equal(Dare(1.0, then="ties")(experts, base)["embed.weight"], base["embed.weight"])
    with pytest.raises(ValueError, match="drop has 2 values for 3 models"):
        Dare([0.1, 0.2])(experts, base)


@pytest.mark.parametrize("dialect", ["none", "mergekit", "peft"])
def test_elected_merges_are_those_of_the_thinned_vectors(dialect):
    taus = torch.randn(3, 300, generator=torch.Generator().manual_seed(1)).double()
    experts, base, weights = [{"x": tau} for tau in taus], {"x": torch.zeros(300).double()}, [1.0, 0.5, 2.0]
    settings = {"drop": 0.4, "dialect": dialect, "seed": 2}
    deltas = [Dare(**settings)(experts, base, [float(i == j) for j in range(3)])["x"] for i in range(3)]
    expected = []
    for column in torch.stack(deltas, 1).tolist():
        heard = [1.0] * 3 if dialect == "peft" else weights
        plus = sum(h * d for h, d in zip(heard, column)) >= 0
        agree = [(w, d) for w, d in zip(weights, column) if (d > 0 if plus else d < 0)]
        divisor = {"none": sum(w for w, _ in agree), "mergekit": 1, "peft": len(agree)}[dialect]
        expected.append(sum(w * d for w, d in agree) / (divisor or 1))
    merged = Dare(**settings, then="ties")(experts, base, weights)["x"]
    torch.testing.assert_close(merged, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_defaults_and_bad_settings():
    assert [(Dare(dialect=d).drop, Dare(dialect=d).rescale) for d in ("none", "mergekit")] == [
        (0.5, "inverse_density"),
        (0.0, "l1"),
    ]
    with pytest.raises(ValueError, match="give drop"):
        Dare(dialect="peft")
    for wrong in (-0.1, 1.1, [0.2, 2.0], float("nan")):
        with pytest.raises(ValueError, match="drop lies between 0 and 1"):
            Dare(wrong)
