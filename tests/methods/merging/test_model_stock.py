"""Model Stock against its formula for single vectors, and against the geometry that it comes from."""

import pytest
import torch

from fulgurite.methods.merging.model_stock import ModelStock, ratio


def merge(base, *experts, **options):
    return ModelStock(**options)([{"x": e} for e in experts], {"x": base})["x"]


def draw(num, *shape, seed=0):
    return torch.randn(num, *shape, generator=torch.Generator().manual_seed(seed))


def test_is_the_formula_for_a_tensor_and_for_filters():
    base, tau = draw(1, 6, 10)[0], draw(3, 6, 10, seed=1) + draw(1, 6, 10, seed=2)
    tensor, filters = merge(base, *(base + tau)), merge(base, *(base + tau), scope="filter")

    def expected(base, tau):
        pairs = [torch.cosine_similarity(tau[i].flatten(), tau[j].flatten(), 0) for i, j in ((0, 1), (0, 2), (1, 2))]
        c = sum(pairs) / 3
        return base + (3 * c / (1 + 2 * c)).clamp(0, 1) * tau.mean(0)

    torch.testing.assert_close(tensor, expected(base, tau), rtol=1e-5, atol=1e-5)
    rows = torch.stack([expected(base[r], tau[:, r]) for r in range(6)])
    torch.testing.assert_close(filters, rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num", [2, 4])
def test_it_is_the_point_nearest_to_the_centre_that_the_experts_scatter_around(num):
    directions = torch.linalg.qr(draw(1, 40, num + 1)[0].double()).Q.T
    centre, tau = 2 * directions[0], 2 * directions[0] + 1.5 * directions[1:]
    mean = tau.mean(0)
    torch.testing.assert_close(merge(torch.zeros(40).double(), *tau), (mean @ centre) / (mean @ mean) * mean)


@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_orthogonal_updates_give_the_base_and_equal_ones_come_back(scale):
    base = torch.tensor([1.0, 2.0, 3.0, 4.0])
    one, other = base.clone(), base.clone()
    one[0] += scale
    other[1] += scale
    torch.testing.assert_close(merge(base, one, other), base)
    assert torch.equal(merge(base, one, one), one)
    assert torch.equal(merge(base, base, base), base)


def test_opposed_updates_stop_at_the_base_unless_told():
    base, tau = torch.zeros(3), torch.tensor([1.0, 0.0, 0.0])
    one, other = tau, torch.tensor([-0.3, 0.9, 0.0])
    assert torch.equal(merge(base, one, other), base)
    c = torch.cosine_similarity(one, other, 0)
    torch.testing.assert_close(merge(base, one, other, clamp=False), 2 * c / (1 + c) * (one + other) / 2)
    pole = ratio(torch.tensor([-1.0, -0.5]).double(), 2, clamp=False)
    assert pole.tolist() == [0.0, -2.0]


def test_the_mean_angle_is_another_mean():
    base, tau = torch.zeros(30), draw(3, 30) + draw(1, 30, seed=5)
    angles = [torch.cosine_similarity(tau[i], tau[j], 0).acos() for i, j in ((0, 1), (0, 2), (1, 2))]
    c = (sum(angles) / 3).cos()
    merged = merge(base, *tau, mean="angle")
    torch.testing.assert_close(merged, 3 * c / (1 + 2 * c) * tau.mean(0), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(merged, merge(base, *tau), atol=1e-5)


def test_weights_are_refused(base, experts):
    with pytest.raises(ValueError, match="plain mean"):
        ModelStock()(experts, base, weights=[1, 2, 1])
    with pytest.raises(ValueError, match="at least 2"):
        ModelStock()(experts[:1], base)
