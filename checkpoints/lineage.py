"""What a checkpoint was made from, parent by parent, as far as the parents lie on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fulgurite.checkpoints.atomic import resolve
from fulgurite.checkpoints.card import parts_of
from fulgurite.checkpoints.errors import CheckpointError
from fulgurite.checkpoints.manifest import MANIFEST_NAME, Manifest, read_manifest

State = Literal["known", "file", "missing", "changed", "damaged", "repeated", "further"]
DEPTH = 40  # generations


@dataclass(frozen=True)
class Node:
    """One model of a merge tree.

    Args:
        path: as its child recorded it.
        digest: as its child recorded it; its own for the root, empty while that is being written.
        part: what it was to its child, such as ``base`` or ``expert 1, weight 0.5``; empty for the root.
        state: ``known`` has a manifest; ``file`` is there without one; ``missing`` is not there; ``changed`` is there
            with another digest; ``damaged`` has a manifest that cannot be read; ``repeated`` stands in full elsewhere
            in the tree; ``further`` is one generation too many and was not looked for.
        manifest: of a ``known`` one.
        parents: of a ``known`` one.
    """

    path: str
    digest: str
    part: str
    state: State
    manifest: Manifest | None = None
    parents: tuple[Node, ...] = ()


def lineage(path: str | Path, depth: int = DEPTH) -> Node:
    """The tree above the checkpoint ``path``, ``depth`` generations of it. Reads manifests alone, no tensors.

    A relative path of a parent is looked for in the working folder, as when it was recorded, then beside the child.
    Where paths lead in a circle, the tree ends: a checkpoint cannot hold the digest of one that was made from it.

    Raises:
        CheckpointError: ``path`` itself has no manifest, or a damaged one.
    """
    manifest = read_manifest(path)
    return replace(lineage_of(manifest, path, depth), digest=manifest.digest)


def lineage_of(manifest: Manifest, path: str | Path, depth: int = DEPTH) -> Node:
    """`lineage` of a checkpoint that is still being written and will lie at ``path``."""
    return Node(str(path), "", "", "known", manifest, _parents(Path(path), manifest, set(), depth))


def nodes(root: Node) -> Iterator[Node]:
    """All nodes, children before their parents."""
    yield root
    for parent in root.parents:
        yield from nodes(parent)


def _parents(path: Path, manifest: Manifest, shown: set[str], depth: int) -> tuple[Node, ...]:
    parts = parts_of(manifest)
    return tuple(_node(path, p["path"], p["digest"], part, shown, depth) for part, p in zip(parts, manifest.parents))


def _node(child: Path, path: str, digest: str, part: str, shown: set[str], depth: int) -> Node:
    if depth == 0:
        return Node(path, digest, part, "further")
    found = next((place for place in map(resolve, (Path(path), child.parent / path)) if place.exists()), None)
    if found is None:
        return Node(path, digest, part, "missing")
    if not (found / MANIFEST_NAME).is_file():
        return Node(path, digest, part, "file")
    try:
        manifest = read_manifest(found)
    except CheckpointError:
        return Node(path, digest, part, "damaged")
    if manifest.digest != digest:
        return Node(path, digest, part, "changed")
    if digest in shown:
        return Node(path, digest, part, "repeated")
    shown.add(digest)
    return Node(path, digest, part, "known", manifest, _parents(found, manifest, shown, depth - 1))
