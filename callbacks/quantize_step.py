"""Quantization as a step: weights of a checkpoint on grids of a few bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fulgurite.callbacks.compress_data import CalibrationSamples
from fulgurite.callbacks.compress_step import CompressAtCheckpoint
from fulgurite.callbacks.compressed_state import source_masks
from fulgurite.callbacks.saved_blocks import SavedBlocks
from fulgurite.checkpoints import read_manifest
from fulgurite.methods.calibration import Loss
from fulgurite.methods.compression import Compressor, TokenWeights, matrices
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.quantization.base import Quantizer
from fulgurite.methods.quantization.bit_budget import BitBudget, Errors
from fulgurite.methods.quantization.rsq import TokenImportance
from fulgurite.methods.quantization.storage import COMPRESSED, packed_mask, unpacked_mask
from fulgurite.methods.quantization.tacq import TaskCircuit


class QuantizeAtCheckpoint(CompressAtCheckpoint):
    """Quantizes the linear layers of a module's blocks; see `CompressAtCheckpoint`.

    Weights that were pruned stay 0.

    Args:
        quantizer: how, and to how many bits.
        layers: full pattern of the names of the layers within backbone or image encoder, as
            ``text\\.encoder\\..*\\.dense``; all linear layers of the blocks where null.
        towers: names of the towers whose blocks are quantized; all where null.
        calibration: training samples that inputs are measured on, and the model is scored on; null for `Rtn` alone.
        name: of artefact and figures; that of the quantizer's class by default.
        importance: how much the tokens of a block count (RSQ); all alike where null.
        budget: bits of every layer by what it loses, in the place of the quantizer's.
        task_circuit: weights that the task needs most stay as they are (TaCQ).
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
        importance: TokenImportance | None = None,
        budget: BitBudget | None = None,
        task_circuit: TaskCircuit | None = None,
    ) -> None:
        measured = task_circuit is not None or (budget is not None and calibration is not None)
        super().__init__(quantizer, layers, towers, calibration, name, scored=measured)
        if importance is not None and quantizer.needs != "grams":
            raise ValueError(f"importance weighs tokens, and {type(quantizer).__name__} measures none: leave it out")
        if budget is not None and quantizer.bits_by_name:
            raise ValueError("budget gives every layer its bits: leave out the quantizer's bits_by_name")
        self.quantizer, self.importance, self.budget = quantizer, importance, budget
        self.task_circuit = task_circuit

    @property
    def compressor(self) -> Compressor:
        """The quantizer."""
        return self.quantizer

    @property
    def methods(self) -> list[object]:
        """The quantizer, and what weighs tokens, gives bits or keeps weights."""
        used = (self.quantizer, self.importance, self.budget, self.task_circuit)
        return [method for method in used if method is not None]

    def prepare(self, compressor: Compressor, tensors: Mapping[str, str], source: Path) -> dict[str, Tensor]:
        """Have pruned weights stay 0. Refuse layers that are quantized, since they would be rounded twice."""
        compressed = read_manifest(source).facts.get(COMPRESSED, {})
        twice = [layer for layer, name in tensors.items() if compressed.get(name, {"bits": None})["bits"] is not None]
        if twice:
            raise ValueError(
                f"{len(twice)} layers of {source} are quantized already, first {twice[0]}: quantize the model that it "
                "was made from, or leave them out of layers"
            )
        pruned = source_masks(source)
        masks = {layer: pruned[name] for layer, name in tensors.items() if name in pruned}
        compressor.keep_zeros(masks)
        return masks

    @property
    def token_weights(self) -> TokenWeights | None:
        """Those of ``importance``."""
        return self.importance

    def score(self, compressor: Compressor, walk: LayerWalk, loss: Loss, saved: SavedBlocks) -> dict[str, Any]:
        """Choose bits, and weights to keep, where that is wanted."""
        facts = {}
        if self.budget is not None:
            errors = self._errors(compressor, walk, saved)
            compressor.assign(walk.ranks.agree(lambda: self.budget.allocate(walk, errors, self.layers)))
            facts["errors"] = {name: {str(bits): e for bits, e in each.items()} for name, each in errors.items()}
        if self.task_circuit is not None:
            weights = matrices(walk, self.layers)

            def make() -> dict[str, Tensor]:
                masks = self.task_circuit.masks(walk, loss, compressor, self.layers, token_weights=self.token_weights)
                return {name: packed_mask(mask.cpu()) for name, mask in masks.items()}

            packed = saved.once("task_circuit", make)
            compressor.keep({n: unpacked_mask(bits, tuple(weights[n].shape)) for n, bits in packed.items()})
        return facts

    def _errors(self, compressor: Compressor, walk: LayerWalk, saved: SavedBlocks) -> Errors:
        """Of every layer in every choice of bits."""

        def make() -> dict[str, Tensor]:
            found = self.budget.errors(walk, compressor, self.layers, self.token_weights)
            return {
                f"{name}/{bits}": torch.tensor(error, dtype=torch.float64)
                for name, each in found.items()
                for bits, error in each.items()
            }

        errors: Errors = {}
        for key, error in saved.once("errors", make).items():
            name, _, bits = key.rpartition("/")
            errors.setdefault(name, {})[int(bits)] = error.item()
        return errors
