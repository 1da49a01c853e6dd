"""Which checkpoints of a run are kept: a plan without side effects, and its execution.

Order is what keeps it safe: a new checkpoint is published first, then `retain` deletes, oldest first, each by one
rename. At no instant, kills included, is there fewer than one good checkpoint if there was one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fulgurite.checkpoints.atomic import fault, remove
from fulgurite.checkpoints.runs import readable_checkpoints
from fulgurite.checkpoints.store import verify


@dataclass(frozen=True)
class Candidate:
    """What a plan must know of one checkpoint.

    Args:
        path: its folder.
        created: time of writing, as in the manifest; sorts by time.
        score: what it is judged by, None or NaN where it has none.
        finite: whether its weights and losses were finite.
    """

    path: Path
    created: str
    score: float | None = None
    finite: bool = True


def plan(
    found: Sequence[Candidate], last: int = 1, best: int = 0, mode: Literal["min", "max"] = "max"
) -> list[Candidate]:
    """The checkpoints to delete, oldest first.

    Kept are the ``last`` newest, the ``best`` by score (of equals the newer), and the newest finite one.

    Raises:
        ValueError: ``last`` is below 1, ``best`` below 0, or the mode unknown.
    """
    if last < 1 or best < 0 or mode not in ("min", "max"):
        raise ValueError(f"last={last} must be at least 1, best={best} at least 0, and mode={mode!r} min or max")
    by_time = sorted(found, key=lambda c: (c.created, c.path.name))
    scored = [c for c in by_time if c.score is not None and not math.isnan(c.score)]
    sign = 1 if mode == "max" else -1
    ranked = sorted(scored, key=lambda c: sign * c.score)
    finite = [c for c in by_time if c.finite]
    kept = {c.path for c in (*by_time[-last:], *ranked[len(ranked) - min(best, len(ranked)) :], *finite[-1:])}
    return [c for c in by_time if c.path not in kept]


def retain(
    folder: str | Path,
    last: int = 1,
    best: int = 0,
    metric: str | None = None,
    mode: Literal["min", "max"] = "max",
    among: Collection[str | Path] | None = None,
) -> list[Path]:
    """Delete from ``folder`` what `plan` does not keep; returns the paths deleted. For the owner of the run.

    Where ``among`` is given, only those checkpoints, in ``folder`` or below, are counted and deleted.

    Scores are the manifests' ``metric``, finiteness their fact ``finite``. Where no checkpoint that is kept is good in
    every byte, the newest good one of the others stays too. Folders whose manifest is damaged are left alone. Reads
    one whole checkpoint, more where that is damaged.

    Raises:
        ValueError: see `plan`.
        WriteError: the operating system refused.
    """
    own = {Path(path) for path in among or ()}
    folders = [Path(folder)] if among is None else sorted({path.parent for path in own})
    readable = [pair for each in folders for pair in readable_checkpoints(each)]
    found = [
        Candidate(
            path,
            manifest.created,
            manifest.metrics.get(metric) if metric is not None else None,
            manifest.facts.get("finite", True),
        )
        for path, manifest in readable
        if among is None or path in own
    ]
    doomed = plan(found, last, best, mode)
    if doomed:
        kept = [candidate for candidate in found if candidate not in doomed]
        if not any(verify(candidate.path).ok for candidate in reversed(kept)):
            spared = next((candidate for candidate in reversed(doomed) if verify(candidate.path).ok), None)
            doomed = [candidate for candidate in doomed if candidate != spared]
    for candidate in doomed:
        fault("before_delete")
        remove(candidate.path)
    return [candidate.path for candidate in doomed]
