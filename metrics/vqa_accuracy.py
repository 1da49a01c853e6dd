"""Accuracy of answers from a closed vocabulary, hard or soft.

Legend: B batch, A answers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


def best_answers(logits: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` highest of (B, A) logits, best first, (B, min(k, A)).

    Of equal logits the lower index comes first, on every device; `torch.topk` promises no order, and sorting all costs
    a hundred times as much.
    """
    left, best = logits.clone(), []
    for _ in range(min(k, logits.shape[-1])):
        best.append(left.argmax(-1, keepdim=True))
        left.scatter_(-1, best[-1], -torch.inf)
    return torch.cat(best, dim=-1)


def answer_credit(logits: Tensor, targets: Tensor, top_k: int = 1) -> Tensor:
    """Best score among the ``top_k`` highest answers of each sample, (B,) float64.

    ``targets`` (B, A) holds 1 at the right answer, or the soft scores ``min(count / 2, 1)`` of iVQA. An answer
    outside the vocabulary is a row of zeros and never correct.
    """
    return targets.gather(-1, best_answers(logits, top_k)).amax(-1).double()


class VQAAccuracy(Metric):
    """Mean credit of the ``top_k`` highest answers.

    Args:
        top_k: how many answers a sample may offer.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, top_k: int = 1) -> None:
        super().__init__()
        self.top_k = top_k
        self.add_state("credit", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor, counted: Tensor | None = None) -> None:
        """Add (B, A) logits and targets; samples where ``counted`` (B,) is False are left out."""
        credit = answer_credit(logits, targets, self.top_k)
        if counted is not None:
            credit = credit[counted]
        self.credit += credit.sum()
        self.total += credit.numel()

    def compute(self) -> Tensor:
        """Mean credit; NaN before any sample."""
        return self.credit / self.total
