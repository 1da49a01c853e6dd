"""The side network of one stack of a ladder, and what a family of models has to say about its side blocks.

Legend: B batch, S positions of the side stream, L positions of the backbone (the text), M positions of the encoder's
side states, D width of the backbone, N its blocks, r reduction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.methods.adapters.ladder_selection import Part

Gate = Literal["learnable", "none", "one", "schedule-linear", "schedule-hyperbolic"]


@dataclass
class SideCall:
    """What a side block is called with, beside its state (B, S, D/r).

    Args:
        args: those of the backbone block's call, by position.
        kwargs: by name.
        text_length: how many positions, at the front, are text; None where the backbone sees all that the side sees.
        mask: (B, S) True at real positions; None where the backbone block's masks hold.
        memory: (B, M, D/r) final side states of the encoder.
        memory_mask: (B, M), as ``mask``.
        shared: what side blocks of one pass leave for the later ones.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    text_length: int | None = None
    mask: Tensor | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None
    shared: dict[str, Any] = field(default_factory=dict)


class SideBlocks(Protocol):
    """How the blocks of one stack of a family of models are made small, and called.

    Attributes:
        width: D.
        dropout: what the family drops out of a stack's input and of its last state while training.
        parts: the layers of a block in the order of the data, for the selection of units.
    """

    width: int
    dropout: float
    parts: Sequence[Part]

    def make(self, number: int, cache_index: int, reduction: int, first: bool) -> nn.Module:
        """A fresh block with every width divided by ``reduction``.

        Args:
            number: of the backbone block beside it.
            cache_index: where its keys and values go in the library's cache.
            reduction: r.
            first: whether it is the first side block of its stack, which owns what the stack shares.
        """
        ...

    def norm(self, reduction: int) -> nn.Module:
        """A fresh norm (D/r) like the one after the stack's last block; the identity where there is none."""
        ...

    def run(self, side: nn.Module, state: Tensor, call: SideCall) -> Tensor:
        """The side block's new state (B, S, D/r)."""
        ...


class SideStack(nn.Module):
    """The side blocks beside one stack, the maps D_i into their width, and their gates.

    Args:
        blocks: the family's.
        num_blocks: N.
        kept: numbers of the backbone blocks that have a side block.
        reduction: r.
        gate: see `LadderSide`.
    """

    def __init__(self, blocks: SideBlocks, num_blocks: int, kept: Sequence[int], reduction: int, gate: Gate) -> None:
        super().__init__()
        self.family, self.num_blocks, self.reduction = blocks, num_blocks, reduction
        width = blocks.width // reduction
        self.first_down = nn.Linear(blocks.width, width)
        reads = () if gate == "one" else kept
        self.downs = nn.ModuleDict({str(i): nn.Linear(blocks.width, width) for i in reads})
        self.blocks = nn.ModuleDict(
            {str(i): blocks.make(i, num_blocks + i, reduction, first=i == kept[0]) for i in kept}
        )
        self.norm = blocks.norm(reduction)
        # One entry per backbone block, those without a side block included: the published count of parameters.
        self.gates = nn.Parameter(torch.zeros(num_blocks)) if gate == "learnable" else None
        self.requires_grad_(True)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """PyTorch's start of linear layers everywhere, norms 1, gates 0."""
        for module in self.modules():
            reset_module(module, generator)
        if self.gates is not None:
            self.gates.zero_()


@torch.no_grad()
def reset_module(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Give the parameters that ``module`` itself owns PyTorch's starting values, those of other kinds of norms 1."""
    if isinstance(module, nn.Linear):
        bound = 1 / math.sqrt(module.in_features)
        module.weight.uniform_(-bound, bound, generator=generator)
        if module.bias is not None:
            module.bias.uniform_(-bound, bound, generator=generator)
    elif isinstance(module, nn.Embedding):
        module.weight.normal_(std=module.num_embeddings**-0.5, generator=generator)
    elif not isinstance(module, SideStack):
        for name, parameter in module.named_parameters(recurse=False):
            parameter.fill_(0.0 if name == "bias" else 1.0)


def projected(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer`` of ``x`` in the layer's own precision, or that of autocast."""
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(layer.weight.dtype)
    return layer(x)


def mixed(side: Tensor, ladder: Tensor, mu: Tensor | None) -> Tensor:
    """mu * side + (1 - mu) * ladder; the sum of both where mu is None.

    Args:
        side: (B, S, D/r).
        ladder: (B, L, D/r) with L <= S; the rest of it is zero.
        mu: a scalar.
    """
    ladder = ladder.to(side.dtype)
    if ladder.shape[1] < side.shape[1]:
        ladder = F.pad(ladder, (0, 0, 0, side.shape[1] - ladder.shape[1]))
    return side + ladder if mu is None else torch.lerp(ladder, side, mu.to(side.dtype))


def scheduled_mu(gate: Gate, epoch: int, epochs: int | None) -> float:
    """mu of an epoch: linspace(0.1, 0.9, epochs)[epoch], or 1 / (1 + epoch) clipped to 0.1 and 0.9.

    Raises:
        ValueError: the epoch lies outside ``epochs``.
    """
    if gate == "schedule-hyperbolic":
        return min(max(1 / (1 + epoch), 0.1), 0.9)
    if epochs is None or not 0 <= epoch < epochs:
        raise ValueError(f"gate 'schedule-linear' has no value for epoch {epoch}: set epochs (now {epochs})")
    return 0.1 if epochs == 1 else 0.1 + 0.8 * epoch / (epochs - 1)
