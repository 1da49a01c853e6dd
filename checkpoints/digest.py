"""Digests of bytes, tensors, files and JSON values, written as ``<algorithm>:<hex>``.

The default, xxh3_128, finds accidents at memory speed and is no defence against an adversary; sha256 is one,
at about a tenth of the speed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

DEFAULT = "xxh3_128"
_ALGORITHMS: dict[str, Callable[[], Any]] = {DEFAULT: xxhash.xxh3_128, "sha256": hashlib.sha256}
_CHUNK = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and digest of one file."""

    bytes: int
    digest: str


class Digest:
    """A digest fed piece by piece.

    Args:
        algorithm: ``"xxh3_128"`` or ``"sha256"``; anything else is a ValueError.
    """

    def __init__(self, algorithm: str = DEFAULT) -> None:
        if algorithm not in _ALGORITHMS:
            raise ValueError(f"unknown digest {algorithm!r}; known: {', '.join(_ALGORITHMS)}")
        self.algorithm = algorithm
        self._state = _ALGORITHMS[algorithm]()

    def update(self, data: bytes | memoryview) -> None:
        """Take in more bytes."""
        self._state.update(data)

    def __str__(self) -> str:
        return f"{self.algorithm}:{self._state.hexdigest()}"


def algorithm_of(digest: str) -> str:
    """The algorithm named in a written digest; ValueError if it is none that this version knows."""
    name = digest.partition(":")[0]
    if name not in _ALGORITHMS:
        raise ValueError(f"{digest!r} is not a digest; known: {', '.join(_ALGORITHMS)}")
    return name


def digest_of_bytes(data: bytes | memoryview, algorithm: str = DEFAULT) -> str:
    """Digest of ``data``."""
    digest = Digest(algorithm)
    digest.update(data)
    return str(digest)


def digest_of_file(path: str | Path, algorithm: str = DEFAULT) -> str:
    """Digest of a file's bytes, read in pieces of 4 MiB."""
    digest, buffer = Digest(algorithm), bytearray(_CHUNK)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return str(digest)


def digest_of_tensor(tensor: Tensor, algorithm: str = DEFAULT) -> str:
    """Digest of a tensor's elements in row-major order; type and shape are not part of it."""
    return digest_of_bytes(tensor_bytes(tensor), algorithm)


def digest_of_state(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], algorithm: str = DEFAULT) -> str:
    """Digest of named tensors: names, types, shapes and values, whatever their order."""
    digest = Digest(algorithm)
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    for name, tensor in sorted(pairs, key=lambda pair: pair[0]):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor_bytes(tensor))
    return str(digest)


def digest_of_json(value: object, algorithm: str = DEFAULT) -> str:
    """Digest of a JSON value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return digest_of_bytes(text.encode(), algorithm)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The elements of a dense tensor as bytes in row-major order; only views and other devices are copied."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if plain.stride(0) != 1:  # counts as contiguous with one element or none
        plain = plain.clone(memory_format=torch.contiguous_format)
    return memoryview(plain.view(torch.uint8).numpy())
