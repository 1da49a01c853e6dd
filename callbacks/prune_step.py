"""Pruning as a step: weights of a checkpoint's backbone set to zero."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fulgurite.callbacks.compress_step import CalibrationSamples, CompressAtCheckpoint, layer_of
from fulgurite.checkpoints import read_manifest
from fulgurite.methods.compression import Compressor
from fulgurite.methods.pruning.base import Pruner
from fulgurite.methods.quantization.storage import COMPRESSED


class PruneAtCheckpoint(CompressAtCheckpoint):
    """Prunes the linear layers of a backbone's blocks; see `CompressAtCheckpoint`. Quantize after it, not before.

    Args:
        pruner: how, and how much.
        layers: full pattern of the names of the layers in the backbone, as ``text\\.encoder\\..*\\.dense``; all linear
            layers of its blocks where null.
        towers: names of the backbone's towers whose blocks are pruned; all where null.
        calibration: training samples that inputs are measured on; null for `Magnitude`.
        name: of artefact and figures; that of the pruner's class by default.
    """

    kind = "pruned"
    verb = "prune"

    def __init__(
        self,
        pruner: Pruner,
        layers: str | None = None,
        towers: list[str] | None = None,
        calibration: CalibrationSamples | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(pruner, layers, towers, calibration, name)
        self.pruner = pruner

    @property
    def compressor(self) -> Compressor:
        """The pruner."""
        return self.pruner

    def prepare(self, compressor: Compressor, weights: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
        """Refuse layers that are quantized, since pruning would take them off their grids."""
        compressed = read_manifest(source).facts.get(COMPRESSED, {})
        quantized = [layer_of(name) for name, about in compressed.items() if about["bits"] is not None]
        if both := [name for name in quantized if name in weights]:
            raise ValueError(
                f"{len(both)} layers of {source} are quantized, first {both[0]}, and pruning would take them off their "
                "grids: prune before you quantize, or leave them out of layers"
            )
        return {}
