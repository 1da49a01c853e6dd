import itertools
import math

import pytest
import torch

from fulgurite.reports.uncertainty import sign_test, standard_error, standard_error_of_mean


def test_standard_error_is_the_spread_of_repeated_draws():
    generator = torch.Generator().manual_seed(0)
    draws = (torch.rand(20000, 50, generator=generator) < 0.3).double().mean(1)
    assert standard_error(0.3, 50) == pytest.approx(draws.std().item(), rel=0.02)
    other = (torch.rand(20000, 20, generator=generator) < 0.9).double().mean(1)
    assert standard_error_of_mean([0.3, 0.9], [50, 20]) == pytest.approx(((draws + other) / 2).std().item(), rel=0.02)
    assert math.isnan(standard_error(0.5, 0))


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 5), (9, 2), (2, 9), (3, 10)])
def test_sign_test_counts_the_outcomes_at_least_as_one_sided(wins, losses):
    total = wins + losses
    sums = [abs(2 * sum(signs) - total) for signs in itertools.product((0, 1), repeat=total)]
    assert sign_test(wins, losses) == pytest.approx(sum(s >= abs(wins - losses) for s in sums) / len(sums))
