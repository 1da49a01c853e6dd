"""What keeps the rest of a model in its place while it forgets.

    NLL      sum_r nll_r / sum_r n_r
    KL       sum_{r,t} KL(P_ref || P) / sum_r n_r
    states   mean_r 1/(n_r D) sum_t |h_l - h_ref_l|^2        (EMBED_DIFF of RMU, arXiv 2403.03218)

Each is over answer positions alone; the published KL is a mean over prompt and padding too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch.nn import functional as F

from fulgurite.methods.unlearning.objectives.base import Terms, View, per_token, token_losses
from fulgurite.methods.unlearning.objectives.rmu import squared_distance


class RetainTerm(ABC):
    """A loss of samples that must stay as they are.

    Attributes:
        state_layer: the block whose output it reads, counted from 0; a pass may stop behind it.
        needs_logits: whether it reads logits of the answer.
        needs_reference: whether it compares with the model before the edit.
    """

    state_layer: int | None = None
    needs_logits: bool = True
    needs_reference: bool = False

    @abstractmethod
    def __call__(self, view: View, reference: View | None) -> Terms:
        """Totals and counts of R rows, as those of `Objective`."""


class RetainNLL(RetainTerm):
    """Cross entropy of the right answers."""

    def __call__(self, view: View, reference: View | None) -> Terms:
        """Totals and counts of the rows."""
        return per_token(token_losses(view), view)


class RetainKL(RetainTerm):
    """Kullback-Leibler divergence from the model before the edit, at each answer token."""

    needs_reference = True

    def __call__(self, view: View, reference: View | None) -> Terms:
        """Totals and counts of the rows."""
        with torch.no_grad():
            before = F.log_softmax(reference.logits.float(), dim=-1)
        now = F.log_softmax(view.logits.float(), dim=-1)
        return per_token(F.kl_div(now, before, reduction="none", log_target=True).sum(-1), view)


class RetainStates(RetainTerm):
    """Squared distance of hidden states from those of the model before the edit.

    Args:
        layer: l, counted from 0; that of `RMU`.

    Raises:
        ValueError: it is negative.
    """

    needs_logits = False
    needs_reference = True

    def __init__(self, layer: int = 7) -> None:
        if layer < 0:
            raise ValueError(f"layer={layer} must be the number of a block, from 0 on")
        self.state_layer = layer

    def __call__(self, view: View, reference: View | None) -> Terms:
        """Totals and counts of the rows."""
        return squared_distance(view, reference.states.detach())
