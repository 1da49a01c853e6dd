"""Tensors stored in slices, one file per rank, and read back whole or in other slices.

Every rank writes the slices that it holds as ``<stem>-<rank>-of-<ranks>.safetensors``; the layout, part of the
manifest's structure, says where each slice lies in its tensor:

    {name: {"shape": whole shape, "pieces": [{"file": stem, "offset": first index per dimension}, ...]}}

A piece's size is in the manifest's record of its file. Reading needs no other process, so any number of ranks can
read what any number wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fulgurite.checkpoints.errors import DamagedError
from fulgurite.checkpoints.manifest import Manifest, read_manifest
from fulgurite.checkpoints.store import load_tensors
from fulgurite.checkpoints.tensorfile import dtype_of

Layout = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Slice:
    """A rank's part of a tensor.

    Args:
        value: its elements.
        shape: of the whole tensor.
        offset: index of the first element in every dimension.
    """

    value: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]


def shard_stem(stem: str, rank: int, world: int) -> str:
    """Stem of the file of one rank."""
    return f"{stem}-{rank:05d}-of-{world:05d}"


def layout_of(ranks: Mapping[str, Mapping[str, Slice]]) -> Layout:
    """The layout of what all ranks hold.

    Args:
        ranks: for the file stem of every rank its slices by tensor name; values may be on the meta device.

    Raises:
        ValueError: slices of one tensor disagree on its shape, or do not cover it exactly once.
    """
    layout: Layout = {}
    sizes: dict[str, int] = {}
    for stem, slices in ranks.items():
        for name, part in slices.items():
            entry = layout.setdefault(name, {"shape": list(part.shape), "pieces": []})
            if entry["shape"] != list(part.shape):
                raise ValueError(f"{name} has the shapes {entry['shape']} and {list(part.shape)} on different ranks")
            if part.value.numel():
                entry["pieces"].append({"file": stem, "offset": list(part.offset)})
            sizes[name] = sizes.get(name, 0) + part.value.numel()
    for name, entry in layout.items():
        if sizes[name] != prod(entry["shape"]):
            raise ValueError(f"{name}: the ranks hold {sizes[name]} of {prod(entry['shape'])} elements")
    return layout


class ShardedTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint stored in slices, each put together when it is asked for.

    Memory: one tensor at a time, as long as the caller keeps none.

    Args:
        path: the checkpoint.
        layout: as `layout_of` made it.
        verify: check the digest of every slice that is read.

    Raises:
        DamagedError: the layout does not fit the files, or a slice has other bytes than were written.
    """

    def __init__(self, path: str | Path, layout: Layout, verify: bool = True) -> None:
        self.path, self.layout, self.verify = Path(path), layout, verify
        self.manifest: Manifest = read_manifest(path)

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor."""
        entry = self.layout[name]
        shape = entry["shape"]
        pieces = [(piece, self._record(piece["file"], name)) for piece in entry["pieces"]]
        if sum(prod(record.shape) for _, record in pieces) != prod(shape):
            raise DamagedError(f"{self.path}: the slices of {name!r} do not add up to its shape {shape}")
        if not pieces:
            first = next(records[name] for records in self.manifest.tensors.values() if name in records)
            return torch.empty(shape, dtype=dtype_of(first.dtype))
        whole = torch.empty(shape, dtype=dtype_of(pieces[0][1].dtype))
        for piece, record in pieces:
            place = tuple(slice(start, start + size) for start, size in zip(piece["offset"], record.shape))
            target = whole[place]
            if list(target.shape) != record.shape or len(piece["offset"]) != len(shape):
                raise DamagedError(
                    f"{self.path}: the slice of {name!r} in {piece['file']} lies outside its shape {shape}"
                )
            target.copy_(load_tensors(self.path, piece["file"], [name], self.verify)[name])
        return whole

    def _record(self, stem: str, name: str) -> Any:
        records = self.manifest.tensors.get(f"{stem}.safetensors", {})
        if name not in records:
            raise DamagedError(f"{self.path}: the manifest has no slice of {name!r} in {stem}")
        return records[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)
