"""The processes that share a piece of work, and what they tell each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fulgurite.checkpoints import CheckpointError


@dataclass(frozen=True)
class Ranks:
    """One process among several that all make the same calls in the same order; alone by default.

    Args:
        rank: of this process.
        size: how many there are.
        group: of `torch.distributed`, the default group where None and ``size`` is above 1.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order of rank, on every rank. A collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: Any, source: int) -> Any:
        """The value of the rank ``source``, on every rank; those of the others are not looked at. A collective."""
        if self.size == 1:
            return value
        values = [value if self.rank == source else None]
        dist.broadcast_object_list(values, src=source, group=self.group)
        return values[0]

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in its place. A collective."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def share(self, sizes: Mapping[str, int]) -> list[str]:
        """The names that are this rank's to work on: largest first, each to the rank with least so far."""
        loads, own = [0] * self.size, []
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            least = loads.index(min(loads))
            loads[least] += sizes[name] + 1
            if least == self.rank:
                own.append(name)
        return own

    def agree(self, work: Callable[[], Any]) -> Any:
        """Do ``work`` on every rank; where it fails on one, every rank raises. Returns this rank's result.

        Raises:
            Exception: this rank's own error; of another rank, its text in a CheckpointError where it was one, else in
                a RuntimeError.
        """
        if self.size == 1:
            return work()
        value, error = None, None
        try:
            value = work()
        except Exception as caught:  # of any kind: the others wait for this rank, and would wait for ever
            error = caught
        stored = CheckpointError if isinstance(error, CheckpointError) else RuntimeError
        errors = self.gather(None if error is None else (stored, f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        for rank, (kind, text) in ((rank, found) for rank, found in enumerate(errors) if found is not None):
            raise kind(f"rank {rank} failed: {text}")
        return value

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """`agree` on ``work``, and `gather` what it returns."""
        return self.gather(self.agree(work))


ALONE = Ranks()
# Longer than any merge or export: one rank may work for hours while the others wait. One that dies is seen at once.
PATIENCE = timedelta(days=2)


def patient_ranks(rank: int, size: int) -> Ranks:
    """The processes of the default group, in a group of their own that waits on the CPU and for long. A collective."""
    return Ranks(rank, size, dist.new_group(backend="gloo", timeout=PATIENCE) if size > 1 else None)
