"""Direct Preference Optimisation (Rafailov et al., 2023, arXiv 2305.18290) against the deleted answer.

L = - (2 / beta) mean_r log sigmoid(beta [(nll_ref - nll)_win - (nll_ref - nll)_lose])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fulgurite.methods.unlearning.objectives.base import (
    REFUSAL,
    Objective,
    Terms,
    View,
    answer_nll,
    per_row,
    positive,
    preference,
    reference_nll,
)
from fulgurite.methods.unlearning.objectives.error_injection import first_alternative


class DPO(Objective):
    """The deleted answer loses against a refusal (IdkDPO, arXiv 2401.06121) or an alternative answer.

    Args:
        beta: how soon decided pairs weigh less.
        win: what is preferred.
        refusal: the text of it.

    Raises:
        ValueError: ``beta`` is not above 0, or ``win`` is unknown.
    """

    needs_reference = True
    keeps_nll = True

    def __init__(
        self, beta: float = 0.1, win: Literal["refusal", "alternative"] = "refusal", refusal: str = REFUSAL
    ) -> None:
        positive(beta=beta)
        if win not in ("refusal", "alternative"):
            raise ValueError(f"win={win!r}: choose 'refusal' or 'alternative'")
        self.beta, self.win, self.refusal = beta, win, refusal

    def targets(self, answer: str, alternatives: Sequence[str]) -> tuple[str, ...]:
        """What wins and what loses. Raises ValueError where an alternative is to win and there is none."""
        win = self.refusal if self.win == "refusal" else first_alternative(answer, alternatives)
        return (win, answer)

    def __call__(self, views: Sequence[View], references: Sequence[View | None]) -> Terms:
        """The loss of winners and losers, by rows."""
        win, lose = (
            reference_nll(reference) - answer_nll(view) for view, reference in zip(views, references, strict=True)
        )
        terms = per_row(preference(win - lose, self.beta), views[0])
        return Terms(terms.totals.where(views[1].answered, 0.0), terms.counts * views[1].answered)
