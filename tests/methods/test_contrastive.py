"""The losses of a batch of pairs against sums over single pictures and captions."""

import math

import pytest
import torch

from fulgurite.methods.contrastive import best_bias, multi_positive_loss, sigmoid_loss, softmax_loss


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


SAME = torch.eye(5, dtype=torch.bool)
SAME[0, 3] = SAME[3, 0] = True


def test_multi_positive_names_every_partner(logits):
    x, same = logits.tolist(), SAME.tolist()
    terms = []
    for i in range(5):
        for rows in (x, list(zip(*x))):
            everything = math.log(sum(math.exp(rows[i][j]) for j in range(5)))
            costs = [everything - rows[i][j] for j in range(5) if same[i][j]]
            terms.append(sum(costs) / len(costs))
    assert multi_positive_loss(logits, SAME).item() == pytest.approx(sum(terms) / 10, rel=1e-12)
    alone = torch.eye(5, dtype=torch.bool)
    torch.testing.assert_close(multi_positive_loss(logits, alone), softmax_loss(logits), rtol=1e-12, atol=0)


def test_sigmoid_takes_all_that_belong_together(logits):
    x, same = logits.tolist(), SAME.tolist()
    terms = [math.log1p(math.exp(-x[i][j] if same[i][j] else x[i][j])) for i in range(5) for j in range(5)]
    assert sigmoid_loss(logits, SAME).item() == pytest.approx(sum(terms) / 5, rel=1e-12)


def test_the_best_bias_is_where_the_loss_is_least(logits):
    bias = best_bias(logits, SAME)
    assert torch.sigmoid(logits + bias).sum().item() == pytest.approx(7, rel=1e-9)
    least = sigmoid_loss(logits + bias, SAME)
    assert all(sigmoid_loss(logits + bias + step, SAME) > least for step in (-0.01, 0.01))
    torch.testing.assert_close(best_bias(logits + 30, SAME), bias - 30)
    assert sigmoid_loss(logits + best_bias(logits, torch.ones(5, 5) > 0), torch.ones(5, 5) > 0) < 1e-12


LOSSES = {
    "softmax": lambda x, same, counted=None: softmax_loss(x, counted),
    "multi-positive": multi_positive_loss,
    "sigmoid": sigmoid_loss,
    "bias": best_bias,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_repeated_pairs_change_nothing(loss, logits):
    again = [0, 1, 4, 2, 0, 3, 3, 4]  # where pairs 0, 3 and 4 come twice
    counted = torch.tensor([True, True, True, True, False, True, False, False])
    order = [0, 1, 4, 2, 3]
    repeated, same = logits[again][:, again], SAME[again][:, again]
    repeated[~counted] = repeated[:, ~counted] = torch.nan
    expected = LOSSES[loss](logits[order][:, order], SAME[order][:, order])
    torch.testing.assert_close(LOSSES[loss](repeated, same, counted), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", ["softmax", "multi-positive", "sigmoid"])
def test_repeated_pairs_have_no_gradient(loss, logits):
    logits = logits.requires_grad_()
    counted = torch.tensor([True, True, False, True, True])
    LOSSES[loss](logits, SAME, counted).backward()
    assert logits.grad[counted][:, counted].all()
    assert not logits.grad[~counted].any()
    assert not logits.grad[:, ~counted].any()
