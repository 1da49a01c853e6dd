"""One checkpoint folder written by all ranks together, each with the slices that it holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fulgurite.checkpoints import CheckpointError, RefusedError, WriteError
from fulgurite.checkpoints.atomic import naming
from fulgurite.checkpoints.shards import SHARDS, Place, layout_of, shard_stem
from fulgurite.checkpoints.store import encode, new_manifest, write_checkpoint
from fulgurite.checkpoints.tensorfile import write_tensors


def write_shards(
    path: str | Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Any],
    fields: Mapping[str, Any],
) -> None:
    """Publish a checkpoint whose sharded tensors stay in slices: one file per rank, the rest by rank 0.

    A collective; ``path`` must be the same folder for all ranks, on a file system that they share. No rank holds
    another rank's slices at any time. Where one rank cannot write, every rank raises, and nothing is published.

    Args:
        path: the checkpoint.
        tensors, documents: as for `save_checkpoint_folder`, with a `DTensor` where a tensor is sharded.
        fields: the other arguments of `save_checkpoint_folder`.

    Raises:
        CheckpointError: a value cannot be stored, or the operating system refused.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    # Every rank checks all that can be refused, so that none goes on alone.
    encoded, error = attempt(lambda: (*encode(tensors, documents), new_manifest(**fields)))
    own, whole = slices_and_rest(encoded[0] if encoded else {})
    ranks = exchange(({key: place_of(tensor) for key, tensor in own.items()}, error))
    if problem := next((error for _, error in ranks if error), None):
        raise RefusedError(problem)
    layout = layout_of([places for places, _ in ranks])
    mine = {f"{stem}/{name}": tensor.to_local() for (stem, name), tensor in own.items()}
    file = shard_stem(rank, world) + ".safetensors"
    if rank:
        folder, _ = exchange(None)[0]
        exchange(attempt(lambda: write_shard(folder / file, mine)) if folder else (None, None))
        _, error = exchange(None)[0]
    else:
        steps = iter(range(2))

        def others(folder: Path) -> dict[str, Any]:
            next(steps)
            exchange((folder, None))
            next(steps)
            written = exchange(attempt(lambda: write_shard(folder / file, mine)))
            if problem := next((error for _, error in written if error), None):
                raise WriteError(problem)
            return {shard_stem(r, world) + ".safetensors": records for r, (records, _) in enumerate(written)}

        manifest = encoded[2]
        manifest.structure[SHARDS] = layout
        _, error = attempt(lambda: write_checkpoint(path, manifest, whole, encoded[1], others=others))
        for _ in steps:  # what the other ranks still wait for, where writing failed early
            exchange((None, None))
        exchange((None, error))
    if error:
        raise WriteError(error)


def slices_and_rest(
    states: Mapping[str, Mapping[str, Tensor]],
) -> tuple[dict[tuple[str, str], DTensor], dict[str, dict[str, Tensor]]]:
    """The sharded tensors of which this rank writes its slice, and the whole tensors by file stem.

    Of equal copies the first rank writes one. Interleaved slices (FSDP2 over tensor parallelism) are made whole, which
    is a collective.
    """
    own: dict[tuple[str, str], DTensor] = {}
    whole: dict[str, dict[str, Tensor]] = {stem: {} for stem in states}
    for stem, state in states.items():
        for name, tensor in state.items():
            if not isinstance(tensor, DTensor):
                whole[stem][name] = tensor
            elif any(type(placement) not in (Shard, Replicate) for placement in tensor.placements):
                whole[stem][name] = tensor.full_tensor()
            elif first_copy(tensor):
                own[stem, name] = tensor
    return own, whole


def first_copy(tensor: DTensor) -> bool:
    """Whether this rank is the first of those that hold the same slice."""
    places = zip(tensor.device_mesh.get_coordinate(), tensor.placements)
    return all(at == 0 for at, placement in places if placement.is_replicate())


def exchange(value: Any) -> list[Any]:
    """The values of all ranks, by rank."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, value)
    return ranks


def attempt(write: Callable[[], Any]) -> tuple[Any, str | None]:
    """Result and None, or None and the text of what storage refused."""
    try:
        return write(), None
    except CheckpointError as error:
        return None, str(error)


def write_shard(file: Path, tensors: Mapping[str, Tensor]) -> Any:
    """Write one rank's slices and bring them to the disk; the records of file and tensors."""
    records = write_tensors(file, tensors)
    with naming(file), open(file, "rb") as written:
        os.fsync(written.fileno())
    return records


def place_of(tensor: DTensor) -> Place:
    """Where this rank's slice lies."""
    size, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Place(tuple(tensor.shape), tuple(offset), tuple(size))
