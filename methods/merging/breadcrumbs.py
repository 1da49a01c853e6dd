"""Model Breadcrumbs: leave out the largest and the smallest changes, keep those between (arXiv 2312.06795).

    of n entries of tau_i by falling magnitude, the first int(gamma n) are outliers, and the int(rho n) that follow
    stay; where that is more than there are, fewer are outliers.   theta* = theta_0 + lam sum_i w_i delta_i

per tensor, or per row. Dialects:

    official   per row, as many outliers as asked for. ``keep_first`` takes the largest int(rho n) first, and then the
               outliers from these, so that int(rho n) - int(gamma n) stay. Scalars stay whole
    mergekit   density 1, lam 1; keeps nothing where int(rho n) is 0; ties adds up what agrees
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from fulgurite.methods.merging.combine import Combine, Then
from fulgurite.methods.merging.election import Aggregate
from fulgurite.methods.merging.per_expert import PerExpert, check_fractions, for_each
from fulgurite.methods.merging.plan import Operands
from fulgurite.methods.merging.row_ranks import by_rank, row_length
from fulgurite.methods.merging.thinning import Thinned, Thinning
from fulgurite.methods.merging.trimming import task_vectors
from fulgurite.methods.selection import cuts_at, kept_count, take_between


class Breadcrumbs(Thinning):
    """Trim on both sides, combine. Under ``scope="row"`` it holds a block of rows of each model, at least one row.

    Args:
        density: rho, the share of entries that is kept, one or one per expert; by default 0.9, and 1 in mergekit's
            dialect.
        gamma: share of the largest entries that is left out, one or one per expert.
        scope: of the shares: a ``tensor``, or each ``row`` of it (a vector is one row); by default a tensor, in the
            official dialect a row.
        keep_first: see the official dialect.
        rescale: to the norm ``l1`` of the tensor before, which reads each tensor once more, or ``none``.
        then: what is made of the results; see `combine`.
        lam: multiple of the merged task vector; by default 0.3, and 1 in mergekit's dialect.
        aggregate: of those that agree under ``then="ties"``: by default their ``mean``, and ``sum`` in mergekit's
            dialect.
        dialect: whose defaults and rules; see above.

    Raises:
        ValueError: density or gamma outside [0, 1], or ``keep_first`` in another dialect than the official one.
    """

    def __init__(
        self,
        density: PerExpert | None = None,
        gamma: PerExpert = 0.01,
        scope: Literal["tensor", "row"] | None = None,
        keep_first: bool = False,
        rescale: Literal["none", "l1"] = "none",
        then: Then = "task_arithmetic",
        lam: float | None = None,
        aggregate: Aggregate | None = None,
        dialect: Literal["none", "official", "mergekit"] = "none",
    ) -> None:
        foreign = dialect == "mergekit"
        if keep_first and dialect != "official":
            raise ValueError(f"keep_first is an order of the official dialect, got dialect={dialect!r}")
        self.density = check_fractions("density", (1.0 if foreign else 0.9) if density is None else density)
        self.gamma = check_fractions("gamma", gamma)
        self.scope = scope or ("row" if dialect == "official" else "tensor")
        self.keep_first, self.rescale, self.dialect = keep_first, rescale, dialect
        aggregate = aggregate or ("sum" if foreign else "mean")
        self.combine = Combine(then, (1.0 if foreign else 0.3) if lam is None else lam, aggregate)

    def settings(self, num_experts: int) -> list[tuple[float, ...]]:
        """Density and gamma of every expert."""
        densities = for_each("density", self.density, num_experts)
        return list(zip(densities, for_each("gamma", self.gamma, num_experts)))

    def band(self, count: int, density: float, gamma: float) -> tuple[int, int]:
        """Of ``count`` magnitudes, how many are outliers, and how many these and the kept ones are."""
        top = int(gamma * count)
        if self.dialect == "official":
            keep = int(density * count)
            return top, max(keep, top) if self.keep_first else min(top + keep, count)
        keep = int(density * count) if self.dialect == "mergekit" else kept_count(density, count)
        top = min(top, count - keep)
        return top, top + keep

    def thinned(self, operands: Operands, settings: Sequence[tuple[float, ...]]) -> Iterator[Thinned]:
        """See `Thinning.thinned`; of pieces, or under ``scope="row"`` of blocks of rows."""
        if self.dialect == "official" and not operands.shape:
            base, experts = operands.whole()
            full = [expert - base for expert in experts]
            yield base, experts, full, [delta.clone() for delta in full]
        elif self.scope == "row":
            yield from self.trimmed_rows(operands, settings)
        else:
            yield from self.trimmed_tensor(operands, settings)

    def trimmed_tensor(self, operands: Operands, settings: Sequence[tuple[float, ...]]) -> Iterator[Thinned]:
        """See `thinned`."""
        bands = [self.band(operands.num_entries, *setting) for setting in settings]
        cuts = cuts_at(task_vectors(operands), operands.num_entries, bands)
        for _, base, experts in operands.pieces():
            full, left = [expert - base for expert in experts], []
            for number, delta in enumerate(full):
                inner, outer = cuts[number]
                kept, outer, inner = take_between(delta, outer, inner)
                cuts[number] = [inner, outer]
                left.append(kept)
            yield base, experts, full, left

    def trimmed_rows(self, operands: Operands, settings: Sequence[tuple[float, ...]]) -> Iterator[Thinned]:
        """See `thinned`."""
        columns, tables = row_length(operands), []
        for setting in settings:
            top, bottom = self.band(columns, *setting)
            tables.append(torch.zeros(columns))
            tables[-1][columns - bottom : columns - top] = 1
        for base, experts in operands.rows(columns):
            full = [expert - base for expert in experts]
            yield base, experts, full, [delta * by_rank(delta, table) for delta, table in zip(full, tables)]
