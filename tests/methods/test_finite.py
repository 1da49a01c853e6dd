import pytest
import torch

from fulgurite.methods.finite import all_finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_entry_is_seen(bad):
    x = torch.zeros(3, 4)
    assert all_finite(x)
    x[1, 2] = bad
    assert not all_finite(x)


def test_infinities_that_cancel_are_seen_and_a_sum_that_overflows_is_not_one():
    assert not all_finite(torch.tensor([float("inf"), -float("inf")]))
    assert all_finite(torch.full((4,), torch.finfo(torch.float32).max))
