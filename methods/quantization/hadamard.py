"""Multiplication by Hadamard and other orthogonal matrices, without the matrix (QuaRot, arXiv 2404.00456).

    h(x) = x H_n^T / sqrt(n),     H_n = B_K x S_{2^m},     n = K 2^m

B_K is one of `hadamard_matrices`, S the Sylvester matrix, itself a Kronecker product of matrices of at most 64 x 64.
Each factor is one small matrix product over a few rows at a time, which stay in the cache. Numbers narrower than
float32 are multiplied in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fulgurite.methods.quantization.hadamard_matrices import base_matrix, split_size, sylvester

SIDE = 6  # a Sylvester factor has at most 2^6 rows
PIECE, PIECE_CUDA = 1 << 17, 1 << 24  # entries transformed at once

Kind = Literal["identity", "hadamard", "gaussian"]
Fallback = Literal["error", "blocks", "gaussian"]
Factors = Sequence["Tensor | int"]  # a matrix, or n for the identity of n


def hadamard_transform(x: Tensor, transposed: bool = False, in_place: bool = False) -> Tensor:
    """x H^T / sqrt(n), or x H / sqrt(n), along the last dimension; differentiable unless ``in_place``.

    Holds about three times 2^17 numbers beyond the output (2^24 on CUDA).

    Args:
        x: (..., n).
        transposed: multiply by the transpose: the inverse.
        in_place: put the result into ``x``, which must be contiguous.

    Raises:
        ValueError: there is no Hadamard matrix of n here, or ``x`` cannot be written to.
    """
    return Rotation.hadamard(x.shape[-1])(x, inverse=transposed, in_place=in_place)


@dataclass(frozen=True)
class Rotation:
    """x -> x Q with an orthogonal Q = diag(s) (F_1 x F_2 x ..)^T, stored as these few words and never as a matrix.

    Args:
        kinds: of the factors, outermost first: ``identity``, ``hadamard`` (normalised), or ``gaussian``, the Q of a QR
            decomposition of Gaussian numbers with the signs of diag(R).
        sizes: of the factors.
        seed: of the signs s, which are 1 where there is none, and of ``gaussian``.

    Raises:
        ValueError: lengths or a kind that is none, no Hadamard matrix of a size, or Gaussian numbers without a seed.
    """

    kinds: tuple[Kind, ...]
    sizes: tuple[int, ...]
    seed: int | None = None

    def __post_init__(self) -> None:
        if len(self.kinds) != len(self.sizes) or not self.kinds:
            raise ValueError(f"kinds {self.kinds} and sizes {self.sizes} must be of one length, at least 1")
        for kind, size in zip(self.kinds, self.sizes):
            if kind not in get_args(Kind):
                raise ValueError(f"kind {kind!r}: expected one of {', '.join(get_args(Kind))}")
            if kind == "hadamard" and split_size(size) is None:
                raise ValueError(
                    f"no Hadamard matrix of size {size} is known here: "
                    "choose fallback='blocks' (of the largest power of 2) or 'gaussian' (a dense matrix)"
                )
            if kind == "gaussian" and self.seed is None:
                raise ValueError("a gaussian factor needs a seed")

    @classmethod
    def hadamard(cls, size: int, seed: int | None = None, fallback: Fallback = "error") -> Rotation:
        """Of a Hadamard matrix, or where there is none of this size, of what ``fallback`` names.

        Args:
            size: n.
            seed: of random signs; needed by ``gaussian``.
            fallback: ``error``; ``blocks``, a Hadamard matrix of the largest power of 2 that divides n for every run
                of that length; ``gaussian``, a dense orthogonal matrix.
        """
        if fallback not in get_args(Fallback):
            raise ValueError(f"fallback={fallback!r}: expected one of {', '.join(get_args(Fallback))}")
        if fallback == "error" or split_size(size) is not None:
            return cls(("hadamard",), (size,), seed)
        if fallback == "gaussian":
            return cls(("gaussian",), (size,), seed)
        block = size & -size
        return cls(("identity", "hadamard"), (size // block, block), seed)

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Rotation:
        """From what `data` gave."""
        return cls(tuple(data["kinds"]), tuple(data["sizes"]), data["seed"])

    def data(self) -> dict[str, Any]:
        """Plain values that describe it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @property
    def size(self) -> int:
        """n."""
        return math.prod(self.sizes)

    def __call__(self, x: Tensor, inverse: bool = False, in_place: bool = False) -> Tensor:
        """x Q, or x Q^T where ``inverse``, along the last dimension; see `hadamard_transform`."""
        if x.shape[-1] != self.size:
            raise ValueError(f"a last dimension of {x.shape[-1]}, expected {self.size}")
        if not in_place:
            return _Rotate.apply(x, self, inverse)
        if not x.is_contiguous():
            raise ValueError("in_place needs a contiguous tensor")
        with torch.no_grad():
            return self.rotate(x, inverse, x)

    def rotate(self, x: Tensor, inverse: bool, out: Tensor) -> Tensor:
        """Write x Q or x Q^T into ``out``, contiguous, which may be ``x``."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        factors = self.factors(dtype, x.device, inverse)
        signs = None if self.seed is None else self.signs().to(x.device, dtype)
        rows, results = x.reshape(-1, self.size), out.view(-1, self.size)
        step = max(1, (PIECE_CUDA if x.is_cuda else PIECE) // self.size)
        for start in range(0, len(rows), step):
            part = rows[start : start + step].to(dtype)
            if signs is not None and not inverse:
                part = part * signs
            part = times_kronecker(part, factors)
            if signs is not None and inverse:
                part = part * signs
            results[start : start + step] = part
        return out

    def factors(self, dtype: torch.dtype, device: torch.device, inverse: bool) -> list[Tensor | int]:
        """Matrices F of x -> x (F_1 x F_2 x ..)^T, of Q or of its transpose."""
        found: list[Tensor | int] = []
        for kind, size in zip(self.kinds, self.sizes):
            if kind == "identity":
                found.append(size)
            elif kind == "gaussian":
                matrix = gaussian_matrix(size, self.seed)
                found.append((matrix if inverse else matrix.T).to(device, dtype))
            else:
                found += hadamard_factors(size, dtype, device, inverse)
        return found

    def signs(self) -> Tensor:
        """(n,) float64, +-1: ones of a dense matrix, which needs none."""
        return torch.ones(self.size, dtype=torch.float64) if "gaussian" in self.kinds else signs(self.size, self.seed)

    def matrix(self) -> Tensor:
        """Q (n, n) in float64."""
        return self(torch.eye(self.size, dtype=torch.float64))


class _Rotate(torch.autograd.Function):
    """The rotation and, backward, its inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Rotation, inverse: bool) -> Tensor:
        ctx.rotation, ctx.inverse = rotation, inverse
        return rotation.rotate(x, inverse, torch.empty(x.shape, dtype=x.dtype, device=x.device))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.rotation(gradient, inverse=not ctx.inverse), None, None


def signs(size: int, seed: int) -> Tensor:
    """(size,) float64, each -1 or 1, as QuaRot draws them."""
    drawn = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed))
    return (2 * drawn - 1).to(torch.float64)


@lru_cache(maxsize=8)
def gaussian_matrix(size: int, seed: int) -> Tensor:
    """(size, size) float64 orthogonal: Q of Gaussian numbers, whose R has a positive diagonal."""
    drawn = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(drawn)
    return q * r.diagonal().sign()


def hadamard_factors(size: int, dtype: torch.dtype, device: torch.device, transposed: bool) -> list[Tensor]:
    """The factors of H_n / sqrt(n), outermost first: B_K, and Sylvester matrices of at most 2^6 rows."""
    base, power = split_size(size)
    exponent = power.bit_length() - 1
    count = max(1, math.ceil(exponent / SIDE))
    found = [] if base == 1 else [base_matrix(base).T if transposed else base_matrix(base)]
    found += [sylvester(2 ** ((exponent + part) // count)) for part in range(count)]
    wide = [factor.to(device, dtype) for factor in found if len(factor) > 1] or [torch.ones(1, 1).to(device, dtype)]
    return [factor / math.sqrt(len(factor)) for factor in wide]


def times_kronecker(rows: Tensor, factors: Factors) -> Tensor:
    """rows (F_1 x F_2 x ..)^T of (R, n), one factor after the other from the innermost."""
    after = 1
    for factor in reversed(factors):
        size = factor if isinstance(factor, int) else len(factor)
        if not isinstance(factor, int):
            if after == 1:
                rows = rows.reshape(-1, size) @ factor.T
            else:
                rows = torch.matmul(factor, rows.view(-1, size, after))
        after *= size
    return rows.view(-1, after)
