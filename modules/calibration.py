"""What a module offers to those who measure it on data: inputs example by example, scores, and what is padding.

One door for every statistic: Gram matrices and Fisher information, for merging and for compression alike.

Legend: B examples, S tokens, D width, C answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from fulgurite.methods.adapters.places import site_of
from fulgurite.samples import Batch

SETS = "bank.sets."


@runtime_checkable
class Calibrated(Protocol):
    """A module that can be measured. Nothing may be logged, and nothing kept."""

    def calibration_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """All that `answer_logits` reads of a batch, as tensors with one row per example."""
        ...

    def answer_logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """(B, C) scores whose softmax over C is what the module believes of the answers of each example.

        With the adapters that are active, where it has such; -inf is the score of what cannot be an answer.
        """
        ...

    def token_masks(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """By full patterns of module names, what their layers must not count: 0 for padding, else not 0.

        (B, S) for layers with inputs (B, S, D), (B,) for those with inputs (B, D). Layers that no pattern names have
        no padding.
        """
        ...


def counted_inputs(module: Calibrated, batch: Batch) -> dict[str, Tensor]:
    """Inputs of the examples that count: without the repeats that keep ranks in step. May have no rows."""
    counted = batch["counted"]
    return {name: tensor[counted.to(tensor.device)] for name, tensor in module.calibration_inputs(batch).items()}


def masks_by_layer(module: Calibrated, layers: Iterable[str], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`Calibrated.token_masks` by the names of layers, without those that have no padding.

    A layer of an adapter, ``bank.sets.<set>.<site>.<layer>``, has the padding of its site.
    """
    masks = module.token_masks(inputs)
    out = {}
    for layer in layers:
        found = [mask for pattern, mask in masks.items() if re.fullmatch(pattern, place_of(layer))]
        if len(found) > 1:
            raise ValueError(f"{layer}: {len(found)} patterns of token_masks name it; expected at most one")
        if found:
            out[layer] = found[0]
    return out


def place_of(layer: str) -> str:
    """Name of the module whose inputs a layer sees: itself, or of an adapter's layer the site."""
    if not layer.startswith(SETS):
        return layer
    site = layer.removeprefix(SETS).split(".")[1]
    return f"backbone.{site_of(site.replace('/', '.'))}"


@contextmanager
def using(module: nn.Module, name: str | None) -> Iterator[None]:
    """The adapter set ``name`` active inside; nothing of the kind where None."""
    if name is None:
        yield
        return
    with module.bank.use(name):
        yield
