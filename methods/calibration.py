"""The batches that a whole model is scored with: which of them, their examples, and the gradients of their losses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.ranks import Ranks
from fulgurite.methods.statistics.absolute_gradients import AbsoluteGradients

log = logging.getLogger(__name__)
Loss = Callable[[Any], Tensor]


def first_batches(batches: Sequence[Any], samples: int | None, ranks: Ranks) -> list[tuple[int, Any]]:
    """This process's of the first batches that hold ``samples`` examples, with their numbers among all.

    Batch i of rank r has the number i * size + r.

    Raises:
        ValueError: there are no batches, or their examples cannot be counted.
    """
    numbered = [(place * ranks.size + ranks.rank, batch) for place, batch in enumerate(batches)]
    own = {number: 1 if samples is None else num_examples(batch) for number, batch in numbered}
    counts = {number: count for part in ranks.gather(own) for number, count in part.items()}
    if not counts:
        raise ValueError("there is no calibration data to score the model with")
    if samples is None:
        return numbered
    seen, last = 0, -1
    for last in sorted(counts):
        seen += counts[last]
        if seen >= samples:
            break
    if seen < samples:
        log.warning("%d samples were asked for, and %d are there", samples, seen)
    return [(number, batch) for number, batch in numbered if number <= last]


def num_examples(batch: Any) -> int:
    """Rows of the first tensor of a batch, a tree of tuples, lists and dicts.

    Raises:
        ValueError: there is none.
    """
    if isinstance(batch, Tensor) and batch.dim():
        return len(batch)
    inside = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    for value in inside:
        try:
            return num_examples(value)
        except ValueError:
            continue
    raise ValueError(f"the examples of a {type(batch).__name__} cannot be counted: choose samples=None for all batches")


def rows_of(batch: Any) -> Iterator[Any]:
    """The examples of a batch, each as a batch of one.

    Args:
        batch: a tree of tuples, lists and dicts, whose tensors all have one row for every example.

    Raises:
        ValueError: they have not.
    """
    number = num_examples(batch)

    def row(value: Any, place: int) -> Any:
        if isinstance(value, Tensor):
            if not value.dim() or len(value) != number:
                raise ValueError(
                    f"a batch of {number} examples holds a tensor of {tuple(value.shape)}: give batches of one example"
                )
            return value[place : place + 1]
        if type(value) in (tuple, list):
            if all(isinstance(item, Tensor | tuple | list | dict) for item in value):
                return type(value)(row(item, place) for item in value)
            return value[place : place + 1]
        if isinstance(value, Mapping):
            return {key: row(item, place) for key, item in value.items()}
        return value

    return (row(batch, place) for place in range(number))


def gradient_moments(
    walk: LayerWalk,
    loss: Loss,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    moment: Literal["absolute", "square"] = "absolute",
) -> dict[str, Tensor]:
    """Mean |dL/dW| or (dL/dW)^2 over the losses of the batches of all ranks, in the shape of each layer's weight."""
    gradients = AbsoluteGradients({name: layer.weight for name, layer in layers.items()}, moment)

    def measure() -> None:
        with kept_random_state(walk.device), gradients.differentiable(), torch.enable_grad():
            for batch in batches:
                gradients.update(loss(batch))

    walk.ranks.agree(measure)
    gradients.reduce(walk.ranks.total)
    return gradients.means()


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Give torch's random numbers back as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
