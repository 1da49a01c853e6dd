"""Gradual pruning: a little at a time while the model trains, fast at first (arXiv 1710.01878).

    s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3,   t from t_0 to t_1

Every time the weights of smallest magnitude go; what was pruned stays so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fulgurite.methods.exact_masks import rounded_count, smallest_of
from fulgurite.methods.pruning.magnitude import magnitude_scores


def cubic_sparsity(step: int, start: int, end: int, target: float, initial: float = 0.0) -> float:
    """s_t: ``initial`` up to ``start``, ``target`` from ``end`` on."""
    if step >= end:
        return target
    left = 1 - max(step - start, 0) / (end - start)
    return target + (initial - target) * left**3


def grown_mask(weight: Tensor, mask: Tensor | None, sparsity: float) -> Tensor:
    """True where a weight is kept, in the shape of ``weight``: all but the round(s n) of smallest magnitude.

    Args:
        weight: any shape.
        mask: True where it was kept so far; nothing was pruned where None. What was pruned goes first.
        sparsity: s.
    """
    scores = magnitude_scores(weight)
    if mask is not None:
        # What is pruned is below every weight that is left, also below those that happen to be 0.
        scores = scores.to(torch.float32).clamp_(min=torch.finfo(torch.float32).tiny).mul_(mask)
    return ~smallest_of(scores, rounded_count(sparsity, scores.numel()))
