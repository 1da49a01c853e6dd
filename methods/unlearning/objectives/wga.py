"""Weighted gradient ascent (Wang et al., 2025, arXiv 2502.19301).

L = - sum_{r,t} p_t^beta ce_t / sum_r n_r ,   p_t = exp(-ce_t) without gradient
"""

from __future__ import annotations

from collections.abc import Sequence

from fulgurite.methods.unlearning.objectives.base import Objective, Terms, View, per_token, positive, token_losses


class WGA(Objective):
    """Gradient ascent in which a token weighs as much as the model still knows it.

    Args:
        beta: exponent of its probability.

    Raises:
        ValueError: ``beta`` is not above 0.
    """

    def __init__(self, beta: float = 1.0) -> None:
        positive(beta=beta)
        self.beta = beta

    def __call__(self, views: Sequence[View], references: Sequence[View | None]) -> Terms:
        """The loss of the one target, by rows."""
        (view,) = views
        losses = token_losses(view)
        return per_token(-(losses.detach().neg().exp() ** self.beta) * losses, view)
