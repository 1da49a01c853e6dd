"""Prune the weights of smallest magnitude, of a matrix or of all matrices together.

score = |W|,     exactly round(p n) of n weights are pruned; of equal ones the first
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fulgurite.methods.exact_masks import rounded_count, smallest_of, smallest_of_all


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
