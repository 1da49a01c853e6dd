"""What an edit of one weight is: a change per *slot*, so that independent facts are edited side by side in one pass.

Each row of a batch belongs to a slot (`slots_of`); a row's output depends on its own slot alone, and losses are summed
over slots, so that n edits in one pass equal n edits one after the other.

Legend: n slots, R rows, S positions, i inputs and o outputs of the weight.
"""

from __future__ import annotations

import contextlib
import contextvars
from abc import abstractmethod
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from fulgurite.methods.adapters.base import Adapter

_BEHIND: contextvars.ContextVar[int] = contextvars.ContextVar("fulgurite_positions_behind", default=0)
_SLOTS: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("fulgurite_slots", default=None)


@contextlib.contextmanager
def slots_of(rows: Tensor) -> Iterator[None]:
    """Within it the rows of every batch belong to the slots ``rows`` (R,) long."""
    token = _SLOTS.set(rows)
    try:
        yield
    finally:
        _SLOTS.reset(token)


@contextlib.contextmanager
def answers_behind(length: int) -> Iterator[None]:
    """Within it the last ``length`` positions of every batch are those of answers, and the others end with the prompt.

    By this, noise of a position hangs on its distance from the end of the prompt, and not on padding.
    """
    token = _BEHIND.set(length)
    try:
        yield
    finally:
        _BEHIND.reset(token)


class Edit(Adapter):
    """A change of one linear layer's weight in each of several slots, zero at the start.

    Args:
        site: the linear layer.
        items: slots.

    Raises:
        ValueError: ``site`` is no linear layer, or there is no slot.
    """

    verb = "transform"

    def __init__(self, site: nn.Module, items: int = 1) -> None:
        super().__init__()
        if not isinstance(site, nn.Linear):
            raise ValueError(f"{type(self).__name__} edits the weight of an nn.Linear, not of a {type(site).__name__}")
        if items < 1:
            raise ValueError(f"{type(self).__name__}: items={items} must be at least 1")
        self.items = items

    @abstractmethod
    def start(self, seeds: Sequence[int]) -> None:
        """The starting values of every slot in place, drawn by a seed of its own; the change is zero.

        Args:
            seeds: one per slot.
        """

    @abstractmethod
    def changed(self, x: Tensor, slot: Tensor | None) -> Tensor:
        """What the change adds to the output: ``x`` (R, S, i), ``slot`` (R,) or None for one slot -> (R, S, o)."""

    @abstractmethod
    def change(self, slot: int) -> Tensor:
        """(o, i) float32, the change of the weight in one slot."""

    def project(self) -> None:
        """Put the change back to where it may be, after a step of the optimizer; here it may be anywhere."""

    @property
    def mixes(self) -> bool:
        """An edit is the whole of a set."""
        return False

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``x`` (R, S, i), ``y`` (R, S, o) -> (R, S, o).

        Raises:
            ValueError: the rows are not those that `slots_of` knows.
        """
        slot = _SLOTS.get()
        if self.items == 1:
            slot = None
        elif slot is None or len(slot) != len(x):
            raise ValueError(
                f"{len(x)} rows enter an edit of {self.items} items, and slots are known of "
                f"{'none' if slot is None else len(slot)}"
            )
        return y + self.changed(x, slot).to(y.dtype)

    def folded(self, site: nn.Module) -> dict[str, Tensor]:
        """The edited weight of an edit of one item, added up in float32."""
        if self.items > 1:
            return super().folded(site)
        return {"weight": site.weight.detach().float() + self.change(0)}


def positions_behind() -> int:
    """What `answers_behind` says."""
    return _BEHIND.get()


def selected(tensor: Tensor, slot: Tensor | None) -> Tensor:
    """(R, ...) of (n, ...) by the slots of rows; one slot is given to all."""
    return tensor if slot is None else tensor.index_select(0, slot)
