"""Adapters of several tasks at every site (VL-Adapter, arXiv 2112.06825): multiple, or half-shared ones.

*Multiple* adapters are one per task. *Half-shared* ones have the down- or the up-projection in common. (A *single*
adapter for all tasks is the plain kind.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from fulgurite.methods.adapters.base import Adapter
from fulgurite.methods.adapters.mixing import Group, Mixture
from fulgurite.methods.adapters.sharing import share, used_by
from fulgurite.methods.adapters.tasks import grouped_by_task, select_sets


class PerTask(Adapter):
    """One adapter per task at a site; `tasks_of` says which sample is of which.

    A batch of one task runs that task's adapter alone; of a mixed one, every adapter sees its own samples.
    Parameters: as many as the tasks' adapters have, each shared part once.

    Args:
        site: the module at the site.
        kind: makes the adapter of one task.
        tasks: their names, in the order that `tasks_of` counts through.
        shared: names of submodules that are one and the same for all tasks: ``["down"]`` or ``["up"]`` for half-shared
            adapters, ``["norm_before", "norm_after"]`` for norms, ``["rule"]`` for Compacters with one A.

    Raises:
        ValueError: a task is named twice or none is, ``kind`` spans all sites, or has no such part.
    """

    def __init__(
        self,
        site: nn.Module,
        kind: Callable[[nn.Module], Adapter],
        tasks: list[str],
        shared: list[str] | None = None,
    ) -> None:
        super().__init__()
        if (
            not tasks
            or len(set(tasks)) < len(tasks)
            or any(not t or "." in t or hasattr(nn.ModuleDict, t) for t in tasks)
        ):
            raise ValueError(f"tasks={tasks} must name at least one task, none twice, without '.' or reserved words")
        self.adapters = nn.ModuleDict({task: kind(site) for task in tasks})
        self.tasks, self.shared = tuple(tasks), tuple(shared or ())
        if any(adapter.spans for adapter in self._each):
            raise ValueError(f"PerTask takes kinds with one adapter per site, not {self._each[0].title}")
        share(self._each, self.shared)

    @property
    def _each(self) -> list[Adapter]:
        return list(self.adapters.values())

    @property
    def verb(self) -> str:
        """That of the kind."""
        return self._each[0].verb

    @property
    def title(self) -> str:
        """The kind, how often, and what is shared."""
        shared = f", {' and '.join(self.shared)} shared" if self.shared else ""
        return f"{self._each[0].title} for each of {len(self.tasks)} tasks{shared}"

    @property
    def mixes(self) -> bool:
        """Whether the kind does."""
        return self._each[0].mixes

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Those of every task, one after the other."""
        for adapter in self._each:
            adapter.reset_parameters(generator)

    def of_tasks(self) -> list[list[nn.Parameter]]:
        """Those of each task's adapter, shared parts included."""
        return [list(used_by(adapter)) for adapter in self._each]

    def part(self, name: str) -> nn.Module:
        """The first task's."""
        return self._each[0].part(name)

    def adopt(self, name: str, module: nn.Module) -> None:
        """For every task."""
        for adapter in self._each:
            adapter.adopt(name, module)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``x``, ``y`` (B, ...); with beams every sample has several rows, neighbours of each other."""
        each = self._each
        return type(each[0]).select(each, grouped_by_task(self.tasks, y), x, y)

    @classmethod
    def mix(cls, experts: Sequence[Self], mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
        """Of every task's samples the average of that task's adapters."""
        tasks = grouped_by_task(experts[0].tasks, y)
        if len(tasks.groups) == 1:
            return cls._mix_one(experts, tasks.groups[0], mixture, x, y)
        parts = [
            cls._mix_one(experts, group, Mixture.of(mixture.weights[group.rows]), x[group.rows], y[group.rows])
            for group in tasks.groups
        ]
        return tasks.gather(parts, len(y))

    @classmethod
    def _mix_one(cls, experts: Sequence[Self], task: Group, mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
        each = [expert._each[task.experts[0]] for expert in experts]
        return type(each[0]).mix(each, mixture, x, y)

    @classmethod
    def select(cls, experts: Sequence[Self], mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
        """Every sample's set, and of that its task's adapter."""
        return select_sets(experts[0].tasks, mixture, y, lambda i, rows: experts[i](x[rows], y[rows]))
