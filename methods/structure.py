"""One description of a model's structure, so that no method needs to know a family's names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Attention:
    """Attention layers of a tower whose heads are runs of equal length, one after the other.

    Args:
        value: pattern of the linear layers that give the values.
        output: pattern of those that read what the heads give, as many and in the same order.
        num_heads: of the queries.
        num_key_value_heads: of keys and values; each serves as many query heads.
        head_dim: length of a head's value.
    """

    value: str
    output: str
    num_heads: int
    num_key_value_heads: int
    head_dim: int


@dataclass(frozen=True)
class Tower:
    """A stack of equal blocks.

    Args:
        name: e.g. ``"text"``.
        blocks: full pattern of its blocks' module names; `ModelSpec.block_names` resolves it in order.
        num_blocks: how many blocks there are.
        width: size of the residual stream.
        embedding: name of the input embedding module.
        final_norm: name of the norm after the last block.
        memory: name of the tower before it whose output its cross-attention reads.
        writers: patterns of what is added to the residual stream: linear layers, and embeddings other than
            ``embedding``. A linear layer that projects another tower's output into this one is among them.
        attentions: its attention layers.
        feed_forward_outputs: pattern of the linear layers that read the hidden units.
    """

    name: str
    blocks: str
    num_blocks: int
    width: int
    embedding: str | None = None
    final_norm: str | None = None
    memory: str | None = None
    writers: tuple[str, ...] = ()
    attentions: tuple[Attention, ...] = ()
    feed_forward_outputs: str | None = None


@dataclass(frozen=True)
class ModelSpec:
    """Where things are in a model.

    Args:
        towers: in the order in which data flows through them.
        head: name of the output module.
        points: public name of a place -> (pattern over module names, how many modules it must match).
        shared_inputs: groups of patterns of linear layers that receive the same input.
        position_readers: patterns of linear layers that are called with tokens and then, each time, with a table of
            positions, which are none.
        norm_linear_pairs: (norm pattern, pattern of the linears that read it and nothing else). A norm inside a block
            is read in its own block, any other wherever the second pattern matches.
        tied: groups of parameter names that are one tensor.
    """

    towers: tuple[Tower, ...]
    head: str | None = None
    points: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    shared_inputs: tuple[tuple[str, ...], ...] = ()
    position_readers: tuple[str, ...] = ()
    norm_linear_pairs: tuple[tuple[str, str], ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()

    def block_names(self, root: nn.Module, tower: str) -> list[str]:
        """Names of the blocks of ``tower``, in order."""
        for each in self.towers:
            if each.name == tower:
                return sites(root, each.blocks, each.num_blocks)
        raise LookupError(f"no tower {tower!r}; this model has {[t.name for t in self.towers]}")

    def all_block_names(self, root: nn.Module) -> list[str]:
        """Names of the blocks of all towers, in the order in which data flows through them."""
        return [name for tower in self.towers for name in self.block_names(root, tower.name)]

    @property
    def inside_blocks(self) -> str:
        """Full pattern of the names of what lies inside the blocks of all towers."""
        return "|".join(rf"(?:{tower.blocks})\..*" for tower in self.towers)

    def reads_positions(self, layer: str) -> bool:
        """Whether a layer of that name is one of ``position_readers``."""
        return any(re.fullmatch(pattern, layer) for pattern in self.position_readers)

    def point_names(self, root: nn.Module, point: str) -> list[str]:
        """Names of the modules at the public place ``point``, in order."""
        if point not in self.points:
            raise LookupError(f"no place {point!r} in this model; it has {sorted(self.points)}")
        return sites(root, *self.points[point])


def sites(root: nn.Module, pattern: str, expected: int) -> list[str]:
    """Names of the modules that ``pattern`` matches in full, in module order.

    Raises:
        LookupError: the number of matches is not ``expected``; a short or empty match is never a no-op.
    """
    names = [name for name, _ in root.named_modules()]
    found = [name for name in names if re.fullmatch(pattern, name)]
    if len(found) != expected:
        raise no_match(pattern, names, f"{len(found)} modules, expected {expected}")
    return found


def any_sites(root: nn.Module, pattern: str) -> list[str]:
    """As `sites`, where only no match at all is an error."""
    names = [name for name, _ in root.named_modules()]
    found = [name for name in names if re.fullmatch(pattern, name)]
    if not found:
        raise no_match(pattern, names, "no module")
    return found


def no_match(pattern: str, names: list[str], found: str) -> LookupError:
    """What to raise where ``pattern`` matches ``found``, with the names closest to it."""
    plain = re.sub(r"\\(.)", r"\1", pattern)
    near = difflib.get_close_matches(plain, names, n=3, cutoff=0.3)
    return LookupError(f"pattern {pattern!r} matches {found}; near: {near}")
