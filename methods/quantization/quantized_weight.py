"""A quantized weight as data: integers, scales, zeros, the group of every column, and weights kept as they are.

    W_ij = s_ig (q_ij - z_ig),  g = group_index_j;  kept entries hold their own value

`Compressed` is what every solver of one layer returns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fulgurite.methods.finite import all_finite


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (out, in) on a grid of 2^bits levels.

    Args:
        integers: (out, in) uint8, 0 to 2^bits - 1; an entry that was pruned or is kept holds the zero of its group.
        scale: (out, G), or (1, 1) of a tensor, in the type that is stored.
        zero: like ``scale``, uint8, 0 to 2^bits - 1.
        group_index: (in,) int32, the group of every column.
        bits: 1 to 8.
        kept: (out, in) bool, entries that are not on the grid, or none.
        kept_values: (number of kept,) their values, row by row.
    """

    integers: Tensor
    scale: Tensor
    zero: Tensor
    group_index: Tensor
    bits: int
    kept: Tensor | None = None
    kept_values: Tensor | None = None

    @property
    def symmetric(self) -> bool:
        """Whether every zero is 2^(bits - 1), so that none need be stored."""
        return bool((self.zero == 2 ** (self.bits - 1)).all())

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same on another device."""
        parts = ("integers", "scale", "zero", "group_index", "kept", "kept_values")
        values = {name: getattr(self, name) for name in parts}
        return replace(self, **{name: None if value is None else value.to(device) for name, value in values.items()})

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (out, in), computed in float32 (float64 where a part is) and returned in ``dtype``.

        Memory: two copies of the weight.
        """
        working = torch.promote_types(self.scale.dtype, torch.float32)
        if self.kept_values is not None:
            working = torch.promote_types(working, self.kept_values.dtype)
        index = self.group_index.long()
        values = self.integers.to(working)
        scale, zero = self.scale.to(working), self.zero.to(working)
        groups, widths = index.unique_consecutive(return_counts=True)
        if len(groups) == scale.shape[1]:  # every group lies in one piece, so that nothing need be gathered
            for group, part in zip(groups.tolist(), values.split(widths.tolist(), dim=1)):
                part.sub_(zero[:, group, None]).mul_(scale[:, group, None])
        else:
            values.sub_(zero[:, index]).mul_(scale[:, index])
        if self.kept is not None:
            values[self.kept] = self.kept_values.to(working)
        return values if dtype is None else values.to(dtype)


@dataclass(frozen=True)
class Compressed:
    """What became of one layer's weight.

    Args:
        weight: (out, in) in the type of the input: what the layer computes with.
        quantized: the same as data, or nothing where the weight was not quantized.
        mask: (out, in) bool, True where a weight was not pruned, or nothing where pruning was not asked for.
        loss: half of tr((W - Q) H (W - Q)^T) with the damped H; 0 where no H was used.
        damping: multiple of the mean of diag H that was added to it; nothing where no H was used, which is so too
            after a warning that H could not be factored.
    """

    weight: Tensor
    quantized: QuantizedWeight | None = None
    mask: Tensor | None = None
    loss: float = 0.0
    damping: float | None = None

    def to(self, device: torch.device | str) -> Compressed:
        """The same on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        quantized = None if self.quantized is None else self.quantized.to(device)
        return replace(self, weight=self.weight.to(device), quantized=quantized, mask=mask)


def checked_weight(weight: Tensor) -> Tensor:
    """``weight`` (out, in) in float64 if it has that type and in float32 otherwise.

    Raises:
        ValueError: it is no matrix, or holds numbers that are not finite.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"a weight of {tuple(weight.shape)} in {weight.dtype}: expected a matrix (out, in) of floats")
    if not all_finite(weight):
        raise ValueError("the weight holds NaN or infinite entries")
    return weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
