"""NearSwap: take the other model where it is near, and less of it the further it is away (mergekit's ``nearswap``).

    theta* = a theta_1 + (1 - a) theta_0,   a = clamp(t / max(|theta_1 - theta_0|, 1e-6), 0, 1)

so no entry moves by more than t.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fulgurite.methods.merging.base import Elementwise
from fulgurite.methods.merging.per_expert import refuse_several

NEAREST = 1e-6  # distance below which all are as near


class NearSwap(Elementwise):
    """One model, into its base.

    Args:
        t: how far an entry may move; changes up to it are taken whole.

    Raises:
        ValueError: t is negative.
    """

    def __init__(self, t: float) -> None:
        if not t >= 0:
            raise ValueError(f"t is a distance of at least 0, got {t}")
        self.t = t

    def check(self, num_experts: int, has_base: bool, weights: Sequence[float] | None) -> list[float]:
        """See `Merger.check`; also refuses more than one model, and a weight other than 1."""
        return refuse_several(type(self).__name__, super().check(num_experts, has_base, weights))

    def merge_tensor(
        self, name: str, base: Tensor | None, experts: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        """See the module."""
        (expert,) = experts
        share = (expert - base).abs_().clamp_(min=NEAREST).reciprocal_().mul_(self.t).clamp_(max=1)
        return base.lerp(expert, share)
