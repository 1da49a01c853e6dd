"""Random numbers that depend on their place alone: on seed, method, model, tensor name and position in the tensor.

So a mask is the same whatever was merged before it, in whatever pieces, on however many threads.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

BLOCK = 8  # numbers of 32 bits per step of the counter


def words(seed: int, method: str, model: int, name: str, count: int, start: int = 0) -> np.ndarray:
    """(count,) uint32: numbers ``start`` to ``start + count`` of the stream of this place."""
    digest = hashlib.blake2b(f"{seed}\0{method}\0{model}\0{name}".encode(), digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(digest, "little"))
    bits.advance(start // BLOCK)
    skip = start % BLOCK
    # The same numbers as by `random_raw`, which would keep other threads waiting.
    drawn = np.random.Generator(bits).integers(0, 2**64, (skip + count + 1) // 2 + 1, dtype=np.uint64)
    return drawn.view(np.uint32)[skip : skip + count]


def uniform(seed: int, method: str, model: int, name: str, count: int, start: int = 0) -> Tensor:
    """(count,) float32 in [0, 1): numbers ``start`` to ``start + count`` of the stream of this place."""
    drawn = words(seed, method, model, name, count, start)
    return torch.from_numpy((drawn >> np.uint32(8)).astype(np.float32) * np.float32(2**-24))


def chosen(probability: float, seed: int, method: str, model: int, name: str, count: int, start: int = 0) -> Tensor:
    """(count,) bool: True with this probability, to 2^-32; a third faster than to compare with `uniform`."""
    limit = round(probability * 2**32)
    if limit >= 2**32:
        return torch.ones(count, dtype=torch.bool)
    return torch.from_numpy(words(seed, method, model, name, count, start) < np.uint32(limit))
