"""An edit by low-rank factors in each slot: W0 + (alpha / r) B A (LoRA, arXiv 2106.09685; of one weight, 2505.01456).

r (i + o) numbers per slot. A is Kaiming-uniform, B zero, so that a fresh edit changes nothing, bit for bit.

Legend: n slots, R rows, S positions, i inputs and o outputs, r rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.methods.random import uniform
from fulgurite.methods.unlearning.edits.base import Edit, positions_behind, selected


class LowRankEdit(Edit):
    """See the module's text. The defaults are the published ones.

    Args:
        site: the linear layer.
        items: slots.
        rank: r.
        alpha: the scale is alpha / r.
        dropout: on the input of A while training. Each slot draws for itself, from the end of the prompt on, so that
            neither other slots nor padding change its noise; see `answers_behind`.

    Raises:
        ValueError: as in the base; ``rank`` below 1, or ``dropout`` no share.
    """

    def __init__(
        self, site: nn.Module, items: int = 1, rank: int = 2, alpha: float = 6.0, dropout: float = 0.05
    ) -> None:
        super().__init__(site, items)
        if rank < 1 or not 0 <= dropout < 1:
            raise ValueError(f"LowRankEdit: rank={rank} must be at least 1, and dropout={dropout} in [0, 1)")
        self.rank, self.scale, self.dropout = rank, alpha / rank, dropout
        self.down = nn.Parameter(torch.empty(items, rank, site.in_features))
        self.up = nn.Parameter(torch.empty(items, site.out_features, rank))
        self.seeds: list[int] = []  # of slots that draw for themselves
        self.draws = 0
        self.reset_parameters()

    @torch.no_grad()
    def start(self, seeds: Sequence[int]) -> None:
        """As in the base; from here on every slot draws its noise for itself."""
        self.seeds, self.draws = list(seeds), 0
        bound = 1 / math.sqrt(self.down.shape[-1])
        for down, seed in zip(self.down, self.seeds, strict=True):
            fresh = uniform(seed, "edit", 0, "down", down.numel()).view(down.shape)
            down.copy_(fresh.mul_(2 * bound).sub_(bound))
        self.up.zero_()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A ~ U(-1, 1) / sqrt(i), B = 0; noise is that of the process."""
        self.seeds = []
        nn.init.kaiming_uniform_(self.down.view(-1, self.down.shape[-1]), a=math.sqrt(5), generator=generator)
        self.up.zero_()

    def changed(self, x: Tensor, slot: Tensor | None) -> Tensor:
        """As in the base."""
        x = x.to(self.down.dtype)
        if self.training and self.dropout:
            x = x * self.kept(x, slot) if self.seeds else F.dropout(x, self.dropout)
        if slot is None:
            return F.linear(F.linear(x, self.down[0]), self.up[0]).mul(self.scale)
        hidden = torch.bmm(x, selected(self.down, slot).transpose(1, 2))
        return torch.bmm(hidden, selected(self.up, slot).transpose(1, 2)).mul(self.scale)

    @torch.no_grad()
    def kept(self, x: Tensor, slot: Tensor | None) -> Tensor:
        """Inverted dropout's factors for ``x`` (R, S, i), each row by the noise of its slot."""
        slots = [0] * len(x) if slot is None else slot.tolist()
        behind, width = positions_behind(), x.shape[2]
        self.draws += 1
        rows: Counter[int] = Counter()
        factors = []
        for each in slots:
            place = f"{self.draws} {rows[each]}"
            rows[each] += 1
            prompt, answer = (
                uniform(self.seeds[each], "edit dropout", part, place, length * width).view(length, width)
                for part, length in enumerate((x.shape[1] - behind, behind))
            )
            factors.append(torch.cat([prompt.flip(0), answer]) >= self.dropout)
        return torch.stack(factors).to(x).div_(1 - self.dropout)

    def change(self, slot: int) -> Tensor:
        """As in the base."""
        return self.scale * (self.up[slot].float() @ self.down[slot].float()).detach()
