"""Scores of edits and of answers: limits, guards, and the published examples of what says an answer."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.methods.bootstrap import bootstrap_interval
from fulgurite.methods.unlearning.answers import is_exactly, says, share_that_say
from fulgurite.methods.unlearning.scores import (
    edit_score,
    erasure_score,
    harmonic_mean,
    injection_score,
    neighbourhood_score,
    target_score,
)

ZERO_TO_ONE = torch.linspace(0, 1, 21, dtype=torch.float64)


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def grid():
    """All pairs of probabilities before and after."""
    before, after = torch.meshgrid(ZERO_TO_ONE, ZERO_TO_ONE, indexing="ij")
    return before.flatten(), after.flatten()


def test_scores_written_out():
    for before, after in zip(*(each.tolist() for each in grid())):
        if before > 0:
            expected = max(0.0, (before - after) / before)
            assert erasure_score(values(before), values(after)).item() == pytest.approx(expected)
        if before < 1:
            expected = max(2e-8, 1 - (1 - after) / (1 - before))
            assert injection_score(values(before), values(after)).item() == pytest.approx(expected)
        expected = 1 - abs(after - before) / (abs(before - 0.5) + 0.5)
        assert neighbourhood_score(values(before), values(after)).item() == pytest.approx(expected)


def test_limits():
    inner = ZERO_TO_ONE[1:-1]
    none, all_ = torch.zeros_like(inner), torch.ones_like(inner)
    torch.testing.assert_close(erasure_score(inner, inner), none)
    torch.testing.assert_close(erasure_score(inner, none), all_)
    torch.testing.assert_close(injection_score(inner, all_), all_)
    torch.testing.assert_close(injection_score(inner, inner), none + 2e-8)
    torch.testing.assert_close(neighbourhood_score(ZERO_TO_ONE, ZERO_TO_ONE), torch.ones_like(ZERO_TO_ONE))
    assert torch.equal(edit_score(inner, none, "erasure"), erasure_score(inner, none))
    assert torch.equal(edit_score(inner, none, "injection"), injection_score(inner, none))


def test_scores_stay_in_bounds_wherever_probabilities_lie():
    before, after = grid()
    for score in (erasure_score, injection_score, neighbourhood_score):
        found = score(before, after)
        assert ((found >= -1e-12) & (found <= 1)).all()


def test_nothing_is_divided_by_0():
    assert erasure_score(values(0, 0), values(0, 0.7)).tolist() == [0, 0]
    assert injection_score(values(1, 1), values(1, 0.7)).tolist() == [1, 2e-8]
    assert neighbourhood_score(values(0, 1), values(1, 0)).tolist() == [0, 0]


def test_what_is_missing_stays_missing():
    for score in (erasure_score, injection_score, neighbourhood_score):
        assert score(values(math.nan, 0.5), values(0.5, math.nan)).isnan().all()


def test_the_target_score_is_a_harmonic_mean_and_0_where_a_part_is_0_or_missing():
    found = target_score(values(0.5, 0, 0.5, 1), values(0.25, 1, math.nan, 1), values(1, 1, 1, 1))
    assert found.tolist() == pytest.approx([3 / (2 + 4 + 1), 0, 0, 1])
    assert harmonic_mean(values(*[0.3] * 9)).item() == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("text", "answer", "generous", "exact"),
    [
        ("Easter", "easter", True, True),
        ("It is Easter.", "easter", True, False),
        (" Blue ", "blue", True, True),
        ("bluebells", "blue", True, False),
        ("", "blue", False, False),
        ("red", "blue", False, False),
        ("cat", "a cat", False, False),
        ("a cat", " A cat", True, True),
    ],
)
def test_string_accuracy(text, answer, generous, exact):
    assert says(text, answer) == generous
    assert is_exactly(text, answer) == exact


def test_attacks_heed_case_and_count_candidates():
    candidates = ["Easter", "easter eggs", "the feast", "it is easter"]
    assert share_that_say(candidates, "easter") == 0.5
    assert share_that_say(candidates, "easter", match_case=False) == 0.75
    with pytest.raises(ValueError, match="no candidates"):
        share_that_say([], "easter")
    with pytest.raises(ValueError, match="an empty answer"):
        says("easter", " ")


def test_an_interval_of_many_draws_is_that_of_the_normal_law():
    values = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)).double()
    low, high = bootstrap_interval(values, resamples=2000)
    error = values.std(0) / 20
    torch.testing.assert_close(low, values.mean(0) - 1.96 * error, rtol=0, atol=0.012)
    torch.testing.assert_close(high, values.mean(0) + 1.96 * error, rtol=0, atol=0.012)


def test_an_interval_leaves_out_what_is_missing():
    known = torch.arange(6.0, dtype=torch.float64)
    gaps = torch.full((6,), math.nan, dtype=torch.float64)
    low, high = bootstrap_interval(torch.stack([known, known.where(known > 2, math.nan), gaps], 1), resamples=300)
    assert 3 <= low[1] < 4 < high[1] <= 5
    assert low[2].isnan()
    assert high[2].isnan()
    again = bootstrap_interval(known[:, None], resamples=300)
    assert (again[0].item(), again[1].item()) == (low[0].item(), high[0].item())


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 12), st.integers(0, 100))
def test_an_interval_holds_the_values_it_can_reach(number, seed):
    values = torch.rand(number, 1, generator=torch.Generator().manual_seed(seed)).double()
    low, high = bootstrap_interval(values, resamples=50, seed=seed)
    assert values.min() - 1e-12 <= low <= high <= values.max() + 1e-12


def test_an_interval_of_nothing_is_not_a_number_and_wrong_options_are_refused():
    low, high = bootstrap_interval(torch.zeros(0, 3))
    assert low.shape == (3,)
    assert low.isnan().all()
    assert high.isnan().all()
    for options in ({"level": 0.0}, {"level": 1.0}, {"resamples": 0}):
        with pytest.raises(ValueError, match="level="):
            bootstrap_interval(torch.zeros(2, 1), **options)
