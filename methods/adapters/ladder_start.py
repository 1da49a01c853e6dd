"""Starting values of a ladder's side blocks: backbone blocks of which a selection of units is kept.

As published, one pass goes from the token table through all blocks of all stacks in turn; those without a side block
take part in it. The maps D_i and U are not taken from the backbone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fulgurite.methods.adapters.ladder_selection import (
    Residual,
    Rule,
    Together,
    UnitOrder,
    Units,
    column_units,
    prune,
    stream_units,
)
from fulgurite.methods.adapters.ladder_stack import SideStack
from fulgurite.methods.structure import ModelSpec, Tower

if TYPE_CHECKING:
    from fulgurite.methods.adapters.ladder import LadderSide

StateDict = Mapping[str, Tensor]


@dataclass
class StackSource:
    """What one stack's side blocks start from.

    Args:
        blocks: the tensors of each backbone block.
        importance: of the same names and shapes; None takes the weights themselves.
        table: importance of the token table (V, D); None scores the stack's input by what its first block reads.
        norm: tensors of the norm after the last block.
    """

    blocks: Sequence[StateDict]
    importance: Sequence[StateDict] | None = None
    table: Tensor | None = None
    norm: StateDict = field(default_factory=dict)


@torch.no_grad()
def load_pruned(
    stacks: Sequence[SideStack],
    sources: Sequence[StackSource],
    order: UnitOrder = "ascending",
    rule: Rule = "units",
    residual: Residual = "per_layer",
) -> None:
    """Fill the side blocks of all stacks, in place. Tensors that are no selection start as the backbone's if they fit.

    Raises:
        ValueError: an importance is missing, not finite, or of another shape.
    """
    units: Units | None = None
    for stack, source in zip(stacks, sources, strict=True):
        importance = source.blocks if source.importance is None else source.importance
        for weights, of_block in zip(source.blocks, importance, strict=True):
            _check(weights, of_block, stack)
        units = _first_units(units, stack, source, importance, order, residual)
        sides = stack.blocks
        some = next(iter(sides.values())).state_dict()
        sizes = {name.removesuffix(".weight"): len(tensor) for name, tensor in some.items() if name.endswith(".weight")}
        shared = source.blocks[0]  # what the first block of a stack owns for all of them
        for number, (weights, of_block) in enumerate(zip(source.blocks, importance)):
            pruned, units = prune(weights, of_block, stack.family.parts, sizes, units, order, rule)
            if str(number) in sides:
                _fill(sides[str(number)], pruned, {**shared, **weights})
        _fill(stack.norm, {name: tensor[units.last] for name, tensor in source.norm.items()}, {})


def _first_units(
    before: Units | None,
    stack: SideStack,
    source: StackSource,
    importance: Sequence[StateDict],
    order: UnitOrder,
    residual: Residual,
) -> Units:
    """What the first block of a stack reads. As published, a later stack goes on with the units of the one before."""
    keep = stack.family.width // stack.reduction
    if residual == "consistent":
        votes = {f"{i}/{name}": tensor for i, block in enumerate(importance) for name, tensor in block.items()}
        parts = [
            Together(tuple(f"{i}/{name}" for name in part.layers), writes=True)
            for i in range(len(importance))
            for part in stack.family.parts
            if isinstance(part, Together) and part.writes
        ]
        chosen = stream_units(votes, parts, keep, order, source.table)
        return Units(chosen, memory=before and before.last, stream=chosen)
    if before is not None:
        return before
    if source.table is not None:
        return Units(column_units(source.table, keep, order))
    first = next(part for part in stack.family.parts if isinstance(part, Together))
    return Units(column_units(torch.cat([importance[0][f"{name}.weight"] for name in first.layers]), keep, order))


def _check(weights: StateDict, importance: StateDict, stack: SideStack) -> None:
    for part in stack.family.parts:
        for layer in part.layers if isinstance(part, Together) else ():
            name = f"{layer}.weight"
            if name not in importance or importance[name].shape != weights[name].shape:
                found = tuple(importance[name].shape) if name in importance else "missing"
                raise ValueError(f"the importance of {name!r} is {found}, expected {tuple(weights[name].shape)}")


def _fill(module: nn.Module, pruned: StateDict, like: StateDict) -> None:
    for name, own in module.state_dict().items():
        if name in pruned:
            own.copy_(pruned[name])
        elif name in like and like[name].shape == own.shape:
            own.copy_(like[name])


@torch.no_grad()
def copy_pruned(ladder: LadderSide, model: nn.Module, spec: ModelSpec, importance: StateDict | None = None) -> None:
    """Start the side blocks from the blocks of ``model``, pruned by an importance, in place.

    Args:
        ladder: its side blocks, and the norms after them, are filled.
        model: the backbone that it was made for.
        spec: of the backbone; its towers name the token table and the norms.
        importance: by parameter names of the backbone, such as summed squared gradients; None takes the weights.

    Raises:
        ValueError: an importance is missing, not finite, or of another shape.
    """
    sources = []
    for names, source in zip(ladder.block_names, ladder.sources()):
        tower = _tower_of(names[0], spec)
        source.norm = model.get_submodule(tower.final_norm).state_dict() if tower.final_norm else {}
        if importance is not None:
            source.importance = [
                {key: importance[f"{name}.{key}"] for key in block if f"{name}.{key}" in importance}
                for name, block in zip(names, source.blocks)
            ]
        if tower.embedding is not None:
            source.table = _table(model, f"{tower.embedding}.weight", importance)
        sources.append(source)
    load_pruned(ladder.stacks, sources, ladder.unit_order, ladder.rule, ladder.residual)


def _tower_of(block: str, spec: ModelSpec) -> Tower:
    for tower in spec.towers:
        if re.fullmatch(tower.blocks, block):
            return tower
    raise ValueError(f"no tower of the backbone has the block {block!r}; it has {[t.name for t in spec.towers]}")


def _table(model: nn.Module, name: str, importance: StateDict | None) -> Tensor | None:
    """The importance of the token table, under any of its names; None where that is not given."""
    table = model.get_parameter(name)
    if importance is None:
        return table
    aliases = [each for each, parameter in model.named_parameters(remove_duplicate=False) if parameter is table]
    return next((importance[alias] for alias in aliases if alias in importance), None)
