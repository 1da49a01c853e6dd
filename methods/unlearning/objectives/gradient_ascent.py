"""Gradient ascent on the answer (Yao et al., 2023, arXiv 2310.10683).

    L = - sum_r nll_r / sum_r n_r

With a retain term it is GradDiff (Liu et al., 2022, arXiv 2203.12817); with `RetainKL`, KL minimisation (Maini et al.,
2024, arXiv 2401.06121).
"""

from __future__ import annotations

from collections.abc import Sequence

from fulgurite.methods.unlearning.objectives.base import Objective, Terms, View, per_token, token_losses


class GradientAscent(Objective):
    """The negative cross entropy of the answer tokens. It has no lower bound."""

    def __call__(self, views: Sequence[View], references: Sequence[View | None]) -> Terms:
        """The loss of the one target, by rows."""
        (view,) = views
        return per_token(-token_losses(view), view)
