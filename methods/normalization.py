"""Running statistics of batch normalisation, measured anew: what an average of models leaves wrong.

The variance of an average of features is below the average of their variances, so a merged model whose statistics are
averages scales its features wrongly (arXiv 2211.08403). One pass over a few hundred inputs mends it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def recompute_statistics(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], object] | None = None
) -> int:
    """Replace the running mean and variance of every batch normalisation by the mean over ``batches`` of theirs.

    Each batch counts the same, so batches should be of one size, and not small: every layer sees what the layers before
    it give when they normalise by the batch. Everything else is in evaluation mode, and modes and momenta are put back.
    In place, in one process.

    Args:
        model: holds the layers.
        batches: at least one.
        forward: (model, batch); ``model(batch)`` by default.

    Returns:
        number of layers; where it is 0 nothing was run.

    Raises:
        ValueError: there was no batch. As after any error, the old statistics are kept.
    """
    layers = [each for each in model.modules() if isinstance(each, _BatchNorm) and each.track_running_stats]
    if not layers:
        return 0
    forward = forward or (lambda model, batch: model(batch))
    modes = [(module, module.training) for module in model.modules()]
    before = [(layer, layer.momentum, [buffer.clone() for buffer in layer.buffers(recurse=False)]) for layer in layers]
    for module, _ in modes:
        module.training = False
    measured = False
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.training, layer.momentum = True, None  # the mean over all batches
        count = 0
        for batch in batches:
            forward(model, batch)
            count += 1
        if not count:
            raise ValueError("no batch to measure statistics of normalisation with")
        measured = True
    finally:
        for module, training in modes:
            module.training = training
        for layer, momentum, kept in before:
            layer.momentum = momentum
            for buffer, old in zip(layer.buffers(recurse=False), kept) if not measured else ():
                buffer.copy_(old)
    return len(layers)
