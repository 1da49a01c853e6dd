"""Merging models that lie in files, in memory that does not grow with their number or size.

Sources are mapped, not read; the result is written in place as it is computed. A merger that works in pieces holds one
piece of each source per thread, another merger one tensor of each source per thread.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fulgurite.checkpoints import CheckpointError, Manifest, RefusedError
from fulgurite.checkpoints.inplace import fill, records_of, reserve
from fulgurite.checkpoints.sources import open_source
from fulgurite.checkpoints.store import encode, new_manifest, write_checkpoint
from fulgurite.methods.merging.base import Merger, survey
from fulgurite.methods.merging.plan import PIECE, Matching, Plan, plan_of, source_name
from fulgurite.methods.ranks import ALONE, Ranks

WEIGHTS = "weights.safetensors"
BUDGET = 96 * 2**20  # bytes that pieces may take on all threads together
SMALLEST = 2**12  # entries of a piece at least
COPIES = 8  # of a piece that a merger makes beside those of the sources, at most
Seen = Callable[[str, int], None]


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
    ranks: Ranks = ALONE,
    seen: Seen | None = None,
    facts: dict[str, Any] | None = None,
    documents: dict[str, Any] | None = None,
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
        ranks: processes that share the work and the file system; each calls this with the same arguments.
        seen: called whenever some entries were read, with the pass (``merge`` for the last one) and their number.
        facts: for the manifest, beside the change.
        documents: what else the artefact holds; see `save_checkpoint_folder`.

    Raises:
        ValueError: the models do not fit together, or a source holds NaN; nothing is written.
        CheckpointError: a source is damaged, the result is not a merge though the settings say so, or the operating
            system refused; nothing is left.
    """
    threads = threads or os.cpu_count() or 1
    weights = merger.check(len(experts), base is not None, weights)
    given = [*([] if base is None else [base]), *experts]
    plan, manifest = ranks.agree(lambda: _opened(given, base is not None, Path(out), matching))
    manifest.settings |= {**(settings or {}), "merger": type(merger).__name__, "weights": weights}
    manifest.facts |= facts or {}
    manifest.check()
    done = Merged(Path(out))
    writer = _Writer(plan, merger, weights, dtype, piece_size(plan, threads), seen)
    with one_kernel_thread(threads):
        survey(merger, plan, threads, ranks, writer.size, seen)
        if ranks.rank == 0:
            _publish(writer, manifest, documents or {}, threads, ranks, done)
        else:
            _follow(writer, threads, ranks, done)
    return done


def _opened(given: Sequence[str | Path], has_base: bool, out: Path, matching: Matching | None) -> tuple[Plan, Manifest]:
    """What is merged, and the manifest of the result as far as the sources tell it."""
    if out.exists():
        raise RefusedError(f"{out} is there already: name a new folder, a merge replaces nothing")
    sources = [open_source(path) for path in given]
    labels = [f"{source_name(n, has_base)} ({source.path})" for n, source in enumerate(sources)]
    states = [source.tensors for source in sources]
    plan = plan_of(states[has_base:], states[0] if has_base else None, matching, labels)
    first = sources[has_base].manifest
    # The experts' modules are rebuilt in one way, or they could not be merged; slices are whole now.
    structure = {} if first is None else {k: v for k, v in first.structure.items() if k != "shards"}
    parents = [{"path": str(source.path), "digest": source.digest} for source in sources]
    return plan, new_manifest(parents=parents, structure=structure)


def piece_size(plan: Plan, threads: int) -> int:
    """Entries of a piece, so that those of all models on all threads stay within the budget."""
    tensors = max((len(tensors) for tensors in plan.merged.values()), default=1)
    return max(min(PIECE, BUDGET // (8 * threads * (tensors + COPIES))), SMALLEST)


def held_bytes(plan: Plan, merger: Merger, threads: int | None = None) -> int:
    """About how much memory a merge takes beside the mapped files: every source and some results, per thread."""
    threads = threads or os.cpu_count() or 1
    largest = max(plan.sizes.values(), default=0)
    elements = min(piece_size(plan, threads), largest) if merger.piecewise else largest
    copies = max((len(tensors) for tensors in plan.merged.values()), default=1) + COPIES
    return 4 * elements * copies * threads


@contextmanager
def one_kernel_thread(threads: int) -> Iterator[None]:
    """Kernels on one thread each inside, where several tensors are worked on at a time."""
    before = torch.get_num_threads()
    try:
        if threads > 1:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


class _Writer:
    """Merged tensors as pieces, with a look at what changed."""

    def __init__(
        self,
        plan: Plan,
        merger: Merger,
        weights: Sequence[float],
        dtype: torch.dtype | None,
        size: int,
        seen: Seen | None,
    ) -> None:
        self.plan, self.merger, self.weights, self.dtype, self.size, self.seen = (
            plan,
            merger,
            weights,
            dtype,
            size,
            seen,
        )
        self.change: dict[str, float] = {}
        self.equal = [True] * len(plan.labels)

    def like(self) -> dict[str, Tensor]:
        """Types and shapes of the result."""
        out = {}
        for name in self.plan.order:
            source = self.plan.tied.get(name, name)
            if source in self.plan.merged:
                first = self.plan.merged[source][0]
                out[name] = torch.empty(first.shape, dtype=self.dtype or first.dtype, device="meta")
            else:
                out[name] = self.plan.copied[source].to("meta")
        return out

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """One tensor of the result."""
        source = self.plan.tied.get(name, name)
        if source not in self.plan.merged:
            yield 0, self.plan.copied[source].reshape(-1)
            return
        operands = self.plan.operands(source, self.size)
        given = [tensor.detach().reshape(-1) for tensor in operands.tensors]
        start, moved, norm = 0, 0.0, 0.0
        for merged in self.merger.merge_one(operands, self.weights):
            merged = merged.reshape(-1)
            part = slice(start, start + merged.numel())
            first = given[0][part].to(merged.dtype)
            moved += square_sum(merged - first)
            norm += square_sum(first)
            for number, tensor in enumerate(given):
                if self.equal[number] and not torch.equal(merged, tensor[part].to(merged.dtype)):
                    self.equal[number] = False
            yield start, merged.to(self.dtype or given[0].dtype)
            start = part.stop
        self.change[name] = math.sqrt(moved / norm) if norm else math.sqrt(moved)
        if self.seen is not None:
            self.seen("merge", start)


def square_sum(values: Tensor) -> float:
    """Sum of squares of flat entries."""
    return float(torch.dot(values, values))


def _publish(
    writer: _Writer, manifest: Manifest, documents: dict[str, Any], threads: int, ranks: Ranks, done: Merged
) -> None:
    """Rank 0's part: make the file, write its share, and publish what all ranks have written."""
    waiting, error = True, None

    def others(folder: Path) -> dict[str, Any]:
        nonlocal waiting
        path = folder / WEIGHTS
        reserve(path, writer.like())
        waiting = False
        ranks.gather(str(path))
        _write_share(path, writer, threads, ranks, done)
        if done.equal_to and sum(weight != 0 for weight in writer.weights) > 1:
            raise RefusedError(
                f"the merge equals {' and '.join(done.equal_to)} in every tensor: the sources are the same, or the "
                "settings do nothing"
            )
        manifest.facts["change"] = done.change
        return {WEIGHTS: records_of(path, writer.like())}

    try:
        write_checkpoint(done.path, manifest, *encode({}, documents), others=others)
    except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as caught:
        error = caught
    if waiting:
        ranks.gather(None)
    ranks.gather(None if error is None else str(error))
    if error is not None:
        raise error


def _follow(writer: _Writer, threads: int, ranks: Ranks, done: Merged) -> None:
    """The other ranks' part: write a share into the file that rank 0 has made."""
    path, own = ranks.gather(None)[0], None
    if path is not None:
        try:
            _write_share(Path(path), writer, threads, ranks, done)
        except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as caught:
            own = caught
    text = ranks.gather(None)[0]
    if own is not None:
        raise own
    if text is not None:
        raise CheckpointError(text)


def _write_share(path: Path, writer: _Writer, threads: int, ranks: Ranks, done: Merged) -> None:
    """Merge and write the tensors that are this rank's, and learn from all ranks what has changed."""
    like = writer.like()

    def work() -> Any:
        fill(path, like, writer.pieces, ranks.share({n: t.numel() for n, t in like.items()}), threads)
        return writer.change, writer.equal

    parts = ranks.together(work)
    change = {name: value for own, _ in parts for name, value in own.items()}
    done.change.update((name, change[name]) for name in writer.plan.order if name in change)
    if writer.plan.merged:
        equal = [all(flags) for flags in zip(*(flags for _, flags in parts))]
        done.equal_to += [label for label, same in zip(writer.plan.labels, equal) if same]
