"""What a module offers to those who compress it: where its blocks are, how data run in them, how answers are judged."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from fulgurite.methods.structure import ModelSpec
from fulgurite.modules.calibration import Calibrated
from fulgurite.samples import Batch


@runtime_checkable
class Compressible(Calibrated, Protocol):
    """A module whose blocks can be made smaller. Nothing may be logged, and nothing kept.

    Attributes:
        compressible_part: name of the submodule that the blocks are in. Layers are named as it names them.
    """

    compressible_part: str

    def blocks_spec(self) -> ModelSpec:
        """Where the blocks are in that submodule. Raises ValueError, in one line, where it has none."""
        ...

    def pass_blocks(self, inputs: dict[str, Tensor]) -> None:
        """Run every block on what `calibration_inputs` gave, each of them once."""
        ...

    def answer_targets(self, batch: Batch) -> Tensor:
        """(B, C) scores in [0, 1] of what `answer_logits` scores, for all examples of a batch; 0 of wrong answers."""
        ...

    def weights_changed(self) -> dict[str, Any]:
        """Compute anew what is derived from the weights of that submodule, once it has others than its source's.

        Returns:
            what a checkpoint of the module, self-contained from now on, has among its facts because of that.
        """
        ...
