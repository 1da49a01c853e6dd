"""Weighted means and sums against their formulas, entry by entry in Python."""

import pytest
import torch

from fulgurite.methods.merging.linear import Average, TaskArithmetic

WEIGHTS = [1.0, 2.0, 3.5]


def test_average_is_the_weighted_mean(experts):
    merged, total = Average()(experts, weights=WEIGHTS), sum(WEIGHTS)
    summed = Average(normalize=False)(experts, weights=WEIGHTS)
    for name in ("embed.weight", "scale", "conv.weight"):
        expected = sum(w * e[name].double() for w, e in zip(WEIGHTS, experts))
        torch.testing.assert_close(merged[name].double(), expected / total, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(summed[name].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, -0.5])
@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic_adds_task_vectors(lam, normalize, base, experts):
    merged = TaskArithmetic(lam, normalize)(experts, base, WEIGHTS)
    scale = lam / sum(WEIGHTS) if normalize else lam
    for name in ("embed.weight", "scale", "block.0.mlp.bias"):
        taus = [e[name].double() - base[name].double() for e in experts]
        expected = base[name].double() + scale * sum(w * t for w, t in zip(WEIGHTS, taus))
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_average_is_task_arithmetic_at_one_over_their_number(base, experts):
    a, b = Average()(experts), TaskArithmetic(1 / 3)(experts, base)
    assert all(torch.allclose(a[n], b[n], atol=1e-6) for n in a)


def test_negation_undoes_addition(base, experts):
    added = TaskArithmetic(0.4)(experts, base)
    tau = [{n: base[n] + (added[n] - base[n]) for n in base}]
    back = TaskArithmetic(1.0)(tau, added, [-1.0])
    for name in ("embed.weight", "scale"):
        torch.testing.assert_close(back[name] - added[name], -(tau[0][name] - added[name]), atol=1e-6, rtol=0)
    forgotten = TaskArithmetic(1.0)(experts[:1], base, [-1.0])
    torch.testing.assert_close(forgotten["scale"], 2 * base["scale"] - experts[0]["scale"])


def test_weights_that_cancel_are_a_plain_sum(base, experts):
    merged = TaskArithmetic(1.0, normalize=True)(experts[:2], base, [1.0, -1.0])
    expected = base["embed.weight"] + experts[0]["embed.weight"] - experts[1]["embed.weight"]
    torch.testing.assert_close(merged["embed.weight"], expected)


def test_a_mean_has_no_weights_that_cancel(experts):
    with pytest.raises(ValueError, match=r"\[1.0, -1.0\] cancel: set normalize to false"):
        Average()(experts[:2], weights=[1, -1])
    difference = Average(normalize=False)(experts[:2], weights=[1, -1])
    assert torch.equal(difference["scale"], experts[0]["scale"] - experts[1]["scale"])


def test_taking_a_model_away_leaves_variances_positive(base, experts):
    merged = TaskArithmetic(1.0)(experts, base, [1.0, 1.0, -3.0])
    shares = torch.tensor([0.2, 0.2, 0.6])
    expected = sum(share * expert["bn.running_var"] for share, expert in zip(shares, experts))
    torch.testing.assert_close(merged["bn.running_var"], expected)
