"""Low-rank adapter of Compacter's code: a bottleneck whose two matrices are products of two thin ones.

y = x L R + b,   L (I, rank), R (rank, O)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fulgurite.methods.adapters.base import site_width
from fulgurite.methods.adapters.compacter import xavier_
from fulgurite.methods.adapters.down_up import Activation, DownUp, Init, inner_width


class LowRankLinear(nn.Module):
    """y = x L R + b. Parameters: rank (I + O) + O."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(in_features, rank))
        self.right = nn.Parameter(torch.empty(rank, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    @torch.no_grad()
    def reset_parameters(self, zero: bool = False, generator: torch.Generator | None = None) -> None:
        """L and R ~ Xavier uniform with gain sqrt(2), or with ``zero`` R = 0; b = 0."""
        xavier_(self.left, generator)
        xavier_(self.right, generator)
        if zero:
            self.right.zero_()
        self.bias.zero_()

    @property
    def weight(self) -> Tensor:
        """(L R)^T (O, I), as a linear layer has it."""
        return (self.left @ self.right).T

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., I) -> (..., O)."""
        return nn.functional.linear(x @ self.left, self.right.T, self.bias)


class LowRankAdapter(DownUp):
    """A(z) = z + s up(drop(act(down(z)))), with low-rank down and up.

    Parameters for width D and inner width b = D // reduction: 2 rank (D + b) + D + b. Mixing averages the products
    L R of sets.

    Args:
        dim: features that leave the site, or the site itself.
        reduction: the inner width is ``dim // reduction``.
        rank: of both matrices.
        scale: s.
        dropout: after the activation.
        activation: the non-linearity.
        init: ``"zero_up"`` starts with R = 0 in the up-layer, the identity; ``"official"`` draws it too.

    Raises:
        ValueError: ``reduction`` leaves no inner unit, or ``rank`` is below 1.
    """

    def __init__(
        self,
        dim: int | nn.Module,
        reduction: int = 8,
        rank: int = 1,
        scale: float = 1.0,
        dropout: float = 0.0,
        activation: Activation = "gelu_new",
        init: Init = "zero_up",
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank={rank} must be at least 1")
        width = site_width(dim)
        inner = inner_width(width, reduction)
        down, up = LowRankLinear(width, inner, rank), LowRankLinear(inner, width, rank)
        super().__init__(down, up, scale, dropout, activation, init)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """As `LowRankLinear.reset_parameters`."""
        self.down.reset_parameters(generator=generator)
        self.up.reset_parameters(self.init == "zero_up", generator)
