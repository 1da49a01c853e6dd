"""CE-U, cross entropy unlearning (Yang, 2025, arXiv 2503.01224).

    L = sum_{r,t} CE(softmax(z with z_y = -inf), z) / number of tokens ,   the target without gradient

The first tokens of an answer are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fulgurite.methods.generation_losses import IGNORED
from fulgurite.methods.unlearning.objectives.base import (
    Objective,
    Terms,
    View,
    per_token,
    soft_cross_entropy,
    true_tokens,
)


class CEU(Objective):
    """The model's own distribution without the true token is its target.

    Args:
        skip: how many tokens at the beginning of an answer are left out. Answers of no more tokens train nothing, so
            that it is 0 for answers of one token.

    Raises:
        ValueError: it is negative.
    """

    def __init__(self, skip: int = 1) -> None:
        if skip < 0:
            raise ValueError(f"skip={skip} must not be negative")
        self.skip = skip

    def __call__(self, views: Sequence[View], references: Sequence[View | None]) -> Terms:
        """The loss of the one target, by rows."""
        (view,) = views
        late = view.labelled.cumsum(1) > self.skip
        view = View(view.logits, view.labels.where(late, IGNORED))
        return per_token(soft_cross_entropy(view.logits, without_true_token(view)), view)


@torch.no_grad()
def without_true_token(view: View) -> Tensor:
    """(R, T, V) distributions in which the answer's tokens have exactly 0."""
    return view.logits.float().scatter(-1, true_tokens(view), -torch.inf).softmax(-1)
