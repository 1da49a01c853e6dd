"""Iso-CTS against its form with full SVDs, and its limits."""

import pytest
import torch

from fulgurite.methods.merging.iso_c import iso_c
from fulgurite.methods.merging.iso_cts import IsoCts, iso_cts


def draw(num, *shape, seed=0):
    return list(torch.randn(num, *shape, generator=torch.Generator().manual_seed(seed)))


def by_definition(taus, common):
    taus = [tau.double() for tau in taus]
    rank = min(taus[0].shape)
    own = round((rank - int(rank * common)) / len(taus))
    shared = rank - len(taus) * own
    u, s, v = (part.double() for part in torch.linalg.svd(sum(taus), full_matrices=False))
    u, s, v = u[:, :shared], s[:shared], v[:shared]
    lefts, values, rights = [], [], []
    for tau in taus:
        a, b, c = torch.linalg.svd(tau - u @ u.T @ tau, full_matrices=False)
        lefts.append(a[:, :own])
        values.append(b[:own])
        rights.append(c[:own])
    left, right = torch.cat([*lefts, u], 1), torch.cat([*rights, v], 0)
    (p, _, q), (x, _, y) = (torch.linalg.svd(m, full_matrices=False) for m in (left, right))
    return torch.cat([*values, s]).mean() * p @ q @ x @ y


@pytest.mark.parametrize("solver", ["svd", "eigh", "newton_schulz"])
@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (20, 20)])
@pytest.mark.parametrize("common", [0.4, 0.8])
def test_is_the_form_with_svds(solver, shape, common):
    taus = draw(3, *shape)
    merged = iso_cts(taus, common, solver)
    torch.testing.assert_close(merged.double(), by_definition(taus, common), rtol=0, atol=5e-5)
    spread = torch.linalg.svdvals(merged)
    torch.testing.assert_close(spread, spread.mean().expand_as(spread), rtol=1e-4, atol=0)


def test_all_common_or_no_room_is_iso_c():
    taus = draw(3, 12, 7)
    torch.testing.assert_close(iso_cts(taus, 1.0), iso_c(taus), rtol=0, atol=1e-5)
    many = draw(5, 9, 3)
    assert 3 - round((3 - int(3 * 0.1)) / 5) * 5 <= 0
    torch.testing.assert_close(iso_cts(many, 0.1), iso_c(many), rtol=0, atol=1e-5)


def test_an_idle_task_does_not_count_and_cancelling_ones_change_nothing():
    taus = draw(2, 12, 9)
    torch.testing.assert_close(iso_cts([*taus, torch.zeros(12, 9)]), iso_cts(taus))
    assert not iso_cts([taus[0], -taus[0]]).any()


def test_the_share_is_checked():
    with pytest.raises(ValueError, match=r"common=1\.5"):
        IsoCts(common=1.5)
