"""Metrics that keep something of every sample until all ranks have come together."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class PerSampleMetric(Metric):
    """A metric whose states are lists of vectors, joined over ranks of which some may have had no sample at all.

    torchmetrics lets a rank without any take part in the exchange with numbers of its default type, which do not go
    with those of the others; so here each list begins with an empty vector of the right type.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, torch.dtype] = {}

    def keep(self, name: str, dtype: torch.dtype) -> None:
        """Add the state ``name``, a list of vectors of ``dtype``."""
        self.add_state(name, [], dist_reduce_fx="cat")
        self._kept[name] = dtype
        self._begin(name)

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        for name in self._kept:
            self._begin(name)

    def joined(self, name: str) -> Tensor:
        """All of a state as one vector."""
        return dim_zero_cat(getattr(self, name))

    def _begin(self, name: str) -> None:
        getattr(self, name).append(torch.zeros(0, dtype=self._kept[name], device=self.device))
