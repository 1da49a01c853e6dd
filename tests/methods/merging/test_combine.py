"""The last step of thinning methods against loops over coordinates."""

import pytest
import torch

from fulgurite.methods.merging.combine import Combine

BASE = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, 1.5], dtype=torch.float64)
# Coordinates where all agree, none is there, votes cancel, and weights decide.
DELTAS = torch.tensor([[1, 0, 2, 1, -1, 0.5], [2, 0, -2, -3, 1, 0], [3, 0, 0, 1, 0.25, 0]], dtype=torch.float64)


def slow(deltas, weights, then, lam, aggregate, as_peft):
    out = []
    for column in zip(*deltas):
        if then != "ties":
            total = sum(w * d for w, d in zip(weights, column))
            divisor = sum(weights) if then == "average" and sum(weights) else 1
        else:
            heard = [1.0] * len(weights) if as_peft else weights
            plus = sum(h * d for h, d in zip(heard, column)) >= 0
            agree = [(w, d) for w, h, d in zip(weights, heard, column) if (h * d > 0 if plus else h * d < 0)]
            total = sum(w * d for w, d in agree)
            divisor = 1 if aggregate == "sum" else (len(agree) if as_peft else sum(abs(w) for w, _ in agree)) or 1
        out.append(lam * total / divisor)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("then", ["task_arithmetic", "average", "ties"])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 0.5, -2.0], [1.0, 0.0, -1.0]])
def test_every_rule_is_its_definition(then, weights):
    for aggregate, as_peft in (("mean", False), ("sum", False), ("mean", True)):
        combine = Combine(then, 0.7, aggregate, as_peft)
        merged = combine(BASE, list(BASE + DELTAS), list(DELTAS.clone()), weights)
        expected = BASE + slow(DELTAS.tolist(), weights, then, 0.7, aggregate, as_peft)
        torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)


def test_another_rule_is_refused():
    with pytest.raises(ValueError, match="then is task_arithmetic, average or ties, got 'linear'"):
        Combine("linear")
