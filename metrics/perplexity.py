"""Perplexity: exp of the mean negative log-likelihood of a token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Scored = Callable[[Any], tuple[Tensor, Tensor]]


def perplexity(scored: Scored, batches: Iterable[Any]) -> float:
    """The first of what `perplexity_and_count` gives."""
    return perplexity_and_count(scored, batches)[0]


@torch.no_grad()
def perplexity_and_count(scored: Scored, batches: Iterable[Any]) -> tuple[float, int]:
    """exp(sum of all tokens' negative log-likelihoods / their number), summed in float64, and that number.

    Args:
        scored: of a batch, logits (B, T, V) and the tokens (B, T) that they should have predicted.
        batches: at least one.

    Raises:
        ValueError: there is no token.
    """
    total, count = 0.0, 0
    for batch in batches:
        logits, targets = scored(batch)
        for row, target in zip(logits, targets):  # so that only one row is held in float32
            total += F.cross_entropy(row.float(), target, reduction="none").double().sum().item()
            count += target.numel()
    if not count:
        raise ValueError("there is no token to score")
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf, count
