"""A merge that was found possible: what is merged of what, which files it makes, and what that takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fulgurite.checkpoints import Manifest, RefusedError
from fulgurite.checkpoints.companions import Changes, Layout, config_of, layout_of, num_bytes
from fulgurite.checkpoints.foreign import require_space
from fulgurite.checkpoints.sources import Source
from fulgurite.checkpoints.store import new_manifest
from fulgurite.methods.merging.base import Merger
from fulgurite.methods.merging.plan import PIECE, Plan
from fulgurite.methods.quantization.rotation_record import ROTATION
from fulgurite.methods.quantization.storage import COMPRESSED

BUDGET = 96 * 2**20  # bytes that pieces may take on all threads together
SMALLEST = 2**12  # entries of a piece at least
COPIES = 8  # of a piece that a merger makes beside those of the sources, at most


@dataclass(frozen=True)
class Job:
    """A merge that was found possible and has not begun.

    Args:
        out: a folder that is not there yet, or empty.
        plan: what is merged of what.
        merger, weights: how.
        manifest: of the result as far as the sources tell it.
        layout: files of the result.
        dtypes: type of every merged tensor.
        threads: tensors merged at a time.
        sources: all models, the base first.
    """

    out: Path
    plan: Plan
    merger: Merger
    weights: list[float]
    manifest: Manifest
    layout: Layout
    dtypes: dict[str, torch.dtype]
    threads: int
    sources: Sequence[Source]

    @property
    def like(self) -> dict[str, Tensor]:
        """Types and shapes of the result."""
        return result_like(self.plan, self.dtypes)

    @property
    def num_bytes(self) -> int:
        """What the artefact takes on disk, but for manifest and model card."""
        return num_bytes(self.like) + self.layout.num_bytes

    @property
    def piece_size(self) -> int:
        """Entries of a piece."""
        return piece_size(self.plan, self.threads)

    @property
    def held_bytes(self) -> int:
        """About how much memory it takes beside the mapped files: every source and some results, per thread."""
        largest = max(self.plan.sizes.values(), default=0)
        elements = min(self.piece_size, largest) if self.merger.piecewise else largest
        copies = max((len(tensors) for tensors in self.plan.merged.values()), default=1) + COPIES
        return 4 * elements * copies * self.threads


@dataclass
class Merged:
    """What a merge has done.

    Args:
        path: the artefact.
        change: by tensor, the norm of the change from the base (from the first source where there is none) over its
            own norm.
        equal_to: names of the sources that the result equals in every merged tensor.
    """

    path: Path
    change: dict[str, float] = field(default_factory=dict)
    equal_to: list[str] = field(default_factory=list)


def job_of(
    out: Path,
    plan: Plan,
    merger: Merger,
    weights: list[float],
    settings: dict[str, Any],
    dtypes: dict[str, torch.dtype],
    threads: int | None,
    sources: Sequence[Source],
    first: Source,
    owner: Path | None,
    changes: Changes,
    max_shard_bytes: int | None,
    tokenizer: Path | None = None,
) -> Job:
    """A job with the files that its result gets.

    Args:
        first: whose module is rebuilt of the result.
        owner: model folder of another library that gives configuration and tokenizer.
        changes: what that configuration must say.
        tokenizer: folder whose tokenizer takes the place of that of ``owner``.
        others: see `Job` and `prepare`.

    Raises:
        ValueError: no thread.
        CheckpointError: a source is pruned or quantized, the configuration cannot say it, or the disk is too small.
    """
    for source in sources:
        facts = {} if source.manifest is None else source.manifest.facts
        if facts.get(COMPRESSED) or ROTATION in facts:  # rotated weights have no tensor that says it
            raise RefusedError(
                f"{source.path} is pruned or quantized, which a merge would undo: compress after merging"
            )
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}: give at least 1, or leave it out")
    # The experts' modules are rebuilt in one way, or they could not be merged; slices are whole now.
    structure = {} if first.manifest is None else {k: v for k, v in first.manifest.structure.items() if k != "shards"}
    parents = [{"path": str(source.path), "digest": source.digest} for source in sources]
    manifest = new_manifest(parents=parents, structure=structure, settings=settings)
    files = next((source.files for source in sources if source.path == owner), ())
    layout = layout_of(result_like(plan, dtypes), owner, files, changes, max_shard_bytes, tokenizer)
    job = Job(out, plan, merger, weights, manifest, layout, dtypes, threads or default_threads(merger), sources)
    require_space(out, job.num_bytes)
    return job


def default_threads(merger: Merger) -> int:
    """One per core; a single one where tensors are held whole, so that no more than one of each source is."""
    return (os.cpu_count() or 1) if merger.piecewise else 1


def companion_folder(candidates: Sequence[Source], like: str | Path | None) -> Path | None:
    """``like``, or the first of these models that is a folder of another library."""
    if like is not None:
        return Path(like)
    return next((s.path for s in candidates if s.path.is_dir() and config_of(s.path) is not None), None)


def single_type(dtypes: dict[str, torch.dtype]) -> str | None:
    """The type that all have, as torch names it."""
    found = set(dtypes.values())
    return str(found.pop()).removeprefix("torch.") if len(found) == 1 else None


def rows_cut(plan: Plan, sources: Sequence[Source]) -> tuple[int, frozenset[int]] | None:
    """Rows of the merged vocabularies, and those of the models, where some had more.

    Raises:
        ValueError: matrices are cut to different numbers of rows.
    """
    cut: dict[int, set[int]] = {}
    names: dict[int, str] = {}
    for name, tensors in plan.merged.items():
        before = {len(s.tensors[name]) for s in sources if name in s.tensors and s.tensors[name].dim()}
        if before and before != {len(tensors[0])}:
            cut.setdefault(len(tensors[0]), set()).update(before)
            names.setdefault(len(tensors[0]), name)
    if len(cut) > 1:
        shown = ", ".join(f"{name} to {rows}" for rows, name in names.items())
        raise ValueError(f'rows="common" cuts matrices to different numbers of rows ({shown}): no one vocabulary')
    return next(((rows, frozenset(before)) for rows, before in cut.items()), None)


def result_like(plan: Plan, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    """Types and shapes of the result, on the meta device."""
    out = {}
    for name in plan.order:
        source = plan.tied.get(name, name)
        if source in plan.merged:
            out[name] = torch.empty(plan.merged[source][0].shape, dtype=dtypes[source], device="meta")
        else:
            out[name] = plan.copied[source].to("meta")
    return out


def piece_size(plan: Plan, threads: int) -> int:
    """Entries of a piece, so that those of all models on all threads stay within the budget."""
    tensors = max((len(tensors) for tensors in plan.merged.values()), default=1)
    return max(min(PIECE, BUDGET // (8 * threads * (tensors + COPIES))), SMALLEST)
