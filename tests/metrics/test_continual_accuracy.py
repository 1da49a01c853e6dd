import pytest
import torch

from fulgurite.metrics.continual_accuracy import ContinualAccuracy, continual_scores
from fulgurite.metrics.vqa_accuracy import VQAAccuracy, answer_credit


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
