"""What is made of thinned task vectors delta_i: their sum, their mean, or those that agree with an elected sign.

    task_arithmetic  theta* = theta_0 + lam sum_i w_i delta_i
    average          theta* = theta_0 + lam sum_i w_i delta_i / sum_i w_i     (over 1 where the weights cancel)
    ties             theta* = theta_0 + lam tau*, with tau* as in `election`; a tied vote is plus

A tied vote is plus in the published implementations of all thinning methods; the majority of the whole model, as TIES
has it, would need another pass over all masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fulgurite.methods.merging.election import Aggregate, Election, add_deltas, merge_elected

Then = Literal["task_arithmetic", "average", "ties"]


@dataclass(frozen=True)
class Combine:
    """The last step of a method that thins task vectors out.

    Args:
        then: see the module.
        lam: the multiple.
        aggregate: what ``ties`` makes of those that agree.
        as_peft: ``ties`` counts votes without weights, and divides by the number of those that agree.

    Raises:
        ValueError: ``then`` is none of the three.
    """

    then: Then
    lam: float = 1.0
    aggregate: Aggregate = "mean"
    as_peft: bool = False

    def __post_init__(self) -> None:
        if self.then not in ("task_arithmetic", "average", "ties"):
            raise ValueError(f"then is task_arithmetic, average or ties, got {self.then!r}")

    @property
    def election(self) -> Election:
        """The rule of ``ties``."""
        divisor = "count" if self.as_peft else "weights"
        return Election(weighted=not self.as_peft, zero="positive", aggregate=self.aggregate, divisor=divisor)

    def __call__(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        deltas: Sequence[Tensor],
        weights: Sequence[float],
        as_is: bool = False,
    ) -> Tensor:
        """theta*; arguments as in `merge_elected`, with its promise for one expert alone. Overwrites the deltas."""
        if self.then == "ties":
            return merge_elected(base, experts, deltas, weights, self.election, self.lam, as_is=as_is)
        total = sum(weights)
        divides = self.then == "average" and abs(total) >= 1e-8
        return add_deltas(base, experts, deltas, weights, self.lam / total if divides else self.lam, as_is)
