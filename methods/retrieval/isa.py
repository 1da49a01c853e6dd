"""Interactive similarity aggregation of UCoFiA (Wang et al., ICCV 2023, arXiv 2309.10091).

Similarities weigh themselves:

    ISA(x) = sum_j softmax_j(softmax(x / tau) M / tau) * x_j

M is a learned square matrix that starts as the identity. The temperature tau divides in both softmaxes. The result lies
between the smallest and the largest x_j whatever M is.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPAN = 40.0  # exp(-40) = 4e-18 changes no sum of some hundred weights in float32, and is far above the smallest number


def interactive_similarity(x: Tensor, matrix: Tensor, temperature: float = 0.01, mask: Tensor | None = None) -> Tensor:
    """ISA over the last axis, in float32 at least, also under autocast.

    Args:
        x: (..., n) similarities.
        matrix: (m, m) with m >= n, of which the first n rows and columns are used.
        temperature: tau.
        mask: True for the entries that count, broadcastable to x; at least one of each row. The others get no weight
            in either softmax. None counts all.

    Returns:
        (...).

    Raises:
        ValueError: x has more entries than the matrix has rows.
    """
    size = x.shape[-1]
    if size > len(matrix):
        raise ValueError(f"{size} similarities do not fit an aggregation matrix for up to {len(matrix)}")
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        second = sharp_softmax(x / temperature, mask) @ matrix[:size, :size].to(x.dtype) / temperature
        return (sharp_softmax(second, mask) * x).sum(-1)


def sharp_softmax(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax over the last axis, with no weight for what ``mask`` leaves out, or where it would be below exp(-`SPAN`).

    At temperature 0.01 most weights would be subnormal numbers, or become so when they meet a gradient, and processors
    are many times slower with those.
    """
    if mask is not None:
        x = x.masked_fill(~mask, -torch.inf)
    with torch.no_grad():
        small = x < x.amax(-1, keepdim=True) - SPAN
    return x.masked_fill(small, -torch.inf).softmax(-1)


def identity_diagonals(size: int) -> Tensor:
    """(2 size - 1,) such that `toeplitz` gives the identity: where a matrix shared by relative position starts."""
    diagonals = torch.zeros(2 * size - 1)
    diagonals[size - 1] = 1
    return diagonals


def toeplitz(diagonals: Tensor) -> Tensor:
    """The matrix whose entry depends on the distance between row and column alone, so that it serves any length.

    Args:
        diagonals: (2 n - 1,), from the lowest left to the upper right: entry (i, j) is ``diagonals[j - i + n - 1]``.

    Returns:
        (n, n), of which the leading (m, m) is the matrix for m < n entries.
    """
    return diagonals.unfold(0, (len(diagonals) + 1) // 2, 1).flip(0)
