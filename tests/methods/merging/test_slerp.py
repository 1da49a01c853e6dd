"""SLERP against quaternion-style closed forms, entry by entry."""

import math

import pytest
import torch

from fulgurite.methods.merging.plan import Operands
from fulgurite.methods.merging.slerp import Slerp, combine, gram, total_gram


def by_hand(a, b, t):
    """The formula on Python floats."""
    a, b = a.flatten().tolist(), b.flatten().tolist()
    lengths = [math.sqrt(math.fsum(x * x for x in v)) for v in (a, b)]
    cosine = math.fsum(x * y for x, y in zip(a, b)) / (lengths[0] * lengths[1])
    angle = math.acos(cosine)
    first, second = (1 - t, t) if abs(cosine) > 0.9995 else (math.sin((1 - t) * angle), math.sin(t * angle))
    scale = 1 if abs(cosine) > 0.9995 else math.sin(angle)
    return torch.tensor([(first * x + second * y) / scale for x, y in zip(a, b)])


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_is_the_formula(t, experts):
    far = {n: torch.roll(v, 1, -1) if v.dim() else -v for n, v in experts[1].items()}
    far["bn.num_batches_tracked"], far["position_ids"] = torch.tensor(7), torch.arange(5)
    for other in (experts[1], far):
        merged = Slerp(t)([experts[0], other])
        for name in ("embed.weight", "conv.weight", "block.0.mlp.bias"):
            torch.testing.assert_close(merged[name].flatten(), by_hand(experts[0][name], other[name], t))


def test_ends_are_exact_and_sides_swap(experts):
    a, b = experts[:2]
    for t, end in ((0.0, a), (1.0, b)):
        merged = Slerp(t)([a, b])
        assert all(torch.equal(merged[n], end[n]) for n in end)
    forth, back = Slerp(0.3)([a, b]), Slerp(0.7)([b, a])
    assert all(torch.allclose(forth[n], back[n], atol=1e-6) for n in a)


def test_equal_lengths_stay():
    a, b = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).div_(3)
    a, b = a / a.norm(), b / b.norm()
    for t in (0.2, 0.5, 0.9):
        assert Slerp(t)([{"x": a}, {"x": b}])["x"].norm() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 2.0, -1.0, 0.0])
def test_parallel_antiparallel_and_zero_are_on_the_line(scale):
    a = torch.tensor([1.0, -2.0, 3.0])
    merged = Slerp(0.25)([{"x": a}, {"x": a * scale}])["x"]
    expected = a * (0.75 + 0.25 * scale) if scale else a * math.sin(0.75 * math.pi / 2)
    torch.testing.assert_close(merged, expected)


def test_the_share_comes_from_t_or_weights_and_reaches_statistics(experts):
    by_t, by_weights = Slerp(0.75)(experts[:2]), Slerp()(experts[:2], weights=[1, 3])
    assert all(torch.equal(by_t[n], by_weights[n]) for n in by_t)
    expected = 0.25 * experts[0]["bn.running_var"] + 0.75 * experts[1]["bn.running_var"]
    torch.testing.assert_close(by_t["bn.running_var"], expected)
    with pytest.raises(ValueError, match="give one of them"):
        Slerp(0.75)(experts[:2], weights=[1, 3])
    with pytest.raises(ValueError, match="merges 2 models, got 3"):
        Slerp()(experts)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_inner_products_do_not_depend_on_pieces(size):
    x = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(1))
    origin = x.mean(0)
    expected = torch.einsum("irc,jrc->rij", (x - origin).double(), (x - origin).double())
    torch.testing.assert_close(gram(list(x), origin), expected, rtol=1e-6, atol=1e-6)
    pieces = total_gram(Operands("x", [origin, *x], True, size=size), True)
    torch.testing.assert_close(pieces, expected.sum(0, keepdim=True), rtol=1e-6, atol=1e-6)


def test_a_sum_of_task_vectors_starts_at_the_base():
    x = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(1))
    factors = torch.rand(5, 2, dtype=torch.float64)
    expected = x[2] + sum(factors[:, i, None].float() * (x[i] - x[2]) for i in (0, 1))
    torch.testing.assert_close(combine(factors, [x[0], x[1]], x[2]), expected)
