"""Quantization as a step: weights of a checkpoint's backbone on grids of a few bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fulgurite.callbacks.compress_step import CalibrationSamples, CompressAtCheckpoint, source_masks
from fulgurite.methods.compression import Compressor
from fulgurite.methods.quantization.base import Quantizer


class QuantizeAtCheckpoint(CompressAtCheckpoint):
    """Quantizes the linear layers of a backbone's blocks; see `CompressAtCheckpoint`.

    Weights that were pruned stay 0.

    Args:
        quantizer: how, and to how many bits.
        layers: full pattern of the names of the layers in the backbone, as ``text\\.encoder\\..*\\.dense``; all linear
            layers of its blocks where null.
        towers: names of the backbone's towers whose blocks are quantized; all where null.
        calibration: training samples that inputs are measured on; null for `Rtn`.
        name: of artefact and figures; that of the quantizer's class by default.
    """

    kind = "quantized"
    verb = "quantize"

    def __init__(
        self,
        quantizer: Quantizer,
        layers: str | None = None,
        towers: list[str] | None = None,
        calibration: CalibrationSamples | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(quantizer, layers, towers, calibration, name)
        self.quantizer = quantizer

    @property
    def compressor(self) -> Compressor:
        """The quantizer."""
        return self.quantizer

    def prepare(self, compressor: Compressor, weights: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
        """Have pruned weights stay 0."""
        masks = {name: mask for name, mask in source_masks(source).items() if name in weights}
        compressor.keep_zeros(masks)
        return masks
