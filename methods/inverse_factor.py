"""The upper triangular U with H^-1 = U^T U, from one Cholesky factor and one triangular inverse.

    P H P = L L^T  (P reverses the order)      =>  H = R R^T with R = P L P upper triangular
    H^-1 = R^-T R^-1 = U^T U                   =>  U = R^-1 = P L^-1 P

L^-1 is taken by halves: [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]], two products per split. About 0.6 of
the time of Cholesky, inverse, Cholesky, and no further from the float64 factor.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from fulgurite.methods.finite import all_finite
from fulgurite.methods.statistics.gram import full_precision

SOLVED_AT_ONCE = 64
FIRST_RETRY = 0.01
NUM_RETRIES = 10


@dataclass(frozen=True)
class Factor:
    """U of a damped H, and what was done to get it.

    Args:
        upper: (in, in) upper triangular, columns in the solver's order; the identity where H could not be factored.
        damping: multiple of the mean of diag H that was added; nothing where H could not be factored.
    """

    upper: Tensor
    damping: float | None


def invert_lower_(lower: Tensor) -> Tensor:
    """Invert a lower triangular matrix (n, n) in place. Holds two blocks of n^2 / 4."""
    size = len(lower)
    if size <= SOLVED_AT_ONCE:
        one = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return lower.copy_(torch.linalg.solve_triangular(lower, one, upper=False))
    half = size // 2
    top, corner, bottom = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    invert_lower_(top)
    invert_lower_(bottom)
    corner.copy_(((bottom @ corner) @ top).neg_())
    return lower


def inverse_factor(reversed_hessian: Tensor) -> Tensor | None:
    """U (n, n) of the H whose rows and columns come in reverse; nothing where H is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(reversed_hessian)
    del reversed_hessian
    if failed.item():
        return None
    upper = invert_lower_(lower).flip(0, 1)
    return upper if all_finite(upper) else None


def damped_factor(gram: Tensor, order: Tensor | None, percdamp: float, dtype: torch.dtype) -> Factor:
    """Factor H + percdamp mean(diag H) I, where diagonal entries that are 0 count as 1.

    If that fails, the multiples 0.01 2^k, k = 0..9, that are above ``percdamp`` are tried on the H that was given,
    with a warning; if all fail, U is the identity, which leaves every column without compensation, with a warning.
    Memory: two matrices (in, in) in ``dtype`` beside ``gram``.

    Args:
        gram: (in, in), symmetric. It is not changed.
        order: (in,) the columns in the solver's order; as they are when not given.
        percdamp: multiple of the mean of the diagonal.
        dtype: float32 or float64.
    """
    order = torch.arange(len(gram), device=gram.device) if order is None else order
    backwards = order.flip(0)
    retries = [FIRST_RETRY * 2**k for k in range(NUM_RETRIES)]
    tried = [percdamp] + [damping for damping in retries if damping > percdamp]
    with full_precision():
        for damping in tried:
            upper = inverse_factor(damped(gram, backwards, damping, dtype))
            if upper is not None:
                if damping != percdamp:
                    warnings.warn(
                        f"the Gram matrix could not be factored with percdamp={percdamp:g}; {damping:g} was used",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                return Factor(upper, damping)
    warnings.warn(
        f"the Gram matrix of {len(gram)} columns is not positive definite even with percdamp={tried[-1]:g}: no column "
        "is compensated for, as in rounding to nearest or pruning by magnitude; give more calibration data",
        RuntimeWarning,
        stacklevel=2,
    )
    return Factor(torch.eye(len(gram), dtype=dtype, device=gram.device), None)


def damped(gram: Tensor, order: Tensor, damping: float, dtype: torch.dtype) -> Tensor:
    """A copy of H in ``order`` with diagonal entries of 0 set to 1, and damped."""
    hessian = gram.to(dtype)[order[:, None], order]
    diagonal = hessian.diagonal()
    diagonal.masked_fill_(diagonal == 0, 1)
    diagonal.add_(damping * diagonal.mean())
    return hessian


def checked_gram(gram: Tensor, num_columns: int, percdamp: float) -> Tensor:
    """``gram``, if it can be that of a layer with ``num_columns`` inputs.

    Raises:
        ValueError: its shape does not fit, an entry is not finite, a diagonal entry is negative, or ``percdamp`` is.
    """
    if gram.shape != (num_columns, num_columns):
        raise ValueError(f"a Gram matrix of {tuple(gram.shape)} for a weight of {num_columns} columns")
    if not all_finite(gram) or (gram.diagonal() < 0).any():
        raise ValueError("the Gram matrix holds NaN or infinite entries, or negative ones on its diagonal")
    if not 0 <= percdamp < math.inf:
        raise ValueError(f"percdamp={percdamp}: expected a number from 0 on")
    return gram.detach()
