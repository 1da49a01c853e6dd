"""Pruning as a step: weights of a checkpoint set to zero."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fulgurite.callbacks.compress_data import CalibrationSamples
from fulgurite.callbacks.compress_step import CompressAtCheckpoint
from fulgurite.callbacks.saved_blocks import SavedBlocks
from fulgurite.checkpoints import read_manifest
from fulgurite.methods.calibration import Loss
from fulgurite.methods.compression import Compressor, matrices
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.pruning.base import Pruner
from fulgurite.methods.pruning.ecoflap import Ecoflap
from fulgurite.methods.pruning.iterative import Iterative
from fulgurite.methods.quantization.storage import COMPRESSED, packed_mask, unpacked_mask


def needs_loss(pruner: Pruner | Iterative, allocation: Ecoflap | None) -> bool:
    """Whether the whole model is scored on data before."""
    return allocation is not None or (isinstance(pruner, Iterative) and pruner.score == "gradient")


class PruneAtCheckpoint(CompressAtCheckpoint):
    """Prunes the linear layers of a module's blocks; see `CompressAtCheckpoint`. Quantize after it, not before.

    Args:
        pruner: how, and how much.
        layers: full pattern of the names of the layers within backbone or image encoder, as
            ``text\\.encoder\\..*\\.dense``; all linear layers of the blocks where null.
        towers: names of the towers whose blocks are pruned; all where null.
        calibration: training samples that inputs are measured on, and the model is scored on; null for `Magnitude`
            without an allocation, and `Iterative` by magnitude.
        name: of artefact and figures; that of the pruner's class by default.
        allocation: sparsity of every layer by its importance for the loss, with the pruner's as target; all have the
            pruner's where null.
    """

    kind = "pruned"
    verb = "prune"

    def __init__(
        self,
        pruner: Pruner | Iterative,
        layers: str | None = None,
        towers: list[str] | None = None,
        calibration: CalibrationSamples | None = None,
        name: str | None = None,
        allocation: Ecoflap | None = None,
    ) -> None:
        in_rounds = isinstance(pruner, Iterative)
        super().__init__(pruner, layers, towers, calibration, name, scored=needs_loss(pruner, allocation))
        if allocation is not None and in_rounds:
            raise ValueError(
                "allocation gives every layer its sparsity, and Iterative ranks all together: leave it out"
            )
        if allocation is not None and (pruner.sparsities or getattr(pruner, "scope", "matrix") != "matrix"):
            raise ValueError("allocation gives every layer its sparsity: leave out the pruner's sparsities and scope")
        if allocation is not None and pruner.sparsity != allocation.target:
            raise ValueError(
                f"allocation.target={allocation.target} and the pruner's sparsity={pruner.sparsity}: give the same"
            )
        self.pruner, self.allocation = pruner, allocation

    @property
    def compressor(self) -> Compressor:
        """The pruner."""
        return self.pruner

    @property
    def methods(self) -> list[object]:
        """The pruner, and the allocation."""
        return [self.pruner] if self.allocation is None else [self.pruner, self.allocation]

    def prepare(self, compressor: Compressor, tensors: Mapping[str, str], source: Path) -> dict[str, Tensor]:
        """Refuse layers that are quantized, since pruning would take them off their grids, or pruned already."""
        compressed = read_manifest(source).facts.get(COMPRESSED, {})
        quantized = {name for name, about in compressed.items() if about["bits"] is not None}
        if both := [layer for layer, name in tensors.items() if name in quantized]:
            raise ValueError(
                f"{len(both)} layers of {source} are quantized, first {both[0]}, and pruning would take them off their "
                "grids: prune before you quantize, or leave them out of layers"
            )
        if both := [layer for layer, name in tensors.items() if name in compressed]:
            raise ValueError(
                f"{len(both)} layers of {source} are pruned already, first {both[0]}: prune the model that it was made "
                "from, to the sparsity wanted, or leave them out of layers"
            )
        return {}

    def score(self, compressor: Compressor, walk: LayerWalk, loss: Loss, saved: SavedBlocks) -> dict[str, Any]:
        """Find the masks of a pruner of rounds; allocate sparsities, where that is wanted."""
        if isinstance(compressor, Iterative):
            self._find(compressor, walk, loss, saved)
        if self.allocation is None:
            return {}

        def make() -> dict[str, Tensor]:
            found = self.allocation.importance(walk, loss, self.layers)
            return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}

        importance = {name: value.item() for name, value in saved.once("importance", make).items()}
        compressor.assign(walk.ranks.agree(lambda: self.allocation.allocate(walk, importance, self.layers)))
        return {"importance": importance}

    def _find(self, compressor: Iterative, walk: LayerWalk, loss: Loss, saved: SavedBlocks) -> None:
        """Masks of all rounds, once."""

        def make() -> dict[str, Tensor]:
            return {name: packed_mask(mask.cpu()) for name, mask in compressor.find(walk, loss, self.layers).items()}

        weights = matrices(walk, self.layers)
        packed = saved.once("rounds", make)
        compressor.keep({name: unpacked_mask(bits, tuple(weights[name].shape)) for name, bits in packed.items()})
