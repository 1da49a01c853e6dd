"""Distances against loops over entries."""

import pytest
import torch

from fulgurite.methods.merging.vl_distance import branch_distances, distance, distances, ssd, tssd


def pair(seed=0, shape=(7, 9)):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(shape, generator=generator) for _ in range(2))
    x[0, 0] = y[0, 0] = 0.0
    x[0, 1] = 0.0
    return x, y


def slow(xs, ys, over_all=True):
    values = []
    for a, b in zip(xs, ys):
        if a == 0 and b == 0:
            if over_all:
                values.append(0.0)
            continue
        values.append(1 - abs(a + b) / (abs(a) + abs(b)))
    return sum(values) / len(values)


def cut(values, k):
    kept = sorted(range(len(values)), key=lambda i: -abs(values[i]))[:k]
    return [v if i in kept else 0.0 for i, v in enumerate(values)]


def test_entry_by_entry():
    x, y = pair()
    xs, ys = x.double().flatten().tolist(), y.double().flatten().tolist()
    assert ssd(x, y) == pytest.approx(slow(xs, ys), abs=1e-6)
    for keep in (0.1, 0.3, 0.7):
        k = int(keep * 63)
        assert tssd(x, y, keep) == pytest.approx(slow(cut(xs, k), cut(ys, k), over_all=False), abs=1e-6)
    assert tssd(x, y, 1.0) == ssd(x, y)


def test_bounds_symmetry_and_scale():
    x, y = pair()
    for keep in (0.2, 1.0):
        assert tssd(x, x, keep) == 0
        assert tssd(x[1:], -x[1:], keep) == pytest.approx(1)
        assert 0 < tssd(x, y, keep) < 1
        assert tssd(x, y, keep) == pytest.approx(tssd(y, x, keep))
        for scale in (1e-30, 1e30):
            assert tssd(scale * x, scale * y, keep) == pytest.approx(tssd(x, y, keep), abs=1e-5)
    zero = torch.zeros(4)
    assert (ssd(zero, zero), tssd(zero, zero, 0.5), distance(zero, zero).cosine) == (0, 0, 0)
    for keep in (0.0, 1.1):
        with pytest.raises(ValueError, match="keep="):
            tssd(x, y, keep)


def test_of_each_tensor_and_of_all_as_one_vector():
    x, y, start = ({"a": pair(s)[0], "b": 10 * pair(s)[1][0]} for s in (1, 2, 3))
    found = distances(x, y, start, keep=0.3)
    dx, dy = ({n: m[n] - start[n] for n in m} for m in (x, y))
    for name, own in found.tensors.items():
        assert own.ssd == ssd(dx[name], dy[name])
        assert own.tssd == tssd(dx[name], dy[name], 0.3)
        assert own.l2 == pytest.approx(float((x[name] - y[name]).norm()), rel=1e-5)
        expected = 1 - torch.cosine_similarity(dx[name].flatten(), dy[name].flatten(), dim=0)
        assert own.cosine == pytest.approx(float(expected), abs=1e-5)
    flat = [torch.cat([m["a"].flatten(), m["b"]]) for m in (dx, dy)]
    assert found.overall.ssd == ssd(*flat)
    assert found.overall.tssd == tssd(*flat, 0.3)
    assert found.overall.size == 72
    assert found.overall.l2 == pytest.approx(float((flat[0] - flat[1]).norm()), rel=1e-5)
    with pytest.raises(ValueError, match=r"\['b'\]"):
        distances(x, {**y, "b": torch.zeros(2)})
    with pytest.raises(ValueError, match="c"):
        distances(x, {**y, "c": torch.zeros(2)})


def test_between_branches():
    v, t = pair()
    seed = {"blocks.0.attn.w": torch.full((7, 9), 0.5), "norm.weight": torch.ones(3)}
    state = {"blocks.0.attn.v.w": v, "blocks.0.attn.l.w": t, "blocks.0.norm1.vl.w": torch.ones(2), "norm.weight": v[0]}
    found = branch_distances(state, seed=seed)
    assert list(found.tensors) == ["blocks.0.attn.w"]
    assert found.tensors["blocks.0.attn.w"] == distance(v - 0.5, t - 0.5)
    with pytest.raises(ValueError, match="or none"):
        branch_distances(state, "v", "vl")
