"""Standard normal noise that depends on its place alone: on seed, name and position, not on what was drawn before.

Numbers 2i and 2i + 1 of a place are made of the words 2i and 2i + 1 of its stream (Box-Muller), so a tensor has the
same noise in whatever pieces, shards or threads it is made.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fulgurite.methods.random import digest_of, stream


def normal(seed: int, purpose: str, number: int, name: str, count: int, start: int = 0) -> Tensor:
    """(count,) float64: numbers ``start`` to ``start + count`` of the place (seed, purpose, number, name).

    Each has 32 random bits, or rather a pair of them 64.
    """
    skip = start % 2
    pairs = (skip + count + 1) // 2
    words = stream(digest_of(seed, purpose, number, name), 8 * pairs, 4 * (start - skip)).view(np.uint32)
    uniform = torch.from_numpy((words.astype(np.float64) + 0.5) * 2.0**-32).view(pairs, 2)
    radius = uniform[:, 0].log().mul_(-2).sqrt_()
    angle = uniform[:, 1] * (2 * math.pi)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1).flatten()[skip : skip + count]
