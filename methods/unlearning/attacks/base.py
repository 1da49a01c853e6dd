"""What an attack is, and the two kinds that there are: those that read hidden states, and those that only ask.

An attack makes at most ``budget`` candidates for an item; it succeeds where the deleted answer is among them.

Legend: n items, V vocabulary, B budget.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

ORIGINAL = "original"


class Attack(ABC):
    """One attack; see the module's text."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def budget(self) -> int:
        """B, the most candidates per item."""

    @property
    def title(self) -> str:
        """Name among the figures; attacks of one run must differ in it."""
        return self.name


class WhiteBox(Attack):
    """Candidates are token ids out of the distributions of the logit lens at the last position of the prompt.

    Args:
        layers: S, of which distributions are read: 0 the embeddings, L the last block.
        k: entries taken of each distribution or difference.

    Raises:
        ValueError: too few layers, one named twice or not rising, or ``k`` below 1.
    """

    least: ClassVar[int] = 1

    def __init__(self, layers: Sequence[int], k: int) -> None:
        self.layers, self.k = tuple(layers), k
        kind = type(self).__name__
        if len(self.layers) < self.least:
            raise ValueError(f"{kind}: layers={list(layers)} are {len(self.layers)}, and it takes {self.least} or more")
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"{kind}: layers={list(layers)} must rise, each named once")
        if k < 1:
            raise ValueError(f"{kind}: k={k} must be at least 1")

    @abstractmethod
    def candidates(self, lens: Mapping[int, Tensor]) -> Tensor:
        """(n, B) long token ids from probabilities (n, V) by layer; ids may occur more than once."""


@dataclass(frozen=True)
class Target:
    """What an attacker who only asks knows of an item.

    Args:
        question: that the fact answers.
        rephrasings: of the question.
        subject: what the question is about.
        pictures: how many rephrased pictures there are by level.
    """

    question: str
    rephrasings: tuple[str, ...] = ()
    subject: str = ""
    pictures: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Query:
    """One question, and which picture it is asked of.

    Args:
        question: text.
        level: of the rephrased pictures, or ``"original"``.
        place: number of the picture within its level.
    """

    question: str
    level: str = ORIGINAL
    place: int = 0


class BlackBox(Attack):
    """Candidates are texts, sampled from the model's answers to some queries.

    Args:
        samples: answers drawn per query.
        temperature: of the draw.
        max_new_tokens: tokens of an answer.
    """

    def __init__(self, samples: int, temperature: float, max_new_tokens: int) -> None:
        if samples < 1 or max_new_tokens < 1 or not temperature > 0:
            raise ValueError(
                f"{type(self).__name__}: samples={samples} and max_new_tokens={max_new_tokens} must be at least 1, and "
                f"temperature={temperature} above 0"
            )
        self.samples, self.temperature, self.max_new_tokens = samples, temperature, max_new_tokens

    @property
    @abstractmethod
    def num_queries(self) -> int:
        """Queries per item."""

    @property
    def budget(self) -> int:
        """One candidate per query and sample."""
        return self.num_queries * self.samples

    @abstractmethod
    def queries(self, target: Target) -> list[Query]:
        """`num_queries` queries. Raises ValueError where the item has too few rephrasings or pictures."""


def contains(candidates: Tensor, token: Tensor) -> Tensor:
    """(n,) whether each row of ``candidates`` (n, B) holds the item's ``token`` (n,)."""
    return torch.eq(candidates, token[:, None]).any(dim=1)
