"""UNDIAL, self-distillation with adjusted logits (Dong et al., 2024, arXiv 2402.10052).

L = sum_{r,t} CE(softmax(z_ref - beta onehot(y_t)), z) / sum_r n_r
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fulgurite.methods.unlearning.objectives.base import (
    Objective,
    Terms,
    View,
    per_token,
    positive,
    soft_cross_entropy,
    true_tokens,
)


class UNDIAL(Objective):
    """The model learns from itself before the edit, with the true token's logit lowered.

    NOTE: the published code also trains prompt and padding; here the answer alone is trained.

    Args:
        beta: by how much it is lowered.

    Raises:
        ValueError: ``beta`` is not above 0.
    """

    needs_reference = True

    def __init__(self, beta: float = 10.0) -> None:
        positive(beta=beta)
        self.beta = beta

    def __call__(self, views: Sequence[View], references: Sequence[View | None]) -> Terms:
        """The loss of the one target, by rows."""
        (view,), (reference,) = views, references
        with torch.no_grad():
            index = true_tokens(view)
            lowered = torch.full(index.shape, -self.beta, device=index.device)
            teacher = reference.logits.float().scatter_add(-1, index, lowered).softmax(-1)
        return per_token(soft_cross_entropy(view.logits, teacher), view)
