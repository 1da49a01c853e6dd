"""Stored statistics of experts, for the mergers that weigh by them: one folder or file per expert.

A folder is a checkpoint that says which model it was measured of; of a bare safetensors file only the names of its
tensors can be checked. Tensors are mapped and read when they are merged, one of each expert at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fulgurite.checkpoints import MANIFEST_NAME, Manifest, MismatchError, load_tensors, read_manifest
from fulgurite.checkpoints.atomic import resolve
from fulgurite.checkpoints.errors import MissingError
from fulgurite.checkpoints.sources import safe
from fulgurite.checkpoints.tensorfile import map_file
from fulgurite.methods.merging.data_driven import DataDrivenMerger
from fulgurite.methods.merging.regmean import RegMean

STATISTICS = "statistics"


def use_statistics(
    merger: DataDrivenMerger, paths: Sequence[Path], digests: Sequence[str] | None = None, shared: bool = False
) -> DataDrivenMerger:
    """Give ``merger`` the statistics at ``paths``, in the order of the experts; returns it.

    Args:
        digests: of the experts, which the folders must have been measured of; not compared where None.
        shared: take only what all have, and leave the rest to the average.

    Raises:
        ValueError: their number is not that of the experts, or nothing is shared.
        MismatchError: they are of another kind, or of other models.
        CheckpointError: one is missing or damaged.
    """
    if digests is not None and len(digests) != len(paths):
        raise ValueError(f"{len(paths)} statistics for {len(digests)} sources: give one per source, in their order")
    found = [opened(path) for path in paths]
    for number, (path, (_, manifest)) in enumerate(zip(paths, found)):
        if manifest is not None:
            require_of(path, manifest, merger, None if digests is None else digests[number])
    names = set.intersection(*(set(tensors) for tensors, _ in found)) if shared else None
    if names is not None and not names:
        raise ValueError(f"there is no tensor of which all of {', '.join(map(str, paths))} have a {merger.kind}")
    statistics = [{n: t for n, t in tensors.items() if names is None or n in names} for tensors, _ in found]
    if isinstance(merger, RegMean):
        turned = {name for _, manifest in found if manifest is not None for name in manifest.facts["transposed"]}
        return merger.use(statistics, turned)
    return merger.use(statistics)


def opened(path: Path) -> tuple[dict[str, Tensor], Manifest | None]:
    """The tensors at ``path``, and the manifest of a folder, which is verified."""
    if (resolve(path) / MANIFEST_NAME).is_file():
        manifest = read_manifest(path)
        if f"{STATISTICS}.safetensors" not in manifest.tensors:
            raise MissingError(f"{path} holds no statistics: make them by fulgurite statistics")
        return load_tensors(path, STATISTICS), manifest
    if not path.is_file():
        raise MissingError(f"no statistics at {path}: expected a folder of fulgurite statistics or a safetensors file")
    return map_file(safe(path)), None


def require_of(path: Path, manifest: Manifest, merger: DataDrivenMerger, digest: str | None) -> None:
    """Raise MismatchError where a folder's statistics are of another kind or model."""
    kind, parent = manifest.facts["kind"], manifest.parents[0]
    if kind != merger.kind:
        raise MismatchError(f"{path} holds a {kind}, and {type(merger).__name__} weighs by a {merger.kind}")
    if digest not in (None, parent["digest"]):
        raise MismatchError(
            f"{path} was measured of {parent['path']} with the digest {parent['digest']}, and the source at its place "
            f"has {digest}: give statistics in the order of the sources, or measure this one"
        )
