"""Which weights a pass of an unlearning module sees: those before any edit, or edited ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fulgurite.methods.adapters.bank import AdapterBank
from fulgurite.methods.quantization.rtn import quantize_rtn
from fulgurite.methods.sharding import whole
from fulgurite.methods.unlearning.attacks.wrapped import Quantized
from fulgurite.methods.unlearning.edits.attached import attached
from fulgurite.methods.unlearning.edits.base import Edit, slots_of
from fulgurite.methods.unlearning.edits.whole_weight import WholeWeightEdit


@dataclass(frozen=True)
class EditedState:
    """One state of the edited weight, with or without a slot of its own for each item.

    Args:
        bank: holds the edit that a fit trains, as its live set.
        site: the layer whose weight is edited.
        live: whether that edit is there.
        edits: further ones on top of it, each with a slot per item, or with one for all.
    """

    bank: AdapterBank
    site: nn.Module
    live: bool = False
    edits: tuple[Edit, ...] = ()

    @contextlib.contextmanager
    def over(self, items: Tensor) -> Iterator[None]:
        """Within it row r of every batch sees the weight of item ``items[r]``; ``items`` (R,) long."""
        with self.bank.use("live" if self.live else None), attached(self.site, *self.edits), slots_of(items):
            yield

    def with_edit(self, edit: Edit) -> EditedState:
        """Another edit on top."""
        return EditedState(self.bank, self.site, self.live, (*self.edits, edit))

    @torch.no_grad()
    def weight(self, item: int) -> Tensor:
        """(o, i) float32, the weight that the item's rows see."""
        weight = whole(self.site.weight).float()
        live = [*self.bank.adapters_of("live").values()] if self.live else []
        for edit in (*live, *self.edits):
            weight = weight + whole(edit.change(item if edit.items > 1 else 0))
        return weight

    @property
    def shared(self) -> bool:
        """Whether all items see the same weight."""
        return all(edit.items == 1 for edit in self.edits)

    def quantized(self, item: int, attack: Quantized) -> EditedState:
        """All rows see the item's weight, rounded."""
        weight = self.weight(item)
        rounded = quantize_rtn(weight, attack.bits, attack.group_size or "channel").weight
        edit = WholeWeightEdit(self.site).to(weight.device).requires_grad_(False)
        edit.delta.data[0] = rounded.float() - whole(self.site.weight).float()
        return EditedState(self.bank, self.site, False, (edit,))


def item_rows(counts: Sequence[int], device: torch.device) -> Tensor:
    """(R,) long: item i, ``counts[i]`` times, for every i."""
    return torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, device=device))
