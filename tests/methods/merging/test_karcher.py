"""The Karcher mean against what defines it: a minimum of squared angles, and SLERP for two models."""

import pytest
import torch

from fulgurite.methods.merging.karcher import Karcher
from fulgurite.methods.merging.slerp import Slerp


def draw(num, *shape, seed=0):
    return torch.randn(num, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def merge(x, weights=None, **options):
    return Karcher(**options)([{"x": v} for v in x], weights=weights)["x"]


def cost(direction, x, weights):
    units, direction = x / x.norm(dim=1, keepdim=True), direction / direction.norm()
    return float((torch.tensor(weights).double() * (units @ direction).clamp(-1, 1).acos().square()).sum())


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 2.0, 0.5]])
def test_no_direction_nearby_has_smaller_angles(weights):
    x = draw(3, 8) + 0.7 * draw(1, 8, seed=1)
    merged = merge(x, weights, max_iter=100, tol=1e-12)
    least = cost(merged, x, weights)
    for seed in range(50):
        step = draw(1, 8, seed=10 + seed)[0]
        assert cost(merged + 1e-3 * merged.norm() * step, x, weights) > least
    lengths = (torch.tensor(weights).double() * x.norm(dim=1)).sum() / sum(weights)
    torch.testing.assert_close(merged.norm(), lengths)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.7])
def test_two_of_equal_length_are_slerp(t):
    x = draw(2, 30)
    x = x / x.norm(dim=1, keepdim=True)
    expected = Slerp(t)([{"x": v} for v in x])["x"]
    torch.testing.assert_close(merge(x, [1 - t, t], max_iter=100, tol=1e-12), expected)


def test_turning_all_models_turns_the_mean():
    x = draw(4, 9) + draw(1, 9, seed=2)
    turn = torch.linalg.qr(draw(1, 9, 9, seed=3)[0]).Q
    torch.testing.assert_close(merge(x @ turn), merge(x) @ turn)


def test_fewer_steps_are_less_exact():
    x = draw(3, 8)
    exact = merge(x, max_iter=200, tol=1e-13)
    off = [float((merge(x, max_iter=steps) - exact).norm()) for steps in (1, 3, 10)]
    assert off[0] > off[1] > off[2]


def test_parallel_opposite_and_zero_models_are_finite():
    x, zero = draw(1, 10)[0], torch.zeros(10).double()
    torch.testing.assert_close(merge([x, 2 * x, 3 * x]), 2 * x)
    torch.testing.assert_close(merge([x, -x]), x)
    torch.testing.assert_close(merge([x, zero]), x / 2)
    assert torch.equal(merge([zero, zero]), zero)
