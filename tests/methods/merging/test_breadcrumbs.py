"""Model Breadcrumbs against a sort in plain Python, in each dialect."""

import pytest
import torch

from fulgurite.methods.merging.breadcrumbs import Breadcrumbs
from fulgurite.methods.merging.trimming import trim
from fulgurite.methods.selection import SMALL


def slow_band(row, first, last):
    """Entries at these places of the order by falling magnitude, the first of equal ones first."""
    order = sorted(range(len(row)), key=lambda j: (-abs(row[j]), j))
    kept = set(order[first:last])
    return [value if j in kept else 0.0 for j, value in enumerate(row)]


def trimmed(merger, tau):
    return merger([{"x": tau}], {"x": torch.zeros_like(tau)})["x"]


def draw(*shape):
    return torch.randint(-6, 7, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.85, 0.3), (1.0, 0.1), (0.01, 0.0), (0.0, 0.2)])
def test_a_band_of_exactly_the_density_stays(density, gamma):
    tau, settings = draw(9, 11), {"lam": 1.0}
    keep = max(int(density * 99), 1) if density else 0
    top = min(int(gamma * 99), 99 - keep)
    expected = torch.tensor(slow_band(tau.flatten().tolist(), top, top + keep)).view(9, 11)
    assert torch.equal(trimmed(Breadcrumbs(density, gamma, **settings), tau), expected)
    keep = max(int(density * 11), 1) if density else 0
    top = min(int(gamma * 11), 11 - keep)
    expected = torch.tensor([slow_band(row, top, top + keep) for row in tau.tolist()])
    assert torch.equal(trimmed(Breadcrumbs(density, gamma, "row", **settings), tau), expected)


def test_the_official_masks_follow_each_other_within_rows():
    tau = draw(8, 20)
    for keep_first, first, last in ((False, 3, 3 + 12), (True, 3, 12)):
        merger = Breadcrumbs(0.6, 0.15, keep_first=keep_first, dialect="official", lam=1.0)
        assert torch.equal(trimmed(merger, tau), torch.tensor([slow_band(row, first, last) for row in tau.tolist()]))
    for scope in ("row", "tensor"):
        merger = Breadcrumbs(0.1, 0.5, scope, keep_first=True, dialect="official", lam=1.0)
        assert not trimmed(merger, tau).any()
    assert trimmed(merger, torch.tensor(2.0)) == 2


def test_mergekit_keeps_the_floor_and_ties_adds_up():
    tau = draw(60)
    expected = torch.tensor(slow_band(tau.tolist(), 6, 6 + 30))
    assert torch.equal(trimmed(Breadcrumbs(0.5, 0.1, dialect="mergekit"), tau), expected)
    assert not trimmed(Breadcrumbs(0.5, dialect="mergekit"), torch.tensor(2.0)).any()
    assert trimmed(Breadcrumbs(0.5, lam=1.0), torch.tensor(2.0)) == 2
    twice = Breadcrumbs(0.5, 0.1, then="ties", dialect="mergekit")([{"x": tau}] * 2, {"x": torch.zeros(60)})["x"]
    assert torch.equal(twice, 2 * expected)


def test_no_outliers_is_magnitude_pruning_also_of_many_entries():
    tau = torch.randn(SMALL + 9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(trimmed(Breadcrumbs(0.3, 0.0, lam=1.0), tau), trim(tau, 0.3))
    kept = trimmed(Breadcrumbs(0.3, 0.2, lam=1.0), tau)
    assert kept.count_nonzero() == int(0.3 * len(tau))
    assert torch.equal(kept, trim(tau, (int(0.2 * len(tau)) + int(0.3 * len(tau)) + 0.5) / len(tau)) - trim(tau, 0.2))


def test_l1_and_settings_of_every_expert(base, experts):
    tau = draw(50)
    merged = trimmed(Breadcrumbs(0.4, 0.1, rescale="l1", lam=1.0), tau)
    torch.testing.assert_close(merged.abs().sum(), tau.abs().sum(), rtol=1e-5, atol=0)
    own = Breadcrumbs([1.0, 0.0, 0.0], lam=1.0)(experts, base)
    assert torch.equal(own["embed.weight"], experts[0]["embed.weight"])
    with pytest.raises(ValueError, match="gamma has 2 values for 3 models"):
        Breadcrumbs(gamma=[0.1, 0.2])(experts, base)


def test_defaults_and_bad_settings():
    found = [
        (b.density, b.scope, b.combine.lam, b.combine.aggregate)
        for b in (Breadcrumbs(dialect=dialect) for dialect in ("none", "official", "mergekit"))
    ]
    assert found == [(0.9, "tensor", 0.3, "mean"), (0.9, "row", 0.3, "mean"), (1.0, "tensor", 1.0, "sum")]
    with pytest.raises(ValueError, match="keep_first is an order of the official dialect"):
        Breadcrumbs(keep_first=True)
    with pytest.raises(ValueError, match="gamma lies between 0 and 1"):
        Breadcrumbs(gamma=-0.1)
