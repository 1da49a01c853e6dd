"""BitFit (Ben Zaken et al., 2021, arXiv 2106.10199): the biases of a frozen model train, as changes added to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from fulgurite.methods.adapters.base import Adapter
from fulgurite.methods.adapters.mixing import Mixture


class Bias(Adapter):
    """y + delta, with delta = 0 at start, at a layer that has a bias: linear, norm, or convolution.

    Parameters: as many as the bias has.

    Args:
        site: the layer.
        new: give a linear layer or a norm without a bias one, as the published code does with T5.

    Raises:
        ValueError: the site has no bias that is added to its output, and gets none.
    """

    verb = "transform"

    def __init__(self, site: nn.Module, new: bool = False) -> None:
        super().__init__()
        bias = getattr(site, "bias", None)
        if not isinstance(bias, Tensor):
            weight = getattr(site, "weight", None)
            if not new or not isinstance(weight, Tensor) or not (weight.dim() == 1 or isinstance(site, nn.Linear)):
                raise ValueError(
                    f"Bias adapts layers with a bias, and this {type(site).__name__} has none; with new: true linear "
                    "layers and norms get one"
                )
            bias = weight.new_zeros(len(weight))
        self.delta = nn.Parameter(torch.zeros_like(bias, requires_grad=True))
        # Behind the channels of a convolution come its positions.
        self.positions = len(site.kernel_size) if isinstance(site, nn.modules.conv._ConvNd) else 0

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Zero; nothing is drawn."""
        self.delta.zero_()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``y`` (..., O), of a convolution (..., O, *positions)."""
        return y + self._placed(self.delta.to(y.dtype))

    def _placed(self, delta: Tensor) -> Tensor:
        return delta.view(*delta.shape, *(1,) * self.positions)

    @torch.no_grad()
    def folded(self, site: nn.Module) -> dict[str, Tensor]:
        """b + delta."""
        if getattr(site, "bias", None) is None:
            return super().folded(site)
        return {"bias": site.bias.to(torch.promote_types(site.bias.dtype, torch.float32)) + self.delta}

    @classmethod
    def mix(cls, experts: Sequence[Self], mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
        """``y`` (B, ..., O) plus each sample's average."""
        first = experts[0]
        deltas = mixture.weights @ torch.stack([e.delta.to(mixture.weights.dtype) for e in experts])  # (B, O)
        between = (1,) * (y.dim() - 2 - first.positions)
        return y + deltas.to(y.dtype).view(len(y), *between, -1, *(1,) * first.positions)
