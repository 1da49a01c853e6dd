"""Merging models that lie in files, in memory that does not grow with their number or size.

Sources are mapped, not read; the result is written in place as it is computed. A merger that works in pieces holds one
piece of each source per thread, another merger one tensor of each source per thread. Where the sources are folders of
another library, the artefact is one too: with configuration and tokenizer, and weights under the names that it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fulgurite.checkpoints.companions import Changes
from fulgurite.checkpoints.foreign import require_new
from fulgurite.checkpoints.sources import open_source
from fulgurite.methods.merging.base import Merger
from fulgurite.methods.merging.job import Job, Merged, companion_folder, job_of, rows_cut, single_type
from fulgurite.methods.merging.plan import Matching, plan_of, source_name
from fulgurite.methods.merging.writing import Seen, carry_out
from fulgurite.methods.ranks import ALONE, Ranks


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
    like: str | Path | None = None,
    max_shard_bytes: int | None = None,
) -> Merged:
    """Merge models on disk into the artefact ``out``, all or nothing; see `prepare` for the other arguments.

    Args:
        ranks: processes that share the work and the file system; each calls this with the same arguments.
        seen: called whenever some entries were read, with the pass (``merge`` for the last one) and their number.

    Raises:
        ValueError: the models do not fit together, or a source holds NaN; nothing is written.
        CheckpointError: a source is damaged, the result is not a merge though the settings say so, or the operating
            system refused; nothing is left.
    """
    job = ranks.agree(
        lambda: prepare(experts, out, merger, base, weights, dtype, matching, threads, settings, like, max_shard_bytes)
    )
    return carry_out(job, ranks, seen)


def prepare(
    experts: Sequence[str | Path],
    out: str | Path,
    merger: Merger,
    base: str | Path | None = None,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    matching: Matching | None = None,
    threads: int | None = None,
    settings: dict[str, Any] | None = None,
    like: str | Path | None = None,
    max_shard_bytes: int | None = None,
) -> Job:
    """Open the models and find out whether they can be merged, and what that takes. Writes nothing.

    Args:
        experts: T sources; see `open_source` for what one may be.
        out: a checkpoint folder that is not there yet, or empty.
        merger: what merges.
        base: the model that the experts were fine-tuned from.
        weights: one number per expert, 1 for each by default.
        dtype: of the merged tensors; that of the base (of the first expert where there is none) by default.
        matching: what happens to entries that differ.
        threads: tensors merged at a time; by default one per core, and a single one for a merger that takes tensors
            whole. The result does not depend on it.
        settings: for the manifest, beside the sources.
        like: model folder of another library whose configuration and tokenizer the artefact gets; by default the base,
            or else the first expert, where that is one.
        max_shard_bytes: of a weight file of such an artefact.

    Raises:
        ValueError, CheckpointError: see `merge_files`.
    """
    weights = merger.check(len(experts), base is not None, weights)
    require_new(Path(out))
    has_base = base is not None
    sources = [open_source(path) for path in [*([] if base is None else [base]), *experts]]
    labels = [f"{source_name(n, has_base)} ({source.path})" for n, source in enumerate(sources)]
    states = [source.tensors for source in sources]
    plan = plan_of(states[has_base:], states[0] if has_base else None, matching, labels)
    dtypes = {name: dtype or tensors[0].dtype for name, tensors in plan.merged.items()}
    own = {**(settings or {}), "merger": type(merger).__name__, "weights": weights}
    if matching not in (None, Matching()):
        own["matching"] = asdict(matching)
    first = sources[has_base]
    owner = companion_folder(sources[: 1 + has_base], like)
    changes = Changes(single_type(dtypes), rows_cut(plan, sources))
    return job_of(
        Path(out), plan, merger, weights, own, dtypes, threads, sources, first, owner, changes, max_shard_bytes
    )
