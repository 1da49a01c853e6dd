"""Negative Preference Optimisation (Zhang et al., 2024, arXiv 2404.05868).

    L = - (2 / beta) mean_r log sigmoid(beta (nll_r - nll_ref_r))
    dL / dnll_r = - 2 sigmoid(-beta (nll_r - nll_ref_r)) / R

Gradient ascent with a weight that is 1 at the start and goes to 0 as the answer is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence

from fulgurite.methods.unlearning.objectives.base import (
    Objective,
    Terms,
    View,
    answer_nll,
    per_row,
    positive,
    preference,
    reference_nll,
)


class NPO(Objective):
    """The answer is the loser of a preference without a winner.

    Args:
        beta: how soon forgotten answers weigh less; towards 0 it is gradient ascent.

    Raises:
        ValueError: ``beta`` is not above 0.
    """

    needs_reference = True
    keeps_nll = True

    def __init__(self, beta: float = 0.1) -> None:
        positive(beta=beta)
        self.beta = beta

    def __call__(self, views: Sequence[View], references: Sequence[View | None]) -> Terms:
        """The loss of the one target, by rows."""
        (view,), (reference,) = views, references
        return per_row(preference(answer_nll(view) - reference_nll(reference), self.beta), view)
