"""DELLA against ranks counted one by one."""

import pytest
import torch

from fulgurite.methods.merging.della import Della
from fulgurite.methods.merging.linear import TaskArithmetic
from fulgurite.methods.merging.row_ranks import by_rank
from fulgurite.methods.random import uniform


def slow_probabilities(row, density, epsilon):
    """p of every entry of one row; of equal magnitudes the one further right has the lower rank."""
    out = []
    for j, value in enumerate(row):
        rank = sum(abs(v) < abs(value) or (abs(v) == abs(value) and k > j) for k, v in enumerate(row))
        share = rank / (len(row) - 1) if len(row) > 1 else 0.5
        out.append(density - epsilon + 2 * epsilon * share)
    return out


@pytest.mark.parametrize("shape", [(), (1,), (40,), (7, 30), (3, 4, 5)])
def test_every_entry_is_kept_with_the_probability_of_its_rank(shape):
    tau = torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(1)).float()
    rows = tau.view(-1, shape[-1] if shape else 1).tolist()
    p = torch.tensor([slow_probabilities(row, 0.6, 0.2) for row in rows]).view(shape)
    drawn = uniform(9, "della", 0, "x", tau.numel()).view(shape)
    base, settings = {"x": torch.zeros(shape)}, {"then": "task_arithmetic", "lam": 1.0, "seed": 9}
    merged = Della(0.6, 0.2, **settings)([{"x": tau}], base)["x"]
    torch.testing.assert_close(merged, torch.where(drawn < p, tau / p, 0), rtol=1e-6, atol=0)
    plain = Della(0.6, 0.2, "none", **settings)([{"x": tau}], base)["x"]
    assert torch.equal(plain, torch.where(drawn < p, tau, 0))


def test_ranks_of_rows_are_those_of_a_stable_sort():
    values = torch.randn(5, 300, generator=torch.Generator().manual_seed(2)).mul(9).round()
    order = values.abs().sort(descending=True, stable=True).indices
    expected = torch.empty(5, 300).scatter_(1, order, torch.arange(299.0, -1, -1).expand(5, -1))
    assert torch.equal(by_rank(values, torch.arange(300.0)), expected)


def test_the_mean_over_seeds_is_task_arithmetic_and_large_entries_stay_more_often():
    tau = torch.linspace(0.2, 3, 12).mul(torch.tensor([1.0, -1.0]).repeat(6))
    base = {"x": torch.zeros(12)}
    merges = [Della(0.5, 0.3, then="task_arithmetic", seed=s)([{"x": tau}], base)["x"] for s in range(1500)]
    merges = torch.stack(merges)
    expected = TaskArithmetic(1.1)([{"x": tau}], base)["x"]
    assert ((merges.mean(0) - expected).abs() < 4 * merges.std(0) / 1500**0.5).all()
    kept = (merges != 0).float().mean(0)
    torch.testing.assert_close(kept, torch.linspace(0.2, 0.8, 12), rtol=0, atol=4 * 0.5 / 1500**0.5)


def test_l1_gives_each_tensor_its_sum_of_magnitudes_back():
    tau = torch.randn(30, 20, generator=torch.Generator().manual_seed(3))
    merged = Della(0.4, dialect="mergekit", then="task_arithmetic")([{"x": tau}], {"x": torch.zeros(30, 20)})["x"]
    torch.testing.assert_close(merged.abs().sum(), tau.abs().sum(), rtol=1e-5, atol=0)


def test_every_expert_has_its_own_settings(base, experts):
    merged = Della([1.0, 0.0, 0.0], [0.9, 0.3, 0.9], lam=1.0)(experts, base)
    assert torch.equal(merged["embed.weight"], experts[0]["embed.weight"])
    with pytest.raises(ValueError, match="epsilon has 2 values for 3 models"):
        Della(0.5, [0.1, 0.2])(experts, base)


def test_defaults_and_bad_settings():
    ours, theirs = Della(), Della(dialect="mergekit")
    assert (ours.density, ours.epsilon, ours.combine.lam, ours.rescale) == (0.7, 0.07, 1.1, "inverse_probability")
    assert (theirs.density, theirs.epsilon, theirs.combine.lam, theirs.rescale) == (1.0, 0.15, 1.0, "l1")
    for density, epsilon in ((0.9, 0.1), (0.1, 0.1), ([0.5, 0.95], 0.1)):
        with pytest.raises(ValueError, match="lower epsilon"):
            Della(density, epsilon)
    with pytest.raises(ValueError, match="density lies between 0 and 1"):
        Della(1.2)
