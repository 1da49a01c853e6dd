"""NuSLERP against SLERP of single vectors."""

import pytest
import torch

from fulgurite.methods.merging.nuslerp import NuSlerp
from fulgurite.methods.merging.slerp import Slerp


def draw(*shape, seed=0):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))


def merge(a, b, base=None, **options):
    return NuSlerp(**options)([{"x": a}, {"x": b}], None if base is None else {"x": base})["x"]


def one(a, b, t):
    """SLERP of two vectors in float64; they are far from parallel here."""
    return Slerp(t)([{"x": a.double()}, {"x": b.double()}])["x"].float()


@pytest.mark.parametrize("task_vectors", [False, True])
def test_each_vector_is_interpolated_by_itself(task_vectors):
    a, b = draw(5, 7)
    base = draw(5, 7, seed=1)[0]
    origin = base if task_vectors else torch.zeros(5, 7)
    x, y = a - origin, b - origin
    options = {"t": 0.3, "task_vectors": task_vectors}
    torch.testing.assert_close(merge(a, b, base, **options), origin + one(x, y, 0.3))
    rows = torch.stack([one(x[r], y[r], 0.3) for r in range(5)])
    torch.testing.assert_close(merge(a, b, base, flatten=False, **options), origin + rows)
    columns = torch.stack([one(x[:, c], y[:, c], 0.3) for c in range(7)], 1)
    torch.testing.assert_close(merge(a, b, base, flatten=False, dim=0, **options), origin + columns)


def test_kernels_have_vectors_along_the_last_dimension_or_the_first():
    a, b = draw(3, 2, 4, 5)
    last, first = (merge(a, b, t=0.6, flatten=False, dim=dim) for dim in (-1, 0))
    torch.testing.assert_close(last[2, 1, 3], one(a[2, 1, 3], b[2, 1, 3], 0.6))
    torch.testing.assert_close(first[:, 1, 3, 4], one(a[:, 1, 3, 4], b[:, 1, 3, 4], 0.6))


def test_small_angles_are_interpolated_on_the_arc():
    angles = torch.tensor([0.0, 0.02, 0.005], dtype=torch.float64)
    a, b, expected = torch.stack([angles.cos(), angles.sin()], 1)
    torch.testing.assert_close(merge(a, b, t=0.25), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(Slerp(0.25)([{"x": a}, {"x": b}])["x"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 3.0, -1.0])
def test_vectors_on_one_line_stay_on_it(scale):
    a = draw(1000)[0]
    merged = merge(a, a * scale, t=0.25)
    torch.testing.assert_close(merged, a * (0.75 + 0.25 * scale))


def test_the_share_comes_from_weights_and_the_ends_are_exact(base, experts):
    by_weights = NuSlerp(task_vectors=True)(experts[:2], base, [1, 3])
    by_share = NuSlerp(0.75, task_vectors=True)(experts[:2], base)
    assert all(torch.equal(by_weights[n], by_share[n]) for n in base)
    cancelled = NuSlerp()(experts[:2], weights=[1, -1])
    assert torch.equal(cancelled["embed.weight"], NuSlerp(0.5)(experts[:2])["embed.weight"])
    ends = NuSlerp(task_vectors=True)(experts[:2], base, [0, 2])
    assert all(torch.equal(ends[n], experts[1][n]) for n in base)
