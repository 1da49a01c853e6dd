"""What every router promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

# One tensor (N, D), or the parts that make it up, each (N, D_i).
Features = Tensor | Sequence[Tensor]


class Router(nn.Module, ABC):
    """From features of a sample under the frozen backbone to weights over the K experts."""

    @abstractmethod
    def update(self, features: Features, expert: str) -> None:
        """Learn from the features of some training samples of ``expert``."""

    @abstractmethod
    def build(self, width: int, experts: Sequence[str]) -> None:
        """Make room for ``experts`` with features of ``width``, so that a checkpoint can be loaded."""

    @abstractmethod
    def forward(self, features: Features, num_models: int | None = None, top_k: int | None = None) -> Tensor:
        """Weights (B, K) in the order of the experts; rows sum to 1.

        Args:
            features: of B samples.
            num_models: only the first so many experts exist; all when not given.
            top_k: experts to keep per sample, in place of the router's own number.
        """
