import math

import pytest
import torch

from fulgurite.methods.losses import answer_loss


def by_hand(logits, targets):
    total = sum(math.exp(x) for x in logits)
    nll = [math.log(total) - x for x in logits]
    return sum(a * n for a, n in zip(targets, nll)) / max(sum(targets), 1)


@pytest.mark.parametrize("targets", [[0, 1, 0], [0.5, 1, 1], [0.5, 0, 0], [0, 0, 0], [1, 1, 1]])
def test_every_sample_equals_the_formula(targets):
    logits = [0.3, -1.2, 2.0]
    loss = answer_loss(torch.tensor([logits, logits[::-1]]), torch.tensor([targets, [0, 1, 0]]).float())
    assert loss.shape == (2,)
    assert loss[0].item() == pytest.approx(by_hand(logits, targets), abs=1e-6)
    assert loss[1].item() == pytest.approx(by_hand(logits[::-1], [0, 1, 0]), abs=1e-6)


def test_one_answer_is_cross_entropy():
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    gold = torch.tensor([0, 5, 2, 2])
    expected = torch.nn.functional.cross_entropy(logits, gold, reduction="none")
    torch.testing.assert_close(answer_loss(logits, torch.eye(6)[gold]), expected)


def test_unknown_answer_gives_no_loss_and_no_gradient():
    logits = torch.tensor([[80.0, -90.0], [1.0, 2.0]], requires_grad=True)
    loss = answer_loss(logits, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    loss.sum().backward()
    assert loss[0] == 0
    assert torch.equal(logits.grad[0], torch.zeros(2))
    assert bool(logits.grad[1].any())


def test_half_precision_is_scored_in_single():
    logits = torch.tensor([[40.0, 1.0, -3.0]])
    target = torch.tensor([[0.0, 1.0, 0.0]])
    assert answer_loss(logits.bfloat16(), target) == answer_loss(logits, target)
