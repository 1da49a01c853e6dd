"""Ladder side-tuning, LST (Sung, Cho, Bansal, 2022, arXiv 2206.06522): a small network beside a frozen one.

With h_0 the embedded input of a stack and h_{i+1} the state after its block i, and for every block i that is kept

    s <- D_0 drop(h_0);     s <- mu_i s + (1 - mu_i) D_i h_{i+1};     s <- SideBlock_i(s);     mu_i = sigmoid(a_i / T)

the last stack's output is replaced by U drop(norm(s)), which the frozen head reads. A decoder's side blocks attend to
the final side states of the encoder. Nothing but the side network trains, and no graph is built through the backbone.

Legend: B batch, S positions, L text positions, V visual positions, D width, r reduction.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.methods.adapters.base import Spanning, SpanSite
from fulgurite.methods.adapters.ladder_selection import Residual, Rule, UnitOrder
from fulgurite.methods.adapters.ladder_stack import (
    Gate,
    SideBlocks,
    SideCall,
    SideStack,
    mixed,
    projected,
    reset_module,
    scheduled_mu,
)
from fulgurite.methods.adapters.ladder_start import StackSource, load_pruned
from fulgurite.methods.block_calls import first_tensor, hidden_of
from fulgurite.methods.recomputation import recomputed, recomputes


@dataclass
class _StackRun:
    """One stack's side state in a pass."""

    state: Tensor
    text_length: int | None
    mask: Tensor | None
    shared: dict[str, Any] = field(default_factory=dict)
    final: Tensor | None = None


@dataclass(frozen=True)
class _Role:
    """What a site is to the ladder: which stack it belongs to, and the number of its block."""

    kind: Literal["embedded", "block", "read_out"]
    stack: int
    number: int = 0


class _Runs(threading.local):
    """The passes of this thread, by adapter."""

    def __init__(self) -> None:
        self.of: weakref.WeakKeyDictionary[nn.Module, dict[int, _StackRun]] = weakref.WeakKeyDictionary()


_RUNS = _Runs()


class LadderSide(Spanning):
    """The side network of a whole model.

    Its sites are, by the names of their points: ``embedded``, the slots before each stack; ``read_out``, the slot
    after the last one; and any others, the blocks of all stacks. Without ``embedded`` a stack starts from what its
    first block is given; without ``read_out`` the ladder gives U drop(s) in place of the last block's output, which
    the backbone's own norm follows. The point ``read_out`` of a model without slots is its last norm. The encoder's
    final side states stay with the adapter, per thread, until the next pass, so that a decoder can run many times.

    Args:
        sites: the modules along which it goes.
        reduction: r; every width of the side network is the backbone's divided by it.
        kept: per stack, numbers of the blocks that have a side block; None keeps all of them.
        gate: ``"learnable"``; ``"none"`` adds D_i h to s; ``"one"`` leaves s alone, an isolated small network;
            the schedules take mu from the epoch, see `start_epoch`.
        temperature: T.
        epochs: length of ``"schedule-linear"``.
        add_residual_after: run the side block first and mix after it.
        merge_last: give g U s + (1 - g) h with the backbone's last state h and a gate g as above.
        ladder_inputs: ``"text"`` lets the backbone see the text alone, as published, while the side sees all.
        init: ``"magnitude"`` starts side blocks as blocks pruned by their weights; ``"fisher"``, as published, so too
            until `ladder_start.copy_pruned` is given the squared gradients; ``"random"`` as PyTorch starts layers. The
            token table and the norms after the blocks, which no site is, come in by `copy_pruned` alone.
        samples: training samples that ``"fisher"`` asks for.
        seed: of their choice.
        unit_order: of the kept units, see `ladder_selection.kept_units`.
        rule: ``"heads"`` prunes whole heads first.
        residual: ``"per_layer"`` lets each layer choose anew what it writes into the residual stream, as published;
            ``"consistent"`` chooses once.
        side_blocks: gives, from a block, how its family's are made small, such as
            ``fulgurite.backbones.side_blocks.side_blocks_of``; None asks the ``embedded`` slots' attribute of that
            name.

    Raises:
        ValueError: sites do not form stacks, ``kept`` does not fit them, or r does not divide a width.
    """

    verb = "transform"

    def __init__(
        self,
        sites: Sequence[SpanSite],
        reduction: int = 8,
        kept: list[list[int]] | None = None,
        gate: Gate = "learnable",
        temperature: float = 0.1,
        epochs: int | None = None,
        add_residual_after: bool = False,
        merge_last: bool = False,
        ladder_inputs: Literal["text", "text_and_vision"] = "text",
        init: Literal["magnitude", "fisher", "random"] = "magnitude",
        samples: int = 1024,
        seed: int = 0,
        unit_order: UnitOrder = "ascending",
        rule: Rule = "units",
        residual: Residual = "per_layer",
        side_blocks: Callable[[nn.Module], SideBlocks] | None = None,
    ) -> None:
        super().__init__()
        self.gate, self.temperature, self.epochs = gate, temperature, epochs
        self.add_residual_after, self.ladder_inputs = add_residual_after, ladder_inputs
        self.init, self.samples, self.seed = init, samples, seed
        self.unit_order, self.rule, self.residual = unit_order, rule, residual
        self.roles, stacks = _roles(sites)
        self.block_names = [[site.name for site in stack] for stack in stacks]
        self._blocks = tuple(tuple(site.module for site in stack) for stack in stacks)  # no part of this module
        self.starts_at_slot = any(role.kind == "embedded" for role in self.roles)
        self.ends_at_slot = any(role.kind == "read_out" for role in self.roles)
        make = side_blocks or _side_blocks_of_slots(sites)
        kept = [list(range(len(stack))) for stack in stacks] if kept is None else kept
        _check_kept(kept, self.block_names)
        self.stacks = nn.ModuleList(
            SideStack(make(stack[0].module), len(stack), numbers, reduction, gate)
            for stack, numbers in zip(stacks, kept)
        )
        if not self.ends_at_slot:
            self.stacks[-1].norm = nn.Identity()
        last = self.stacks[-1].family.width
        self.up = nn.Linear(last // reduction, last)
        self.merge_gate = nn.Parameter(torch.zeros(1)) if merge_last else None  # FSDP2 takes no scalars
        self.register_buffer("mu", torch.tensor(0.5) if gate.startswith("schedule") else None)
        if gate.startswith("schedule"):
            self.start_epoch(0)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """D_i and U as PyTorch starts linear layers, gates 0, side blocks pruned or as linear layers start."""
        for stack in self.stacks:
            stack.reset_parameters(generator)
        reset_module(self.up, generator)
        if self.merge_gate is not None:
            self.merge_gate.zero_()
        if self.init != "random" and not any(p.is_meta for b in self._blocks for p in b[0].parameters()):
            load_pruned(self.stacks, self.sources(), self.unit_order, self.rule, self.residual)

    def sources(self) -> list[StackSource]:
        """The backbone's blocks, by stack, with their weights as the importance."""
        return [StackSource([block.state_dict() for block in blocks]) for blocks in self._blocks]

    def start_epoch(self, epoch: int) -> None:
        """Set mu for an epoch, counted from 0; nothing for gates that are not scheduled.

        Raises:
            ValueError: ``"schedule-linear"`` ends before it.
        """
        if self.mu is not None:
            self.mu.fill_(scheduled_mu(self.gate, epoch, self.epochs))

    def before(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Start a stack that has no slot before it."""
        role = self.roles[index]
        if role.kind == "block" and role.number == 0 and not self.starts_at_slot:
            self._start(role.stack, first_tensor(args, kwargs), None, None)

    def at(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any) -> Any:
        """``y`` as it is at blocks, the text of it at ``embedded``, the ladder's output at the end."""
        role = self.roles[index]
        if role.kind == "embedded":
            length = kwargs.get("text_length")
            self._start(role.stack, y, length, kwargs.get("mask"))
            return y.detach()[:, :length] if self.ladder_inputs == "text" else y.detach()
        if role.kind == "read_out":
            return self._read_out(y)
        self._climb(role, args, kwargs, hidden_of(y, f"block {self.block_names[role.stack][role.number]!r}"))
        if role.number < len(self.block_names[role.stack]) - 1:
            return y
        self._finish(role.stack)
        if self.ends_at_slot or role.stack < len(self.stacks) - 1:
            return y
        out = self._read_out(hidden_of(y, "the last block"))
        return (out, *y[1:]) if isinstance(y, tuple) else out

    @property
    def _runs(self) -> dict[int, _StackRun]:
        return _RUNS.of.setdefault(self, {})

    def _run(self, stack: int) -> _StackRun:
        if stack not in self._runs:
            raise ValueError(
                f"the ladder has not passed the stack of {self.block_names[stack][0]!r} in this thread; run the whole "
                "model, its encoder too, with the ladder active"
            )
        return self._runs[stack]

    def _start(self, stack: int, h: Tensor, text_length: int | None, mask: Tensor | None) -> None:
        """Begin the side state from the embedded input (B, S, D), which a backbone that drops out has done already.

        NOTE: as published h_0 and s are of two draws; here one serves both.
        """
        side = self.stacks[stack]
        if stack == 0:
            self._runs.clear()
        drops = self.training and not self._blocks[stack][0].training
        state = projected(side.first_down, F.dropout(h, side.family.dropout, drops))
        self._runs[stack] = _StackRun(state, text_length, mask)

    def _climb(self, role: _Role, args: tuple[Any, ...], kwargs: Mapping[str, Any], h: Tensor) -> None:
        """Mix the state after a backbone block into the side state, and run the side block."""
        side, key = self.stacks[role.stack], str(role.number)
        if h.requires_grad:
            raise ValueError(
                f"the state after {self.block_names[role.stack][role.number]!r} needs gradients, but a ladder reads a "
                "frozen backbone: place no other trained adapters inside its blocks"
            )
        if key not in side.blocks:
            return
        run = self._run(role.stack)
        if self.add_residual_after:
            run.state = self._mix(side, role.number, self._side_block(role, run, args, kwargs), h)
        else:
            run.state = self._mix(side, role.number, run.state, h)
            run.state = self._side_block(role, run, args, kwargs)

    def _mix(self, side: SideStack, number: int, state: Tensor, h: Tensor) -> Tensor:
        if self.gate == "one":
            return state
        mu = self.mu if side.gates is None else torch.sigmoid(side.gates[number] / self.temperature)
        return mixed(state, projected(side.downs[str(number)], h), mu)

    def _side_block(self, role: _Role, run: _StackRun, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        side = self.stacks[role.stack]
        block, text_length, mask = side.blocks[str(role.number)], run.text_length, run.mask
        memory = _for_rows(self._run(role.stack - 1), len(run.state)) if role.stack else (None, None)

        def side_block(state: Tensor, shared: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
            call = SideCall(args, kwargs, text_length, mask, *memory, shared=dict(shared))
            return side.family.run(block, state, call), call.shared

        if recomputes(self._blocks[role.stack][role.number]):
            hidden = first_tensor(args, kwargs)  # which a side block does not read, and would be kept
            args = tuple(None if value is hidden else value for value in args)
            kwargs = {name: None if value is hidden else value for name, value in kwargs.items()}
            state, run.shared = recomputed(side_block, run.state, run.shared)
        else:
            state, run.shared = side_block(run.state, run.shared)
        return state

    def _finish(self, stack: int) -> None:
        run, side = self._run(stack), self.stacks[stack]
        run.final = F.dropout(side.norm(run.state), side.family.dropout, self.training)
        run.shared.clear()

    def _read_out(self, y: Tensor) -> Tensor:
        """U of the last stack's final side state, (B, S, D)."""
        last = len(self.stacks) - 1
        out = projected(self.up, self._run(last).final).to(y.dtype)
        del self._runs[last]
        if self.merge_gate is None:
            return out
        return torch.lerp(y, out, torch.sigmoid(self.merge_gate / self.temperature).to(out.dtype))


def _roles(sites: Sequence[SpanSite]) -> tuple[list[_Role], list[list[SpanSite]]]:
    """What each site is, and the blocks by stack, in order."""
    stacks: dict[str, list[SpanSite]] = {}
    roles: list[_Role] = []
    slots = {"embedded": 0, "read_out": 0}
    for site in sites:
        if site.point in slots:
            roles.append(_Role(site.point, slots[site.point]))
            slots[site.point] += 1
            continue
        blocks = stacks.setdefault(site.name.rpartition(".")[0], [])
        roles.append(_Role("block", list(stacks).index(site.name.rpartition(".")[0]), len(blocks)))
        blocks.append(site)
    if not stacks:
        raise ValueError("a ladder needs the blocks of the backbone among its points, such as encoder_block")
    if slots["embedded"] not in (0, len(stacks)) or slots["read_out"] > 1:
        raise ValueError(
            f"a ladder has one embedded slot per stack and one read_out slot; its points give {slots} for the stacks "
            f"{list(stacks)}"
        )
    return roles, list(stacks.values())


def _check_kept(kept: Sequence[Sequence[int]], names: Sequence[Sequence[str]]) -> None:
    if len(kept) != len(names):
        raise ValueError(f"kept lists the blocks of {len(kept)} stacks, but there are {[n[0] for n in names]}")
    for numbers, stack in zip(kept, names):
        if not numbers or list(numbers) != sorted(set(numbers)) or not 0 <= numbers[0] <= numbers[-1] < len(stack):
            raise ValueError(
                f"kept={list(numbers)} for the stack of {stack[0]!r} must be rising numbers from 0 to {len(stack) - 1}"
            )


def _side_blocks_of_slots(sites: Sequence[SpanSite]) -> Callable[[nn.Module], SideBlocks]:
    for site in sites:
        if hasattr(site.module, "side_blocks"):
            return site.module.side_blocks
    raise ValueError(
        "no site says how blocks are made small; set side_blocks: fulgurite.backbones.side_blocks.side_blocks_of"
    )


def _for_rows(encoder: _StackRun, rows: int) -> tuple[Tensor, Tensor | None]:
    """The encoder's final side states and their mask for a decoder with ``rows`` rows, repeated where it has beams."""
    times, rest = divmod(rows, len(encoder.final))
    if rest:
        raise ValueError(
            f"a decoder with {rows} rows follows an encoder pass of {len(encoder.final)} samples; run both on one batch"
        )
    if times > 1:
        encoder.final = encoder.final.repeat_interleave(times, 0)
        encoder.mask = None if encoder.mask is None else encoder.mask.repeat_interleave(times, 0)
    return encoder.final, encoder.mask
