"""Objectives that read the logit lens or hidden states: hinges, entropies, distances, and what follows from them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_views import random_view

from fulgurite.methods.generation_losses import IGNORED
from fulgurite.methods.unlearning.objectives import (
    RMU,
    HeadProjectionDefence,
    MaxEntropyDefence,
    RetainStates,
    View,
)


def lens_view(probabilities, tokens):
    """Rows whose lens has these probabilities (R, S, V), with answers of two tokens behind some padding."""
    labels = torch.tensor([[IGNORED, token, 0] for token in tokens])
    return View(None, labels, lens=torch.as_tensor(probabilities, dtype=torch.float32).log())


def hpd(view, layers, k):
    return HeadProjectionDefence(range(layers), k)([view], [None])


def test_head_projection_written_out():
    view = random_view(1)
    tokens = [row[0] for row in view.labels.tolist()]
    tops, bottoms = [], []
    for row, token in enumerate(tokens):
        for numbers in view.lens[row].exp().tolist():
            rising = sorted(numbers)
            tops.append(max(0, numbers[token] - rising[-5]))
            bottoms.append(max(0, rising[4] - numbers[token]))
    expected = sum(tops) / len(tops) + sum(bottoms) / len(bottoms)
    assert hpd(view, 3, 5).loss.item() == pytest.approx(expected, rel=1e-5)
    assert sum(tops) > 0
    assert sum(bottoms) > 0


def test_the_hinge_pulls_at_the_token_and_at_the_kth_entry():
    lens = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log().view(1, 1, 5).requires_grad_()
    loss = HeadProjectionDefence([1], k=2)([View(None, torch.tensor([[0]]), lens=lens)], [None]).loss
    assert loss.item() == pytest.approx(0.3)
    (gradient,) = torch.autograd.grad(loss, lens)
    torch.testing.assert_close(gradient.flatten(), torch.tensor([0.5, -0.2, 0, 0, 0]))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 3))
def test_head_projection_is_0_just_where_no_layer_has_the_token_among_the_k_minus_1_at_either_end(seed, k, layers):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(40, layers, 9, generator=generator).softmax(-1)
    tokens = torch.randint(9, (40,), generator=generator).tolist()
    loss = hpd(lens_view(probabilities, tokens), layers, k).totals
    for row, token in enumerate(tokens):
        orders = [sorted(range(9), key=lambda v, p=layer: float(p[v])) for layer in probabilities[row]]
        extreme = any(token in order[: k - 1] + order[9 - (k - 1) :] for order in orders)
        assert (loss[row] > 0) == extreme
        if loss[row] == 0:
            candidates = {v for layer in probabilities[row] for v in layer.topk(k - 1).indices.tolist()}
            assert token not in candidates


def test_a_token_that_ties_with_the_kth_entry_has_no_loss():
    tied = torch.tensor([0.3, 0.2, 0.2, 0.1, 0.1, 0.1]).view(1, 1, 6)
    assert hpd(lens_view(tied, [2]), 1, 2).loss == 0
    flat = torch.full((1, 1, 6), 1 / 6)
    assert hpd(lens_view(flat, [3]), 1, 3).loss == 0


def test_max_entropy_written_out_and_its_bounds():
    view = random_view(2)
    entropies = [-sum(p * math.log(p) for p in layer) for row in view.lens.exp().tolist() for layer in row]
    loss = MaxEntropyDefence([1, 2, 4])([view], [None]).loss.item()
    assert loss == pytest.approx(-sum(entropies) / len(entropies), rel=1e-5)
    assert -math.log(11) <= loss <= 0


def test_max_entropy_is_least_where_all_tokens_are_alike():
    flat = torch.zeros(1, 2, 50).log_softmax(-1)
    loss = MaxEntropyDefence([0, 1])([View(None, torch.tensor([[3]]), lens=flat)], [None]).loss
    assert loss.item() == pytest.approx(-math.log(50))
    sure = torch.nn.functional.one_hot(torch.tensor([[4, 7]]), 50).float().mul(1000).log_softmax(-1)
    assert MaxEntropyDefence([0, 1])([View(None, torch.tensor([[3]]), lens=sure)], [None]).loss == 0


def plain_distance(states, targets, labels):
    """Mean over the tokens and the width of each row, then over rows."""
    rows = []
    for row, row_targets, row_labels in zip(states.tolist(), targets.tolist(), labels.tolist()):
        used = [(h, c) for h, c, label in zip(row, row_targets, row_labels) if label != IGNORED]
        rows.append(sum((a - b) ** 2 for h, c in used for a, b in zip(h, c)) / len(used) / len(used[0][0]))
    return sum(rows) / len(rows)


def test_rmu_is_a_mean_over_each_answer_s_own_tokens():
    view, objective = random_view(3), RMU(2, 3.0, seed=5)
    targets = objective.control(6).expand(4, 4, 6)
    expected = plain_distance(view.states, targets, view.labels)
    assert objective([view], [None]).loss.item() == pytest.approx(expected, rel=1e-5)
    before = random_view(4)
    kept = RetainStates(2)(view, before).loss.item()
    assert kept == pytest.approx(plain_distance(view.states, before.states, view.labels), rel=1e-5)
    assert RetainStates(2)(view, view).loss == 0


def test_the_control_vector_has_its_length_no_negative_part_and_hangs_on_the_seed_alone():
    torch.manual_seed(1)
    first = RMU(0, 2.5, seed=7).control(40)
    torch.manual_seed(2)
    assert torch.equal(first, RMU(3, 2.5, seed=7).control(40))
    assert first.norm().item() == pytest.approx(2.5)
    assert (first >= 0).all()
    assert not torch.equal(first, RMU(0, 2.5, seed=8).control(40))


@pytest.mark.parametrize(
    "make",
    [
        lambda: HeadProjectionDefence([]),
        lambda: HeadProjectionDefence([1], k=0),
        lambda: MaxEntropyDefence([]),
        lambda: RMU(-1),
        lambda: RMU(1, 0.0),
        lambda: RetainStates(-1),
        lambda: HeadProjectionDefence([1], k=12)([random_view(1)], [None]),
    ],
)
def test_refused_options(make):
    with pytest.raises(ValueError, match=r"must|more than the vocabulary"):
        make()
