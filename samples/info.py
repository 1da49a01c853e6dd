"""What a module must know of the data: vocabulary, domains and stages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class DataInfo:
    """Facts of the data that a model's shape or its numbers depend on.

    Args:
        domains: names in training order; the columns of every per-domain result.
        answers: shared vocabulary; the order is the order of the logits.
        kinds: question types, for accuracy by type.
        tasks: task names that occur.
    """

    domains: tuple[str, ...]
    answers: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("videoqa",)

    @property
    def digest(self) -> str:
        """sha256 over all fields, stored with every run."""
        text = json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Stage:
    """One stretch of training on one set of domains.

    Args:
        name: the domain, or ``"all"`` where several are trained together.
        domains: what is trained on.
        epochs: how often.
        num_batches: batches per epoch and rank, before Lightning's ``limit_train_batches``.
    """

    name: str
    domains: tuple[str, ...]
    epochs: int
    num_batches: int


def batches_within(batches: int, limit: float | int | None) -> int:
    """Batches of an epoch under a limit: a number of them, or a share as Lightning rounds it."""
    if isinstance(limit, float):
        return int(batches * limit)
    return batches if limit is None else min(batches, limit)


def first_stages(domains: Sequence[str], stages: Sequence[Stage]) -> list[int | None]:
    """For every domain the number (from 1) of the stage that trains it first, None where none does."""
    return [next((t for t, stage in enumerate(stages, start=1) if name in stage.domains), None) for name in domains]


def stage_of(stages: Sequence[Stage], epoch: int) -> int:
    """Index of the stage that global ``epoch`` belongs to; past the end it is the last one."""
    end = 0
    for index, stage in enumerate(stages):
        end += stage.epochs
        if epoch < end:
            return index
    return len(stages) - 1
