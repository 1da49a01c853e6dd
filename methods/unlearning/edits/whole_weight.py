"""An edit of every entry of a weight: full fine-tuning of it, or constrained to a ball around where it was.

    W = W0 + D,   D clamped to [-ball, ball] after each step (L-infinity; Zhu et al., 2020, arXiv 2012.00363)

i o numbers per slot.

Legend: n slots, R rows, S positions, i inputs and o outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.methods.unlearning.edits.base import Edit


class WholeWeightEdit(Edit):
    """See the module's text.

    Args:
        site: the linear layer.
        items: slots.
        ball: largest change of an entry; None does not constrain it.

    Raises:
        ValueError: as in the base, or ``ball`` is not above 0.
    """

    def __init__(self, site: nn.Module, items: int = 1, ball: float | None = None) -> None:
        super().__init__(site, items)
        if ball is not None and not ball > 0:
            raise ValueError(f"WholeWeightEdit: ball={ball} must be above 0")
        self.ball = ball
        self.delta = nn.Parameter(torch.zeros(items, site.out_features, site.in_features))

    @torch.no_grad()
    def start(self, seeds: Sequence[int]) -> None:
        """As in the base; nothing is drawn."""
        self.delta.zero_()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """No change."""
        self.delta.zero_()

    def changed(self, x: Tensor, slot: Tensor | None) -> Tensor:
        """As in the base. Slot by slot, so that no weight is copied per row."""
        x = x.to(self.delta.dtype)
        if slot is None:
            return F.linear(x, self.delta[0])
        out = x.new_zeros(*x.shape[:-1], self.delta.shape[1])
        for each in slot.unique().tolist():
            rows = (slot == each).nonzero()[:, 0]
            out = out.index_copy(0, rows, F.linear(x[rows], self.delta[each]))
        return out

    def change(self, slot: int) -> Tensor:
        """As in the base."""
        return self.delta[slot].detach().float()

    @torch.no_grad()
    def project(self) -> None:
        """Clamp every entry to the ball."""
        if self.ball is not None:
            self.delta.clamp_(-self.ball, self.ball)
