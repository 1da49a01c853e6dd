"""RAM and RAM+ against loops over coordinates."""

import pytest
import torch

from fulgurite.methods.merging.ram import Ram


@pytest.mark.parametrize("plus", [False, True])
def test_shared_changes_are_averaged_and_unique_ones_kept(plus):
    generator = torch.Generator().manual_seed(0)
    taus = torch.randn(3, 80, generator=generator).double() * (torch.rand(3, 80, generator=generator) < 0.4)
    taus[:, :5] = 0.05
    columns = list(zip(*taus.tolist()))
    counts = [sum(abs(value) > 0.1 for value in column) for column in columns]
    factors = []
    for tau in taus.tolist():
        unique = sum(count == 1 for value, count in zip(tau, counts) if abs(value) > 0.1)
        shared = sum(count > 1 for value, count in zip(tau, counts) if abs(value) > 0.1)
        factors.append(1 + 0.5 * min(shared / unique, 1.5) if plus else 1.0)
    assert not plus or len(set(factors)) > 1
    expected = []
    for column, count in zip(columns, counts):
        parts = [(f, value) for f, value in zip(factors, column) if abs(value) > 0.1]
        expected.append(2 + sum((f if count == 1 else 1 / count) * value for f, value in parts))
    merger = Ram(0.1, plus, r=0.5, alpha=1.5)
    merged = merger([{"x": 2 + tau} for tau in taus], {"x": torch.full((80,), 2.0).double()})["x"]
    torch.testing.assert_close(merged, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_models_that_share_all_have_nothing_to_make_up_for(base, experts):
    merged = Ram(epsilon=0.0, plus=True)([experts[0]] * 2, base)
    assert torch.equal(merged["embed.weight"], experts[0]["embed.weight"])


def test_what_it_cannot_take_is_refused(base, experts):
    with pytest.raises(ValueError, match="Ram weighs its models by itself; leave out the weights"):
        Ram()(experts, base, [1.0, 2.0, 1.0])
    with pytest.raises(ValueError, match="epsilon is a size"):
        Ram(-1.0)
