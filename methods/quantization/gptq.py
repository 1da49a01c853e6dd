"""GPTQ: quantize column by column and let the columns that follow make up for the error (arXiv 2210.17323).

    Q(w_j) = s (q_j - z) on the grid of the group of column j; see `column_solver` for the loop and `grid` for s and z

Where grids of groups are fitted:

    fresh     when their first column is reached, on weights that hold every update so far
    stale     then too, but on weights that lack the updates of their own block, as the published code does
    static    before the first column, on the weights as given; with order ``activation`` the groups stay those of
              the original columns, so that no index of columns need be stored

TaCQ (arXiv 2504.07389) keeps some weights in 16 bit: they are not rounded, so they cause no error, but take what
earlier columns ask for. RSQ (arXiv 2503.01820) is this function with a Gram matrix of weighted tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from fulgurite.methods.column_solver import ColumnView, Order, checked_block_size, column_order, solve_columns
from fulgurite.methods.inverse_factor import checked_gram, damped_factor
from fulgurite.methods.quantization.base import Quantizer, ScaleType
from fulgurite.methods.quantization.grid import (
    UNQUANTIZED_BITS,
    GridSettings,
    GroupSize,
    Scheme,
    fit_grid,
    fit_groups,
    group_of_columns,
)
from fulgurite.methods.quantization.quantized_weight import Compressed, QuantizedWeight, checked_weight

Groups = Literal["fresh", "stale", "static"]


class GridRule:
    """A column becomes what its group's grid makes of it.

    Args:
        groups: the group of every column, in the solver's order.
        scale: (G, out) or (G, 1); filled group by group where ``fitted_when`` is not static.
        zero: like ``scale``.
        settings: of the grids.
        shape: (in, out).
        fitted_when: see above.
        kept: (in, out) bool, weights that are not rounded.
        pruned: (in, out) bool, weights that become 0; it may be filled while columns are solved.
    """

    def __init__(
        self,
        groups: list[int],
        scale: Tensor,
        zero: Tensor,
        settings: GridSettings,
        shape: tuple[int, int],
        fitted_when: Groups = "static",
        kept: Tensor | None = None,
        pruned: Tensor | None = None,
    ) -> None:
        self.groups, self.scale, self.zero, self.settings = groups, scale, zero, settings
        self.kept, self.pruned = kept, pruned
        self.integers = torch.empty(shape, dtype=torch.uint8, device=scale.device)
        self.keeps_start = fitted_when == "stale"
        starts = [j for j, group in enumerate(groups) if j == 0 or groups[j - 1] != group]
        self.reads: Mapping[int, int] = {}
        if fitted_when != "static":
            self.reads = dict(zip(starts, starts[1:] + [len(groups)]))

    def look(self, column: int, view: ColumnView) -> None:
        """Fit the grid of the group that begins here."""
        stop = self.reads[column]
        rows = (view.stale(stop) if self.keeps_start else view.fresh(stop)).T
        excluded = None if self.kept is None else self.kept[column:stop].T
        group = self.groups[column]
        self.scale[group], self.zero[group] = fit_grid(rows, self.settings, excluded)

    def replace(self, column: int, values: Tensor) -> Tensor:
        """The value on the grid; its integer is noted."""
        group = self.groups[column]
        scale, zero = self.scale[group], self.zero[group]
        levels = torch.div(values, scale).round_().add_(zero).clamp_(0, self.settings.largest)
        if self.kept is not None:
            levels = torch.where(self.kept[column], zero, levels)
        if self.pruned is not None:
            levels = torch.where(self.pruned[column], zero, levels)
        self.integers[column] = levels
        rounded = levels.sub_(zero).mul_(scale)
        return rounded if self.kept is None else torch.where(self.kept[column], values, rounded)


@torch.no_grad()
def gptq(
    weight: Tensor,
    gram: Tensor,
    bits: int,
    group_size: GroupSize = "channel",
    scheme: Scheme = "asymmetric",
    clip_search: bool = False,
    scale_dtype: torch.dtype | None = None,
    order: Order = "none",
    groups: Groups = "fresh",
    percdamp: float = 0.01,
    block_size: int = 128,
    kept: Tensor | None = None,
    zero_dead_kept: bool = False,
    pruned: Tensor | None = None,
) -> Compressed:
    """Quantize the weight of one linear layer.

    Memory beside the arguments: one copy of the weight in float32 and two matrices (in, in), or, once the factor is
    there, one of each and a byte per weight. Time: O(in^3 + out in^2). Columns of H that are all 0 are dead: their
    weights become 0.

    Args:
        weight: (out, in). It is not changed; float64 is solved in float64, all else in float32.
        gram: (in, in), X^T X of the layer's inputs by any factor, as `GramStatistics` takes it.
        bits: 1 to 8; 16 or more leave the weight as it is.
        group_size: columns that share a scale per row, or a whole row (``channel``), or the whole ``tensor``. Grids
            of rows and tensors are always fitted on the weight as given.
        scheme: the grid; see `grid`.
        clip_search: search the range that loses least.
        scale_dtype: type in which scales are stored; they are rounded to it before columns are.
        order: solve columns as they come, by falling energy (``activation``; without ``static`` groups a group is
            then a run of that order), or by falling energy within groups and of groups (``group_aware``).
        groups: where grids of groups are fitted; see above.
        percdamp: multiple of the mean of diag H that is added to it; see `damped_factor` for what follows a failure.
        block_size: columns between two updates of all that follow; changes results with ``stale`` groups alone.
        kept: (out, in) bool, weights that are not rounded (TaCQ). They do not stretch the grid.
        zero_dead_kept: zero kept weights of dead columns too, as the published code does.
        pruned: (out, in) bool, weights that stay 0; those that come after them make up for what they would have been
            given.

    Returns:
        See `Compressed`. A kept weight has the value that the loop left it with.

    Raises:
        ValueError: an argument is out of its range, shapes do not fit, or an entry is not finite.
    """
    dense = checked_weight(weight)
    num_columns = dense.shape[1]
    checked_gram(gram, num_columns, percdamp)
    checked_block_size(block_size)
    if groups not in get_args(Groups):
        raise ValueError(f"groups={groups!r}: expected 'fresh', 'stale' or 'static'")
    if kept is not None and (kept.shape != weight.shape or kept.dtype != torch.bool):
        raise ValueError(f"kept is {kept.dtype} of {tuple(kept.shape)}, expected bool of {tuple(weight.shape)}")
    if kept is not None and pruned is not None:
        kept = kept & ~pruned
    if bits >= UNQUANTIZED_BITS:
        return Compressed(weight.detach().clone())
    settings = GridSettings(bits, scheme, clip_search, scale_dtype)
    group_index = group_of_columns(num_columns, group_size).to(dense.device)
    if group_size in ("channel", "tensor"):
        groups = "static"
    perm = column_order(gram.diagonal().to(dense.dtype), order, group_index)
    if order == "activation" and groups != "static":
        solved_groups = group_index.clone()
        group_index[perm] = solved_groups
    else:
        solved_groups = group_index if perm is None else group_index[perm]
    dead = (gram.diagonal() == 0)[None]
    if kept is not None and not zero_dead_kept:
        dead = dead & ~kept
    if groups == "static":
        # Grids of rows and tensors are fitted on the weight as given, those of groups without dead columns.
        given = dense if group_size in ("channel", "tensor") else dense.masked_fill(dead, 0)
        scale, zero = (fitted.T.contiguous() for fitted in fit_groups(given, group_size, settings, kept))
        del given
    else:
        scale, zero = dense.new_empty(2, int(group_index.max()) + 1, len(dense))
    factor = damped_factor(gram, perm, percdamp, dense.dtype)

    def in_order(rows: Tensor) -> Tensor:
        """A matrix (out, in) as (in, out), its columns in the order in which they are solved."""
        return rows.T.clone(memory_format=torch.contiguous_format) if perm is None else rows.T.index_select(0, perm)

    def as_given(columns: Tensor) -> Tensor:
        """The other way."""
        return (columns if perm is None else columns.index_select(0, perm.argsort())).T.contiguous()

    solved = in_order(dense)
    kept_columns = None if kept is None else in_order(kept)
    pruned_columns = None if pruned is None else in_order(pruned)
    solved.masked_fill_(in_order(dead), 0)
    del dense
    rule = GridRule(
        solved_groups.tolist(), scale, zero, settings, tuple(solved.shape), groups, kept_columns, pruned_columns
    )
    loss = solve_columns(solved, factor.upper, rule, block_size)

    quantized = QuantizedWeight(
        integers=as_given(rule.integers),
        scale=scale.T.to(scale_dtype or solved.dtype).contiguous(),
        zero=zero.T.to(torch.uint8).contiguous(),
        group_index=group_index,
        bits=bits,
        kept=kept,
        kept_values=None if kept is None else as_given(solved)[kept].to(weight.dtype),
    )
    damping = factor.damping
    del factor, solved
    return Compressed(quantized.dequantize(weight.dtype), quantized, loss=loss, damping=damping)


class Gptq(Quantizer):
    """Quantizes column by column (arXiv 2210.17323); see `gptq`.

    Args:
        bits: of every matrix, 1 to 8; 16 leaves it as it is.
        group_size: columns of a row that share a scale; all of a row (``channel``), or all of a matrix (``tensor``).
        scheme: how scale and zero come from the range; see `grid`.
        clip_search: search the range that loses least, instead of the full one.
        scale_dtype: type in which scales are stored, and used; that of the weight where None.
        bits_by_name: full pattern of layer names -> bits, in the place of ``bits``; the first that matches.
        order: in which columns are solved; see `gptq`.
        groups: where grids of groups are fitted; see `gptq`.
        percdamp: multiple of the mean of diag H that is added to it.
        block_size: columns between two updates of all that follow.
        sequential: quantize the layers of a block one after the other, each on what those before it have become.
    """

    needs = "grams"

    def __init__(
        self,
        bits: int = 4,
        group_size: GroupSize = 128,
        scheme: Scheme = "symmetric",
        clip_search: bool = False,
        scale_dtype: ScaleType | None = None,
        bits_by_name: dict[str, int] | None = None,
        order: Order = "activation",
        groups: Groups = "static",
        percdamp: float = 0.01,
        block_size: int = 128,
        sequential: bool = True,
    ) -> None:
        super().__init__(bits, group_size, scheme, clip_search, scale_dtype, bits_by_name)
        checked_block_size(block_size)
        self.order, self.groups, self.percdamp, self.block_size = order, groups, percdamp, block_size
        self.sequential = sequential

    def compress(self, name: str, weight: Tensor, moment: Tensor | None) -> Compressed:
        """The matrix on its grids, later columns made up for earlier ones."""
        return gptq(
            weight,
            moment,
            self.bits_of(name),
            self.group_size,
            self.scheme,
            self.clip_search,
            self.stored_type(weight),
            self.order,
            self.groups,
            self.percdamp,
            self.block_size,
            self.kept_of(name, weight),
            pruned=self.pruned_of(name, weight),
        )
