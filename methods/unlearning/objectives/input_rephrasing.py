"""Input Rephrasing (Patil et al., 2024, arXiv 2309.17410): an objective averaged over ways to ask."""

from __future__ import annotations

from collections.abc import Sequence

from fulgurite.methods.unlearning.objectives.base import Objective, Terms, View
from fulgurite.methods.unlearning.objectives.fact_erasure import FactErasure


class InputRephrasing(Objective):
    """Another objective on the question and its rephrasings, a row each.

    Args:
        objective: published with Fact Erasure, which is meant by None.
        questions: the most rephrasings taken, from the first on; None takes all.

    Raises:
        ValueError: ``questions`` is below 1.
    """

    def __init__(self, objective: Objective | None = None, questions: int | None = None) -> None:
        if questions is not None and questions < 1:
            raise ValueError(f"questions={questions} must be at least 1; without rephrasings use the objective alone")
        self.objective = FactErasure() if objective is None else objective
        self.most = questions
        self.layers = self.objective.layers
        self.state_layer = self.objective.state_layer
        self.needs_logits = self.objective.needs_logits
        self.needs_reference = self.objective.needs_reference
        self.keeps_nll = self.objective.keeps_nll
        self.injects = self.objective.injects

    def targets(self, answer: str, alternatives: Sequence[str]) -> tuple[str, ...]:
        """Those of the other objective."""
        return self.objective.targets(answer, alternatives)

    def questions(self, question: str, rephrasings: Sequence[str]) -> tuple[str, ...]:
        """The question first. Raises ValueError where there are no rephrasings."""
        if not rephrasings:
            raise ValueError(
                f"InputRephrasing: there are no rephrasings of {question!r}: give the item some, or use its objective "
                "alone"
            )
        return (question, *rephrasings[: self.most])

    def __call__(self, views: Sequence[View], references: Sequence[View | None]) -> Terms:
        """The loss of the other objective, by rows: one per question."""
        return self.objective(views, references)
