"""KnOTS on factors against the same steps on dense changes, with TIES by a loop over a flat vector."""

import pytest
import torch

from fulgurite.methods.merging.knots import MergeKnOTS, common_basis
from fulgurite.methods.merging.linear import Average, TaskArithmetic
from fulgurite.methods.merging.lora import Factors
from fulgurite.methods.merging.ties import Ties

SHAPES = {"q": (10, 12), "v": (6, 10)}  # (out, in)


def adapter(seed, rank=3, scale=2.0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    return {site: Factors(draw(rank, width), draw(out, rank), scale) for site, (out, width) in SHAPES.items()}


@pytest.fixture
def adapters():
    return [adapter(1), adapter(2, rank=2, scale=0.5), adapter(3, scale=1.5)]


def dense(f):
    return f.scale * f.up.double() @ f.down.double()


def trimmed_and_elected(rows, density):
    """TIES of (T, n), equal weights, mean."""
    kept = torch.zeros_like(rows)
    for row, out in zip(rows, kept):
        chosen = row.abs().argsort(descending=True)[: int(density * len(row))]
        out[chosen] = row[chosen]
    sign = kept.sum(0).sign()
    agree = (kept * sign > 0).double()
    return (kept * agree).sum(0) / agree.sum(0).clamp(min=1)


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_the_same_on_dense_changes(density, adapters):
    bases, parts = {}, {}
    for site in SHAPES:
        u, s, vh = torch.linalg.svd(torch.cat([dense(a[site]) for a in adapters], dim=1), full_matrices=False)
        k = int((s > 1e-5).sum())
        bases[site] = u[:, :k]
        parts[site] = torch.stack((s[:k, None] * vh[:k]).chunk(3, dim=1))  # (T, k, in)
    flat = torch.cat([part.flatten(1) for part in parts.values()], dim=1)
    merged = trimmed_and_elected(flat, density).split([part[0].numel() for part in parts.values()])
    out = MergeKnOTS(Ties(density=density))(adapters)
    for (site, part), values in zip(parts.items(), merged):
        expected = 0.6 * bases[site] @ values.view_as(part[0])
        torch.testing.assert_close(dense(out[site]), expected, rtol=1e-4, atol=1e-4)
        assert out[site].rank == len(part[0])


def test_sums_are_sums_of_the_changes(adapters):
    weights = [1.0, 0.5, -0.25]
    for site, f in MergeKnOTS(TaskArithmetic(1.0), lam=1.0)(adapters, weights).items():
        expected = sum(w * dense(a[site]) for a, w in zip(adapters, weights))
        torch.testing.assert_close(dense(f), expected, rtol=1e-4, atol=1e-4)
    for site, f in MergeKnOTS(Average(), lam=2.0)(adapters).items():
        torch.testing.assert_close(dense(f), 2 / 3 * sum(dense(a[site]) for a in adapters), rtol=1e-4, atol=1e-4)


def test_one_adapter_and_equal_ones_come_back():
    given = adapter(1)
    for many in ([given], [given] * 3):
        for site, f in MergeKnOTS(Ties(density=1.0), lam=1.0)(many).items():
            torch.testing.assert_close(dense(f), dense(given[site]), rtol=1e-5, atol=1e-5)
            assert f.rank == 3


def test_the_basis_is_orthonormal_and_gives_each_change_back(adapters):
    u, parts = common_basis([a["q"] for a in adapters])
    torch.testing.assert_close(u.T @ u, torch.eye(8, dtype=torch.float64))
    for part, a in zip(parts, adapters):
        torch.testing.assert_close(u @ part, dense(a["q"]))
    gram = sum(part @ part.T for part in parts)
    torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=1e-9, atol=1e-9)


def test_changes_of_nothing_stay_nothing_and_misfits_are_refused(adapters):
    zero = {site: f._replace(up=torch.zeros_like(f.up)) for site, f in adapters[0].items()}
    for f in MergeKnOTS()([zero, zero]).values():
        assert (dense(f) == 0).all()
    del adapters[1]["v"]
    with pytest.raises(ValueError, match="v: not in adapter 1"):
        MergeKnOTS()(adapters)
