"""Bits of every layer within a budget, by how much each loses on its own; see `bit_allocation`.

    error_m(b) = tr((W - Q_b) G (W - Q_b)^T) / tr(W G W^T)

Q_b is what the quantizer makes of layer m in b bits, G the Gram matrix of its inputs in the model as it is: errors of
other layers do not enter. The bits go to the quantizer, which then walks the model:

    quantizer.assign(BitBudget(average_bits=3).bits(walk, quantizer))
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from fulgurite.methods.compression import TokenWeights, cost, grams_of, matrices, matrix, relative_error
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.quantization.base import Quantizer
from fulgurite.methods.quantization.bit_allocation import allocate_bits
from fulgurite.methods.quantization.rtn import Rtn

Errors = dict[str, dict[int, float]]


class BitBudget:
    """Bits by layer errors.

    Args:
        average_bits: mean over all weights, without scales and zeros.
        choices: bits that a layer may get.
        measure: errors of the ``quantizer`` itself, or of ``rounding`` to its grid, which is much faster.

    Raises:
        ValueError: the budget does not allow the fewest bits, or a choice is none.
    """

    def __init__(
        self,
        average_bits: float,
        choices: Sequence[int] = (2, 3, 4, 8),
        measure: Literal["quantizer", "rounding"] = "quantizer",
    ) -> None:
        if not choices or not all(1 <= bits <= 8 or bits == 16 for bits in choices):
            raise ValueError(f"choices={list(choices)}: expected bits from 1 to 8, or 16")
        if average_bits < min(choices):
            raise ValueError(f"average_bits={average_bits} is below the fewest of choices={list(choices)}")
        if measure not in ("quantizer", "rounding"):
            raise ValueError(f"measure={measure!r}: expected 'quantizer' or 'rounding'")
        self.average_bits, self.choices, self.measure = average_bits, tuple(dict.fromkeys(choices)), measure

    def bits(
        self,
        walk: LayerWalk,
        quantizer: Quantizer,
        pattern: str | None = None,
        token_weights: TokenWeights | None = None,
    ) -> dict[str, int]:
        """Bits of every layer, for `Quantizer.assign`. All ranks call it; the model is not changed.

        Args:
            walk: with the batches to measure errors on. Without any, all inputs count alike.
            quantizer: whose errors are measured; it is not changed.
            pattern: full pattern of names of layers; all linear layers of the walked blocks where None.
            token_weights: see `compressed_blocks`.
        """
        return self.allocate(walk, self.errors(walk, quantizer, pattern, token_weights), pattern)

    def allocate(
        self, walk: LayerWalk, errors: Mapping[str, Mapping[int, float]], pattern: str | None = None
    ) -> dict[str, int]:
        """Bits from errors that were measured before, perhaps for another budget."""
        sizes = {name: weight.numel() for name, weight in matrices(walk, pattern).items()}
        return allocate_bits({name: errors[name] for name in sizes}, sizes, self.average_bits)

    def errors(
        self,
        walk: LayerWalk,
        quantizer: Quantizer,
        pattern: str | None = None,
        token_weights: TokenWeights | None = None,
    ) -> Errors:
        """Layer -> bits -> relative squared error of its output. Memory: as quantizing, and no weight changes."""
        solver = copy.copy(quantizer)
        if self.measure == "rounding":
            solver = Rtn(4, quantizer.group_size, quantizer.scheme, quantizer.clip_search, quantizer.scale_dtype)
            solver.keep(quantizer.kept)
            solver.keep_zeros(quantizer.masks)
        solver.begin(matrices(walk, pattern))
        measured = any(walk.ranks.gather(bool(walk.batches)))
        if not measured and solver.needs != "nothing":
            raise ValueError(f"there is no calibration data for {type(solver).__name__}: choose measure='rounding'")
        found: Errors = {}
        for block in walk:
            layers = block.linears(pattern)
            moments: dict[str, Tensor] = {}
            if measured and layers:
                weights = None if token_weights is None else token_weights(block)
                moments = grams_of(block, block.input_groups(layers), weights)
            sizes = {name: cost(module) for name, module in layers.items()}

            def own(
                sizes: dict[str, int] = sizes, layers: dict = layers, moments: dict[str, Tensor] = moments
            ) -> Errors:
                out: Errors = {}
                for name in walk.ranks.share(sizes):
                    weight = matrix(layers[name])
                    out[name] = self._errors_of(solver, name, weight, moments.get(name))
                return out

            for part in walk.ranks.together(own):
                found.update(part)
        return found

    def _errors_of(self, solver: Quantizer, name: str, weight: Tensor, gram: Tensor | None) -> dict[int, float]:
        """Of one layer, in every choice of bits."""
        out = {}
        for bits in self.choices:
            solver.assign({name: bits})
            try:
                out[bits] = relative_error(weight, solver.compress(name, weight, gram).weight, gram)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return out
