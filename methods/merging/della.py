"""DELLA: drop entries of task vectors at random, small ones more often, and make up for it (arXiv 2406.11617).

    p_ij = rho - eps + 2 eps r / (m - 1)   r = 0 .. m - 1: rank of |tau_ij| among the m entries of its row, from below
    delta_ij = m_ij tau_ij / p_ij,  P(m_ij = 1) = p_ij;   E delta_i = tau_i

then the delta_i are merged by elected signs, summed or averaged. A vector is one row; where m = 1, p = rho.

Dialect mergekit: density 1, epsilon 0.15, lam 1; per tensor, delta_i = m_i tau_i |tau_i|_1 / |m_i tau_i|_1, which is
biased.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from fulgurite.methods.merging.combine import Combine, Then
from fulgurite.methods.merging.election import Aggregate
from fulgurite.methods.merging.per_expert import PerExpert, check_fractions, each, for_each
from fulgurite.methods.merging.plan import Operands
from fulgurite.methods.merging.row_ranks import by_rank, row_length
from fulgurite.methods.merging.thinning import Thinned, Thinning
from fulgurite.methods.random import uniform


def keep_probabilities(density: float, epsilon: float, columns: int) -> Tensor:
    """(columns,) p of the module's equation, by rank."""
    if columns == 1:
        return torch.tensor([density])
    return torch.linspace(density - epsilon, density + epsilon, columns)


class Della(Thinning):
    """Drop, rescale, combine. Holds a block of rows of each model, at least one row.

    Args:
        density: rho, the mean share of entries that is kept, one or one per expert; by default 0.7, and 1 in
            mergekit's dialect. An expert of which nothing is kept changes nothing.
        epsilon: how far probabilities lie from ``density`` at most, one or one per expert; by default 0.07, and 0.15
            in mergekit's dialect.
        rescale: by the ``inverse_probability`` of each entry; to the norm ``l1`` of the tensor before, which is
            mergekit's default and reads each tensor twice; or ``none``.
        then: what is made of the results; see `combine`.
        lam: multiple of the merged task vector; by default 1.1, and 1 in mergekit's dialect.
        aggregate: of those that agree under ``then="ties"``.
        dialect: whose defaults; see above.
        seed: of the masks.

    Raises:
        ValueError: a density outside [0, 1], or probabilities outside (0, 1) where it is neither 0 nor 1.
    """

    def __init__(
        self,
        density: PerExpert | None = None,
        epsilon: PerExpert | None = None,
        rescale: Literal["inverse_probability", "l1", "none"] | None = None,
        then: Then = "ties",
        lam: float | None = None,
        aggregate: Aggregate = "mean",
        dialect: Literal["none", "mergekit"] = "none",
        seed: int = 0,
    ) -> None:
        foreign = dialect == "mergekit"
        self.density = check_fractions("density", (1.0 if foreign else 0.7) if density is None else density)
        self.epsilon = check_fractions("epsilon", (0.15 if foreign else 0.07) if epsilon is None else epsilon)
        self.rescale = rescale or ("l1" if foreign else "inverse_probability")
        self.combine = Combine(then, (1.0 if foreign else 1.1) if lam is None else lam, aggregate)
        self.seed = seed
        if len(each(self.density)) == 1 or len(each(self.epsilon)) in (1, len(each(self.density))):
            self.settings(max(len(each(self.density)), len(each(self.epsilon))))

    def settings(self, num_experts: int) -> list[tuple[float, ...]]:
        """Density and epsilon of every expert.

        Raises:
            ValueError: another number of them than of experts, or probabilities outside (0, 1).
        """
        densities = for_each("density", self.density, num_experts)
        pairs = list(zip(densities, for_each("epsilon", self.epsilon, num_experts)))
        for density, epsilon in pairs:
            if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
                raise ValueError(
                    f"density {density} with epsilon {epsilon} means to keep entries with probabilities from "
                    f"{density - epsilon:.4g} to {density + epsilon:.4g}; they must lie between 0 and 1: lower epsilon"
                )
        return pairs

    def thinned(self, operands: Operands, settings: Sequence[tuple[float, ...]]) -> Iterator[Thinned]:
        """See `Thinning.thinned`; of blocks of rows."""
        columns, start = row_length(operands), 0
        tables = [keep_probabilities(density, epsilon, columns) for density, epsilon in settings]
        for base, experts in operands.rows(columns):
            full, left = [expert - base for expert in experts], []
            for number, (delta, (density, _)) in enumerate(zip(full, settings)):
                if density in (0, 1):
                    left.append(delta * density)
                    continue
                probability = by_rank(delta, tables[number])
                drawn = uniform(self.seed, "della", number, operands.name, delta.numel(), start)
                kept = delta * (drawn.to(delta.device).view_as(delta) < probability)
                left.append(kept.div_(probability) if self.rescale == "inverse_probability" else kept)
            start += base.numel()
            yield base, experts, full, left
