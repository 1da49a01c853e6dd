"""SCE against loops over coordinates."""

import pytest
import torch

from fulgurite.methods.merging.sce import Sce
from fulgurite.methods.selection import SMALL


def slow_sce(taus, topk, floor):
    """tau* of flat task vectors."""
    columns, num = list(zip(*taus)), len(taus)
    variances = [sum((v - sum(c) / num) ** 2 for v in c) / num for c in columns]
    keep = int(topk * sum(v > 0 for v in variances))
    kept = (
        set(sorted(range(len(columns)), key=lambda j: (-variances[j], j))[:keep]) if topk < 1 else range(len(columns))
    )
    taus = [[v if j in kept else 0.0 for j, v in enumerate(tau)] for tau in taus]
    squares = [sum(v * v for v in tau) / len(tau) for tau in taus]
    total = sum(squares)
    weights = [1 / num] * num if total < floor or not total else [square / total for square in squares]
    merged = []
    for column in zip(*taus):
        plus = sum(column) >= 0
        agree = [(w, v) for w, v in zip(weights, column) if (v > 0 if plus else v < 0)]
        merged.append(sum(w * v for w, v in agree) / max(sum(w for w, _ in agree), 1e-6))
    return torch.tensor(merged, dtype=torch.float64)


@pytest.mark.parametrize("topk", [1.0, 0.4, 0.0])
@pytest.mark.parametrize(("scale", "floor"), [(1.0, 1e-6), (1e-4, 1e-6), (1e-4, 0.0)])
def test_select_calculate_erase(topk, scale, floor):
    taus = torch.randint(-3, 4, (4, 70), generator=torch.Generator().manual_seed(3)).double() * scale
    taus[1] *= 2
    taus[3] *= 1e-4
    taus[:, 10:20] = 0
    taus[:3, 60:] = 0
    merged = Sce(topk, floor)([{"x": tau} for tau in taus], {"x": torch.zeros(70).double()})["x"]
    torch.testing.assert_close(merged, slow_sce(taus.tolist(), topk, floor), rtol=1e-6, atol=1e-12)


def test_selection_in_large_tensors():
    taus = torch.randn(3, SMALL + 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    merged = Sce(0.1)([{"x": tau} for tau in taus], {"x": torch.zeros(SMALL + 7).double()})["x"]
    chosen = taus.var(0, unbiased=False).topk(int(0.1 * (SMALL + 7))).indices
    assert set(merged.nonzero().flatten().tolist()) == set(chosen.tolist())


def test_what_it_cannot_take_is_refused(base, experts):
    with pytest.raises(ValueError, match="Sce weighs its models by itself"):
        Sce()(experts, base, [1.0, 2.0, 1.0])
    with pytest.raises(ValueError, match="topk lies between 0 and 1"):
        Sce(1.5)
