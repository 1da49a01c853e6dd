import itertools

import pytest
import torch

from fulgurite.methods.pruning.allocation import Allocation
from fulgurite.methods.pruning.global_schedule import prune_in_rounds, round_sparsity
from fulgurite.methods.pruning.magnitude import Magnitude, global_magnitude_masks, magnitude_scores, matrix_mask
from fulgurite.methods.pruning.n_m import n_m_mask
from fulgurite.methods.pruning.wanda import Wanda, wanda_mask, wanda_scores


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.501, 1.0])
def test_magnitude_prunes_the_exact_count_of_smallest(sparsity):
    weight = draw(6, 11)
    kept = matrix_mask(magnitude_scores(weight), sparsity)
    assert (~kept).sum() == round(sparsity * 66)
    assert not sparsity or sparsity == 1 or weight[~kept].abs().max() < weight[kept].abs().min()


def test_global_magnitude_prunes_one_count_of_all_matrices():
    weights = {"a": draw(5, 7), "b": draw(30, 4, seed=1) * 0.1}
    masks = dict(global_magnitude_masks(weights, 0.4))
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.4 * 155)
    pruned = torch.cat([weights[n][~m].abs() for n, m in masks.items()])
    kept = torch.cat([weights[n][m].abs() for n, m in masks.items()])
    assert pruned.max() < kept.min()


def loop_wanda_rows(weight, norm, sparsity):
    kept = torch.ones_like(weight, dtype=torch.bool)
    for row in range(len(weight)):
        scores = [abs(w.item()) * n.item() for w, n in zip(weight[row], norm)]
        for column in sorted(range(len(scores)), key=lambda j: scores[j])[: int(sparsity * len(scores))]:
            kept[row, column] = False
    return kept


def test_wanda_prunes_the_smallest_of_every_row():
    weight, norm = draw(5, 13).double(), draw(13, seed=1).abs().double()
    norm[[2, 7]] = 0  # dead inputs, whose scores are tied
    kept = wanda_mask(weight, norm, 0.45)
    assert torch.equal(kept, loop_wanda_rows(weight, norm, 0.45))
    assert ((~kept).sum(1) == 5).all()  # int(5.85)
    assert torch.equal(wanda_mask(weight, norm * 37, 0.45), kept)
    assert wanda_mask(weight, norm, 0.0).all()


def test_wanda_of_a_matrix_prunes_an_exact_count_and_keeps_the_largest():
    weight, norm = draw(5, 13), draw(13, seed=1).abs()
    kept = wanda_mask(weight, norm, 0.37, "matrix")
    scores = wanda_scores(weight, norm)
    assert (~kept).sum() == round(0.37 * 65)
    assert scores[~kept].max() < scores[kept].min()
    assert torch.equal(scores, weight.abs() * norm)


def published_variant(scores, sparsity):
    """The bisection as published, by masks of the whole matrix."""
    ordered = scores.sort(dim=1, stable=True).values
    sums, totals = ordered.cumsum(1), scores.sum(1)

    def mask_of(alpha):
        places = (sums <= (totals * alpha)[:, None]).sum(1, keepdim=True) - 1
        return (scores <= ordered.gather(1, places.clamp(min=0))) & (places >= 0)

    alpha, (low, high) = 0.4, (0.0, 0.8)
    mask = mask_of(alpha)
    while abs(mask.float().mean() - sparsity) > 0.001 and high - low >= 0.001:
        if mask.float().mean() > sparsity:
            alpha, high = (alpha + low) / 2, alpha
        else:
            alpha, low = (alpha + high) / 2, alpha
        mask = mask_of(alpha)
    return ~mask


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.6])
def test_the_variant_is_the_published_bisection(sparsity):
    weight, norm = draw(40, 64), draw(64, seed=1).abs()
    kept = wanda_mask(weight, norm, sparsity, "variant")
    assert torch.equal(kept, published_variant(wanda_scores(weight, norm), sparsity))
    assert abs((~kept).float().mean() - sparsity) < 0.01
    assert len((~kept).sum(1).unique()) > 1


def test_wanda_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"input_norm \(3,\)"):
        wanda_scores(draw(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match="not finite"):
        wanda_scores(draw(2, 4), torch.full((4,), float("inf")))
    with pytest.raises(ValueError, match="selection='columns'"):
        wanda_mask(draw(2, 4), torch.ones(4), 0.5, "columns")
    with pytest.raises(ValueError, match="outside"):
        wanda_mask(draw(2, 4), torch.ones(4), 1.5)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:5", "4:4"])
@pytest.mark.parametrize("columns", [16, 19, 3])
def test_n_of_every_m_are_kept(pattern, columns):
    kept, run = map(int, pattern.split(":"))
    scores = torch.randint(0, 6, (7, columns), generator=torch.Generator().manual_seed(5)).float()  # many ties
    mask = n_m_mask(scores, pattern)
    for row in range(7):
        for start in range(0, columns, run):
            part = scores[row, start : start + run].tolist()
            order = sorted(range(len(part)), key=lambda j: part[j])  # stable, ascending
            expected = [j in order[max(len(part) - kept, 0) :] for j in range(len(part))]
            assert mask[row, start : start + run].tolist() == expected


def test_rounds_reach_the_target_and_never_bring_a_weight_back():
    weights = {"a": draw(20, 5), "b": draw(7, 9, seed=1)}
    seen = []

    def scores_after(masks):
        seen.append({name: mask.clone() for name, mask in masks.items()})
        # The first half of every matrix is worth nothing from the second round on, whatever is pruned.
        worth = {n: (torch.arange(w.numel()) > w.numel() // 2 * bool(masks)).view_as(w) for n, w in weights.items()}
        return lambda name: (weights[name] * worth[name]).abs()

    masks = prune_in_rounds(scores_after, {n: w.numel() for n, w in weights.items()}, 0.6, 4)
    rounds = [*seen[1:], masks]
    counts = [sum(int((~m).sum()) for m in each.values()) for each in rounds]
    assert counts == [round(0.6 ** (4 / t) * 163) for t in (1, 2, 3, 4)]
    for before, after in itertools.pairwise(rounds):
        assert all(not (after[name] & ~before[name]).any() for name in weights)
    assert round_sparsity(0.6, 4, 4) == 0.6
    with pytest.raises(ValueError, match="round 5 of 4"):
        round_sparsity(0.6, 5, 4)


def test_whole_counts_of_an_allocation_are_pruned_whole():
    weight, energy = draw(7, 10), torch.rand(10, generator=torch.Generator().manual_seed(0))
    for count in range(11):
        (share,) = Allocation((7 * (10 - count),), (70,)).sparsity
        wanda = Wanda(0.5)
        wanda.assign({"a": share})
        assert (~wanda.compress("a", weight, energy).mask).sum(1).tolist() == [count] * 7


def test_the_variant_prunes_nothing_at_0_and_says_what_it_cannot_reach():
    weight, norm = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), torch.ones(64)
    assert wanda_mask(weight, norm, 0.0, "variant").all()
    with pytest.raises(ValueError, match=r"prunes at most 0\.[89]"):
        wanda_mask(weight, norm, 0.99, "variant")


@pytest.mark.parametrize(
    "pruner", [Wanda(pattern="2:4"), Wanda(0.5, sparsities={"a": 0.1}), Magnitude(0.5, scope="global")]
)
def test_an_allocation_beside_what_says_otherwise_is_refused(pruner):
    with pytest.raises(ValueError, match="gives every layer its sparsity"):
        pruner.assign({"a": 0.5}) or pruner.begin({"a": torch.ones(4, 4)})
