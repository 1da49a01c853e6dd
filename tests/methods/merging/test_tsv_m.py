"""TSV-M against its SVD form, and where its answer is known."""

import pytest
import torch

from fulgurite.methods.merging.tsv_m import TsvM, tsv_m


def draw(num, *shape, seed=0):
    return list(torch.randn(num, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float())


@pytest.mark.parametrize("whiten", ["svd", "eigh", "newton_schulz"])
@pytest.mark.parametrize("shape", [(40, 15), (15, 40), (18, 18)])
def test_is_the_form_with_svds(whiten, shape):
    taus = draw(3, *shape)
    num, parts = min(shape) // 3, [torch.linalg.svd(t.double(), full_matrices=False) for t in taus]
    left = torch.cat([u[:, :num] for u, _, _ in parts], 1)
    values = torch.cat([s[:num] for _, s, _ in parts])
    right = torch.cat([v[:num] for _, _, v in parts])
    (p, _, q), (x, _, y) = (torch.linalg.svd(m, full_matrices=False) for m in (left, right))
    merged = TsvM(lam=0.7, whiten=whiten)([{"w": t} for t in taus], {"w": torch.zeros(shape)})["w"]
    torch.testing.assert_close(merged.double(), 0.7 * p @ q @ values.diag() @ x @ y, rtol=0, atol=2e-5)


def test_orthogonal_tasks_are_summed():
    left = torch.linalg.qr(draw(1, 30, 12)[0]).Q.split(4, 1)
    right = torch.linalg.qr(draw(1, 12, 12, seed=1)[0]).Q.split(4, 1)
    taus = [u @ torch.diag(torch.rand(4) + 0.5) @ v.T for u, v in zip(left, right)]
    torch.testing.assert_close(tsv_m(taus), sum(taus), atol=1e-5, rtol=0)


def test_rank_is_no_more_than_each_task_may_have():
    values = torch.linalg.svdvals(tsv_m(draw(4, 20, 10)))
    assert (values > 1e-4).sum() == 8


def test_more_tasks_than_rank_one_task_and_idle_tasks():
    taus = draw(5, 7, 3)
    assert tsv_m(taus).abs().max() > 0.1
    torch.testing.assert_close(tsv_m(taus[:1]), taus[0], atol=1e-5, rtol=0)
    idle = tsv_m([taus[0], torch.zeros(7, 3), torch.zeros(7, 3)])
    u, s, v = torch.linalg.svd(taus[0])
    torch.testing.assert_close(idle, s[0] * u[:, :1] @ v[:1], atol=1e-5, rtol=0)
