"""Scores evened out per candidate: the interface of all normalisers, and the one that leaves scores as they are.

Some candidates are near to every query and some to none; a normaliser takes that out of the scores of each level, and
then averages the levels. What it knows of a candidate comes from other queries: of a bank (``mode`` single-query, so
that a query can be scored alone) or of the test itself (transductive, so that the score of one query depends on the
others). Figures of the two modes are not comparable.

Legend: L levels, Q queries, N candidates, b queries of a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fulgurite.methods.ranks import ALONE, Ranks

Blocks = Callable[[], Iterable[Tensor]]
PIECE = 1 << 18  # entries that are worked on at once, in float64: 2 MiB


def pieces(blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Blocks (L, b, N) in float64 and in parts of few rows, so that sums hardly depend on how the rows are divided.

    Raises:
        ValueError: a block has another number of dimensions.
    """
    for block in blocks:
        if block.dim() != 3:
            raise ValueError(f"a block of scores is {tuple(block.shape)}: give (levels, queries, candidates)")
        for piece in block.split(max(1, PIECE // max(1, block.shape[0] * block.shape[2])), dim=1):
            yield piece.double()


class ColumnLogSumExp:
    """log sum_i exp(x_ij) for every level and column, of rows that come in parts: (L, N) whatever their number."""

    def __init__(self) -> None:
        self.rows = 0
        self.value: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take in some rows, (L, b, N)."""
        part = x.logsumexp(1)
        self.value = part if self.value is None else torch.logaddexp(self.value, part)
        self.rows += x.shape[1]

    def total(self, ranks: Ranks) -> Tensor:
        """Over the rows of all ranks, (L, N) float64. A collective.

        Raises:
            ValueError: no rank has rows.
        """
        own = self.value
        parts = [part for part in ranks.gather(None if own is None else own.cpu()) if part is not None]
        if not parts:
            raise ValueError("a normaliser was given no queries to fit on: give it a bank, or choose NoNormalizer")
        total = torch.stack(parts).logsumexp(0)
        return total if own is None else total.to(own.device)


class ScoreNormalizer(ABC):
    """Fitted once on the scores of some queries against all candidates, then applied to the scores of any query.

    Attributes:
        mode: whose queries it is fitted on: ``single-query`` on those of a bank (of the training split, never of the
            test), ``transductive`` on all test queries.
    """

    mode: ClassVar[Literal["single-query", "transductive"]]

    @property
    def needs_whole_rows(self) -> bool:
        """Whether `apply` must see all candidates of a query at once; else some, with ``fitted`` of those."""
        return False

    @abstractmethod
    def fit(self, blocks: Blocks, ranks: Ranks = ALONE) -> dict[str, Tensor]:
        """What is known of the candidates, as tensors that can be stored.

        Args:
            blocks: gives the scores (L, b, N) of all queries of this rank, block after block; called once per pass,
                and each time it starts anew. No block is kept.
            ranks: share the queries; every rank gets the result for all of them. A collective.

        Raises:
            ValueError: there are no queries, or another pass gives another number of them.
        """

    @abstractmethod
    def apply(self, scores: Tensor, fitted: dict[str, Tensor]) -> Tensor:
        """(Q, N): the mean over levels of the normalised ``scores`` (L, Q, N)."""

    def bias(self, fitted: dict[str, Tensor]) -> Tensor | None:
        """(L, N) to add to the scores of every query, where that is all that `apply` does; None for nothing.

        Raises:
            ValueError: it does more than that.
        """
        raise ValueError(
            f"{type(self).__name__} does not normalise by a term per candidate, which a search in two stages needs: "
            "choose NoNormalizer, Sinkhorn, or QueryBank with dynamic: false"
        )


class NoNormalizer(ScoreNormalizer):
    """The mean over levels as it is. Needs no queries, and asks for none."""

    mode = "single-query"

    def fit(self, blocks: Blocks, ranks: Ranks = ALONE) -> dict[str, Tensor]:
        """Nothing; ``blocks`` is not called."""
        return {}

    def apply(self, scores: Tensor, fitted: dict[str, Tensor]) -> Tensor:
        """The mean over levels."""
        return scores.mean(0)

    def bias(self, fitted: dict[str, Tensor]) -> Tensor | None:
        """None."""
        return None
