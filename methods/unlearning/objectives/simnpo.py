"""SimNPO (Fan et al., 2024, arXiv 2410.07163): NPO by the mean over tokens, without a reference.

    L = - (2 / beta) mean_r log sigmoid(beta (nll_r / n_r - delta))
    dL / dnll_r = - 2 sigmoid(-beta (nll_r / n_r - delta)) / (R n_r)

Published with weight 0.125 beside a retain term of weight 1.
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
)


class SimNPO(Objective):
    """NPO with the mean loss of a token in place of the sum over tokens, and a margin in place of the reference.

    Args:
        beta: how soon forgotten answers weigh less.
        delta: loss per token up to which an answer counts as known.

    Raises:
        ValueError: ``beta`` is not above 0.
    """

    def __init__(self, beta: float = 4.5, delta: float = 0.0) -> None:
        positive(beta=beta)
        self.beta, self.delta = beta, delta

    def __call__(self, views: Sequence[View], references: Sequence[View | None]) -> Terms:
        """The loss of the one target, by rows."""
        (view,) = views
        per_answer_token = answer_nll(view) / view.lengths.clamp(min=1)
        return per_row(preference(per_answer_token - self.delta, self.beta), view)
