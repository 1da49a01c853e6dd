"""Merging models that lie in files, in memory that does not grow with their number or size.

Sources are mapped, not read; the result is written in place as it is computed. An element-wise merger holds one piece
of each source per thread, another merger one tensor of each source per thread.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fulgurite.checkpoints import RefusedError
from fulgurite.checkpoints.inplace import write_in_place
from fulgurite.checkpoints.sources import Source, open_source
from fulgurite.checkpoints.store import encode, new_manifest, write_checkpoint
from fulgurite.methods.merging.base import Matching, Merger, Plan, plan_of

PIECE = 2**20  # elements of one piece: 4 MiB of each source in float32


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


def merge_files(
    experts: Sequence[str | Path],
    out: str | Path,
    merger: Merger,
    base: str | Path | None = None,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    matching: Matching | None = None,
    threads: int | None = None,
    settings: dict[str, Any] | None = None,
) -> Merged:
    """Merge models on disk into the artefact ``out``, all or nothing.

    Args:
        experts: T sources; see `open_source` for what one may be.
        out: a checkpoint folder that is not there yet.
        merger: what merges.
        base: the model that the experts were fine-tuned from.
        weights: one number per expert, 1 for each by default.
        dtype: of the merged tensors; that of the base (of the first expert where there is none) by default.
        matching: what happens to entries that differ.
        threads: tensors merged at a time; all cores by default. The result does not depend on it.
        settings: for the manifest, beside the sources.

    Raises:
        ValueError: the models do not fit together, or a source holds NaN; nothing is written.
        CheckpointError: a source is damaged, the result is not a merge though the settings say so, or the operating
            system refused; nothing is left.
    """
    weights = merger.check(len(experts), base is not None, weights)
    if Path(out).exists():
        raise RefusedError(f"{out} is there already: name a new folder, a merge replaces nothing")
    sources = [open_source(path) for path in experts]
    start = None if base is None else open_source(base)
    plan = plan_of([s.tensors for s in sources], None if start is None else start.tensors, matching or Matching())
    merger.begin(len(experts))
    for name in sorted(plan.merged) if merger.scans else ():
        merger.scan(name, *plan.sources(name))
    done = Merged(Path(out))
    writer = _Writer(plan, merger, weights, dtype, done)
    parents = [{"path": str(s.path), "digest": s.digest} for s in (*([] if start is None else [start]), *sources)]
    manifest = new_manifest(
        parents=parents,
        structure=_structure(sources),
        settings={**(settings or {}), "merger": type(merger).__name__, "weights": weights},
    )

    def others(folder: Path) -> dict[str, Any]:
        threads_now = threads or os.cpu_count() or 1
        written = write_in_place(folder / "weights.safetensors", writer.like(), writer.pieces, threads_now)
        if writer.is_a_source() and sum(weight != 0 for weight in weights) > 1:
            raise RefusedError(
                f"the merge of {len(experts)} models equals {' and '.join(done.equal_to)} in every tensor: the sources "
                "are the same, or the settings do nothing"
            )
        manifest.facts["change"] = done.change
        return {"weights.safetensors": written}

    write_checkpoint(out, manifest, *encode({}, {}), others=others)
    return done


def held_bytes(plan: Plan, merger: Merger, threads: int | None = None) -> int:
    """About how much memory a merge takes beside the mapped files: every source and two results, per thread."""
    largest = max((math.prod(plan.shape(name)) for name in plan.merged), default=0)
    elements = min(PIECE, largest) if merger.elementwise else largest
    copies = len(plan.experts) + (plan.base is not None) + 2
    return 4 * elements * copies * (threads or os.cpu_count() or 1)


def _structure(sources: Sequence[Source]) -> dict[str, Any]:
    """How the experts' modules must be rebuilt, which is alike for all that can be merged; slices are whole now."""
    first = sources[0].manifest
    return {} if first is None else {k: v for k, v in first.structure.items() if k != "shards"}


class _Writer:
    """Merged tensors as pieces, with a look at what changed."""

    def __init__(
        self, plan: Plan, merger: Merger, weights: Sequence[float], dtype: torch.dtype | None, done: Merged
    ) -> None:
        self.plan, self.merger, self.weights, self.dtype, self.done = plan, merger, weights, dtype, done
        names = [f"expert {i}" for i in range(len(plan.experts))]
        self.names = names if plan.base is None else ["the base", *names]
        self.equal = dict.fromkeys(self.names, True)

    def like(self) -> dict[str, Tensor]:
        """Types and shapes of the result."""
        out = {}
        for name in self.plan.order:
            source = self.plan.tied.get(name, name)
            if source in self.plan.merged:
                dtype = self.dtype or self.plan.reference(source).dtype
                out[name] = torch.empty(self.plan.shape(source), dtype=dtype, device="meta")
            else:
                out[name] = self.plan.copied[source].to("meta")
        return out

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """One tensor of the result."""
        source = self.plan.tied.get(name, name)
        if source not in self.plan.merged:
            yield 0, self.plan.copied[source].reshape(-1)
            return
        size = PIECE if self.merger.elementwise else max(math.prod(self.plan.shape(source)), 1)
        dtype, moved, norm = self.dtype or self.plan.reference(source).dtype, 0.0, 0.0
        parts = self.plan.pieces(source, size) if self.merger.elementwise else [(0, *self.plan.sources(source))]
        for start, base, experts in parts:
            merged = self.merger.merge_one(source, base, experts, self.weights)
            given = experts if base is None else [base, *experts]
            moved += float((merged - given[0]).double().square().sum())
            norm += float(given[0].double().square().sum())
            for label, tensor in zip(self.names, given):
                if self.equal[label] and not torch.equal(merged, tensor):
                    self.equal[label] = False
            yield start, merged.to(dtype).reshape(-1)
        self.done.change[name] = math.sqrt(moved / norm) if norm else math.sqrt(moved)

    def is_a_source(self) -> bool:
        """Whether the result equals a source in every merged tensor."""
        self.done.equal_to = [label for label, equal in self.equal.items() if equal]
        return bool(self.done.equal_to) and bool(self.plan.merged)
