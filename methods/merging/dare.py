"""DARE: drop entries of task vectors at random, and make up for it (arXiv 2311.03099).

    delta_ij = m_ij tau_ij / (1 - p),  P(m_ij = 1) = 1 - p;   E delta_i = tau_i

then the delta_i are summed, averaged, or merged by elected signs. Dialects:

    mergekit   drops nothing by default; per tensor, delta_i = m_i tau_i |tau_i|_1 / |m_i tau_i|_1, which is biased;
               ties adds up what agrees instead of averaging it
    peft       has no default; ties votes without weights and divides by the number of those that agree
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from fulgurite.methods.merging.combine import Combine, Then
from fulgurite.methods.merging.election import Aggregate
from fulgurite.methods.merging.per_expert import PerExpert, check_fractions, for_each
from fulgurite.methods.merging.plan import Operands
from fulgurite.methods.merging.thinning import Thinned, Thinning
from fulgurite.methods.random import chosen


class Dare(Thinning):
    """Drop, rescale, combine.

    Args:
        drop: p, one or one per expert; by default 0.5, and 0 in mergekit's dialect. The peft dialect has none. An
            expert of which all is dropped changes nothing.
        rescale: by the ``inverse_density`` 1 / (1 - p); to the norm ``l1`` of the tensor before, which is mergekit's
            default and reads each tensor twice; or ``none``.
        then: what is made of the results; see `combine`.
        lam: multiple of the merged task vector.
        aggregate: of those that agree under ``then="ties"``: by default their ``mean``, and ``sum`` in mergekit's
            dialect.
        dialect: whose defaults and rules; see above.
        seed: of the masks.

    Raises:
        ValueError: drop outside [0, 1], or none given to the peft dialect.
    """

    def __init__(
        self,
        drop: PerExpert | None = None,
        rescale: Literal["inverse_density", "l1", "none"] | None = None,
        then: Then = "task_arithmetic",
        lam: float = 1.0,
        aggregate: Aggregate | None = None,
        dialect: Literal["none", "mergekit", "peft"] = "none",
        seed: int = 0,
    ) -> None:
        if drop is None:
            if dialect == "peft":
                raise ValueError("dialect='peft' has no default: give drop")
            drop = 0.0 if dialect == "mergekit" else 0.5
        self.drop, self.dialect, self.seed = check_fractions("drop", drop), dialect, seed
        self.rescale = rescale or ("l1" if dialect == "mergekit" else "inverse_density")
        aggregate = aggregate or ("sum" if dialect == "mergekit" else "mean")
        self.combine = Combine(then, lam, aggregate, as_peft=dialect == "peft")

    def settings(self, num_experts: int) -> list[tuple[float, ...]]:
        """Of every expert 1 - p."""
        return [(1 - drop,) for drop in for_each("drop", self.drop, num_experts)]

    def thinned(self, operands: Operands, settings: Sequence[tuple[float, ...]]) -> Iterator[Thinned]:
        """See `Thinning.thinned`; of pieces."""
        for start, base, experts in operands.pieces():
            full, left = [expert - base for expert in experts], []
            for number, (delta, (density,)) in enumerate(zip(full, settings)):
                mask = chosen(density, self.seed, "dare", number, operands.name, delta.numel(), start)
                kept = delta * mask.to(delta.device)
                if 0 < density < 1 and self.rescale == "inverse_density":
                    kept.div_(density)
                left.append(kept)
            yield base, experts, full, left
