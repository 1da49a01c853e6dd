"""PCB-Merging against the equations on sorted lists."""

import math

import pytest
import torch

from fulgurite.methods.merging.base import survey
from fulgurite.methods.merging.pcb import Pcb, ordered_keys, value_of_key
from fulgurite.methods.merging.plan import plan_of
from fulgurite.methods.selection import BINS, SHIFT


def sign(x):
    return (x > 0) - (x < 0)


def scaled(values):
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 0.0 for v in values]


def slow_pcb(taus, ratio, clamp, normalised, lams):
    num, count = len(taus), len(taus[0])
    sizes = []
    for tau in taus:
        ordered = sorted(map(abs, tau))
        low, high = ordered[int(count * clamp)], ordered[int(count * (1 - clamp) - 1)]
        sizes.append([min(max(abs(v), low), high) for v in tau])
    shares = [scaled(size) for size in sizes]
    parts = [[sign(v) * s for v, s in zip(t, own)] for t, own in zip(taus, shares)] if normalised else taus
    totals = [sum(column) for column in zip(*parts)]
    scales = []
    for tau, share in zip(taus, shares):
        balance = [math.exp(num * s * s) * math.tanh(v * total) for s, v, total in zip(share, tau, totals)]
        threshold = sorted(balance)[int(count * (1 - ratio))]
        scales.append(scaled([max(b, threshold) for b in balance]))
    merged = []
    for j in range(count):
        total = sum(s[j] * lam * sign(t[j]) * a[j] for s, lam, t, a in zip(scales, lams, taus, sizes))
        merged.append(total / max(sum(s[j] for s in scales), 1e-12))
    return torch.tensor(merged, dtype=torch.float64)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("ratio", "clamp"), [(0.05, 0.01), (0.3, 0.1), (0.9, 0.0), (1.0, 0.01)])
def test_every_model_is_one_flat_vector(normalised, ratio, clamp):
    # Values that float32 holds, so that order statistics are the same in both.
    taus = torch.randn(3, 200, generator=torch.Generator().manual_seed(6)).double()
    experts = [dict(zip("ab", tau.split([150, 50]))) for tau in taus]
    base = {"a": torch.zeros(150).double(), "b": torch.zeros(50).double()}
    lam = [1.0, 0.5, 1.2]
    merged = Pcb(ratio, clamp, normalised, lam)(experts, base, [1.0, 2.0, 1.0])
    expected = slow_pcb(taus.tolist(), ratio, clamp, normalised, [1.0, 1.0, 1.2])
    torch.testing.assert_close(torch.cat([merged["a"], merged["b"]]), expected, rtol=1e-4, atol=1e-5)


def test_pieces_and_threads_change_nothing_and_many_models_do_not_overflow():
    taus = torch.randn(90, 300, generator=torch.Generator().manual_seed(7))
    experts, base, merger = (
        [{"x": tau, "y": tau[:9]} for tau in taus],
        {"x": torch.zeros(300), "y": torch.zeros(9)},
        Pcb(),
    )
    whole = merger(experts, base)["x"]
    assert whole.isfinite().all()
    assert whole.any()
    plan = plan_of(experts, base)
    survey(merger, plan, threads=2, size=64)
    parts = torch.cat(list(merger.merge_one(plan.operands("x", 64), [1.0] * 90)))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_keys_order_like_floats_and_give_them_back():
    values = torch.tensor([-torch.inf, -3e38, -1.5, -1e-42, -0.0, 0.0, 1e-42, 2.0, 3e38])
    keys = ordered_keys(values)
    assert (keys.diff() > 0).all()
    for value, key in zip(values.tolist(), keys.tolist()):
        assert value_of_key((key >> SHIFT) + BINS, key & ((1 << SHIFT) - 1)) == value


def test_what_it_cannot_take_is_refused(base, experts):
    with pytest.raises(ValueError, match="lam has 2 values for 3 models"):
        Pcb(lam=[1.0, 1.0])(experts, base)
    with pytest.raises(ValueError, match="ratio lies above 0"):
        Pcb(ratio=0.0)
    with pytest.raises(ValueError, match="clamp lies from 0"):
        Pcb(clamp=0.5)
