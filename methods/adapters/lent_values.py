"""Values that take the place of some entries of a frozen weight while a module computes with it, without a copy.

They are written into the weight in place for as long as something reads it, which is twice: in the module's forward
pass, and in its backward pass, which multiplies by the weight again. At all other times the weight is what it was, bit
for bit. In between the module reads an alias of the weight that depends on the values, so that their gradient is the
entries of the weight's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def read_entries(weight: Tensor, index: Tensor) -> Tensor:
    """(K,) entries at flat indices (K,), whatever the memory format."""
    return weight.view(-1)[index] if weight.is_contiguous() else weight[torch.unravel_index(index, weight.shape)]


def write_entries(weight: Tensor, index: Tensor, values: Tensor) -> None:
    """Write values (K,) to flat indices (K,), in the weight's type."""
    values = values.to(weight.dtype)
    if weight.is_contiguous():
        weight.view(-1)[index] = values
    else:
        weight[torch.unravel_index(index, weight.shape)] = values


@dataclass
class _Held:
    """What a weight holds at the moment: by whose loans, how many of them, and the entries that they have displaced."""

    owner: Any = None
    loans: int = 0
    displaced: Tensor | None = None


# By module and name of the parameter in it: every set of adapters writes into the same weights.
_HELD: WeakKeyDictionary[nn.Module, dict[str, _Held]] = WeakKeyDictionary()


@dataclass
class Loan:
    """Values lent to a weight for one call of a module; `give` and `take_back` alternate, as often as it is needed.

    Several loans of one owner may be open at once, as of a weight that two modules share.

    Args:
        owner: whose values they are.
        module: that has the weight.
        name: of the parameter in it.
        weight: the parameter's data.
        index: (K,) flat indices.
        values: (K,), detached.
    """

    owner: Any
    module: nn.Module
    name: str
    weight: Tensor
    index: Tensor
    values: Tensor
    open: bool = False
    version: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.version = None if self.values.is_inference() else self.values._version

    @torch.no_grad()
    def give(self) -> None:
        """Write the values into the weight, where they are not in it.

        Raises:
            RuntimeError: another owner's values are in it, or the values have changed since the call.
        """
        if self.open:
            return
        if self.version is not None and self.version != self.values._version:
            raise RuntimeError(
                f"the values lent to {self.name!r} of a {type(self.module).__name__} were changed between a forward "
                "pass and its backward pass; step the optimizer after the backward pass"
            )
        held = _HELD.setdefault(self.module, {}).setdefault(self.name, _Held())
        if held.loans and held.owner is not self.owner:
            raise RuntimeError(
                f"{self.name!r} of a {type(self.module).__name__} holds the values of another adapter set; use one set "
                "at a time, in one thread"
            )
        if not held.loans:
            held.owner, held.displaced = self.owner, read_entries(self.weight, self.index)
            write_entries(self.weight, self.index, self.values)
        held.loans, self.open = held.loans + 1, True

    @torch.no_grad()
    def take_back(self) -> None:
        """Write back what the values have displaced, where no other loan of the weight is open."""
        if not self.open:
            return
        self.open, held = False, _HELD[self.module][self.name]
        held.loans -= 1
        if held.loans:
            return
        if self.weight.untyped_storage().size():  # FSDP2 frees it, and fetches the original anew
            write_entries(self.weight, self.index, held.displaced)
        held.owner = held.displaced = None


class LentAlias(torch.autograd.Function):
    """The weight of a loan, as a function of the values (K,) that are in it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, loan: Loan) -> Tensor:
        """An alias with a version of its own, since the weight is written to and restored behind its back."""
        ctx.loan, ctx.dtype = loan, values.dtype
        return loan.weight.data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """All that read the weight are through; the entries' gradients."""
        ctx.loan.take_back()
        return read_entries(gradient, ctx.loan.index).to(ctx.dtype), None


def give_in_backward(outputs: Sequence[Tensor], loans: Sequence[Loan]) -> None:
    """Open the loans of a module's call again as soon as a backward pass comes to its ``outputs``.

    A hook of the nodes, since those of tensors come before FSDP2 has fetched the weight.
    """

    def give(_: Any) -> None:
        for loan in loans:
            if not loan.open:
                loan.give()
                at_end_of_backward(loan.take_back)  # where no gradient of the values is asked for

    for node in {output.grad_fn for output in outputs if output.grad_fn is not None}:
        node.register_prehook(give)


def in_backward() -> bool:
    """Whether a backward pass is going on in this thread."""
    return torch._C._current_graph_task_id() != -1


def at_end_of_backward(call: Any) -> None:
    """Have ``call`` called when the current backward pass ends."""
    torch.autograd.Variable._execution_engine.queue_callback(call)
