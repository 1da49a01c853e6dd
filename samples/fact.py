"""A fact that may have to be deleted: how else it can be asked for, and what near it must stay.

The terms are those of UnLOK-VQA (arXiv 2505.01456). The question, its answer and its picture are those of the `Sample`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from fulgurite.samples.picture import Picture

Level = Literal["easy", "medium", "hard"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Fact:
    """What belongs to a sample whose answer is to be deleted.

    Args:
        subject: what the question is about, in a word.
        rephrased_questions: the question in other words; it has the same answer.
        rephrased_images: by level, other pictures on which the question has the same answer.
        neighbour_questions: other questions about the same picture, each with its answer, which has to stay.
        neighbour_images: by level, other pictures, each with its answer to the same question, which has to stay.
        alternatives: wrong answers that are plausible.
        objects: what each of ``alternatives`` takes the place of, where neighbour pictures were made by such changes.
    """

    subject: str
    rephrased_questions: tuple[str, ...] = ()
    rephrased_images: Mapping[Level, tuple[Picture, ...]] = field(default_factory=dict)
    neighbour_questions: tuple[tuple[str, str], ...] = ()
    neighbour_images: Mapping[Level, tuple[tuple[Picture, str], ...]] = field(default_factory=dict)
    alternatives: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
