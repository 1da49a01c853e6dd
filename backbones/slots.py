"""Places in a backbone where something passes through and nothing is computed, for adapters that add to it.

A model of a library has no module at every place where a prompt, a side network or a read-out attaches. A slot is one
without parameters: the backbone calls it there, and what its adapters give back goes on.

Legend: B batch, L text positions with prompts, V visual tokens, D width.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from fulgurite.backbones.side_blocks import side_blocks_of


class Slot(nn.Module):
    """Gives its first argument back.

    Attributes:
        side_blocks: how a ladder makes the blocks of the stack small, see `side_blocks_of`.

    Args:
        width: D of what passes through.
        takes_prompts: whether it may come back with more positions in front.
    """

    side_blocks = staticmethod(side_blocks_of)

    def __init__(self, width: int, takes_prompts: bool = False) -> None:
        super().__init__()
        self.out_features = width
        self.takes_prompts = takes_prompts

    def forward(self, x: Tensor, text_length: int | None = None, mask: Tensor | None = None) -> Tensor:
        """``x`` (B, S, D).

        Args:
            text_length: L, where what is before a stack's first block passes; text comes first.
            mask: (B, L + V) True where a position of an encoder is real.
        """
        return x


def call_before(module: nn.Module, slot: Slot) -> None:
    """Let the first argument of ``module``, the first block of a decoder, pass through ``slot``."""
    module.register_forward_pre_hook(functools.partial(_before, slot), with_kwargs=True)


def call_after(module: nn.Module, slot: Slot) -> None:
    """Let the last state that ``module``, a decoder of transformers, gives pass through ``slot``."""
    module.register_forward_hook(functools.partial(_after, slot))


def _before(slot: Slot, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return (slot(args[0], text_length=args[0].shape[1], mask=None), *args[1:]), kwargs


def _after(slot: Slot, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    output.last_hidden_state = slot(output.last_hidden_state)
    return output
