"""Keep N of every M consecutive inputs of a row, those of largest score.

Exactly M - N of each run are pruned; of equal scores the first. Of a last run that is shorter than M, at most N are
kept, as if it went on with pruned weights. R rows, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fulgurite.methods.exact_masks import checked
from fulgurite.methods.pruning.pattern import kept_of


def n_m_mask(scores: Tensor, pattern: str) -> Tensor:
    """True where a weight is kept.

    Args:
        scores: (R, C), not negative.
        pattern: kept weights and length of a run, as in ``2:4``.

    Raises:
        ValueError: no such pattern, or negative or NaN scores.
    """
    kept, run = kept_of(pattern)
    checked("scores", scores, scores.numel())
    rows, columns = scores.shape
    whole = columns // run * run
    mask = torch.ones(rows, columns, dtype=torch.bool, device=scores.device)
    if whole:
        runs = scores[:, :whole].reshape(rows, whole // run, run)
        mask[:, :whole] = (two_of_four(runs) if (kept, run) == (2, 4) else largest_of_runs(runs, kept)).flatten(1)
    if columns - whole > kept:
        mask[:, whole:] = largest_of_runs(scores[:, None, whole:], kept).flatten(1)
    return mask


def largest_of_runs(runs: Tensor, kept: int) -> Tensor:
    """True at the ``kept`` largest of the last dimension; of equal ones, the last."""
    order = runs.argsort(dim=-1, stable=True)
    chosen = torch.arange(runs.shape[-1], device=runs.device) >= runs.shape[-1] - kept
    return torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, order, chosen.expand_as(runs))


def two_of_four(runs: Tensor) -> Tensor:
    """As `largest_of_runs`, of (..., 4): minima and maxima give the two in the middle, and only ties need an order."""
    a, b, c, d = runs.unbind(-1)
    lower = torch.maximum(torch.minimum(a, b), torch.minimum(c, d))
    upper = torch.minimum(torch.maximum(a, b), torch.maximum(c, d))
    second, third = torch.minimum(lower, upper), torch.maximum(lower, upper)
    mask = runs > second[..., None]
    tied = second == third
    if tied.any():
        mask[tied] = largest_of_runs(runs[tied], 2)
    return mask
