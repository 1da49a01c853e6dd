"""Tensors stored in slices, one file per rank, and read back whole.

Every rank writes the slices that it holds as ``shard-<rank>-of-<ranks>.safetensors``. The layout, the entry ``shards``
of the manifest's structure, says by file stem (``weights``, ``state``) where each slice lies in its tensor:

    {stem: {name: {"shape": whole shape, "pieces": [{"file": shard, "offset": first index per dimension}, ...]}}}

In the shard a slice is called ``<stem>/<name>``, and its size is in the manifest's record of the file. Reading needs no
other process, so any number of ranks can read what any number wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from fulgurite.checkpoints.errors import DamagedError
from fulgurite.checkpoints.manifest import Manifest
from fulgurite.checkpoints.tensorfile import dtype_of

SHARDS = "shards"
Layout = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Place:
    """Where a rank's slice lies in its tensor.

    Args:
        shape: of the whole tensor.
        offset: index of the slice's first element in every dimension.
        size: of the slice.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]


def shard_stem(rank: int, world: int) -> str:
    """Stem of the file of one rank."""
    return f"shard-{rank:05d}-of-{world:05d}"


def layout_of(ranks: Sequence[Mapping[tuple[str, str], Place]]) -> Layout:
    """The layout of what all ranks hold; empty slices are left out.

    Args:
        ranks: for every rank, the places of its slices by file stem and tensor name.

    Raises:
        ValueError: slices of one tensor disagree on its shape, or do not add up to it.
    """
    layout: Layout = {}
    counts: dict[tuple[str, str], int] = {}
    for rank, places in enumerate(ranks):
        for (stem, name), place in places.items():
            entry = layout.setdefault(stem, {}).setdefault(name, {"shape": list(place.shape), "pieces": []})
            if entry["shape"] != list(place.shape):
                raise ValueError(f"{name} has the shapes {entry['shape']} and {list(place.shape)} on different ranks")
            if prod(place.size):
                entry["pieces"].append({"file": shard_stem(rank, len(ranks)), "offset": list(place.offset)})
            counts[stem, name] = counts.get((stem, name), 0) + prod(place.size)
    for (stem, name), count in counts.items():
        if count != prod(layout[stem][name]["shape"]):
            raise ValueError(f"{name}: the ranks hold {count} elements of the shape {layout[stem][name]['shape']}")
    return layout


class ShardedTensors(Mapping[str, Tensor]):
    """The tensors of one file stem that are stored in slices, each put together when it is asked for.

    Memory: one tensor at a time, as long as the caller keeps none.

    Args:
        manifest: of the checkpoint.
        stem: ``weights`` or ``state``; one without slices is empty.
        read: (stem of a shard, name in it) -> the slice.

    Raises:
        DamagedError: the layout does not fit the files.
    """

    def __init__(self, manifest: Manifest, stem: str, read: Callable[[str, str], Tensor]) -> None:
        self.manifest, self.stem, self.read = manifest, stem, read
        self.layout: dict[str, dict[str, Any]] = manifest.structure.get(SHARDS, {}).get(stem, {})
        for name, entry in self.layout.items():
            self._check(name, entry)

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor.

        Raises:
            KeyError: no such tensor is stored in slices.
            DamagedError: a slice has other bytes than were written.
        """
        entry = self.layout[name]
        inside = f"{self.stem}/{name}"
        if not entry["pieces"]:
            record = next(found[inside] for found in self.manifest.tensors.values() if inside in found)
            return torch.empty(entry["shape"], dtype=dtype_of(record.dtype))
        whole = None
        for piece in entry["pieces"]:
            part = self.read(piece["file"], inside)
            if whole is None:
                whole = torch.empty(entry["shape"], dtype=part.dtype)
            whole[tuple(slice(start, start + size) for start, size in zip(piece["offset"], part.shape))] = part
        return whole

    def _check(self, name: str, entry: Any) -> None:
        """Raise `DamagedError` unless the slices cover the tensor exactly once, as far as the manifest says."""
        try:
            shape, boxes = list(entry["shape"]), []
            for piece in entry["pieces"]:
                record = self.manifest.tensors[f"{piece['file']}.safetensors"][f"{self.stem}/{name}"]
                boxes.append([(start, start + size) for start, size in zip(piece["offset"], record.shape, strict=True)])
            cuts = [sorted({box[d] for box in boxes}) for d in range(len(shape))]
            # Ranks cut along dimensions, so the slices are a grid.
            grid = len({tuple(box) for box in boxes}) == len(boxes) == prod(map(len, cuts))
            whole = all(_tiles(intervals, size) for intervals, size in zip(cuts, shape))
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"the manifest's layout of the slices of {name!r} is none: {error!r}") from error
        if prod(shape) and not (grid and whole):
            raise DamagedError(f"the slices of {name!r} do not make up its shape {shape}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)


def _tiles(intervals: Sequence[tuple[int, int]], size: int) -> bool:
    """Whether sorted intervals cover 0 to ``size``, each point once."""
    return [0, *(end for _, end in intervals)] == [*(start for start, _ in intervals), size]


@dataclass(frozen=True)
class Stored:
    """A tensor that is still in its files."""

    tensors: ShardedTensors
    name: str

    def load(self) -> Tensor:
        """Read it, whole."""
        return self.tensors[self.name]
