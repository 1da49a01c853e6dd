"""Arcee Fusion against softmax and quartiles in plain Python."""

import math

import pytest
import torch

from fulgurite.methods.merging.arcee_fusion import ArceeFusion
from fulgurite.methods.merging.plan import Operands
from fulgurite.methods.selection import SMALL


def softmax(row):
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total + 1e-8 for v in row]


def slow_importances(expert, base):
    out = []
    for new, old in zip(expert, base):
        p, q = softmax(new), softmax(old)
        divergence = max(sum(a * math.log(a / b) for a, b in zip(p, q)), 0.0)
        out += [abs(a - b) * divergence for a, b in zip(new, old)]
    return out


@pytest.mark.parametrize("shape", [(50,), (13, 9), (3, 4, 5), ()])
def test_entries_above_the_threshold_are_taken(shape):
    generator = torch.Generator().manual_seed(4)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    expert = base + torch.randn(shape, generator=generator, dtype=torch.float64) ** 3
    columns = shape[-1] if shape else 1
    found = slow_importances(expert.view(-1, columns).tolist(), base.view(-1, columns).tolist())
    first, median, third = (sorted(found)[int(q * (len(found) - 1))] for q in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (third - first)
    taken = torch.tensor([value >= threshold for value in found]).view(shape)
    assert taken.any()
    merged = ArceeFusion()([{"x": expert}], {"x": base})["x"]
    assert torch.equal(merged, torch.where(taken, expert, base))
    assert ArceeFusion().threshold(Operands("x", [base, expert], True)) == pytest.approx(threshold, rel=1e-5)


def test_large_tensors_have_exact_quartiles_too():
    rows = SMALL // 50 + 20
    base = torch.zeros(rows, 50)
    expert = torch.randn(rows, 50, generator=torch.Generator().manual_seed(5))
    p = expert.double().softmax(1) + 1e-8
    found = expert.abs().double() * (p * (p / (1 / 50 + 1e-8)).log()).sum(1, keepdim=True)
    ordered = found.flatten().sort().values
    first, median, third = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    taken = found >= median + 1.5 * (third - first)
    merged = ArceeFusion()([{"x": expert}], {"x": base})["x"]
    assert torch.equal(merged, torch.where(taken, expert, base))


def test_several_models_are_refused(base, experts):
    with pytest.raises(ValueError, match="ArceeFusion merges one model into its base, got 3"):
        ArceeFusion()(experts, base)
