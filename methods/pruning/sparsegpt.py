"""SparseGPT: prune column by column and let the columns that follow make up for it (arXiv 2301.00774).

    score_ij = w_ij^2 / U_jj^2 (here its root), by the weights as they are when the choice is made
    by fraction   at the start of every block of columns, the smallest scores of the block, over all rows
    by N:M        before every M columns, the M - N smallest scores of a row

Exactly round(p out in) weights are pruned, spread over the blocks by their size; the published code prunes one more per
block. Of a last run that is shorter than M, at most N are kept. Of equal scores the first go, column by column.
Together with a grid, the weights that stay are rounded to it; it is fitted on the dense weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fulgurite.methods.column_solver import ColumnView, checked_block_size, solve_columns
from fulgurite.methods.exact_masks import rounded_count, smallest_of_rows
from fulgurite.methods.inverse_factor import checked_gram, damped_factor
from fulgurite.methods.pruning.base import Pruner
from fulgurite.methods.pruning.n_m import largest_of_runs, two_of_four
from fulgurite.methods.pruning.pattern import kept_of
from fulgurite.methods.quantization.gptq import GridRule
from fulgurite.methods.quantization.grid import (
    UNQUANTIZED_BITS,
    GridSettings,
    GroupSize,
    Scheme,
    fit_groups,
    group_of_columns,
)
from fulgurite.methods.quantization.quantized_weight import Compressed, QuantizedWeight, checked_weight


class SparseRule:
    """A column loses the weights that were chosen, and the others become what ``grid`` makes of them.

    Args:
        pivots: (in,) U_jj.
        shape: (in, out).
        reads: first column -> end of the columns whose weights are chosen together.
        num_pruned: end of those columns -> weights pruned up to there, of all rows; not given for ``pattern``.
        pattern: weights kept of every run in a row, and the length of a run.
        grid: rounds what is kept.
    """

    keeps_start = False

    def __init__(
        self,
        pivots: Tensor,
        shape: tuple[int, int],
        reads: Mapping[int, int],
        num_pruned: Mapping[int, int],
        pattern: tuple[int, int] | None,
        grid: GridRule | None,
    ) -> None:
        self.pivots, self.reads, self.num_pruned, self.pattern, self.grid = pivots, reads, num_pruned, pattern, grid
        self.pruned = torch.zeros(shape, dtype=torch.bool, device=pivots.device)
        if grid is not None:
            grid.pruned = self.pruned

    def look(self, column: int, view: ColumnView) -> None:
        """Choose among the weights from here on."""
        stop = self.reads[column]
        scores = (view.fresh(stop) / self.pivots[column:stop, None]).abs_()
        if self.pattern is not None:
            kept, run = self.pattern
            whole = (kept, run, len(scores)) == (2, 4, 4)
            self.pruned[column:stop] = ~(two_of_four(scores.T) if whole else largest_of_runs(scores.T, kept)).T
        else:
            count = self.num_pruned[stop] - self.num_pruned[column]
            self.pruned[column:stop] = smallest_of_rows(scores.reshape(1, -1), count).view_as(scores)

    def replace(self, column: int, values: Tensor) -> Tensor:
        """0 where a weight was chosen."""
        if self.grid is not None:
            return self.grid.replace(column, values)
        return values.masked_fill(self.pruned[column], 0)


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    sparsity: float | None = None,
    pattern: str | None = None,
    percdamp: float = 0.01,
    block_size: int = 128,
    bits: int = UNQUANTIZED_BITS,
    group_size: GroupSize = "channel",
    scheme: Scheme = "asymmetric",
    clip_search: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> Compressed:
    """Prune the weight of one linear layer, and quantize it in the same pass where ``bits`` says so.

    Memory beside the arguments: one copy of the weight in float32 and two matrices (in, in), or, once the factor is
    there, one of each, a byte per weight and two blocks. Time: O(in^3 + out in^2). Columns of H that are all 0 are
    dead: their weights become 0.

    Args:
        weight: (out, in). It is not changed; float64 is solved in float64, all else in float32.
        gram: (in, in), X^T X of the layer's inputs by any factor, as `GramStatistics` takes it.
        sparsity: fraction that is pruned, 0 to 1.
        pattern: N:M instead, N weights kept of every M.
        percdamp: multiple of the mean of diag H that is added to it; see `damped_factor` for what follows a failure.
        block_size: columns whose weights are chosen together by ``sparsity``, and between two updates of all that
            follow; with a ``pattern`` it changes nothing.
        bits: 1 to 8 to round what is kept; 16 or more do not.
        group_size: of the grid; see `gptq`.
        scheme: of the grid; see `grid`.
        clip_search: of the grid.
        scale_dtype: type in which scales are stored.

    Raises:
        ValueError: both or none of ``sparsity`` and ``pattern`` are given, an argument is out of its range, shapes do
            not fit, or an entry is not finite.
    """
    dense = checked_weight(weight)
    num_rows, num_columns = dense.shape
    checked_gram(gram, num_columns, percdamp)
    checked_block_size(block_size)
    if (sparsity is None) == (pattern is None):
        raise ValueError(f"sparsity={sparsity}, pattern={pattern!r}: expected one of the two")
    runs = None if pattern is None else kept_of(pattern)
    width = block_size if runs is None else runs[1]
    reads = {start: min(start + width, num_columns) for start in range(0, num_columns, width)}
    num_pruned = {}
    if sparsity is not None:
        num_pruned = {end: rounded_count(sparsity, num_rows * end) for end in [0, *reads.values()]}
    if bits >= UNQUANTIZED_BITS and (sparsity == 0 or (runs is not None and runs[0] == runs[1])):
        return Compressed(weight.detach().clone(), mask=torch.ones_like(weight, dtype=torch.bool))

    shape = (num_columns, num_rows)
    grid, group_index = None, None
    if bits < UNQUANTIZED_BITS:
        settings = GridSettings(bits, scheme, clip_search, scale_dtype)
        group_index = group_of_columns(num_columns, group_size).to(dense.device)
        scale, zero = (fitted.T.contiguous() for fitted in fit_groups(dense, group_size, settings))
        grid = GridRule(group_index.tolist(), scale, zero, settings, shape)
    factor = damped_factor(gram, None, percdamp, dense.dtype)

    rule = SparseRule(factor.upper.diagonal(), shape, reads, num_pruned, runs, grid)
    solved = dense.T.clone(memory_format=torch.contiguous_format)
    solved.masked_fill_((gram.diagonal() == 0)[:, None], 0)
    loss = solve_columns(solved, factor.upper, rule, block_size)

    mask = ~rule.pruned.T.contiguous()
    if grid is None:
        return Compressed(solved.T.contiguous().to(weight.dtype), mask=mask, loss=loss, damping=factor.damping)
    quantized = QuantizedWeight(
        integers=grid.integers.T.contiguous(),
        scale=scale.T.to(scale_dtype or dense.dtype).contiguous(),
        zero=zero.T.to(torch.uint8).contiguous(),
        group_index=group_index,
        bits=bits,
    )
    return Compressed(quantized.dequantize(weight.dtype), quantized, mask, loss, factor.damping)


class SparseGpt(Pruner):
    """Prunes column by column; see `sparsegpt`.

    Args:
        sparsity: share of every matrix that is pruned.
        pattern: N:M instead.
        sparsities: see `Pruner`.
        percdamp: see `sparsegpt`.
        block_size: see `sparsegpt`.
        bits: of what is kept; 16 leaves it.
        group_size: of the grid, with ``bits`` below 16.
        scheme: of the grid.
        clip_search: of the grid.
        sequential: compress the layers of a block one after the other, instead of all from what the block was.
    """

    needs = "grams"

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str | None = None,
        sparsities: dict[str, float] | None = None,
        percdamp: float = 0.01,
        block_size: int = 128,
        bits: int = UNQUANTIZED_BITS,
        group_size: GroupSize = "channel",
        scheme: Scheme = "asymmetric",
        clip_search: bool = False,
        sequential: bool = False,
    ) -> None:
        super().__init__(sparsity, pattern, sparsities)
        checked_block_size(block_size)
        if bits < UNQUANTIZED_BITS:
            GridSettings(bits, scheme, clip_search)
        self.percdamp, self.block_size, self.sequential = percdamp, block_size, sequential
        self.bits, self.group_size, self.scheme, self.clip_search = bits, group_size, scheme, clip_search

    def compress(self, name: str, weight: Tensor, moment: Tensor | None) -> Compressed:
        """The matrix, pruned, with what stays made up for it."""
        return sparsegpt(
            weight,
            moment,
            self.sparsity_of(name),
            self.pattern,
            self.percdamp,
            self.block_size,
            self.bits,
            self.group_size,
            self.scheme,
            self.clip_search,
            weight.dtype if self.bits < UNQUANTIZED_BITS else None,
        )
