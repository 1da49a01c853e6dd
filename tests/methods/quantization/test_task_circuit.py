import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy

from fulgurite.methods.quantization.task_circuit import average_bits, ratio_for, task_circuit_mask, task_circuit_scores
from fulgurite.methods.statistics.absolute_gradients import AbsoluteGradients


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def case():
    shapes = {"up": (16, 8), "down": (8, 16), "out": (5, 8)}
    weights = {name: draw(*shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}
    quantized = {name: (weight * 2).round() / 2 for name, weight in weights.items()}
    sensitivity = {name: draw(*shape, seed=9 + n).abs() for n, (name, shape) in enumerate(shapes.items())}
    return sensitivity, weights, quantized


@pytest.mark.parametrize("ratio", [0.0, 0.0035, 0.05, 0.25, 1.0])
def test_exactly_the_largest_scores_of_all_matrices_are_kept(ratio):
    sensitivity, weights, quantized = case()
    masks = task_circuit_mask(sensitivity, weights, quantized.__getitem__, ratio)
    flat = torch.cat([(sensitivity[n] * (weights[n] - quantized[n]) * weights[n]).abs().flatten() for n in weights])
    expected = torch.zeros_like(flat, dtype=torch.bool)
    expected[flat.topk(int(ratio * len(flat))).indices] = True
    assert torch.equal(torch.cat([masks[name].flatten() for name in weights]), expected)
    assert [masks[name].shape for name in weights] == [weights[name].shape for name in weights]


def test_masks_are_nested_and_the_unit_of_the_loss_does_not_matter():
    sensitivity, weights, quantized = case()
    masks = [
        task_circuit_mask(sensitivity, weights, quantized.__getitem__, ratio) for ratio in (0.01, 0.02, 0.1, 0.3, 0.9)
    ]
    for small, large in itertools.pairwise(masks):
        assert not any((small[name] & ~large[name]).any() for name in weights)
    scaled = {name: value * 64 for name, value in sensitivity.items()}
    again = task_circuit_mask(scaled, weights, quantized.__getitem__, 0.1)
    assert all(torch.equal(again[name], masks[2][name]) for name in weights)
    some = task_circuit_mask(sensitivity, weights, quantized.__getitem__, 0.01, num_all=1000)
    assert sum(int(mask.sum()) for mask in some.values()) == 10


def test_scores_vanish_where_nothing_changes_or_matters_and_are_taken_in_float32():
    a, w = draw(4, 4).abs(), draw(4, 4, seed=1)
    q = w.clone()
    q[0] += 1
    a[:, 0] = 0
    scores = task_circuit_scores(a, w, q)
    assert (scores[1:] == 0).all()
    assert (scores[:, 0] == 0).all()
    assert (scores[0, 1:] > 0).all()
    half, near = torch.tensor([1.0]).half(), torch.tensor([1.0001])
    assert task_circuit_scores(torch.ones(1), half, near).item() == pytest.approx(1e-4, rel=1e-2)
    with pytest.raises(ValueError, match="shapes"):
        task_circuit_scores(a, w, q[:2])


def test_gradients_of_examples_do_not_cancel_and_their_order_does_not_matter():
    weight = draw(3, 4, dtype=torch.float64).requires_grad_(True)
    x, y = draw(6, 4, seed=1, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])

    def summed(order):
        gradients = AbsoluteGradients({"w": weight})
        for example in order:
            gradients.update(cross_entropy(x[example] @ weight.T, y[example]))
        return gradients.means()["w"]

    torch.testing.assert_close(summed(range(6)), summed([3, 5, 0, 1, 4, 2]), rtol=1e-12, atol=0)
    together = AbsoluteGradients({"w": weight})
    together.update(cross_entropy(x @ weight.T, y))
    assert (summed(range(6)) >= together.means()["w"] - 1e-12).all()
    assert summed(range(6)).sum() > 1.1 * together.means()["w"].sum()


def test_bits_of_the_published_budgets():
    assert average_bits(2, 0.0035) == pytest.approx(2.105)
    assert average_bits(3, 0.0035) == pytest.approx(3.1015)
    assert average_bits(4, 0.0, columns=128) == 4.25
    assert average_bits(2, ratio_for(2.3, 2, 64 * 8), 64 * 8) == pytest.approx(2.3)
    with pytest.raises(ValueError, match="below the 3 of 3 bits"):
        ratio_for(2.9, 3)


def test_what_cannot_be_chosen_is_refused():
    sensitivity, weights, quantized = case()
    with pytest.raises(ValueError, match="ratio=2"):
        task_circuit_mask(sensitivity, weights, quantized.__getitem__, 2.0)
    with pytest.raises(ValueError, match="more than the 296"):
        task_circuit_mask(sensitivity, weights, quantized.__getitem__, 0.5, num_all=1000)
    with pytest.raises(ValueError, match="no sensitivity, first out"):
        task_circuit_mask({n: a for n, a in sensitivity.items() if n != "out"}, weights, quantized.__getitem__, 0.1)
