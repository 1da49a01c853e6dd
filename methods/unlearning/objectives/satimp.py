"""SatImp, gradient ascent weighted by saturation and importance (Yang et al., 2025, arXiv 2505.11953).

L = - sum_{r,t} p_t^b1 (1 - p_t)^b2 ce_t / sum_r n_r ,   p_t = exp(-ce_t) without gradient in the weights
"""

from __future__ import annotations

from collections.abc import Sequence

from fulgurite.methods.unlearning.objectives.base import Objective, Terms, View, per_token, positive, token_losses


class SatImp(Objective):
    """Gradient ascent on tokens that are known, but not beyond doubt. Published with weight 0.1 and retain weight 1.

    Args:
        saturation: b1.
        importance: b2.

    Raises:
        ValueError: one of them is not above 0.
    """

    def __init__(self, saturation: float = 5.0, importance: float = 1.0) -> None:
        positive(saturation=saturation, importance=importance)
        self.saturation, self.importance = saturation, importance

    def __call__(self, views: Sequence[View], references: Sequence[View | None]) -> Terms:
        """The loss of the one target, by rows."""
        (view,) = views
        losses = token_losses(view)
        known = losses.detach().neg().exp()
        return per_token(-(known**self.saturation) * (1 - known) ** self.importance * losses, view)
