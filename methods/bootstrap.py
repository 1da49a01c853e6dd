"""How far a mean may be off by the choice of the items alone: percentile bootstrap (Efron, 1979).

Legend: N items, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bootstrap_interval(
    values: Tensor, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Lower and upper end (C,) float64 of the interval of each column's mean, over items drawn with replacement.

    All columns see the same draws. The draws hang on ``seed`` and N alone.

    Args:
        values: (N, C); NaN where an item has none, which no mean counts.
        level: share of the resampled means inside.
        resamples: how many; N times as many numbers are held.
        seed: of the draws.

    Raises:
        ValueError: ``level`` is not between 0 and 1, or ``resamples`` below 1.
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level={level} must lie between 0 and 1, and resamples={resamples} be at least 1")
    values = values.detach().cpu().double()
    number, columns = values.shape
    if not number:
        return values.new_full((columns,), torch.nan), values.new_full((columns,), torch.nan)
    drawn = torch.randint(number, (resamples, number), generator=torch.Generator().manual_seed(seed))
    times = values.new_zeros(resamples, number).scatter_add_(1, drawn, values.new_ones(resamples, number))
    means = (times @ values.nan_to_num()) / (times @ values.isnan().logical_not().double())
    tail = (1 - level) / 2
    low, high = means.nanquantile(values.new_tensor([tail, 1 - tail]), dim=0)
    return low, high
