import math
import random

import pytest
import torch

from fulgurite.methods.pruning.allocation import allocate_per_tower, allocate_sparsity, uniform_sparsity
from fulgurite.methods.pruning.block_importance import group_importance, matrix_importance


def draw(seed, groups=9):
    source = random.Random(seed)
    return [source.random() ** 3 for _ in range(groups)], [source.randint(1, 400) for _ in range(groups)]


def bisected(scores, sizes, target, cap):
    """Real-valued water filling, by bisection of lambda."""
    low = [size * (1 - cap) for size in sizes]
    amount, below, above = sum(sizes) * (1 - target), 0.0, 1e15
    for _ in range(200):
        middle = (below + above) / 2
        kept = [min(n, least + middle * s) for n, least, s in zip(sizes, low, scores)]
        below, above = (middle, above) if sum(kept) < amount else (below, middle)
    return kept


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("target", "cap"), [(0.5, 0.6), (0.5, 0.95), (0.3, 1.0), (0.7, 0.7), (0.0, 0.4), (1.0, 1.0)])
def test_the_sum_is_exact_and_every_group_within_one_weight_of_the_real_solution(seed, target, cap):
    scores, sizes = draw(seed)
    found = allocate_sparsity(scores, sizes, target, cap)
    total = math.floor(round(sum(sizes) * (1 - target), 6))
    assert sum(found.kept) == total
    slack = len(sizes) if sum(math.ceil(round(n * (1 - cap), 6)) for n in sizes) > total else 0
    for kept, size, sparsity in zip(found.kept, sizes, found.sparsity):
        assert 0 <= kept <= size
        assert sparsity <= cap + 1e-9 + bool(slack) / size
    for kept, real in zip(found.kept, bisected(scores, sizes, target, cap)):
        assert abs(kept - real) < 2 + len(sizes) * (cap < 1)


@pytest.mark.parametrize("seed", range(6))
def test_more_important_is_never_sparser_and_order_and_unit_do_not_matter(seed):
    scores, sizes = draw(seed)
    before = allocate_sparsity(scores, sizes, 0.5, 0.8).kept
    for group in range(len(sizes)):
        for factor in (1.01, 1.5, 40):
            raised = [s * factor if g == group else s for g, s in enumerate(scores)]
            assert allocate_sparsity(raised, sizes, 0.5, 0.8).kept[group] >= before[group]
    assert allocate_sparsity([s * 4096 for s in scores], sizes, 0.5, 0.8).kept == before
    order = random.Random(seed).sample(range(len(sizes)), len(sizes))
    permuted = allocate_sparsity([scores[g] for g in order], [sizes[g] for g in order], 0.5, 0.8).kept
    assert permuted == tuple(before[g] for g in order)


def test_a_cap_at_the_target_and_scores_like_sizes_are_uniform():
    assert allocate_sparsity([5.0, 1.0, 3.0], [1000, 2000, 3000], 0.5, 0.5).sparsity == (0.5, 0.5, 0.5)
    assert allocate_sparsity([1.0, 2.0, 3.0], [1000, 2000, 3000], 0.3, 1.0).sparsity == pytest.approx((0.3, 0.3, 0.3))
    assert uniform_sparsity([10, 20, 33], 0.5).kept == (5, 10, 16)


def test_groups_of_no_importance_keep_what_others_cannot():
    assert allocate_sparsity([0.0, 0.0, 1.0], [100, 200, 300], 0.5, 0.7).kept == (30, 60, 210)
    # The important group is full with 10; the others share the rest by what they have room for.
    assert allocate_sparsity([0.0, 0.0, 1.0], [100, 200, 10], 0.5, 1.0).kept == (48, 97, 10)
    assert allocate_sparsity([0.0, 0.0], [100, 300], 0.5, 1.0).kept == (50, 150)


def test_towers_have_the_target_each():
    scores, sizes = draw(1)
    towers = ["vision"] * 4 + ["text"] * 5
    found = allocate_per_tower(scores, sizes, towers, 0.5, 0.8)
    for part in (slice(0, 4), slice(4, 9)):
        assert found.kept[part] == allocate_sparsity(scores[part], sizes[part], 0.5, 0.8).kept
        assert sum(found.kept[part]) == sum(sizes[part]) // 2


def test_the_official_dialect_keeps_more_than_asked():
    # From its loop by hand: ceilings 400 + (100.2 -> 101, 200, 300.6 -> 301, 400) overshoot by 2, and 2 more are added.
    found = allocate_sparsity([1.0, 2.0, 3.0, 4.0], [1000] * 4, 0.5, 0.6, "official")
    assert sum(found.kept) == 2002
    assert found.sparsity == pytest.approx((0.56, 0.52, 0.479, 0.439))


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match=r"max_sparsity 0\.4"):
        allocate_sparsity([1.0], [10], 0.5, 0.4)
    with pytest.raises(ValueError, match="group 1 is nan"):
        allocate_sparsity([1.0, math.nan], [10, 10], 0.5, 0.6)
    with pytest.raises(ValueError, match="2 importances for 1"):
        allocate_sparsity([1.0, 1.0], [10], 0.5, 0.6)
    with pytest.raises(ValueError, match="dialect='other'"):
        allocate_sparsity([1.0], [10], 0.5, 0.6, "other")


def test_importance_of_matrices_and_groups():
    weight = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    per_weight = torch.tensor([[3.0, 1.0], [2.0, 0.5]])
    assert matrix_importance(weight, per_weight) == 6.5
    assert matrix_importance(weight, per_weight, "magnitude") == 3 + 2 + 1 + 2
    assert matrix_importance(weight, per_weight, "squared") == 3 + 4 + 0.5 + 8
    one = torch.tensor(2.0)
    assert matrix_importance(weight, one) == 2
    assert matrix_importance(weight, one, "magnitude") == 15
    assert matrix_importance(weight, one, "squared") == (1 + 4 + 0.25 + 16) * 4
    with pytest.raises(ValueError, match="does not fit"):
        matrix_importance(weight, torch.ones(3))
    importance, sizes, groups = {"a": 2.0, "b": 3.0, "c": 4.0}, {"a": 10, "b": 30, "c": 5}, {"a": 0, "b": 0, "c": 1}
    assert group_importance(importance, sizes, groups) == ({0: 5.0, 1: 4.0}, {0: 40, 1: 5})
    assert group_importance(importance, sizes, groups, "average")[0] == {0: 0.125, 1: 0.8}
