import math

import pytest
import torch
from torch.nn import functional as F

from fulgurite.methods.losses import answer_loss
from fulgurite.methods.schedules import BertCosine, Constant, StagedSchedule, WarmupCosine, WarmupLinear


def test_hard_label_is_cross_entropy_and_soft_label_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, generator=generator, dtype=torch.float32)
    labels = torch.tensor([0, 3, 2, 4])
    hard = answer_loss(logits, F.one_hot(labels, 5).float())
    torch.testing.assert_close(hard, F.cross_entropy(logits, labels, reduction="none"))
    soft = torch.tensor([[1.0, 0.5, 0.0, 0.0, 0.0]])
    p = logits[:1].softmax(-1)[0]
    expected = -(1.0 * math.log(p[0]) + 0.5 * math.log(p[1])) / 1.5
    assert answer_loss(logits[:1], soft).item() == pytest.approx(expected, rel=1e-5)


def test_answer_outside_the_vocabulary_costs_nothing():
    logits = torch.randn(2, 3, requires_grad=True)
    loss = answer_loss(logits, torch.zeros(2, 3))
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0]
    assert not logits.grad.any()


def test_warmup_rises_to_one_and_decays_towards_zero():
    factors = [WarmupLinear(0.1)(s, 100) for s in range(100)]
    assert factors[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(1 / 90)
    assert WarmupCosine(0.0)(50, 100) == pytest.approx(0.5)
    assert Constant()(7, 10) == 1.0


def test_the_published_cosine_begins_at_zero_and_jumps_at_the_end_of_the_warmup():
    factors = [BertCosine(0.1)(s, 100) for s in range(101)]
    assert factors[:10] == pytest.approx([s / 10 for s in range(10)])
    assert factors[10] == pytest.approx((1 + math.sqrt(10 + 2 * math.sqrt(5)) / 4) / 2)  # cos 18 degrees
    assert factors[50] == pytest.approx(0.5)
    assert factors[75] == pytest.approx((1 - math.sqrt(0.5)) / 2)
    assert factors[100] == 0
    assert BertCosine(0)(0, 5) == 1


@pytest.mark.parametrize("warmup", [-0.1, 1.0])
def test_warmup_outside_its_range_is_an_error(warmup):
    with pytest.raises(ValueError, match="share of the steps"):
        WarmupLinear(warmup)


def test_every_stage_starts_afresh():
    schedule = WarmupLinear(0.2)
    staged = StagedSchedule(schedule, [10, 5])
    assert [staged(s) for s in range(15)] == [schedule(s, 10) for s in range(10)] + [schedule(s, 5) for s in range(5)]
    assert staged(15) == 0.0  # LambdaLR asks once more after the last step
