"""Scores of an edit, from probabilities of its target before and after (UnLOK-VQA, arXiv 2505.01456, its code).

    erasure         max(0, (p_before - p_after) / p_before)                     p of the deleted answer
    injection       max(2e-8, 1 - (1 - p_after) / (1 - p_before))               p of the text that takes its place
    neighbourhood   1 - |p_after - p_before| / (|p_before - 0.5| + 0.5)         p of the edit's target, asked elsewhere
    target          harmonic mean of the scores on the edited question, on a rephrasing, and on a neighbour

The published formulas divide by 0 where p_before is 0 (erasure) or 1 (injection). Here nothing was there to erase, and
the score is 0; the text was sure already, and the score is 1 where it still is.

A NaN stands for what an item does not have.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Form = Literal["erasure", "injection"]
LEAST_INJECTION = 2e-8


def erasure_score(before: Tensor, after: Tensor) -> Tensor:
    """Share of the answer's probability that is gone, elementwise, in [0, 1]."""
    return ((before - after) / before).where(before != 0, 0.0).clamp(min=0)


def injection_score(before: Tensor, after: Tensor) -> Tensor:
    """Share of what was missing to certainty that is there now, elementwise, in [2e-8, 1]."""
    score = 1 - (1 - after) / (1 - before)
    return score.where(before != 1, (after == 1).to(score)).clamp(min=LEAST_INJECTION)


def edit_score(before: Tensor, after: Tensor, form: Form) -> Tensor:
    """Rewrite score of the edited question, paraphrase score of another wording."""
    return erasure_score(before, after) if form == "erasure" else injection_score(before, after)


def neighbourhood_score(before: Tensor, after: Tensor) -> Tensor:
    """How little the probability moved where it should not, elementwise: 1 where not at all, 0 at the most."""
    return 1 - (after - before).abs() / ((before - 0.5).abs() + 0.5)


def target_score(rewrite: Tensor, paraphrase: Tensor, neighbourhood: Tensor) -> Tensor:
    """Harmonic mean of the three, elementwise; 0 where one is 0 or missing."""
    return harmonic_mean(torch.stack([rewrite, paraphrase, neighbourhood], dim=-1))


def harmonic_mean(values: Tensor) -> Tensor:
    """Over the last dimension, of numbers from 0 on; 0 where one of them is 0 or NaN."""
    mean = values.shape[-1] / (1 / values).sum(-1)
    return mean.where((values > 0).all(-1), 0.0)
