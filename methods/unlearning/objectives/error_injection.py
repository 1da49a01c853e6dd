"""Error Injection (Patil et al., 2024, arXiv 2309.17410): the model learns another answer.

L = - mean_r log p(a | x_r) ,   a the first alternative answer that is not empty nor the answer
"""

from __future__ import annotations

from collections.abc import Sequence

from fulgurite.methods.unlearning.answers import is_exactly
from fulgurite.methods.unlearning.objectives.base import Objective, Terms, View, answer_nll, per_row


class ErrorInjection(Objective):
    """The negative log-probability of an alternative answer, summed over its tokens."""

    injects = True

    def targets(self, answer: str, alternatives: Sequence[str]) -> tuple[str, ...]:
        """The first alternative. Raises ValueError where there is none."""
        return (first_alternative(answer, alternatives),)

    def __call__(self, views: Sequence[View], references: Sequence[View | None]) -> Terms:
        """The loss of the one target, by rows."""
        (view,) = views
        return per_row(answer_nll(view), view)


def first_alternative(answer: str, alternatives: Sequence[str]) -> str:
    """The first alternative that is neither empty nor the answer. Raises ValueError where there is none."""
    for alternative in alternatives:
        if alternative.strip() and not is_exactly(alternative, answer):
            return alternative
    raise ValueError(f"the answer {answer!r} has no alternative to take its place: give the item one")
