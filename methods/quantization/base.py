"""What all quantization of one matrix shares: its grid, bits by name, and weights that stay as they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fulgurite.methods.compression import Compressor
from fulgurite.methods.quantization.grid import UNQUANTIZED_BITS, GridSettings, GroupSize, Scheme, group_of_columns

ScaleType = Literal["float16", "bfloat16", "float32"]


class Quantizer(Compressor):
    """A compressor that puts weights on grids of 2^bits levels.

    Args:
        bits: of every matrix, 1 to 8; 16 leaves it as it is.
        group_size: columns of a row that share a scale; all of a row (``channel``), or all of a matrix (``tensor``).
        scheme: how scale and zero come from the range; see `grid`.
        clip_search: search the range that loses least, instead of the full one.
        scale_dtype: type in which scales are stored, and used; that of the weight where None.
        bits_by_name: full pattern of layer names -> bits, in the place of ``bits``; the first that matches.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: GroupSize = 128,
        scheme: Scheme = "symmetric",
        clip_search: bool = False,
        scale_dtype: ScaleType | None = None,
        bits_by_name: dict[str, int] | None = None,
    ) -> None:
        for each in (bits, *(bits_by_name or {}).values()):
            if each < UNQUANTIZED_BITS:
                GridSettings(each, scheme, clip_search)
        group_of_columns(1, group_size)
        self.bits, self.group_size, self.scheme, self.clip_search = bits, group_size, scheme, clip_search
        self.scale_dtype, self.bits_by_name = scale_dtype, dict(bits_by_name or {})
        self.assigned: dict[str, int] = {}
        self.kept: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}

    def assign(self, bits: Mapping[str, int]) -> None:
        """Take the bits of every matrix from an allocation, by the name of its layer."""
        self.assigned = dict(bits)

    def keep(self, masks: Mapping[str, Tensor]) -> None:
        """Leave the weights where a mask (out, in) is True as they are (TaCQ), by the name of the layer."""
        self.kept = dict(masks)

    def keep_zeros(self, masks: Mapping[str, Tensor]) -> None:
        """Leave the weights at 0 where a mask (out, in) of pruning is False, by the name of the layer."""
        self.masks = dict(masks)

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Check what is given by name.

        Raises:
            ValueError: an entry of ``bits_by_name`` matches no layer, an allocation leaves some out, or a mask does not
                fit its layer.
        """
        if self.assigned and (missing := [name for name in weights if name not in self.assigned]):
            raise ValueError(f"the allocation has no bits for {len(missing)} layers, first {missing[0]}")
        for name, mask in (*self.kept.items(), *self.masks.items()):
            if name in weights and (mask.shape != weights[name].shape or mask.dtype != torch.bool):
                shape = tuple(weights[name].shape)
                raise ValueError(f"{name}: a mask of {tuple(mask.shape)} in {mask.dtype}, expected {shape} in bool")
        for pattern in self.bits_by_name:
            if not any(re.fullmatch(pattern, name) for name in weights):
                raise ValueError(
                    f"bits_by_name: {pattern!r} matches none of {len(weights)} layers, as {next(iter(weights))}"
                )

    def bits_of(self, name: str) -> int:
        """Of one layer."""
        if name in self.assigned:
            return self.assigned[name]
        return next((value for each, value in self.bits_by_name.items() if re.fullmatch(each, name)), self.bits)

    def kept_of(self, name: str, weight: Tensor) -> Tensor | None:
        """Which weights of a layer stay as they are."""
        mask = self.kept.get(name)
        return None if mask is None else mask.to(weight.device)

    def pruned_of(self, name: str, weight: Tensor) -> Tensor | None:
        """Which weights of a layer were pruned, and stay 0."""
        mask = self.masks.get(name)
        return None if mask is None else ~mask.to(weight.device)

    def stored_type(self, weight: Tensor) -> torch.dtype:
        """Type of the scales of a layer."""
        return weight.dtype if self.scale_dtype is None else getattr(torch, self.scale_dtype)
