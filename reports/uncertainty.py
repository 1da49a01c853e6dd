"""How far an accuracy may be off by the choice of the test questions alone."""

from __future__ import annotations

import math
from collections.abc import Sequence


def standard_error(accuracy: float, number: int) -> float:
    """Binomial standard error ``sqrt(p (1 - p) / n)``, an upper bound for graded scores. NaN for n = 0."""
    return math.sqrt(accuracy * (1 - accuracy) / number) if number else math.nan


def standard_error_of_mean(accuracies: Sequence[float], numbers: Sequence[int]) -> float:
    """Of the plain mean over domains with independent questions: ``sqrt(sum of squares) / N``."""
    errors = [standard_error(p, n) for p, n in zip(accuracies, numbers)]
    return math.sqrt(sum(e * e for e in errors)) / len(errors) if errors else math.nan


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of equally likely wins and losses, ties left out (McNemar's exact test)."""
    total = wins + losses
    if total == 0:
        return 1.0
    tail = sum(math.comb(total, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**total)
