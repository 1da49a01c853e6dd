"""Head Projection: the k likeliest tokens of each layer's logit lens (Patil et al., 2024, arXiv 2309.17410).

C = union over l in S of topk(P_l)        at most |S| k candidates
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fulgurite.methods.unlearning.attacks.base import WhiteBox
from fulgurite.methods.unlearning.attacks.top_ids import top_ids


class HeadProjection(WhiteBox):
    """See the module's text. The defaults are the published ones for a model of 32 blocks.

    Args:
        layers: S.
        k: tokens taken of each layer.
    """

    name = "head projection"

    def __init__(self, layers: Sequence[int] = (25, 29, 30, 31, 32), k: int = 4) -> None:
        super().__init__(layers, k)

    @property
    def budget(self) -> int:
        """|S| k."""
        return len(self.layers) * self.k

    def candidates(self, lens: Mapping[int, Tensor]) -> Tensor:
        """(n, |S| k), layer by layer."""
        return torch.cat([top_ids(lens[layer], self.k) for layer in self.layers], dim=1)
