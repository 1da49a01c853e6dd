"""The Fisher-weighted average against its formula, entry by entry in Python."""

import pytest
import torch

from fulgurite.methods.merging.fisher import Fisher
from fulgurite.methods.merging.linear import Average

WEIGHTS = [1.0, 2.0, 0.5]
MEASURED = ("embed.weight", "block.0.mlp.weight", "scale")


@pytest.fixture
def fishers(experts):
    """Squares from 1e-12 to 1, so that the floor of 1e-6 cuts about half of them."""
    generator = torch.Generator().manual_seed(3)
    return [{n: 10 ** (-12 * torch.rand(e[n].shape, generator=generator)) for n in MEASURED} for e in experts]


@pytest.mark.parametrize("favor_target", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("floor", [1e-6, 0.0])
def test_it_is_the_mean_weighted_by_fisher(favor_target, normalize, floor, experts, fishers):
    merged = Fisher(favor_target, floor, normalize).use(fishers)(experts, weights=WEIGHTS)
    coefficients = list(WEIGHTS)
    if normalize:
        squares = [sum(v**2 for t in f.values() for v in t.flatten().tolist()) for f in fishers]
        coefficients = [w / s**0.5 for w, s in zip(WEIGHTS, squares)]
    for name in MEASURED:
        for place in range(experts[0][name].numel()):
            above = below = 0.0
            for i, (expert, fisher, c) in enumerate(zip(experts, fishers, coefficients)):
                value = fisher[name].flatten()[place].item()
                if i == 0 or not favor_target:
                    value = max(value, floor)
                above += c * value * expert[name].flatten()[place].item()
                below += c * value
            assert merged[name].flatten()[place].item() == pytest.approx(above / below, rel=1e-6, abs=1e-7)


def test_tensors_without_fisher_are_averaged(experts, fishers):
    merged, mean = Fisher().use(fishers)(experts, weights=WEIGHTS), Average()(experts, weights=WEIGHTS)
    for name in set(mean) - set(MEASURED):
        assert torch.equal(merged[name], mean[name])
    assert not torch.equal(merged["embed.weight"], mean["embed.weight"])


def test_equal_fishers_average_and_a_large_one_wins(experts, fishers):
    mean = Average()(experts)["embed.weight"]
    merged = Fisher(floor=0.0).use([fishers[1]] * 3)(experts)
    torch.testing.assert_close(merged["embed.weight"], mean, rtol=1e-6, atol=1e-6)
    large = [fishers[0], {n: f + 1e12 for n, f in fishers[1].items()}, fishers[2]]
    merged = Fisher(normalize=False).use(large)(experts)
    torch.testing.assert_close(merged["embed.weight"], experts[1]["embed.weight"], rtol=1e-6, atol=1e-6)


def test_where_no_donor_knows_anything_the_target_stays(experts, fishers):
    for fisher in fishers:
        fisher["embed.weight"][2] = 0
    merged = Fisher().use(fishers)(experts)["embed.weight"][2]
    torch.testing.assert_close(merged, experts[0]["embed.weight"][2], rtol=1e-7, atol=0)
    unfloored = Fisher(floor=0.0).use(fishers)(experts)["embed.weight"][2]
    torch.testing.assert_close(unfloored, Average()(experts)["embed.weight"][2])


def test_one_expert_comes_back_to_the_bit_and_order_does_not_count(experts, fishers):
    alone = Fisher().use(fishers[:1])(experts[:1])
    assert all(torch.equal(alone[n], experts[0][n]) for n in alone)
    turn = [2, 0, 1]
    merger = Fisher(favor_target=False)
    a = merger.use(fishers)(experts, weights=WEIGHTS)
    b = merger.use([fishers[i] for i in turn])([experts[i] for i in turn], weights=[WEIGHTS[i] for i in turn])
    assert all(torch.allclose(a[n], b[n], rtol=1e-6, atol=1e-6) for n in a if a[n].is_floating_point())


def test_what_does_not_fit_is_refused(experts, fishers):
    with pytest.raises(ValueError, match="statistics of 0 models for 3 experts"):
        Fisher()(experts)
    with pytest.raises(ValueError, match=r"lack: \['module.scale'\]"):
        Fisher().use([{**f, "module.scale": torch.ones(())} for f in fishers])(experts)
    with pytest.raises(ValueError, match=r"expert 1 name different tensors: \['scale'\]"):
        Fisher().use([fishers[0], {n: f for n, f in fishers[1].items() if n != "scale"}, fishers[2]])(experts)
    with pytest.raises(ValueError, match=r"scale: a Fisher of \(1,\) for a tensor of \(\)"):
        Fisher().use([{**f, "scale": torch.ones(1)} for f in fishers])(experts)
    with pytest.raises(ValueError, match="scale: the Fisher of expert 0 has entries that are not finite"):
        Fisher().use([{**f, "scale": torch.tensor(torch.nan)} for f in fishers])(experts)
    with pytest.raises(ValueError, match="expert 0 has entries that are negative or NaN"):
        Fisher().use([{**f, "scale": torch.tensor(-1.0)} for f in fishers])(experts)
    with pytest.raises(ValueError, match="floor"):
        Fisher(floor=-1.0)
