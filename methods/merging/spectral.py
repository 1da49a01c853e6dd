"""What the spectral merges share: polar factors, leading singular triplets, and which tensors are matrices to them.

For M = U S V^T with m >= n (else transposed), the Gram matrix G = M^T M = V S^2 V^T is n x n, and

    polar(M) = U V^T = M G^(-1/2),  sum_i s_i = tr G^(1/2),  u_i = M v_i / s_i

so that an eigendecomposition on the smaller side replaces the SVD. It squares the condition number: G is built and
solved in float32 only where that keeps five digits, else in float64; a matrix that is singular even there, or where
that gains nothing, goes to the SVD. The Newton-Schulz iteration needs matrix products only, which is what accelerators
are fast at.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fulgurite.methods.merging.base import Merger, average

Solver = Literal["svd", "eigh", "newton_schulz"]
ROWS = 512  # of a matrix that are in float64 at a time
POLAR_FLOOR = 1e-2  # smallest over largest eigenvalue of a Gram matrix in float32, for a relative error of 1e-5
TRIPLET_FLOOR = 1e-3  # the same for leading triplets, where the last kept one is the smallest
SINGULAR = 1e-10  # the same in float64
STEPS = 60


def gram(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """M^T M, (n, n), summed over blocks of rows in ``dtype``."""
    out = matrix.new_zeros(matrix.shape[1], matrix.shape[1], dtype=dtype)
    for rows in matrix.split(ROWS if dtype != matrix.dtype else len(matrix)):
        rows = rows.to(dtype)
        out.addmm_(rows.mT, rows)
    return out


def precisions(matrix: Tensor, floor: float) -> list[tuple[torch.dtype, float]]:
    """Types to try for the Gram matrix, each with the smallest over largest eigenvalue that it can be trusted with.

    On a processor a decomposition in float64 costs as much as the SVD in float32 of a square matrix, and is tried
    only where the Gram matrix is much the smaller one.
    """
    exact = [(torch.float64, SINGULAR)]
    if matrix.dtype == torch.float64:
        return exact
    tall = matrix.is_cuda or matrix.shape[0] >= 2 * matrix.shape[1]
    return [(torch.float32, floor), *(exact if tall else [])]


def is_conditioned(gram_matrix: Tensor, floor: float) -> bool:
    """Whether the smallest eigenvalue is above ``floor`` times (about) the largest; a Cholesky factorisation."""
    vector = gram_matrix.sum(1)
    for _ in range(12):
        vector = gram_matrix @ (vector / vector.norm())
    shift = floor * float(vector.norm())
    if not 0 < shift < float("inf"):
        return False
    shifted = gram_matrix - shift * torch.eye(len(gram_matrix), dtype=gram_matrix.dtype, device=gram_matrix.device)
    return int(torch.linalg.cholesky_ex(shifted).info) == 0


def polar(matrix: Tensor, solver: Solver = "eigh") -> tuple[Tensor, float]:
    """The polar factor U V^T of M (m, n), and the nuclear norm of M.

    Args:
        matrix: in float32 or float64.
        solver: ``"svd"`` is the definition; ``"eigh"`` the same to 1e-5 by the Gram matrix; ``"newton_schulz"`` by
            matrix products alone. The latter two pass a matrix that is singular to the SVD, which completes it.
    """
    if matrix.shape[0] < matrix.shape[1]:
        factor, nuclear = polar(matrix.mT, solver)
        return factor.mT, nuclear
    for dtype, floor in precisions(matrix, POLAR_FLOOR) if solver != "svd" else ():
        square = gram(matrix, dtype)
        if is_conditioned(square, floor):
            inverse, nuclear = inverse_root(square) if solver == "eigh" else newton_schulz(square)
            return matrix @ inverse.to(matrix.dtype), nuclear
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right, float(values.sum())


def inverse_root(square: Tensor) -> tuple[Tensor, float]:
    """G^(-1/2) and tr G^(1/2) of a positive G by its eigendecomposition."""
    values, vectors = torch.linalg.eigh(square)
    roots = values.clamp_min(torch.finfo(square.dtype).tiny).sqrt()
    return (vectors / roots) @ vectors.mT, float(roots.sum())


def newton_schulz(square: Tensor) -> tuple[Tensor, float]:
    """G^(-1/2) and tr G^(1/2) of a positive G by matrix products.

    With G / |G| = R_0 and P_0 = I:  Q = (15 I - 10 R + 3 R^2) / 8,  P <- P Q,  R <- R Q^2, until R is I.

    Raises:
        ArithmeticError: it is not after 60 steps.
    """
    eye = torch.eye(len(square), dtype=square.dtype, device=square.device)
    length = square.norm()
    rest, out = square / length, eye
    limit = 50 * torch.finfo(square.dtype).eps * len(square) ** 0.5
    for _ in range(STEPS):
        if float((rest - eye).norm()) < limit:
            inverse = out / length.sqrt()
            return inverse, float((square * inverse).sum())
        step = (15 * eye - 10 * rest + 3 * (rest @ rest)) / 8
        out, rest = out @ step, step @ rest @ step
        rest = (rest + rest.mT) / 2
    raise ArithmeticError(f"Newton-Schulz does not converge in {STEPS} steps; use the solver eigh or svd")


def triplets(matrix: Tensor, num: int, solver: Solver = "eigh") -> tuple[Tensor, Tensor, Tensor]:
    """The ``num`` largest singular triplets of M (m, n): (m, num), (num,) falling, (n, num).

    Signs are arbitrary, as are directions of equal values.
    """
    if matrix.shape[0] < matrix.shape[1]:
        left, values, right = triplets(matrix.mT, num, solver)
        return right, values, left
    for dtype, floor in precisions(matrix, TRIPLET_FLOOR) if solver != "svd" and num else ():
        squares, vectors = torch.linalg.eigh(gram(matrix, dtype))
        squares, vectors = squares[-num:].flip(0), vectors[:, -num:].flip(1)
        if float(squares[-1]) > floor * float(squares[0]):
            values = squares.sqrt()
            values, vectors = values.to(matrix.dtype), vectors.to(matrix.dtype)
            return matrix @ (vectors / values), values, vectors
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :num], values[:num], right[:num].mT


class Spectral(Merger):
    """theta* = theta_0 + lam tau*, with tau* of `merge_matrix` for matrices and the mean of task vectors for the rest.

    Holds one tensor of each source and its task vectors.

    Args:
        lam: multiple of the merged task vector.
        exclude: patterns (`re.search` in a name) of matrices that are averaged like the rest.
    """

    def __init__(self, lam: float = 1.0, exclude: Sequence[str] = ()) -> None:
        self.lam, self.exclude = lam, [re.compile(pattern) for pattern in exclude]

    @abstractmethod
    def merge_matrix(self, taus: Sequence[Tensor]) -> Tensor:
        """tau* (m, n) of task vectors (m, n), already multiplied by their weights; at least one is not zero."""

    def merge_tensor(
        self, name: str, base: Tensor | None, experts: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        """theta_0 + lam tau*."""
        if base.dim() != 2 or not base.numel() or any(pattern.search(name) for pattern in self.exclude):
            mean = average(experts, weights)
            return mean if self.lam == 1 else base + self.lam * (mean - base)
        taus = [weight * (expert - base) for expert, weight in zip(experts, weights)]
        if not any(tau.any() for tau in taus):
            return base.clone()
        return base.add(self.merge_matrix(taus), alpha=self.lam)
