"""Figures of memorisation as loops over numbers, and comparisons of two samples against counting."""

import itertools
import math

import pytest
import torch

from fulgurite.methods.generation_losses import IGNORED
from fulgurite.methods.unlearning.forget_quality import kolmogorov_smirnov, membership_auc, privacy_leak
from fulgurite.methods.unlearning.memorisation import (
    exact_memorisation,
    extraction_strength,
    min_k,
    model_utility,
    normalised_probability,
    probability,
    token_log_probabilities,
    truth_ratio,
    truth_ratio_scores,
    without_end,
)


@pytest.fixture
def answers():
    """Logits and labels of five answers of 6, 0, 1, 3 and 5 tokens, padded here and there."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(5, 8, 7, generator=generator), torch.randint(7, (5, 8), generator=generator)
    for row, length in enumerate((6, 0, 1, 3, 5)):
        labels[row, : row % 3] = IGNORED
        labels[row, row % 3 + length :] = IGNORED
    return logits, labels


def rows(logits, labels):
    """By answer: its tokens' logits and ids."""
    pairs = [list(zip(*row)) for row in zip(logits.tolist(), labels.tolist())]
    return [[(numbers, label) for numbers, label in row if label != IGNORED] for row in pairs]


def logs(numbers):
    total = math.log(sum(map(math.exp, numbers)))
    return [number - total for number in numbers]


def guessed(numbers):
    return max(range(len(numbers)), key=lambda v: numbers[v])


def test_the_end_is_the_last_token_of_an_answer(answers):
    logits, labels = answers
    assert rows(logits, without_end(labels)) == [row[:-1] for row in rows(logits, labels)]


def test_probability_of_an_answer(answers):
    logits, labels = answers
    known = [[logs(numbers)[label] for numbers, label in row] for row in rows(logits, labels)]
    expected = [math.exp(sum(each) / len(each)) if each else math.nan for each in known]
    lengths = (labels != IGNORED).sum(1)
    nll = -token_log_probabilities(logits, labels).where(labels != IGNORED, 0.0).sum(1)
    assert probability(nll, lengths).tolist() == pytest.approx(expected, nan_ok=True)


def test_exact_memorisation_and_extraction_strength():
    """Of six tokens, those at 0, 1, 4 and 5 are predicted; then of none, of all, and with the last one wrong."""
    labels = torch.arange(6).expand(4, 6)
    said = labels.clone()
    for row, wrong in enumerate(([2, 3], list(range(6)), [], [5])):
        said[row, wrong] += 1
    logits = torch.nn.functional.one_hot(said, 8).float()
    assert exact_memorisation(logits, labels).tolist() == pytest.approx([4 / 6, 0, 1, 5 / 6])
    assert extraction_strength(logits, labels).tolist() == pytest.approx([1 - 4 / 6, 0, 1, 0])


def test_exact_memorisation_and_extraction_strength_written_out(answers):
    logits, labels = answers
    # What is predicted is right half of the time.
    logits[:, ::2].scatter_(-1, labels.clamp(min=0)[:, ::2, None], 9.0)
    exact, strength = [], []
    for row in rows(logits, labels):
        right = [guessed(numbers) == label for numbers, label in row]
        exact.append(sum(right) / len(right) if right else math.nan)
        shortest = next((k for k in range(len(right) + 1) if all(right[k:])), 0)
        strength.append(1 - shortest / len(right) if right else math.nan)
    assert exact_memorisation(logits, labels).tolist() == pytest.approx(exact, nan_ok=True)
    assert extraction_strength(logits, labels).tolist() == pytest.approx(strength, nan_ok=True)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.5, 1.0])
@pytest.mark.parametrize("standardised", [False, True])
def test_min_k_written_out(answers, share, standardised):
    logits, labels = answers
    expected = []
    for row in rows(logits, labels):
        each = []
        for numbers, label in row:
            known = logs(numbers)
            mean = sum(math.exp(x) * x for x in known)
            deviation = math.sqrt(sum(math.exp(x) * (x - mean) ** 2 for x in known))
            each.append((known[label] - mean) / deviation if standardised else known[label])
        lowest = sorted(each)[: max(1, math.floor(share * len(each)))]
        expected.append(-sum(lowest) / len(lowest) if lowest else math.nan)
    found = min_k(token_log_probabilities(logits, labels, standardised), labels, share)
    assert found.tolist() == pytest.approx(expected, rel=1e-4, nan_ok=True)


def test_min_k_of_a_flat_distribution_is_finite():
    logits, labels = torch.zeros(1, 3, 5), torch.tensor([[0, 1, 2]])
    assert min_k(token_log_probabilities(logits, labels, standardised=True), labels).isfinite()
    with pytest.raises(ValueError, match="share=0"):
        min_k(torch.zeros(1, 1), torch.zeros(1, 1), share=0)


def test_the_truth_ratio_and_what_is_averaged_of_it():
    right, false = torch.tensor([1.0, 2.0, 0.5, 1e4]), torch.tensor([[1.0, 3.0], [2.0, 2.0], [0.1, 0.1], [1e4, 1e4]])
    ratio = [math.exp(-(sum(f) / 2)) / (math.exp(-r) + 1e-10) for r, f in zip(right.tolist(), false.tolist())]
    assert truth_ratio(right, false).tolist() == pytest.approx(ratio)
    closeness, margin, share = (
        truth_ratio_scores(right, false, kind).tolist() for kind in ("closeness", "margin", "probability")
    )
    assert closeness[:3] == pytest.approx([min(r, 1 / r) for r in ratio[:3]])
    assert margin[:3] == pytest.approx([max(0, 1 - r) for r in ratio[:3]], abs=1e-6)
    assert share[:3] == pytest.approx([1 / (1 + r) for r in ratio[:3]])
    for found in (closeness, margin, share):
        assert all(0 <= each <= 1 for each in found)


def test_normalised_probability_and_utility():
    found = normalised_probability(torch.tensor([0.2, 0.0]), torch.tensor([[0.1, 0.1], [0.0, 0.0]]))
    assert found.tolist() == pytest.approx([0.5, 0.0])
    nine = [0.1 * k for k in range(1, 10)]
    assert model_utility(nine) == pytest.approx(9 / sum(1 / x for x in nine))
    assert model_utility([*nine[:8], 0.0]) == 0


def test_auc_counts_pairs():
    forgotten, holdout = torch.tensor([1.0, 2.0, 2.0, 5.0]), torch.tensor([2.0, 3.0, 0.5])
    pairs = [(h > f) + (h == f) / 2 for f in forgotten.tolist() for h in holdout.tolist()]
    assert membership_auc(forgotten, holdout) == pytest.approx(sum(pairs) / 12)
    assert membership_auc(forgotten, forgotten) == 0.5
    assert membership_auc(torch.tensor([0.1, 0.2]), torch.tensor([3.0])) == 1


def test_privacy_leak_is_0_where_auc_is_that_of_a_retrained_model():
    assert privacy_leak(0.5) == 0
    assert privacy_leak(0.7, 0.7) == 0
    assert privacy_leak(1.0) == pytest.approx(-100)
    assert privacy_leak(0.4, 0.6) == pytest.approx(50)


def plain_distance(first, second):
    return max(
        abs(sum(x <= at for x in first) / len(first) - sum(x <= at for x in second) / len(second))
        for at in first + second
    )


@pytest.mark.parametrize(("n", "m"), [(4, 4), (3, 5), (6, 2), (1, 4)])
def test_the_p_value_is_the_share_of_all_orders(n, m):
    generator = torch.Generator().manual_seed(n)
    for _ in range(3):
        first, second = torch.randn(n, generator=generator), torch.randn(m, generator=generator)
        distance, p = kolmogorov_smirnov(first, second)
        assert distance == pytest.approx(plain_distance(first.tolist(), second.tolist()))
        far, orders = 0, list(itertools.combinations(range(n + m), n))
        for chosen in orders:
            rest = [place for place in range(n + m) if place not in chosen]
            far += plain_distance(list(chosen), rest) > distance - 1e-9
        assert p == pytest.approx(far / len(orders))


def test_the_p_value_of_samples_of_one_size_in_closed_form():
    """2 sum_k (-1)^(k-1) C(2n, n - k h) / C(2n, n), with h the distance times n (Gnedenko and Korolyuk, 1951)."""
    n = 60
    first, second = torch.arange(n).double(), torch.arange(n).double() + 20.5
    distance, p = kolmogorov_smirnov(first, second)
    h = round(distance * n)
    series = sum((-1) ** (k - 1) * math.comb(2 * n, n - k * h) for k in range(1, n // h + 1))
    assert p == pytest.approx(2 * series / math.comb(2 * n, n), rel=1e-9)


def test_the_p_value_of_equal_and_of_separate_samples():
    sample = torch.randn(30, generator=torch.Generator().manual_seed(1))
    assert kolmogorov_smirnov(sample, sample.flip(0)) == (0.0, 1.0)
    distance, p = kolmogorov_smirnov(sample, sample[:25] + 100)
    assert distance == 1
    assert p == pytest.approx(2 / math.comb(55, 25), rel=1e-9)


@pytest.mark.parametrize("compare", [membership_auc, kolmogorov_smirnov])
def test_samples_without_numbers_are_refused(compare):
    for sample in (torch.zeros(0), torch.tensor([0.0, math.nan])):
        with pytest.raises(ValueError, match="two samples"):
            compare(sample, torch.ones(2))
