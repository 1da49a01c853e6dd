"""The loop over columns that GPTQ (arXiv 2210.17323) and SparseGPT (arXiv 2301.00774) share.

    q_j = Q(w_j);  e_j = (w_j - q_j) / U_jj;  w_k <- w_k - e_j U_jk  for the columns k > j;  H^-1 = U^T U

The weight lies transposed, so that a column is one run of memory. Updates of rank one reach 16 columns; what lies
beyond follows by a matrix product per 16 columns inside a block, and by one per block beyond it. All of that only
changes the order of additions. Shapes: in columns, out rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from fulgurite.methods.statistics.gram import full_precision

Order = Literal["none", "activation", "group_aware"]

COLUMNS_AT_ONCE = 16


class ColumnView:
    """Weights as they are in the middle of the loop."""

    def __init__(self, weight: Tensor, upper: Tensor, errors: Tensor, first: int, at: int, before: Tensor | None):
        self.weight, self.upper, self.errors = weight, upper, errors
        self.first, self.at, self.before = first, at, before

    def fresh(self, stop: int) -> Tensor:
        """Columns from here to ``stop`` (n, out) with every update so far."""
        last = self.first + len(self.errors)
        if stop <= last:
            return self.weight[self.at : stop]
        done = slice(self.first, self.at)
        beyond = self.weight[last:stop].addmm(
            self.upper[done, last:stop].T, self.errors[: self.at - self.first], alpha=-1
        )
        return torch.cat([self.weight[self.at : last], beyond])

    def stale(self, stop: int) -> Tensor:
        """The same with the updates of earlier blocks alone, as the published code reads them."""
        last = self.first + len(self.errors)
        return torch.cat([self.before[self.at - self.first : stop - self.first], self.weight[last:stop]])


class Rule(Protocol):
    """What becomes of a column."""

    reads: Mapping[int, int]
    """Column before which `look` is called -> end of the columns that it reads."""
    keeps_start: bool
    """Whether `look` wants `ColumnView.stale`."""

    def look(self, column: int, view: ColumnView) -> None:
        """Decide on columns from ``column`` on, by their weights as they are now."""

    def replace(self, column: int, values: Tensor) -> Tensor:
        """Q(w_j) of the weights (out,) of a column."""


def solve_columns(weight: Tensor, upper: Tensor, rule: Rule, block_size: int) -> float:
    """Replace every column and let the later ones make up for it.

    Args:
        weight: (in, out), contiguous. It is overwritten with the result.
        upper: (in, in), U.
        rule: what becomes of a column.
        block_size: columns between two updates of all that follow. Memory: two blocks.

    Returns:
        Half of tr((W - Q) H (W - Q)^T), H the damped matrix.
    """
    num_columns = len(weight)
    pivots = upper.diagonal().tolist()
    loss = torch.zeros((), dtype=torch.float64 if weight.device.type == "cpu" else weight.dtype, device=weight.device)
    with full_precision():
        for first in range(0, num_columns, block_size):
            last = min(first + block_size, num_columns)
            before = weight[first:last].clone() if rule.keeps_start else None
            errors = torch.empty_like(weight[first:last])
            for start, stop in segments(first, last, rule.reads):
                for column in range(start, stop):
                    if column in rule.reads:
                        rule.look(column, ColumnView(weight, upper, errors, first, column, before))
                    values, error = weight[column], errors[column - first]
                    replaced = rule.replace(column, values)
                    torch.sub(values, replaced, out=error).div_(pivots[column])
                    values.copy_(replaced)
                    if column + 1 < stop:
                        weight[column + 1 : stop].addr_(upper[column, column + 1 : stop], error, alpha=-1)
                if stop < last:
                    weight[stop:last].addmm_(
                        upper[start:stop, stop:last].T, errors[start - first : stop - first], alpha=-1
                    )
            if last < num_columns:
                weight[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
            loss += errors.square().sum()
    return loss.item() / 2


def segments(first: int, last: int, reads: Mapping[int, int]) -> Iterator[tuple[int, int]]:
    """Runs of up to 16 columns that cover [first, last); a column whose look reads beyond its run begins a new one."""
    start = first
    while start < last:
        stop = min(start + COLUMNS_AT_ONCE, last)
        for column in range(start + 1, stop):
            if reads.get(column, 0) > stop:
                stop = column
                break
        yield start, stop
        start = stop


def column_order(energy: Tensor, order: Order, group_index: Tensor) -> Tensor | None:
    """The columns in the order in which they are solved (in,), or nothing where that is their own.

    Args:
        energy: (in,) the diagonal of H; columns that are dead count as 1.
        order: by falling energy (``activation``), or so within groups and groups by their largest (``group_aware``).
        group_index: (in,) the group of every column.

    Raises:
        ValueError: an unknown order.
    """
    if order == "none":
        return None
    energy = energy.masked_fill(energy == 0, 1)
    falling = energy.argsort(descending=True, stable=True)
    if order == "activation":
        return falling
    if order != "group_aware":
        raise ValueError(f"order={order!r}: expected 'none', 'activation' or 'group_aware'")
    groups = group_index.long().to(energy.device)
    largest = energy.new_full((int(groups.max()) + 1,), -1).scatter_reduce_(0, groups, energy, "amax")
    rank = largest.argsort(descending=True, stable=True).argsort()
    return falling[rank[groups[falling]].argsort(stable=True)]


def checked_block_size(block_size: int) -> int:
    """``block_size``, if it is one.

    Raises:
        ValueError: it is below 1.
    """
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: expected at least 1 column")
    return block_size
