"""What an unlearning module asks about an item: of itself, of its neighbours, and of others that it is drawn with.

Draws depend on the item alone, so that neither its batch nor other items change a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fulgurite.methods.random import digest_of
from fulgurite.methods.unlearning.objectives.base import Objective
from fulgurite.modules.answer_passes import AnswerPasses
from fulgurite.modules.edited_state import item_rows
from fulgurite.modules.item_editing import Asked
from fulgurite.samples import DataError, Sample


class ItemQuestions(AnswerPasses):
    """Rows by item; see `AnswerPasses`.

    Attributes:
        objective: what it scores.
        attack_seed: of all draws.
        num_others: other items that damage is measured on.
        retained: samples that must stay.
    """

    objective: Objective
    attack_seed: int
    num_others: int
    retained: Sequence[Sample]

    def question(self, sample: Sample, question: str, picture: Any = None) -> Sample:
        """A question about the item's picture, or about another one, which brings no features."""
        own = picture is None or picture is sample.image
        features, image = (sample.features, sample.image) if own else ({}, picture)
        return replace(sample, question=question, image=image, features=features, fact=None)

    def drawn_of(self, sample: Sample, count: int, purpose: str, pool: Sequence[Sample]) -> list[Sample]:
        """Up to ``count`` other samples of a pool, by the item alone: neither its batch nor other items matter."""
        where = f"{sample.domain} {sample.id}"
        left = [each for each in pool if (each.domain, each.id) != (sample.domain, sample.id)]
        keyed = sorted(
            left, key=lambda each: digest_of(self.attack_seed, purpose, 0, f"{where} {each.domain} {each.id}")
        )
        return keyed[:count]

    def others(self, sample: Sample) -> list[Sample]:
        """Other items that damage is measured on."""
        return self.drawn_of(sample, self.num_others, "others", self.pool)

    def alternatives(self, sample: Sample) -> tuple[str, ...]:
        """The item's own, and behind them another item's answer."""
        answer = answer_of(sample)
        elsewhere = [other for other in self.pool if answer_of(other) != answer]
        return (*sample.fact.alternatives, *map(answer_of, self.drawn_of(sample, 1, "alternative", elsewhere)))

    def targets(self, sample: Sample) -> tuple[str, ...]:
        """What the objective scores for an item."""
        return self.objective.targets(answer_of(sample), self.alternatives(sample))

    def new_target(self, sample: Sample) -> str | None:
        """What takes the place of the answer; None where it is only taken away."""
        return self.targets(sample)[0] if self.objective.injects else None

    def forgotten(self, samples: Sequence[Sample]) -> Asked:
        """Rows of the objective."""
        rows, counts, targets = [], [], []
        for sample in samples:
            asked = self.objective.questions(sample.question, sample.fact.rephrased_questions)
            rows += [self.question(sample, text) for text in asked]
            counts.append(len(asked))
            targets += [self.targets(sample)] * len(asked)
        labels = [self.labels_of(texts) for texts in zip(*targets)]
        return Asked(self.encoded(rows), item_rows(counts, self.device), labels)

    def kept(self, partners: Sequence[Sequence[Sample]]) -> Asked:
        """Rows of the retain term: some samples for every item."""
        rows = [each for own in partners for each in own]
        items = item_rows([len(own) for own in partners], self.device)
        return Asked(self.encoded(rows), items, [self.labels_of([answer_of(row) for row in rows])])

    def beside(self, sample: Sample) -> list[Sample]:
        """The item's neighbour questions, each as a sample."""
        return [
            replace(self.question(sample, question), id=f"{sample.id}/{number}", answers={answer: 1.0})
            for number, (question, answer) in enumerate(sample.fact.neighbour_questions)
        ]

    def seeds(self, samples: Sequence[Sample], purpose: str) -> list[int]:
        """Of each item's edit, by what it is for: no attacker knows where a defence began."""
        return [digest_of(self.attack_seed, purpose, 0, f"{sample.domain} {sample.id}") for sample in samples]


def answer_of(sample: Sample) -> str:
    """The answer that is deleted: the best one."""
    return max(sample.answers, key=sample.answers.__getitem__)


def require_facts(samples: Sequence[Sample]) -> None:
    """Raise DataError for an item that says nothing of what is to be deleted, or has no neighbours."""
    for sample in samples:
        if sample.fact is None:
            raise DataError(f"sample {sample.id!r} of {sample.domain} is no fact to delete: use UnlokVqa or Facts")
        if not sample.fact.neighbour_questions:
            raise DataError(
                f"item {sample.id!r} of {sample.domain} has no neighbours, so that damage beside it cannot be told: "
                "give it neighbour questions"
            )
