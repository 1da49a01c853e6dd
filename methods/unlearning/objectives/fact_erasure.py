"""Fact Erasure (Patil et al., 2024, arXiv 2309.17410): the probability of the deleted answer itself is minimised.

    L = mean_r p(y | x_r) ,   p(y | x) = exp(-nll)

Its gradient is p times that of log p, so it fades as the answer does, where gradient ascent grows without bound.
"""

from __future__ import annotations

from collections.abc import Sequence

from fulgurite.methods.unlearning.objectives.base import Objective, Terms, View, answer_nll, per_row


class FactErasure(Objective):
    """The mean over rows of the answer's probability.

    NOTE: the published code takes the geometric mean of several prompts, or their product; for one prompt all agree.
    """

    def __call__(self, views: Sequence[View], references: Sequence[View | None]) -> Terms:
        """The loss of the one target, by rows."""
        (view,) = views
        return per_row(answer_nll(view).neg().exp(), view)
