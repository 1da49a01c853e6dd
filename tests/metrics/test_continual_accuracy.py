import math
import re
from typing import ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fulgurite.metrics.continual_accuracy import ContinualAccuracy, continual_scores
from fulgurite.metrics.vqa_accuracy import VQAAccuracy, answer_credit, best_answers


def test_scores_equal_the_definitions_by_hand():
    matrix = torch.tensor([[0.1, 0.2, 0.3], [0.8, 0.25, 0.3], [0.9, 0.7, 0.4], [0.6, 0.5, 0.9]]).double()
    scores = continual_scores(matrix, [1, 2, 3])
    assert scores["average"] == pytest.approx((0.6 + 0.5 + 0.9) / 3)
    assert scores["forgetting"] == pytest.approx(((0.9 - 0.6) + (0.7 - 0.5)) / 2)  # the best stage, not the own one
    assert scores["forgetting_own"] == pytest.approx(((0.8 - 0.6) + (0.7 - 0.5)) / 2)
    assert scores["backward_transfer"] == pytest.approx(-scores["forgetting_own"])
    assert scores["forward_transfer"] == pytest.approx(((0.25 - 0.2) + (0.4 - 0.3)) / 2)
    assert "unseen" not in scores


def test_joint_training_has_no_forgetting_and_unseen_domains_stay_apart():
    matrix = torch.tensor([[0.0, 0.0, 0.1], [0.4, 0.6, 0.2]]).double()
    scores = continual_scores(matrix, [1, 1, None])
    assert scores == {"average": pytest.approx(0.5), "unseen": pytest.approx(0.2)}


def test_matrix_counts_every_sample_once_whatever_the_batches():
    generator = torch.Generator().manual_seed(0)
    domain = torch.randint(3, (200,), generator=generator)
    kind = torch.randint(-1, 2, (200,), generator=generator)
    credit = torch.rand(200, generator=generator).double()
    metric = ContinualAccuracy(3, 2, 2)
    for start in range(0, 200, 7):
        part = slice(start, start + 7)
        metric.update(1, domain[part], credit[part], kind[part])
    result = metric.compute()
    for d in range(3):
        assert result["matrix"][1, d].item() == pytest.approx(credit[domain == d].mean().item(), abs=1e-12)
        for k in range(2):
            chosen = (domain == d) & (kind == k)
            assert result["by_kind"][1, d, k].item() == pytest.approx(credit[chosen].mean().item(), abs=1e-12)
    assert result["matrix"][0].isnan().all()


def test_two_ranks_with_uneven_data_add_up_to_one():
    whole, ranks = ContinualAccuracy(2, 1), [ContinualAccuracy(2, 1) for _ in range(2)]
    domain, credit = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([1.0, 0.5, 0.0, 0.0, 1.0])
    whole.update(1, domain, credit)
    for rank, part in zip(ranks, (slice(0, 4), slice(4, 5))):
        rank.update(1, domain[part], credit[part])
    total = ContinualAccuracy(2, 1)
    total.credit, total.count = ranks[0].credit + ranks[1].credit, ranks[0].count + ranks[1].count
    assert torch.equal(total.compute()["matrix"][1], whole.compute()["matrix"][1])


def test_soft_credit_is_the_best_score_among_the_top_answers():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 0.0, 0.0]])
    targets = torch.tensor([[0.5, 1.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert answer_credit(logits, targets).tolist() == [0.5, 0.0, 0.0]
    assert answer_credit(logits, targets, top_k=2).tolist() == [1.0, 0.5, 0.0]
    assert answer_credit(logits, targets, top_k=10).tolist() == [1.0, 0.5, 0.0]


def test_vqa_accuracy_leaves_uncounted_samples_out():
    metric = VQAAccuracy()
    logits, targets = torch.eye(3), torch.eye(3)
    targets[2] = 0
    metric.update(logits, targets, torch.tensor([True, False, True]))
    assert metric.compute().item() == 0.5


def test_one_domain_and_no_stage_keep_their_shape():
    metric = ContinualAccuracy(num_domains=1, num_stages=0, num_kinds=1)
    metric.update(0, torch.tensor([0, 0]), torch.tensor([1.0, 0.0]), torch.tensor([0, -1]))
    found = metric.results()
    assert found["matrix"].tolist() == [[0.5]]
    assert found["by_kind"].tolist() == [[[1.0]]]


def test_domains_without_a_counted_question_are_in_no_mean():
    """The scores are those of the matrix without their columns."""
    nan = math.nan
    matrix = torch.tensor(
        [[0.1, nan, 0.2, 0.3, nan], [0.8, nan, 0.25, 0.3, nan], [0.9, nan, 0.7, 0.4, nan], [0.6, nan, 0.5, 0.9, nan]]
    ).double()
    stages = [1, 2, 3, None, None]
    assert continual_scores(matrix, stages) == continual_scores(matrix[:, [0, 2, 3]], [1, 3, None])
    assert continual_scores(matrix[:, [1, 4]], [1, None]) == {}


def test_counting_uses_no_operation_that_deterministic_cuda_refuses():
    """The names are those that torch itself lists, as the refusal shows on a GPU alone."""

    class Calls(TorchFunctionMode):
        names: ClassVar[set[str]] = set()

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.names.add(func.__name__)
            return func(*args, **(kwargs or {}))

    listed = torch.use_deterministic_algorithms.__doc__.partition("RuntimeError` when ``mode=True``:")[2].partition(
        "In addition"
    )[0]
    refused = set(re.findall(r":func:`torch\.(?:Tensor\.)?(\w+)`", listed))
    assert {"bincount", "histc", "put_"} <= refused
    metric, calls = ContinualAccuracy(2, 1, 2), Calls()
    torch.use_deterministic_algorithms(True)
    try:
        with calls:
            metric.update(1, torch.tensor([0, 1, 1]), torch.tensor([0.5, 1.0, 0.25]), torch.tensor([1, -1, 0]))
            credit = answer_credit(torch.eye(3), torch.eye(3), top_k=2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls.names
    assert not calls.names & refused
    assert metric.credit[1].tolist() == [[0.0, 0.5, 0.0], [0.25, 0.0, 1.0]]
    assert credit.tolist() == [1.0, 1.0, 1.0]


def test_an_unknown_column_is_refused():
    with pytest.raises(IndexError):
        ContinualAccuracy(2, 1).update(0, torch.tensor([-1]), torch.tensor([1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_answers_the_first_is_best(dtype):
    """As a sort of (-logit, index) pairs says; coarse logits make many ties."""
    logits = torch.randint(4, (50, 200), generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = [sorted(range(200), key=lambda i: (-row[i], i))[:10] for row in logits.tolist()]
    assert best_answers(logits, 10).tolist() == expected
    assert best_answers(logits[:, :3], 10).shape == (50, 3)
    credit = torch.nn.functional.one_hot(torch.tensor([row[0] for row in expected]), 200)
    assert answer_credit(logits, credit).tolist() == [1.0] * 50
