"""Grids of 2^b levels and how they are fitted to weights.

    value = s (q - z),     q = clamp(round(w / s) + z, 0, 2^b - 1),     round is half to even

Integers are unsigned throughout; a signed one of another library is q - 2^(b-1). Scales, of rows w:

    asymmetric             s = (max(w, 0) - min(w, 0)) / (2^b - 1), z = round(-min(w, 0) / s); zeros span [-1, 1]
    symmetric              s = 2 max|w| / (2^b - 1), z = 2^(b-1), as compressed-tensors; of zeros s is the type's eps
    symmetric_gptq         the same scale, as GPTQ, GPTQModel and TaCQ; zeros span [-1, 1]
    symmetric_quarot       s = max|w| / (2^(b-1) - 1), z = 2^(b-1), as QuaRot and RSQ; max|w| is at least 1e-5

The clip search shrinks the range by 1 - i/100, i = 0..79, and keeps per row what makes sum |s (q - z) - w|^2.4 the
smallest, the earlier one where equal. N rows, G groups of columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Scheme = Literal["asymmetric", "symmetric", "symmetric_gptq", "symmetric_quarot"]
GroupSize = int | Literal["channel", "tensor"]

CLIP_STEPS = 80
CLIP_EXPONENT = 2.4
SEARCHED_AT_ONCE = 1 << 18
QUAROT_SMALLEST = 1e-5
UNQUANTIZED_BITS = 16


@dataclass(frozen=True)
class GridSettings:
    """How a grid is fitted.

    Args:
        bits: 1 to 8.
        scheme: whose scale and zero; see above.
        clip_search: search the range that loses least, instead of the full one.
        scale_dtype: type in which scales are stored; they are rounded to it before they are used. That of the
            computation when not given.

    Raises:
        ValueError: other bits, an unknown scheme, a scale type that is no float, or one bit on QuaRot's grid.
    """

    bits: int
    scheme: Scheme = "asymmetric"
    clip_search: bool = False
    scale_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.bits not in range(1, 9):
            raise ValueError(f"bits={self.bits}: a grid has 1 to 8 bits, and 16 or more leave weights as they are")
        if self.scheme not in get_args(Scheme):
            raise ValueError(f"scheme={self.scheme!r}: expected one of {', '.join(get_args(Scheme))}")
        if self.bits == 1 and self.scheme == "symmetric_quarot":
            raise ValueError("scheme='symmetric_quarot' has no grid of bits=1: give bits=2 or another scheme")
        if self.scale_dtype is not None and not self.scale_dtype.is_floating_point:
            raise ValueError(f"scale_dtype={self.scale_dtype}: expected a floating type")

    @property
    def largest(self) -> int:
        """The largest integer."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero of symmetric grids."""
        return 2 ** (self.bits - 1)


def to_integers(weight: Tensor, scale: Tensor, zero: Tensor, largest: int) -> Tensor:
    """clamp(round(w / s) + z, 0, largest), in the type of ``weight``."""
    return (weight / scale).round_().add_(zero).clamp_(0, largest)


def to_values(integers: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """s (q - z)."""
    return (integers - zero).mul_(scale)


def fit_grid(rows: Tensor, settings: GridSettings, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero of every row.

    Args:
        rows: (N, n), finite.
        excluded: (N, n) bool; entries that need no place on the grid. They count as the mean of the others of their
            row, or 0 where there are none (TaCQ).

    Returns:
        (N,) scales that are exact in ``settings.scale_dtype``, and (N,) zeros, both in the type of ``rows``. The clip
        search holds a few copies of 2^18 entries, or of a row if that is longer.

    Raises:
        ValueError: a scale is beyond the largest number of ``settings.scale_dtype``.
    """
    if excluded is not None:
        mean = rows.masked_fill(excluded, 0).sum(1) / (~excluded).sum(1).clamp(min=1)
        rows = torch.where(excluded, mean[:, None], rows)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    scale, zero = scale_and_zero(low, high, settings)
    if settings.clip_search:
        step = max(1, SEARCHED_AT_ONCE // rows.shape[1])
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            search_clip(rows[part].contiguous(), low[part], high[part], scale[part], zero[part], settings)
    return scale, zero


def scale_and_zero(low: Tensor, high: Tensor, settings: GridSettings) -> tuple[Tensor, Tensor]:
    """Scale and zero of the ranges [low, high], each (N,), that hold 0."""
    if settings.scheme == "asymmetric":
        empty = (low == 0) & (high == 0)
        low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
        scale = as_stored((high - low) / settings.largest, settings)
        # A scale that was rounded down can put the zero of a range without positive numbers beyond the last level.
        return scale, (-low / scale).round_().clamp_(0, settings.largest)
    size = torch.maximum(-low, high)
    if settings.scheme == "symmetric_quarot":
        scale = size.clamp(min=QUAROT_SMALLEST) / (settings.middle - 1)
    else:
        scale = 2 * size / settings.largest
        of_zeros = 2 / settings.largest
        if settings.scheme == "symmetric":
            of_zeros = torch.finfo(settings.scale_dtype or scale.dtype).eps
        scale.masked_fill_(scale == 0, of_zeros)
    return as_stored(scale, settings), torch.full_like(scale, settings.middle)


def smallest_of_type(kind: torch.dtype) -> float:
    """The smallest positive number of a floating type, one without full precision."""
    return torch.finfo(kind).tiny * torch.finfo(kind).eps


def as_stored(scale: Tensor, settings: GridSettings) -> Tensor:
    """Scales rounded to the type that stores them, and never to 0.

    Raises:
        ValueError: they do not fit that type.
    """
    kind = settings.scale_dtype or scale.dtype
    stored = scale.to(kind).to(scale.dtype).clamp_(min=smallest_of_type(kind))
    if not torch.isfinite(stored).all():
        raise ValueError(
            f"scales up to {scale.max().item():.3g} do not fit {kind}: give scale_dtype torch.bfloat16 or torch.float32"
        )
    return stored


def search_clip(rows: Tensor, low: Tensor, high: Tensor, scale: Tensor, zero: Tensor, settings: GridSettings) -> None:
    """Put the best scales and zeros of ``rows`` into ``scale`` and ``zero``.

    A row is not looked at where its smallest and largest entry alone, cut off by a range, lose more than the best range
    so far loses of all its entries.
    """
    best = torch.full_like(scale, math.inf)
    for step in range(CLIP_STEPS):
        shrink = 1 - step / 100
        tried, tried_zero = scale_and_zero(shrink * low, shrink * high, settings)
        bottom, top = to_values(tried.new_tensor([[0.0], [settings.largest]]), tried, tried_zero)
        least = (bottom - low).clamp_(min=0).pow_(CLIP_EXPONENT) + (high - top).clamp_(min=0).pow_(CLIP_EXPONENT)
        # The margin is wider than the rounding of sums.
        open_rows = (least <= best * (1 + 1e-4)).nonzero().squeeze(1)
        if not len(open_rows):
            continue
        part = rows if len(open_rows) == len(rows) else rows.index_select(0, open_rows)
        part_scale, part_zero = tried[open_rows], tried_zero[open_rows]
        integers = to_integers(part, part_scale[:, None], part_zero[:, None], settings.largest)
        error = (
            to_values(integers, part_scale[:, None], part_zero[:, None]).sub_(part).abs_().pow_(CLIP_EXPONENT).sum(1)
        )
        better = error < best[open_rows]
        found = open_rows[better]
        best[found], scale[found], zero[found] = error[better], part_scale[better], part_zero[better]


def group_of_columns(num_columns: int, group_size: GroupSize) -> Tensor:
    """The group of every column (in,), int32; a last group may be short.

    Raises:
        ValueError: a group size below 1 or of an unknown name.
    """
    if group_size in ("channel", "tensor"):
        return torch.zeros(num_columns, dtype=torch.int32)
    if not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size={group_size!r}: expected a number of columns, 'channel' or 'tensor'")
    return torch.arange(num_columns, dtype=torch.int32) // group_size


def fit_groups(
    weight: Tensor, group_size: GroupSize, settings: GridSettings, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scales and zeros of a whole weight (out, in), each (out, G), or (1, 1) of a ``tensor``; see `fit_grid`."""
    group_of_columns(weight.shape[1], group_size)
    if group_size == "tensor":
        flat = None if excluded is None else excluded.reshape(1, -1)
        scale, zero = fit_grid(weight.reshape(1, -1), settings, flat)
        return scale[:, None], zero[:, None]
    width = weight.shape[1] if group_size == "channel" else group_size
    fitted = [
        fit_grid(part, settings, None if excluded is None else excluded[:, start : start + part.shape[1]])
        for start, part in zip(range(0, weight.shape[1], width), weight.split(width, dim=1))
    ]
    return torch.stack([scale for scale, _ in fitted], 1), torch.stack([zero for _, zero in fitted], 1)
