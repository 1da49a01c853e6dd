"""LoRA (Hu et al., 2021, arXiv 2106.09685) as a branch beside a linear layer: y + s B A drop(x).

s is alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (arXiv 2312.03732). A is (rank, in), B is
(out, rank).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.methods.adapters.base import Adapter
from fulgurite.methods.adapters.low_rank_branch import Down, Up, branch_down, branch_up
from fulgurite.methods.adapters.mixing import Mixture


class LoRA(Adapter):
    """y + s * B A drop(x), with B = 0 at start, so that a fresh adapter is the identity.

    Mixing adds up the weight changes: a sample sees W + s * sum_i p_i B_i A_i. (The factors are not averaged
    one by one: B and A of different sets have no common basis.)

    Args:
        site: the linear layer, or (in_features, out_features).
        rank: width of the branch.
        alpha: numerator of the scale.
        dropout: on the input of the branch.
        rslora: divide by the square root of the rank instead of the rank.

    Raises:
        ValueError: ``site`` is no linear layer, or ``rank`` is below 1.
    """

    verb = "transform"

    def __init__(
        self,
        site: nn.Linear | tuple[int, int],
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rslora: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(site, nn.Linear):
            site = (site.in_features, site.out_features)
        if not isinstance(site, tuple):
            raise ValueError(f"LoRA adapts nn.Linear layers, not {type(site).__name__}; choose other points")
        if rank < 1:
            raise ValueError(f"rank={rank} must be at least 1")
        in_features, out_features = site
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.down = Down(in_features, rank, bias=False)
        self.up = Up(rank, out_features, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A ~ U(-1, 1) / sqrt(in_features), the default of `nn.Linear` and of `peft`; B = 0."""
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5), generator=generator)
        self.up.weight.zero_()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``x`` (..., in), ``y`` (..., out) -> (..., out)."""
        return self.up(self.down(F.dropout(x, self.dropout, self.training)), y, self.scale)

    @torch.no_grad()
    def folded(self, site: nn.Module) -> dict[str, Tensor]:
        """W + s B A, added up in float32 or better."""
        kind = torch.promote_types(site.weight.dtype, torch.float32)
        change = self.up.weight.to(kind) @ self.down.weight.to(kind)
        return {"weight": torch.add(site.weight.to(kind), change, alpha=self.scale)}

    @classmethod
    def mix(cls, experts: Sequence[Self], mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
        """``x`` (B, ..., in), ``y`` (B, ..., out) -> (B, ..., out).

        The branches of the k used sets run side by side; extra memory B * S * k * rank.
        """
        used = [experts[i] for i in mixture.used]
        first = experts[0]
        x = F.dropout(x, first.dropout, first.training)
        hidden = branch_down(x, torch.cat([e.down.weight for e in used]))  # (B, ..., k * rank)
        shares = mixture.weights[:, list(mixture.used)].to(hidden.dtype).repeat_interleave(first.rank, dim=1)
        hidden = hidden * shares.view(len(x), *(1,) * (x.dim() - 2), -1)
        return branch_up(hidden, y, torch.cat([e.up.weight for e in used], dim=1), first.scale)
