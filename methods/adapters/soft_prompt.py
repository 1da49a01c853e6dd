"""Soft prompts (Lester et al., 2021, arXiv 2104.08691), made by a small network as in prefix tuning and VL-Adapter.

    p_i = W_2 tanh(W_1 E[i] + b_1) + b_2,   i = 1 .. P        or p_i = E[i] without the network

E is (P, D), W_1 is (m, D), W_2 is (D, m). The prompts stand in front of what a place reads. In front of a decoder they
are past positions: later ones see their keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from fulgurite.methods.adapters.base import Adapter, site_width
from fulgurite.methods.adapters.mixing import Mixture


class SoftPrompt(Adapter):
    """P trained vectors in front of the positions of a place that may become longer.

    A fresh one changes the output: there is no prompt that a model does not see. A sample of mixed sets sees the
    average of their prompts.

    Args:
        site: a place for prompts, ``encoder_prompt`` or ``decoder_prompt`` of a generative backbone.
        length: P.
        hidden: m, the width of the network; None trains the vectors themselves.
        std: all matrices start from N(0, ``std``), what the published BART ends up with; biases start at zero.

    Raises:
        ValueError: the site may not become longer, or a size is below 1.
    """

    verb = "transform"

    def __init__(self, site: nn.Module, length: int = 40, hidden: int | None = 800, std: float = 0.02) -> None:
        super().__init__()
        if not getattr(site, "takes_prompts", False):
            raise ValueError(
                f"SoftPrompt adds positions, which a {type(site).__name__} cannot have; choose the points "
                "encoder_prompt or decoder_prompt"
            )
        if length < 1 or (hidden is not None and hidden < 1):
            raise ValueError(f"length={length} and hidden={hidden} must be at least 1")
        width = site_width(site)
        self.std = std
        self.vectors = nn.Parameter(torch.empty(length, width))
        if hidden is None:
            self.network: nn.Module = nn.Identity()
        else:
            self.network = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """N(0, ``std``) and zero biases."""
        self.vectors.normal_(std=self.std, generator=generator)
        for module in self.network.children():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=self.std, generator=generator)
                module.bias.zero_()

    def prompts(self) -> Tensor:
        """(P, D)."""
        return self.network(self.vectors)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``y`` (B, S, D) -> (B, P + S, D)."""
        return torch.cat([self.prompts().to(y.dtype).expand(len(y), -1, -1), y], dim=1)

    @classmethod
    def mix(cls, experts: Sequence[Self], mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
        """``y`` (B, S, D) -> (B, P + S, D), with each sample's average of the sets' prompts."""
        prompts = torch.stack([expert.prompts() for expert in experts])  # (K, P, D)
        mixed = torch.einsum("bk,kpd->bpd", mixture.weights.to(prompts.dtype), prompts)
        return torch.cat([mixed.to(y.dtype), y], dim=1)
