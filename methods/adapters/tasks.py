"""Which task each sample of a batch belongs to, for kinds that hold tensors per task.

The index lies in a context variable, so that it reaches the adapters at any depth of a frozen model whose code
knows nothing of tasks, and threads do not see each other's.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fulgurite.methods.adapters.mixing import Mixture


class _Tasks:
    """One batch's index, and the grouping of its samples, made once for all sites."""

    def __init__(self, index: Tensor) -> None:
        if index.dim() != 1 or index.dtype != torch.long or not len(index):
            raise ValueError(f"the tasks of a batch are an index (B,) long; this is {index.dtype} {tuple(index.shape)}")
        self.index = index
        self.groupings: dict[tuple[int, int, torch.device], Mixture] = {}


_CURRENT: contextvars.ContextVar[_Tasks | None] = contextvars.ContextVar("fulgurite_tasks", default=None)


@contextlib.contextmanager
def tasks_of(index: Tensor | None) -> Iterator[None]:
    """Say until the block ends which task each sample belongs to; blocks may nest.

    Args:
        index: (B,) long, positions among the kinds' ``tasks`` (`AdapterBank.tasks`), best on the CPU; None takes
            the word back.

    Raises:
        ValueError: the index has another shape or type, or no sample.
    """
    token = _CURRENT.set(None if index is None else _Tasks(index))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_tasks() -> Tensor | None:
    """The index (B,) of the samples that are being computed, or None outside `tasks_of`."""
    tasks = _CURRENT.get()
    return None if tasks is None else tasks.index


def rows_by_task(tasks: Sequence[str], rows: Tensor) -> Tensor:
    """The task of every row of a site's output.

    Args:
        tasks: names that the index counts through.
        rows: what has one row per sample, or as many per sample as there are beams, neighbours of each other.

    Raises:
        ValueError: no `tasks_of` is active, or its index does not fit the tasks or the rows.
    """
    index = current_tasks()
    if index is None:
        raise ValueError(
            f"adapters of the tasks {list(tasks)} need to know the task of each sample; run the model inside "
            "`with tasks_of(index)`"
        )
    if len(rows) % len(index):
        raise ValueError(f"{len(index)} tasks were given for {len(rows)} rows, which is no multiple of them")
    if not 0 <= int(index.min()) <= int(index.max()) < len(tasks):
        raise ValueError(f"a task's index lies outside 0 to {len(tasks) - 1}; the tasks are {list(tasks)}")
    return index.repeat_interleave(len(rows) // len(index)).to(rows.device)


def grouped_by_task(tasks: Sequence[str], rows: Tensor) -> Mixture:
    """`rows_by_task` as a one-hot mixture over ``tasks``, made once per batch for all sites."""
    current = _CURRENT.get()
    key = (len(tasks), len(rows), rows.device)
    if current is None or key not in current.groupings:
        mixture = Mixture.one_hot(rows_by_task(tasks, rows), len(tasks))
        current.groupings[key] = mixture
    return current.groupings[key]


def select_sets(
    tasks: Sequence[str], mixture: Mixture, rows: Tensor, run: Callable[[int, slice | Tensor], Tensor]
) -> Tensor:
    """Every row by its set, where sets route by task themselves.

    Args:
        tasks: names that the index counts through.
        mixture: the rows by their set, one-hot.
        rows: as for `rows_by_task`.
        run: gives what a set, by its number, makes of some rows; it sees their tasks alone.
    """
    if len(mixture.groups) == 1:
        return run(mixture.groups[0].experts[0], slice(None))
    index = rows_by_task(tasks, rows)
    parts = []
    for group in mixture.groups:
        with tasks_of(index[group.rows]):
            parts.append(run(group.experts[0], group.rows))
    return mixture.gather(parts, len(rows))
