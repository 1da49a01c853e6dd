"""Wanda: prune by weight times norm of its input, without changing what stays (arXiv 2306.11695).

score_ij = |W_ij| sqrt(v_j),     v_j the column energy sum_t x_tj^2, on any scale
rows       int(p in) of every row, as published for language models
matrix     exactly round(p n) of the matrix
variant    of every row, the smallest scores that add up to at most a share alpha of its sum; alpha is bisected
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fulgurite.methods.exact_masks import smallest_of_rows
from fulgurite.methods.pruning.base import Pruner
from fulgurite.methods.pruning.magnitude import magnitude_scores, matrix_mask, pruned
from fulgurite.methods.pruning.n_m import n_m_mask
from fulgurite.methods.quantization.quantized_weight import Compressed, checked_weight

Selection = Literal["rows", "matrix", "variant"]
START, LARGEST, TOLERANCE = 0.4, 0.8, 1e-3


def wanda_scores(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|W_ij| n_j in float32, or in float64 where the weight has that.

    Args:
        weight: (out, in).
        input_norm: (in,) square roots of the column energies.

    Raises:
        ValueError: norms that do not fit, or are negative or not finite.
    """
    if weight.dim() != 2 or input_norm.shape != weight.shape[1:]:
        raise ValueError(f"input_norm {tuple(input_norm.shape)} does not fit a weight {tuple(weight.shape)}")
    if not (torch.isfinite(input_norm) & (input_norm >= 0)).all():
        raise ValueError("input_norm has negative entries or some that are not finite")
    scores = magnitude_scores(weight)
    return scores.mul_(input_norm.to(scores))


def wanda_mask(weight: Tensor, input_norm: Tensor, sparsity: float, selection: Selection = "rows") -> Tensor:
    """True where a weight is kept, (out, in); see `wanda_scores`.

    Raises:
        ValueError: a sparsity outside [0, 1] or an unknown selection.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"a sparsity of {sparsity} is outside [0, 1]")
    scores = wanda_scores(weight, input_norm)
    if selection == "rows":
        return ~smallest_of_rows(scores, int(sparsity * weight.shape[1]))
    if selection == "matrix":
        return matrix_mask(scores, sparsity)
    if selection == "variant":
        return variant_mask(scores, sparsity)
    raise ValueError(f"selection={selection!r}: expected 'rows', 'matrix' or 'variant'")


def variant_mask(scores: Tensor, sparsity: float) -> Tensor:
    """True where a weight is kept, with as many of each row as the bisected share alpha leaves.

    Starts at alpha = 0.4 in [0, 0.8], and ends when the matrix is within 1e-3 of ``sparsity`` or the interval is
    shorter than that, as published; a sparsity of 0 prunes nothing.

    Raises:
        ValueError: more than alpha = 0.8 prunes is wanted.
    """
    if sparsity == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    ordered, order = scores.sort(dim=1, stable=True)
    sums, totals = ordered.cumsum(1), ordered.sum(1, keepdim=True)
    low, high, alpha = 0.0, LARGEST, START
    while True:
        counts = (sums <= alpha * totals).sum(1)
        found = counts.sum().item() / scores.numel()
        if abs(found - sparsity) <= TOLERANCE or high - low < TOLERANCE:
            break
        if found > sparsity:
            alpha, high = (alpha + low) / 2, alpha
        else:
            alpha, low = (alpha + high) / 2, alpha
    if sparsity - found > 10 * TOLERANCE and alpha > LARGEST - 2 * TOLERANCE:
        raise ValueError(
            f"selection='variant' prunes at most {found:.3f} of this matrix, not {sparsity}: choose 'rows' or 'matrix'"
        )
    kept = torch.arange(scores.shape[1], device=scores.device) >= counts[:, None]
    return torch.zeros_like(kept).scatter_(1, order, kept)


class Wanda(Pruner):
    """Prunes by weight times norm of its input.

    Args:
        sparsity: share of every matrix that is pruned.
        pattern: N:M instead.
        sparsities: see `Pruner`.
        selection: rank within ``rows`` or the ``matrix``, or by the share of a row's sum (``variant``).
    """

    needs = "energies"

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str | None = None,
        sparsities: dict[str, float] | None = None,
        selection: Selection = "rows",
    ) -> None:
        super().__init__(sparsity, pattern, sparsities)
        if pattern is not None and selection != "rows":
            raise ValueError(f"pattern={pattern!r} ranks within runs of a row: leave out selection={selection!r}")
        self.selection = selection

    def compress(self, name: str, weight: Tensor, moment: Tensor | None) -> Compressed:
        """The matrix with 0 where the product is smallest."""
        checked_weight(weight)
        norm = moment.sqrt()
        if self.pattern is not None:
            return pruned(weight, n_m_mask(wanda_scores(weight, norm), self.pattern))
        return pruned(weight, wanda_mask(weight, norm, self.sparsity_of(name), self.selection))
