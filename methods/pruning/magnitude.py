"""Prune the weights of smallest magnitude, of a matrix or of all matrices together.

score = |W|,     exactly round(p n) of n weights are pruned; of equal ones the first
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from fulgurite.methods.exact_masks import rounded_count, smallest_of, smallest_of_all
from fulgurite.methods.pruning.base import Pruner
from fulgurite.methods.pruning.n_m import n_m_mask
from fulgurite.methods.quantization.quantized_weight import Compressed, checked_weight


def magnitude_scores(weight: Tensor) -> Tensor:
    """|W| in float32, or in float64 where the weight has that."""
    return weight.detach().abs().to(torch.promote_types(weight.dtype, torch.float32))


def matrix_mask(scores: Tensor, sparsity: float) -> Tensor:
    """True where a weight is kept: all but the round(p n) smallest scores of one tensor."""
    return ~smallest_of(scores, rounded_count(sparsity, scores.numel()))


def global_magnitude_masks(weights: Mapping[str, Tensor], sparsity: float) -> Iterator[tuple[str, Tensor]]:
    """(name, mask), True where a weight is kept: all but the round(p N) smallest magnitudes of all N weights.

    Holds one weight's scores and mask at a time.
    """
    sizes = {name: weight.numel() for name, weight in weights.items()}
    count = rounded_count(sparsity, sum(sizes.values()))
    for name, pruned in smallest_of_all(lambda name: magnitude_scores(weights[name]), sizes, count):
        yield name, ~pruned


class Magnitude(Pruner):
    """Prunes the weights of smallest magnitude; needs no data.

    Args:
        sparsity: share that is pruned, of every matrix or of all together.
        pattern: N:M instead.
        sparsities: see `Pruner`.
        scope: rank the weights of each ``matrix``, or of all of them together (``global``).
    """

    needs = "nothing"

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str | None = None,
        sparsities: dict[str, float] | None = None,
        scope: Literal["matrix", "global"] = "matrix",
    ) -> None:
        super().__init__(sparsity, pattern, sparsities)
        if scope == "global" and (pattern is not None or sparsities):
            raise ValueError("scope=global ranks all matrices together: give sparsity alone")
        self.scope = scope
        self._masks: dict[str, Tensor] = {}

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Rank all weights, where they are ranked together. Memory: a mask of every matrix."""
        super().begin(weights)
        if self.scope == "global" and self.assigned:
            raise ValueError("an allocation gives every layer its sparsity: leave out scope=global")
        if self.scope == "global":
            self._masks = dict(global_magnitude_masks(weights, self.sparsity))

    def compress(self, name: str, weight: Tensor, moment: Tensor | None) -> Compressed:
        """The matrix with its smallest weights 0."""
        checked_weight(weight)
        if self.scope == "global":
            return pruned(weight, self._masks[name])
        scores = magnitude_scores(weight)
        mask = matrix_mask(scores, self.sparsity_of(name)) if self.pattern is None else n_m_mask(scores, self.pattern)
        return pruned(weight, mask)


def pruned(weight: Tensor, mask: Tensor) -> Compressed:
    """The weight with 0 where ``mask`` is False; all else is as it was, bit for bit."""
    return Compressed(weight.detach().masked_fill(~mask, 0), mask=mask)
