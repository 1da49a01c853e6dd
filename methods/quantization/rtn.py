"""Round to nearest: a grid per tensor, row or group of columns, and every weight on its nearest level."""

from __future__ import annotations

import torch
from torch import Tensor

from fulgurite.methods.quantization.base import Quantizer
from fulgurite.methods.quantization.grid import (
    UNQUANTIZED_BITS,
    GridSettings,
    GroupSize,
    Scheme,
    fit_groups,
    group_of_columns,
    to_integers,
)
from fulgurite.methods.quantization.quantized_weight import Compressed, QuantizedWeight, checked_weight


@torch.no_grad()
def quantize_rtn(
    weight: Tensor,
    bits: int,
    group_size: GroupSize = "channel",
    scheme: Scheme = "asymmetric",
    clip_search: bool = False,
    scale_dtype: torch.dtype | None = None,
    kept: Tensor | None = None,
) -> Compressed:
    """Round a weight (out, in) to a grid of its own. Memory: about four copies of it in float32.

    Args:
        weight: (out, in). It is not changed; float64 is computed in float64, all else in float32.
        bits: 1 to 8; 16 or more leave the weight as it is.
        group_size: columns that share a scale per row, or a whole row (``channel``), or the whole ``tensor``.
        scheme: the grid; see `grid`.
        clip_search: search the range that loses least.
        scale_dtype: type in which scales are stored.
        kept: (out, in) bool; entries that stay as they are, and do not stretch the grid.

    Raises:
        ValueError: an argument is out of its range, or the weight is not finite.
    """
    dense = checked_weight(weight)
    if bits >= UNQUANTIZED_BITS:
        return Compressed(weight.detach().clone())
    settings = GridSettings(bits, scheme, clip_search, scale_dtype)
    scale, zero = fit_groups(dense, group_size, settings, kept)
    group_index = group_of_columns(dense.shape[1], group_size).to(dense.device)
    index = group_index.long()
    integers = to_integers(dense, scale[:, index], zero[:, index], settings.largest)
    if kept is not None:
        integers = torch.where(kept, zero[:, index], integers)
    quantized = QuantizedWeight(
        integers=integers.to(torch.uint8),
        scale=scale.to(scale_dtype or dense.dtype),
        zero=zero.to(torch.uint8),
        group_index=group_index,
        bits=bits,
        kept=kept,
        kept_values=None if kept is None else weight.detach()[kept],
    )
    return Compressed(quantized.dequantize(weight.dtype), quantized)


class Rtn(Quantizer):
    """Rounds to the nearest level; needs no data."""

    needs = "nothing"

    def compress(self, name: str, weight: Tensor, moment: Tensor | None) -> Compressed:
        """The matrix, rounded."""
        return quantize_rtn(
            weight,
            self.bits_of(name),
            self.group_size,
            self.scheme,
            self.clip_search,
            self.stored_type(weight),
            self.kept_of(name, weight),
        )
