"""Gradients of tensors that each belong to one task, where several processes train.

A step computes gradients for the tasks of its batch alone, and an optimizer leaves tensors without a gradient as they
are. Strategies want the same gradients on every process, so all of these tensors get one of 0 where they are not used,
and it is taken off again where no process used them: what is left is what one process would have.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fulgurite.methods.adapters.bank import AdapterBank
from fulgurite.methods.adapters.base import Adapter


class TaskGradients:
    """Keeps account of the tasks that were trained since the last step of the optimizer.

    Args:
        bank: with the live set.
    """

    def __init__(self, bank: AdapterBank) -> None:
        self.bank = bank
        self.seen: set[int] = set()

    def parameters(self) -> dict[nn.Parameter, set[int]]:
        """The tensors that kinds hold per task, with the numbers of the tasks that use them: shared ones of several."""
        found: dict[nn.Parameter, set[int]] = {}
        for adapter in self.bank.sets["live"].modules():
            for number, own in enumerate(adapter.of_tasks() if isinstance(adapter, Adapter) else ()):
                for parameter in own:
                    found.setdefault(parameter, set()).add(number)
        return found

    def with_all(self, outputs: Tensor) -> Tensor:
        """``outputs``, of which each of these tensors is a part of no weight."""
        return outputs + 0 * sum(parameter.sum() for parameter in self.parameters()).to(outputs.dtype)

    def add(self, numbers: Tensor, total: Callable[[Tensor], Tensor]) -> None:
        """Note the tasks of a step.

        Args:
            numbers: (B,) of this process's samples.
            total: sums a tensor over processes; a collective.
        """
        counts = total(torch.bincount(numbers, minlength=len(self.bank.tasks)).float())
        self.seen |= set(counts.nonzero().flatten().tolist())

    def settle(self) -> None:
        """Take the gradients off that stand for nothing, after a backward pass."""
        for parameter, tasks in self.parameters().items():
            if not tasks & self.seen:
                parameter.grad = None

    def clear(self) -> None:
        """The optimizer has made its step."""
        self.seen.clear()
