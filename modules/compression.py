"""What a module offers to those who score it before it is compressed."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from fulgurite.modules.calibration import Calibrated
from fulgurite.samples import Batch


@runtime_checkable
class Compressible(Calibrated, Protocol):
    """A module that can be measured, and whose answers can be judged. Nothing may be logged, and nothing kept."""

    def answer_targets(self, batch: Batch) -> Tensor:
        """(B, C) scores in [0, 1] of what `answer_logits` scores, for all examples of a batch; 0 of wrong answers."""
        ...
