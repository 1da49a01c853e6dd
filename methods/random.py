"""Random numbers that depend on their place alone: on seed, method, model, tensor name and position in the tensor.

So a mask is the same whatever was merged before it, in whatever pieces, on however many threads.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

BLOCK = 32  # bytes per step of the counter


def digest_of(seed: int, method: str, model: int, name: str) -> int:
    """128 bits that stand for a place."""
    return int.from_bytes(
        hashlib.blake2b(f"{seed}\0{method}\0{model}\0{name}".encode(), digest_size=16).digest(), "little"
    )


def stream(digest: int, count: int, start: int) -> np.ndarray:
    """(count,) uint8: bytes ``start`` to ``start + count`` of the stream of a place (Philox 4x64)."""
    bits = np.random.Philox(key=digest)
    bits.advance(start // BLOCK)
    skip = start % BLOCK
    # The same numbers as by `random_raw`, which would keep other threads waiting.
    drawn = np.random.Generator(bits).integers(0, 2**64, (skip + count) // 8 + 1, dtype=np.uint64)
    return drawn.view(np.uint8)[skip : skip + count]


def uniform(seed: int, method: str, model: int, name: str, count: int, start: int = 0) -> Tensor:
    """(count,) float32 in [0, 1): numbers ``start`` to ``start + count`` of the stream of this place."""
    drawn = stream(digest_of(seed, method, model, name), 4 * count, 4 * start).view(np.uint32)
    return torch.from_numpy((drawn >> np.uint32(8)).astype(np.float32) * np.float32(2**-24))


def chosen(probability: float, seed: int, method: str, model: int, name: str, count: int, start: int = 0) -> Tensor:
    """(count,) float32, 1 with this probability (to 2^-32) and 0 otherwise; a third of the cost of `uniform`.

    One byte decides, except for one entry in 256, for which 24 further bits do.
    """
    first, rest = divmod(round(probability * 2**32), 2**24)
    if first >= 256:
        return torch.ones(count)
    digest = digest_of(seed, method, model, name)
    drawn = stream(digest, count, start)
    kept = drawn < np.uint8(first)
    undecided = np.flatnonzero(drawn == np.uint8(first))
    kept[undecided] = scattered(digest, undecided + start) < rest
    return torch.from_numpy(kept.astype(np.float32))


def scattered(digest: int, positions: np.ndarray) -> np.ndarray:
    """24 random bits at each of these positions of a place (SplitMix64, which needs no others before them)."""
    z = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(digest & (2**64 - 1))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) >> np.uint64(40)
