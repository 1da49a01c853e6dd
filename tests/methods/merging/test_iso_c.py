"""Iso-C: equal singular values, the same nuclear norm, and the published SVD form."""

import pytest
import torch

from fulgurite.methods.merging.iso_c import IsoC


def taus(base, experts, name):
    return [e[name] - base[name] for e in experts]


@pytest.mark.parametrize("solver", ["svd", "eigh", "newton_schulz"])
def test_is_the_form_with_an_svd(solver, base, experts):
    merged = IsoC(solver=solver)(experts, base, [1.0, 2.0, 0.5])
    for name in ("embed.weight", "block.0.attn.weight", "head.weight"):
        total = sum(w * t.double() for w, t in zip((1.0, 2.0, 0.5), taus(base, experts, name)))
        u, s, v = torch.linalg.svd(total, full_matrices=False)
        torch.testing.assert_close(merged[name].double(), base[name] + s.mean() * (u @ v), rtol=0, atol=1e-5)


def test_singular_values_are_equal_and_their_sum_stays(base, experts):
    merged = IsoC()(experts, base)
    for name in ("block.0.mlp.weight", "head.weight"):
        values = torch.linalg.svdvals(merged[name] - base[name])
        total = torch.linalg.svdvals(sum(taus(base, experts, name)))
        torch.testing.assert_close(values, values.mean().expand_as(values), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values.sum(), total.sum(), rtol=1e-5, atol=1e-5)


def test_the_rest_and_excluded_matrices_are_means(base, experts):
    merged = IsoC(lam=0.5, exclude=["head", r"^embed"])(experts, base)
    for name in ("head.weight", "embed.weight", "conv.weight", "scale", "block.0.mlp.bias"):
        torch.testing.assert_close(merged[name], base[name] + 0.5 * sum(taus(base, experts, name)) / 3)
    assert not torch.allclose(merged["block.0.mlp.weight"], base["block.0.mlp.weight"], atol=1e-3)


def test_task_vectors_that_cancel_change_no_matrix(base, experts):
    merged = IsoC()([experts[0], experts[0]], base, [1.0, -1.0])
    assert torch.equal(merged["head.weight"], base["head.weight"])
