"""Probability Delta: what rises or falls most from one layer to the next (Patil et al., 2024, arXiv 2309.17410).

    D_j  = P_{S[j+1]} - P_{S[j]}          neighbours in the list S: a gap in S is one difference
    D2_j = D_{j+1} - D_j                  second differences (arXiv 2505.01456)
    C    = union over j of topk and bottomk of D_j, or of D2_j

Legend: n items, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fulgurite.methods.unlearning.attacks.base import WhiteBox
from fulgurite.methods.unlearning.attacks.top_ids import top_ids


class ProbabilityDelta(WhiteBox):
    """First differences: at most 2 k (|S| - 1) candidates. The defaults are the published ones for 32 blocks.

    Args:
        layers: S, two or more.
        k: tokens taken at either end of each difference.
    """

    name = "probability delta"
    least = 2

    def __init__(self, layers: Sequence[int] = (27, 28, 29, 30, 31, 32), k: int = 2) -> None:
        super().__init__(layers, k)

    @property
    def budget(self) -> int:
        """2 k (|S| - 1), or 2 k (|S| - 2) of second differences."""
        return 2 * self.k * (len(self.layers) + 1 - self.least)

    def candidates(self, lens: Mapping[int, Tensor]) -> Tensor:
        """(n, B): of each difference its k largest, then its k smallest. One or two rows (n, V) are
        held beside the lens."""
        found = []
        for change in self.differences([lens[layer] for layer in self.layers]):
            found += [top_ids(change, self.k), top_ids(change, self.k, largest=False)]
        return torch.cat(found, dim=1)

    def differences(self, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """Each (n, V), in the place of the one before."""
        change = torch.empty_like(rows[0])
        for before, after in pairwise(rows):
            yield torch.sub(after, before, out=change)


class SecondDifference(ProbabilityDelta):
    """Second differences, PD^2: at most 2 k (|S| - 2) candidates.

    Args:
        layers: S, three or more.
        k: tokens taken at either end of each difference.
    """

    name = "second difference"
    least = 3

    def __init__(self, layers: Sequence[int] = (26, 27, 28, 29, 30, 31, 32), k: int = 2) -> None:
        super().__init__(layers, k)

    def differences(self, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """Each (n, V), in the place of the one before; a second row is held for it."""
        change = torch.empty_like(rows[0])
        return (torch.sub(after, before, out=change) for before, after in held_pairs(super().differences(rows)))


def held_pairs(rows: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Neighbours among rows that are each written over the one before."""
    before = next(rows).clone()
    for after in rows:
        yield before, after
        before.copy_(after)
