"""The losses that a config chooses among."""

import pytest
import torch

from fulgurite.methods.contrastive import multi_positive_loss, sigmoid_loss, softmax_loss
from fulgurite.methods.retrieval.losses import MultiPositive, Sigmoid, SymmetricCrossEntropy


@pytest.fixture
def logits():
    return 3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


SAME = torch.eye(4, dtype=torch.bool)
SAME[1, 2] = SAME[2, 1] = True
COUNTED = torch.tensor([True, True, True, False])


def test_each_is_its_function(logits):
    part, same = logits[:3, :3], SAME[:3, :3]
    expected = {
        SymmetricCrossEntropy(): softmax_loss(part),
        MultiPositive(): multi_positive_loss(part, same),
        Sigmoid(-2.0): sigmoid_loss(part - 2, same),
    }
    for loss, value in expected.items():
        torch.testing.assert_close(loss(part, same), value)
        torch.testing.assert_close(loss(logits, SAME, COUNTED), value)


def test_copies_of_a_video_are_wrong_answers_only_as_published(logits):
    sure = torch.where(SAME, 50.0, -50.0).double()
    two_of_four = 0.5 * torch.log(torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(SymmetricCrossEntropy()(sure, SAME), two_of_four)
    torch.testing.assert_close(MultiPositive()(sure, SAME), two_of_four)
    assert Sigmoid(0.0)(sure, SAME) < 1e-12
    x = logits.requires_grad_()
    x.data[1:3, 1:3] = 0.0
    assert torch.autograd.grad(SymmetricCrossEntropy()(x, SAME), x)[0][1, 2] > 0
    for loss in (MultiPositive(), Sigmoid()):
        assert torch.autograd.grad(loss(x, SAME), x)[0][1, 2] < 0


def test_the_best_bias_makes_the_sigmoid_blind_to_the_level_of_the_scores(logits):
    loss = Sigmoid()
    x, y = logits.clone().requires_grad_(), (logits + 25).requires_grad_()
    first, second = loss(x, SAME, COUNTED), loss(y, SAME, COUNTED)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(*torch.autograd.grad(first + second, (x, y)))
