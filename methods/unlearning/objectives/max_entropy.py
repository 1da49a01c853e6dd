"""Max-Entropy Defence (Patil et al., 2024, arXiv 2309.17410): no layer prefers any token.

L = - mean_{l in S, r} H(P_l) ,   H(P) = - sum_v P_v log P_v ,   0 <= H <= log V
"""

from __future__ import annotations

from collections.abc import Sequence

from fulgurite.methods.unlearning.objectives.base import Objective, Terms, View, per_row


class MaxEntropyDefence(Objective):
    """The negative entropy of the logit lens of some layers at the last position of the prompt.

    Args:
        layers: S; published for 32 blocks: 22 to 32.

    Raises:
        ValueError: no layers.
    """

    needs_logits = False

    def __init__(self, layers: Sequence[int]) -> None:
        if not layers:
            raise ValueError("MaxEntropyDefence: layers=[] must name some")
        self.layers = tuple(layers)

    def __call__(self, views: Sequence[View], references: Sequence[View | None]) -> Terms:
        """The loss of the one target, by rows."""
        (view,) = views
        return per_row((view.lens.exp() * view.lens).sum(-1).mean(1), view)
