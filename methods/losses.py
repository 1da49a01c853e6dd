"""Losses over a closed answer vocabulary.

Legend: B batch, A answers.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy against answer scores: ``sum_j a_j nll_j / max(sum_j a_j, 1)`` per sample.

    With one answer of score 1 this is the usual cross entropy; a row of zeros (answer outside the vocabulary)
    gives 0 and no gradient.

    Args:
        logits: (B, A).
        targets: (B, A) scores in [0, 1]; for iVQA ``min(count / 2, 1)``.

    Returns:
        (B,) losses.
    """
    nll = -F.log_softmax(logits.float(), dim=-1)
    nll = nll.where(targets > 0, 0.0)  # what cannot be an answer has -inf for its logit
    return (targets * nll).sum(-1) / targets.sum(-1).clamp(min=1)
