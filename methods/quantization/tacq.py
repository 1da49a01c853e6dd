"""TaCQ: keep the weights that a task needs most, quantize all others (arXiv 2504.07389).

    masks = TaskCircuit().masks(walk, loss, quantizer)
    quantizer.keep(masks)
    for block in compressed_blocks(walk, quantizer): ...

    A    the reference: what the same quantizer makes of the model, keeping nothing
    B    sensitivities A = sum over examples of |dL / dW|
    C    the k = int(p M) weights of largest |A (W - W_q) W| are kept; see `task_circuit`

Sensitivities depend on neither bits nor p: those that `sensitivities` gave may be stored, and used again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fulgurite.methods.calibration import Loss, first_batches, gradient_moments, rows_of
from fulgurite.methods.compression import TokenWeights, compressed_blocks, matrices
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.quantization.base import Quantizer
from fulgurite.methods.quantization.quantized_weight import QuantizedWeight
from fulgurite.methods.quantization.task_circuit import task_circuit_mask
from fulgurite.methods.statistics.gram import input_width

Examples = Callable[[Any], Iterable[Any]]


class TaskCircuit:
    """Finds the weights that stay in 16 bits.

    Args:
        ratio: p, share of the weights of the quantized layers.
        samples: examples to take gradients of, over all processes: the first batches that hold as many; all where
            None.
        moment: of the gradients of single examples: ``absolute`` values as published, or ``square``.

    Raises:
        ValueError: numbers outside their ranges.
    """

    def __init__(
        self, ratio: float = 0.0035, samples: int | None = None, moment: Literal["absolute", "square"] = "absolute"
    ) -> None:
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio={ratio}: expected a share from 0 to 1")
        if samples is not None and samples < 1:
            raise ValueError(f"samples={samples}: expected at least 1, or None for all")
        if moment not in ("absolute", "square"):
            raise ValueError(f"moment={moment!r}: expected 'absolute' or 'square'")
        self.ratio, self.samples, self.moment = ratio, samples, moment

    def masks(
        self,
        walk: LayerWalk,
        loss: Loss,
        quantizer: Quantizer,
        pattern: str | None = None,
        sensitivities: Mapping[str, Tensor] | None = None,
        token_weights: TokenWeights | None = None,
    ) -> dict[str, Tensor]:
        """True at the weights (out, in) to keep, by name of the layer. All ranks call it; the model is as it was.

        Memory: a copy of the weights, their integers, and the sensitivities, besides what the walk holds.

        Args:
            walk: with the batches to calibrate with and take gradients of.
            loss: of the whole model on one batch.
            quantizer: with its bits; it is not changed.
            pattern: full pattern of names of layers; all linear layers of the walked blocks where None.
            sensitivities: of an earlier call, instead of new gradients.
            token_weights: see `compressed_blocks`.
        """
        if sensitivities is None:
            sensitivities = self.sensitivities(walk, loss, pattern)
        quantized = reference(walk, quantizer, pattern, token_weights)
        return self.select(matrices(walk, pattern), sensitivities, quantized)

    def sensitivities(
        self, walk: LayerWalk, loss: Loss, pattern: str | None = None, examples: Examples | None = None
    ) -> dict[str, Tensor]:
        """Mean over examples of |dL / dW| (out, in), by name of the layer. All ranks call it.

        Args:
            walk: as for `masks`.
            loss: as for `masks`.
            pattern: as for `masks`.
            examples: the examples of a batch, each as a batch of one; `rows_of` where None.
        """
        layers = {name: walk.model.get_submodule(name) for name in matrices(walk, pattern)}
        batches = [batch for _, batch in first_batches(walk.batches, self.samples, walk.ranks)]
        single = (example for batch in batches for example in (examples or rows_of)(batch))
        found = gradient_moments(walk, loss, layers, single, self.moment)
        return {name: value.T if input_width(layers[name])[1] else value for name, value in found.items()}

    def select(
        self,
        weights: Mapping[str, Tensor],
        sensitivities: Mapping[str, Tensor],
        quantized: Mapping[str, QuantizedWeight | None],
    ) -> dict[str, Tensor]:
        """Masks from what the two passes have found; None of a layer that is not quantized."""

        def dense(name: str) -> Tensor:
            # Not in the weight's own type, which may be too coarse to tell the two apart.
            return weights[name] if quantized[name] is None else quantized[name].dequantize()

        return task_circuit_mask(sensitivities, weights, dense, self.ratio)


def reference(
    walk: LayerWalk, quantizer: Quantizer, pattern: str | None = None, token_weights: TokenWeights | None = None
) -> dict[str, QuantizedWeight | None]:
    """What the quantizer makes of every layer if it keeps nothing; the model is as it was afterwards.

    All ranks call it. Memory: a copy of the weights, and a byte per weight.

    Raises:
        ValueError: the weights are sharded.
    """
    if walk.sharded:
        raise ValueError("a task circuit needs whole weights, and these are sharded: choose it on one that is whole")
    plain = copy.copy(quantizer)
    plain.keep({})
    weights = matrices(walk, pattern)
    plain.begin(weights)
    saved = {name: weight.cpu().clone() for name, weight in weights.items()}
    found: dict[str, QuantizedWeight | None] = {}
    try:
        for block in compressed_blocks(walk, plain, pattern, token_weights):
            found.update({name: result.quantized for name, result in block.results.items()})
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(saved[name])
    return found
