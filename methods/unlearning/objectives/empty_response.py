"""Empty Response (Patil et al., 2024, arXiv 2309.17410): the model learns to refuse.

L = - mean_r log p(e | x_r) ,   e the refusal
"""

from __future__ import annotations

from collections.abc import Sequence

from fulgurite.methods.unlearning.objectives.base import REFUSAL, Objective, Terms, View, answer_nll, per_row


class EmptyResponse(Objective):
    """The negative log-probability of a refusal, summed over its tokens.

    Args:
        refusal: what is to be said in place of the answer.

    Raises:
        ValueError: it is empty.
    """

    injects = True

    def __init__(self, refusal: str = REFUSAL) -> None:
        if not refusal.strip():
            raise ValueError('refusal is empty: give a text that the model is to say, as "I don\'t know"')
        self.refusal = refusal

    def targets(self, answer: str, alternatives: Sequence[str]) -> tuple[str, ...]:
        """The refusal."""
        return (self.refusal,)

    def __call__(self, views: Sequence[View], references: Sequence[View | None]) -> Terms:
        """The loss of the one target, by rows."""
        (view,) = views
        return per_row(answer_nll(view), view)
