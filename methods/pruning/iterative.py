"""Prune a whole model in rounds, each ranking all weights by what the rounds before left (arXiv 2310.02998, baselines).

    score = |W|, or |W| G with G = mean |dL/dW| of the model as it is after the last round

See `global_schedule` for how much each round prunes. Weights keep their values; only which ones go is found here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fulgurite.methods.calibration import Loss, first_batches, gradient_moments
from fulgurite.methods.compression import Compressor, matrices
from fulgurite.methods.exact_masks import rounded_count
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.pruning.global_schedule import Masks, prune_in_rounds, round_sparsity
from fulgurite.methods.pruning.magnitude import magnitude_scores, pruned
from fulgurite.methods.quantization.quantized_weight import Compressed, checked_weight
from fulgurite.methods.statistics.gram import input_width


class Iterative(Compressor):
    """Prunes the weights of smallest score of all layers together, in rounds.

        pruner = Iterative(0.5)
        pruner.find(walk, loss)
        for block in compressed_blocks(walk, pruner): ...

    Args:
        sparsity: share of all weights that is pruned in the end.
        rounds: how many.
        score: |W| (``magnitude``), which one round ranks as well as many; or times the gradient (``gradient``).
        samples: examples to take gradients of, over all processes; all where None.
    """

    needs = "nothing"

    def __init__(
        self,
        sparsity: float,
        rounds: int = 3,
        score: Literal["magnitude", "gradient"] = "gradient",
        samples: int | None = 32,
    ) -> None:
        rounded_count(sparsity, 1)
        round_sparsity(sparsity, 1, rounds)
        if score not in ("magnitude", "gradient"):
            raise ValueError(f"score={score!r}: expected 'magnitude' or 'gradient'")
        if samples is not None and samples < 1:
            raise ValueError(f"samples={samples}: expected at least 1, or None for all")
        self.sparsity, self.rounds, self.score, self.samples = sparsity, rounds, score, samples
        self._masks: Masks = {}

    def find(self, walk: LayerWalk, loss: Loss, pattern: str | None = None) -> Masks:
        """Find the masks (out, in) of all layers, True where a weight is kept. All ranks call it.

        The model is as it was afterwards. Memory: a copy of the weights, the gradients' sums, and masks.

        Args:
            walk: with the batches to take gradients of.
            loss: of the whole model on one batch.
            pattern: full pattern of names of layers; all linear layers of the walked blocks where None.
        """
        weights = matrices(walk, pattern)
        layers = {name: walk.model.get_submodule(name) for name in weights}
        sizes = {name: weight.numel() for name, weight in weights.items()}
        if self.score == "magnitude":
            self._masks = prune_in_rounds(
                lambda masks: lambda name: magnitude_scores(weights[name]), sizes, self.sparsity, self.rounds
            )
            return self._masks
        batches = [batch for _, batch in first_batches(walk.batches, self.samples, walk.ranks)]
        saved = {name: weight.clone() for name, weight in weights.items()}

        def scores_after(masks: Masks) -> Callable[[str], Tensor]:
            with torch.no_grad():
                for name, mask in masks.items():
                    weights[name].masked_fill_(~mask, 0)
            gradients = gradient_moments(walk, loss, layers, batches)
            return lambda name: magnitude_scores(weights[name]) * turned(layers[name], gradients[name])

        try:
            self._masks = prune_in_rounds(scores_after, sizes, self.sparsity, self.rounds)
        finally:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(saved[name])
        return self._masks

    def keep(self, masks: Masks) -> None:
        """Take masks that `find` has given before."""
        self._masks = dict(masks)

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Check that the masks are there.

        Raises:
            ValueError: `find` was not called, or for other layers.
        """
        if missing := [name for name in weights if name not in self._masks]:
            raise ValueError(f"no masks of {len(missing)} layers, first {missing[0]}: call find(walk, loss) first")

    def compress(self, name: str, weight: Tensor, moment: Tensor | None) -> Compressed:
        """The matrix with 0 where its mask says so."""
        checked_weight(weight)
        return pruned(weight, self._masks[name].to(weight.device))


def turned(module: nn.Module, value: Tensor) -> Tensor:
    """A value per entry of a layer's weight, as (out, in)."""
    return value.T if input_width(module)[1] else value
