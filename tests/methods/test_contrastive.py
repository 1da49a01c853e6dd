"""The losses of a batch of pairs against sums over single pictures and captions."""

import math

import pytest
import torch

from fulgurite.methods.contrastive import sigmoid_loss, softmax_loss


@pytest.fixture
def logits():
    return 3 * torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_softmax_is_the_mean_over_rows_and_columns(logits):
    x = logits.tolist()
    terms = []
    for i in range(5):
        terms.append(math.log(sum(math.exp(x[i][j]) for j in range(5))) - x[i][i])
        terms.append(math.log(sum(math.exp(x[j][i]) for j in range(5))) - x[i][i])
    assert softmax_loss(logits).item() == pytest.approx(sum(terms) / 10, rel=1e-12)
    assert softmax_loss(logits[:1, :1]) == 0


def test_sigmoid_judges_every_combination(logits):
    x = logits.tolist()
    terms = [math.log1p(math.exp(-x[i][j] if i == j else x[i][j])) for i in range(5) for j in range(5)]
    assert sigmoid_loss(logits).item() == pytest.approx(sum(terms) / 5, rel=1e-12)
